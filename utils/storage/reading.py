"""Opening files that anybody may have written: regular files alone, JSON by the letter, tensors as expected."""

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, first_line

if TYPE_CHECKING:  # torch takes seconds to import, and not every reader of a file needs it
    import torch


def regular_file(path: str | Path) -> Path:
    """`path`, where it leads to a regular file: a pipe or a device is read for ever.

    Raises UserError where it leads to anything else, OSError where it leads nowhere.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # a zero byte in the name
        raise UserError(f"{str(path)!r} is no name of a file; pass another") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is no regular file; pass or put one there")
    return Path(path)


def refuse_special(folder: Path) -> None:
    """Raise UserError where something in `folder` is neither file nor folder: a library might wait for it for ever."""
    for entry in sorted(folder.iterdir()):
        if entry.exists() and not entry.is_dir():
            regular_file(entry)


def inside(folder: Path, name: str, links: bool = False) -> Path:
    """`folder`/`name`, a regular file that lies in `folder`.

    links: a file that is a link may lead elsewhere; else only within the hub's cache, whose folders are made of links.
    Raises UserError otherwise.
    """
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise UserError(f"{folder} names the file {name!r}, which is not in it; restore the folder")
    try:
        file = regular_file(folder / name)
        roots = [folder.resolve(), *([folder.parents[1].resolve()] if folder.parent.name == "snapshots" else [])]
        if not links and not any(root in file.resolve().parents for root in roots):
            raise UserError(f"{file} is a link that leads out of its folder; put the file itself there")
    except OSError:
        raise UserError(f"{folder} has lost its file {name}; restore it or train the checkpoint again") from None
    return file


def read_json(path: str | Path, foreign: bool = False) -> Any:
    """The JSON value in file `path`. Raises UserError as `parse_json`, and unless it is a regular file in UTF-8."""
    try:
        text = regular_file(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); restore it") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no valid JSON or is damaged (it is not UTF-8 text); restore it") from None
    return parse_json(text, path, foreign)


def parse_json(text: str, path: str | Path, foreign: bool = False) -> Any:
    """The JSON value of a text from file `path`.

    Raises UserError where it is not JSON by the letter: a key twice, NaN, a number beyond a float, or something so deep
    or long that Python gives up. foreign: of another project, which may write Infinity and a key twice.
    """
    hooks = {} if foreign else {"object_pairs_hook": _each_key_once, "parse_float": _finite}
    try:
        return json.loads(text, parse_constant=_infinity if foreign else _no_constant, **hooks)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no valid JSON or is damaged ({first_line(error)}); restore it") from None


def _each_key_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not finite")
    return float(text)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _infinity(text: str) -> float:
    return _no_constant(text) if text == "NaN" else float(text)


@dataclass(frozen=True)
class Like:
    """What a tensor must be. shape: None is any size of at least 1. dtypes: the names of those it may have."""

    shape: tuple[int | None, ...]
    dtypes: tuple[str, ...] = ("float32",)


FLOATS = ("float32", "float16", "bfloat16")


def read_tensors(
    path: str | Path, expected: Mapping[str, Like], what: str, remedy: str = "restore it"
) -> "dict[str, torch.Tensor]":
    """The tensors of the safetensors file `path`, which holds those of `expected` {name: Like} and no other.

    Raises UserError, with `what` the file should hold and the `remedy` in the sentence, where names, shapes or dtypes
    differ or a number is not finite.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(regular_file(path), "pt") as file:
            problem = _other_names(set(file.keys()), set(expected))
            tensors = {} if problem else {name: file.get_tensor(name) for name in expected}
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: a type of number that torch lacks
        problem = first_line(error)
    for name in () if problem else tensors:
        problem = problem or _difference(name, tensors[name], expected[name])
    if problem:
        raise UserError(f"{path} holds no {what} or is damaged ({problem}); {remedy}")
    return tensors


def _other_names(found: set[str], expected: set[str]) -> str | None:
    missing, unknown = sorted(expected - found), sorted(found - expected)
    return f"{missing[0]} is missing" if missing else f"{unknown[0]} is none of them" if unknown else None


def _difference(name: str, tensor: "torch.Tensor", like: Like) -> str | None:
    """What makes `tensor` another than it must be, or None."""
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    fits = [n > 0 if wanted is None else n == wanted for n, wanted in zip(shape, like.shape)]
    if len(shape) != len(like.shape) or not all(fits):
        return f"{name} has the shape {list(shape)}, not {['any' if n is None else n for n in like.shape]}"
    if dtype not in like.dtypes:
        return f"{name} is of {dtype}, not {' or '.join(like.dtypes)}"
    return None if is_finite(tensor) else f"{name} holds numbers that are not finite"


def is_finite(tensor: "torch.Tensor") -> bool:
    """Whether every number of `tensor` is finite; without a copy of it, since it may be most of the memory."""
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(torch.isfinite(bound)) for bound in tensor.aminmax())


def tensors_sha256(tensors: "Mapping[str, torch.Tensor]") -> str:
    """SHA-256 over names, types, shapes and numbers of tensors on the CPU, which a safetensors file can record."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
