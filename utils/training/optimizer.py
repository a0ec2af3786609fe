"""Which parameters decay: for the training loop, and for the classifier of a gate."""

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor


def decay_groups(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[dict]:
    """Parameter groups of an optimizer: matrices decay by `weight_decay`, biases and the weights of norms do not.

    So it is in Trainer, which the published code uses.
    """
    kinds = {(weight_decay, False): [], (0.0, False): []}
    for parameter in parameters:  # the fused optimizer takes no tensors in shards beside whole ones
        kind = weight_decay if parameter.ndim > 1 else 0.0, isinstance(parameter, DTensor)
        kinds.setdefault(kind, []).append(parameter)
    return [{"params": kind, "weight_decay": decay} for (decay, _), kind in kinds.items()]
