"""Imports bitsandbytes so that it neither asks the hub nor speaks. Import this before anything that imports PEFT.

When it is imported on a processor with AVX-512 bf16, bitsandbytes asks the hub for a kernel. Without the package
`kernels` it prints a notice instead. Nothing here may use the network unless a hub id was given.
"""

import logging
import sys

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
_absent = "kernels" not in sys.modules
if _absent:
    sys.modules["kernels"] = None  # so that importing it fails, as where it is not installed
try:
    import bitsandbytes  # noqa: F401
finally:
    if _absent:
        del sys.modules["kernels"]
