"""Models larger than one device: the weights of every layer lie in shards, one a process (`--shard`, torch's FSDP2).

A layer gathers its weights before it computes and lets go of the others' afterwards; in the backward pass it does so
again, and gradients are added and cut into shards. What lies outside of the layers (embedding, last norm, head) and
what is put into them later (adapters) is whole in every process: it is small, and used apart from its module.

So every pass needs all processes. Training sees to it that they make as many (utils.training.loop). Without gradients
they may differ: evaluation gives one process a batch and another none, and answers have different lengths. There a
process announces each pass, and those that wait for the others take part in it (utils.distributed.announce).
"""

import weakref
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from utils import distributed

POLICY = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # weights as they are, gradients added in float32


def shard(model: torch.nn.Module, layers: Iterable[torch.nn.Module], device: str) -> torch.nn.Module:
    """`model`, which holds `layers`, on `device`: each layer as this process's shard, all else whole.

    A layer is moved and cut before the next, so that the device never holds more than one whole layer.
    """
    mesh, layers = init_device_mesh(torch.device(device).type, (distributed.world_size(),)), list(layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=POLICY)
        layer.set_gradient_divide_factor(1.0)  # sums over rows stay sums
        layer.set_force_sum_reduction_for_comms(True)
    model.to(device)
    whole = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(model, mesh=mesh, mp_policy=POLICY, ignored_params=whole)  # layers then gather one ahead
    _make_room(layers)
    _keep_in_step(model)
    return model


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether weights of `module` lie in shards."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def _make_room(layers: Iterable[torch.nn.Module]) -> None:
    """Gather every layer once, outside of inference mode: what it is gathered into must be fit for training."""
    with torch.inference_mode(False), torch.no_grad():
        for layer in layers:
            layer.unshard()
            layer.reshard()


def _keep_in_step(model: torch.nn.Module) -> None:
    """Let passes of `model` without gradients be announced, so that waiting processes take part in them."""
    found, helping = weakref.ref(model), []

    def help_others() -> None:
        own = found()
        helping.append(True)
        with torch.no_grad():
            own(input_ids=torch.zeros(1, 1, dtype=torch.long, device=own.device), use_cache=False)
        helping.pop()

    number = distributed.add_helper(help_others)

    def before(*_: object) -> None:
        if not helping and not torch.is_grad_enabled() and distributed.announce(number) != number:
            raise RuntimeError("two processes compute with different models at the same time")

    def after(module: torch.nn.Module, *_: object) -> None:
        if not torch.is_grad_enabled():
            module.reset_iter_state()  # else the order of all layers called would grow until the next backward pass

    model.register_forward_pre_hook(before, prepend=True)
    model.register_forward_hook(after, always_call=True)


def gather_for_gradients(layer: torch.nn.Module, *outputs: torch.Tensor) -> None:
    """Let a sharded `layer` gather its weights when a gradient arrives at `outputs`, which it gives beside what it
    returns (keys and values). Does nothing where it is whole."""
    if isinstance(layer, FSDPModule):
        for output in outputs:
            if output.requires_grad:
                output.register_hook(lambda _: layer.unshard())


def to_dtype(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """`model.to(dtype)`, also where it is sharded: FSDP has no way to say so once a layer has been gathered."""
    model.to(dtype)
    layers = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for layer in layers:
        for group in layer._get_fsdp_state()._fsdp_param_groups:
            for parameter in group.fsdp_params:
                parameter.all_gather_outputs = []
                del parameter._unsharded_param
    _make_room(layers)
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, put together where it lies in shards; then all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: torch.nn.Module, trained: bool) -> dict[str, torch.Tensor] | None:
    """The state of `model` with whole tensors on the CPU of the main process, {} elsewhere; None if it has no shards.

    trained: frozen weights in shards are left out. All processes must call it.
    """
    if not is_sharded(model):
        return None
    frozen = {name for name, p in model.named_parameters() if isinstance(p, DTensor) and not p.requires_grad}
    found = {}
    for name, tensor in model.state_dict().items():
        if not trained or name not in frozen:
            tensor = whole(tensor)
            if distributed.is_main():
                found[name] = tensor.cpu()
    return found


def placed_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`tensor`, which every process holds, cut as `other` lies; as it is where that is whole."""
    if not isinstance(other, DTensor):
        return tensor
    cut = distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
    return cut.clone()  # the cut may be a view of the whole


def clip_grad_norm(parameters: Mapping[str, torch.nn.Parameter], max_norm: float) -> float:
    """Scale the gradients so that their norm over all shards is at most `max_norm`; returns that from before."""
    if not any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        return float(torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm))
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    shards = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    others = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    square = torch.nn.utils.get_total_norm(shards) ** 2
    dist.all_reduce(square)
    total = (square + torch.nn.utils.get_total_norm(others).to(square) ** 2).sqrt()
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ has it
    for gradient in [*shards, *others]:
        gradient.mul_(scale.to(gradient.device))
    return float(total)
