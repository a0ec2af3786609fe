"""Which parameters decay: for the training loop, and for the classifier of a gate."""

from collections.abc import Iterable

import torch


def decay_groups(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[dict]:
    """Parameter groups of an optimizer: matrices decay by `weight_decay`, biases and the weights of norms do not.

    So it is in Trainer, which the published code uses.
    """
    kinds = {weight_decay: [], 0.0: []}
    for parameter in parameters:
        kinds[weight_decay if parameter.ndim > 1 else 0.0].append(parameter)
    return [{"params": kind, "weight_decay": decay} for decay, kind in kinds.items()]
