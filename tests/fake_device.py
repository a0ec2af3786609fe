"""An accelerator that has shapes and no numbers, on a machine without one, and a list of what would make the CPU wait.

`FakeTensorMode` computes shapes and devices only, and refuses an operation on tensors of two devices, as a GPU does.
A build of torch without CUDA indexes no tensor on `cuda`, not even a fake one; the device here is `lazy`, of which it
knows in every build. So what code does for CUDA by its name has to be told of this one.
"""

import contextlib
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.data import batch

DEVICE = "lazy"
ROOT = Path(__file__).resolve().parents[1]
# Operations of which the CPU must know a number, or the shape of the result.
KNOWN = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
COPIES = {"_to_copy", "copy_"}


@contextlib.contextmanager
def fake_device():
    """While open, tensors on DEVICE are fake. Yields a list that gets (what, where) of each wait of the CPU: `number`
    or `shape` of a tensor that is asked for, `copy` to the device from memory that is not pinned, `read` back from it.
    where: the nearest function of this project."""
    waits = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(batch, "PINNED", (*batch.PINNED, DEVICE)))
        for name in ("autocast", "is_autocast_enabled"):  # which know no such device: those of the CPU
            known = getattr(torch, name)
            stack.enter_context(mock.patch.object(torch, name, lambda _, *a, known=known, **k: known("cpu", *a, **k)))
        stack.enter_context(mock.patch.object(torch, DEVICE, SimpleNamespace(), create=True))  # for checkpoints
        fused = "_get_fused_kernels_supported_devices"
        stack.enter_context(mock.patch(f"torch.optim.optimizer.{fused}", lambda: ["cpu", DEVICE]))

        def tolist(tensor):  # at once, as a GPU gives them, not one by one
            waits.extend([("number", _place())] * (tensor.device.type == DEVICE))
            return np.ones(tensor.shape).tolist()

        def pin_memory(tensor):  # which takes an accelerator
            assert tensor.device.type == "cpu", "only what lies on the CPU can be pinned"
            pinned.append(tensor.clone())
            return pinned[-1]

        pinned = []
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", tolist))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", pin_memory))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Operations(waits, pinned))
        yield waits


def send(*parts):
    """Put what is on the meta device, in modules and in the attributes of other objects, on DEVICE; shared tensors stay
    shared. Called while a `fake_device` is open: it holds no number then."""
    made = {}

    def sent(old):
        if id(old) not in made:
            new = torch.empty(old.shape, dtype=old.dtype, device=DEVICE)
            is_parameter = isinstance(old, torch.nn.Parameter)
            made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if is_parameter else new
        return made[id(old)]

    def replace(tensors):
        for name, old in tensors.items():
            if isinstance(old, torch.Tensor) and old.is_meta:
                tensors[name] = sent(old)

    for part in parts:
        modules = [part, *vars(part).values()]
        for module in (m for own in modules if isinstance(own, torch.nn.Module) for m in own.modules()):
            replace(module._parameters)
            replace(module._buffers)
        replace(vars(part))


class _Operations(TorchDispatchMode):
    """Notes down the waits; gives numbers that fake tensors have not."""

    def __init__(self, waits, pinned):
        super().__init__()
        self.waits, self.pinned = waits, pinned

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        kinds = {tensor.device.type for tensor in tensors if tensor.device.type != "cpu" or tensor.dim()}
        name = _name(function)
        to = kwargs.get("device")
        here = DEVICE in kinds
        if name in COPIES and "cpu" in kinds and (here or to and torch.device(to).type == DEVICE):
            pinned = any(tensor is own for tensor in tensors for own in self.pinned)
            self._note("copy", not (pinned and kwargs.get("non_blocking")))
        elif name in COPIES and here and to and torch.device(to).type == "cpu":
            self._note("read")
        elif here and "cpu" in kinds:  # a CPU index is copied without a word
            self._note("copy")
        elif here and name in KNOWN:
            self._note("number" if name == "_local_scalar_dense" else "shape")
        if name == "_local_scalar_dense":
            return 1.0
        return function(*args, **kwargs)

    def _note(self, what, noted=True):
        self.waits.extend([(what, _place())] * noted)


class Asked(TorchDispatchMode):
    """While open, `places` gets the place of each operation on real tensors of which a CPU would have to know."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if _name(function) in KNOWN:
            self.places.append(_place())
        return function(*args, **(kwargs or {}))


def _name(function):
    """`_to_copy` of aten::_to_copy.default."""
    return function.name().split("::")[-1].split(".")[0]


def _place():
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if "transformers" in path.parts:
            return f"transformers.{path.stem}"
        if path.is_relative_to(ROOT) and path != Path(__file__) and "site-packages" not in path.parts:
            return f"{path.stem}.{frame.name}"
    return "torch"
