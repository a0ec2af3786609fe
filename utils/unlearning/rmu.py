"""RMU (arXiv 2403.03218): which layers it trains and which it steers."""

import torch

from utils.errors import UserError
from utils.models.layers import decoder_layers


def restrict_to_rmu_layers(model, args):
    """Freeze all but the layers l - 2, l - 1 and l (RMU section 4), l = args.rmu_layer. UserError if LoRA has none."""
    layers = decoder_layers(model)
    last = rmu_layer(args, len(layers))
    trained = {p for layer in layers[max(0, last - 2) : last + 1] for p in layer.parameters() if p.requires_grad}
    if not trained:
        raise UserError(f"LoRA has nothing on layer {last} or the two before it; choose other --lora_target_modules")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)


def rmu_layers(model, args):
    """((layer l, the layer after it or None), l); nothing behind l has a share in the loss."""
    layers = decoder_layers(model)
    number = rmu_layer(args, len(layers))
    return (layers[number], layers[number + 1] if number + 1 < len(layers) else None), number


def rmu_layer(args, n_layers):
    """l: --rmu_layer, else the depth of the authors' layer 7 of 32. Raises UserError beyond the last layer."""
    layer = round(7 / 32 * n_layers) if args.rmu_layer is None else args.rmu_layer
    if layer >= n_layers:
        raise UserError(f"--rmu_layer={layer} is beyond the model's last layer; use at most {n_layers - 1}")
    return layer


def _generator(seed):
    return torch.Generator().manual_seed(seed)
