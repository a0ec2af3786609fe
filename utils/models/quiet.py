"""Imports bitsandbytes quickly, and so that it neither asks the hub nor speaks. Import this before what imports PEFT.

When it is imported on a processor with AVX-512 bf16, bitsandbytes asks the hub for a kernel. Without the package
`kernels` it prints a notice instead. Nothing here may use the network unless a hub id was given. It also hands some of
its functions to torch.compile, which imports the compiler: nearly half of all that a script imports. Here that happens
when the first of them is called.
"""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

_compile = torch.compile


def _compile_when_called(function: Callable | None = None, **options: Any) -> Callable:
    if function is None:
        return functools.partial(_compile_when_called, **options)
    compiled = functools.cache(lambda: _compile(function, **options))
    return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))


logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
_absent = "kernels" not in sys.modules
if _absent:
    sys.modules["kernels"] = None  # so that importing it fails, as where it is not installed
torch.compile = _compile_when_called
try:
    import bitsandbytes  # noqa: E402, F401
finally:
    torch.compile = _compile
    if _absent:
        del sys.modules["kernels"]
