"""What the four scripts share: data, models, prompt encoders, losses, metrics, training, checkpoints, command line."""
