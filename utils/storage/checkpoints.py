"""Checkpoint folders that describe themselves, written whole or not at all; no pickle."""

import hashlib
import os
import subprocess
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from utils.errors import UserError, note_once
from utils.storage import schemas
from utils.storage.files import recover, write_json
from utils.storage.formats import Index, Manifest
from utils.storage.reading import inside, refuse_special, regular_file

MANIFEST = "manifest.json"
KINDS = ("lora", "full", "prompt", "in-context", "eco", "gate", "refusal")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "scikit-learn", "numpy")
VERSION = 2  # of the manifest: since 2 its hashes cover all that loading reads
CONFIGURATIONS = ("config.json", "adapter_config.json", "template.json", "eco.json", "vocabulary.json")
READ_BY_LOADING = (  # beside weights
    *CONFIGURATIONS, "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.py", "refusal.json",
)  # fmt: skip
GATE = "gate"  # the folder of the gate that a checkpoint is served behind
OF_A_GATE = (GATE, f"{GATE}/classifier", "classifier", "token_classifier")  # folders; the third of earlier versions


class Task(Protocol):
    """What a manifest records of a task (utils.tasks.base.Task)."""

    kind: str
    words: Sequence[str]


@dataclass(frozen=True)
class Link:
    """One model of a chain base -> adapter -> prompt: where it lies, and its manifest (None for a plain model)."""

    path: Path
    name: str
    manifest: dict | None = None

    @property
    def kind(self) -> str:
        return self.manifest["kind"] if self.manifest else "model"

    @cached_property
    def sha256(self) -> str:
        """Hash of the model as it lay there when first asked for: `resolve_chain` asks before anything is loaded."""
        return weights_sha256(self.path)

    @cached_property
    def earlier_sha256(self) -> str:
        """The hash that manifests of version 1 record of a parent."""
        return _earlier_sha256(self.path)


def write_manifest(
    folder: Path,
    final_path: str | os.PathLike,
    kind: str,
    chain: Sequence[Link],
    args: Namespace,
    data_fingerprint: str,
    task: Task,
    metrics: list[dict] | None,
    training: dict[str, Any] | None = None,
) -> None:
    """Describe the checkpoint in `folder`, which will lie at `final_path`: manifest.json, and metrics.json if it was
    evaluated.

    chain: the Links of what it was trained on; its parent is the last. A local parent is recorded relative to the
    checkpoint, so that a tree of checkpoints can be moved as a whole. All `args` of the command are recorded. task:
    recorded with its label words, so that a checkpoint can answer without its data. metrics: records as
    utils.evaluation.record.make_record gives them, or None. training: `cost` of utils.training.loop.Training, or None.
    """
    parent = chain[-1]
    local = parent.path.exists() and not is_hub_name(parent.name)
    path = os.path.relpath(parent.path.resolve(), Path(final_path).resolve()) if local else parent.name
    manifest = {
        "kind": kind,
        "version": VERSION,
        "parent": {"path": path, "sha256": parent.sha256},
        "base": base_name(chain),
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "data_fingerprint": data_fingerprint,
        "task": task.kind,
        "label_words": list(task.words),
        "seed": args.seed,
        "libraries": {name: _version(name) for name in LIBRARIES},
        "git_commit": _git_commit(),
        "files": {name: file_sha256(folder / name) for name in model_files(folder)},
        "training": training,
        "metrics": metrics,
    }
    if (folder / GATE).is_dir():
        manifest["gate"] = {"sha256": gate_sha256(folder)}
    if metrics:
        write_json(folder / "metrics.json", metrics)
    write_json(folder / MANIFEST, manifest)


def base_name(chain: Sequence[Link]) -> str:
    """The name of the pre-trained model under a chain of Links, as the first command that used it named it."""
    recorded = [link.manifest["base"] for link in chain if link.manifest and "base" in link.manifest]
    return recorded[0] if recorded else chain[0].name


def read_manifest(path: str | Path, verify: bool = True) -> dict[str, Any] | None:
    """The manifest of checkpoint folder `path`, or None for a folder that is a plain model.

    verify=False: the contents of its files are not looked at. Raises UserError for a folder that is neither, a manifest
    that is not ours, and weights that are gone or altered.
    """
    path = Path(path)
    file = path / MANIFEST
    if not file.exists():
        if (path / "config.json").exists():
            refuse_special(path)
            return None
        raise UserError(
            f"{path} holds neither {MANIFEST} nor config.json; pass what qlora.py or spul.py wrote, or a model"
        )
    manifest = schemas.read(file, Manifest)
    if (kind := manifest["kind"]) not in KINDS:
        raise UserError(f"{file} names the unknown kind {kind!r}; this version reads {', '.join(KINDS)}")
    refuse_special(path)
    for name, digest in manifest["files"].items():
        held = inside(path, name)
        if verify and file_sha256(held) != digest:
            raise UserError(f"{held} is not the file its manifest names (SHA-256 differs); restore it")
    unnamed = sorted(set(model_files(path)) - set(manifest["files"]))
    if manifest.get("version", 1) == 1:  # which named the weights, but not all else
        unnamed = [name for name in unnamed if name.endswith(".safetensors")]
    if unnamed:
        raise UserError(f"{path} holds {unnamed[0]}, which its manifest does not name; remove it")
    return manifest


def manifest_at(path: str | Path) -> dict[str, Any] | None:
    """The manifest in the folder `path`, or None if there is none that this project wrote; no other file is read."""
    try:
        return schemas.read(Path(path) / MANIFEST, Manifest)
    except UserError:
        return None


def first_manifest(names: Sequence[str | Path]) -> dict[str, Any]:
    """The manifest of the first of the checkpoints `names` that has one; {} where all are plain models."""
    for name in names:
        recover(name)
    path = next((name for name in names if (Path(name) / MANIFEST).exists()), None)
    return read_manifest(path) if path else {}


def parent_path(path: str | Path, manifest: dict[str, Any], override: str | None = None) -> str:
    """Where the parent of the checkpoint at `path` is to be found: a path or a hub name. `override` goes first."""
    recorded = manifest["parent"]["path"]
    if override or is_hub_name(recorded):
        return override or recorded
    # From where the checkpoint lies; it may be read through a link. Older ones count from where they were written.
    places = [os.path.normpath(place / recorded) for place in (Path(path).resolve(), Path(path).absolute())]
    return next(filter(os.path.exists, places), places[0])


def verify_parent(link: Link, child: Link) -> None:
    """Raise UserError unless `link` is, file for file, the parent that checkpoint `child` was trained on."""
    found = link.sha256
    if child.manifest.get("version", 1) == 1:
        found = link.earlier_sha256
        note_once(
            f"{child.path} is of an earlier version, which took no notice of its parent's tokenizer and of weights in "
            "subfolders; whether those have changed since is not known"
        )
    if found != child.manifest["parent"]["sha256"]:
        raise UserError(
            f"{link.path} is not the model that {child.path} was trained on (SHA-256 differs); "
            "point --parent_path at the right one"
        )


def is_hub_name(name: str | Path) -> bool:
    """Whether `name` has the form of a hub id (owner/name or name) rather than of a relative path to a parent."""
    return not str(name).startswith((".", "/")) and len(Path(name).parts) <= 2 and not os.path.exists(name)


def weights_sha256(path: str | Path) -> str:
    """SHA-256 over the names and contents of all that makes a model: one GGUF file, or `model_files` of a folder."""
    path = Path(path)
    names = [path.name] if path.is_file() else model_files(path)
    folder = path.parent if path.is_file() else path
    return _digest({name: folder / name for name in names})


def gate_sha256(folder: Path) -> str:
    """SHA-256 over the gate in the checkpoint `folder`: two checkpoints behind the same gate have the same."""
    inner = folder / GATE
    return _digest({path.relative_to(inner).as_posix(): path for path in sorted(inner.rglob("*")) if path.is_file()})


def model_files(folder: Path) -> list[str]:
    """The files in `folder` that loading reads, sorted: weights, wherever an index says they lie, configurations and
    tokenizer. Raises UserError where an index names a file outside of the folder, or one that is not there."""
    found = [*_weights(folder), *(path for name in READ_BY_LOADING for path in folder.glob(name))]
    found += [path for name in OF_A_GATE for path in folder.glob(f"{name}/*")]
    return sorted({path.relative_to(folder).as_posix() for path in found if not path.is_dir()})


def _weights(folder: Path) -> list[Path]:
    """safetensors, .bin only without them, as in loading; the index of shards; and the shards that it names."""
    kind = next((kind for kind in ("safetensors", "bin") if list(folder.glob(f"*.{kind}*"))), "safetensors")
    indices = sorted(folder.glob(f"*.{kind}.index.json"))
    shards = [name for index in indices for name in schemas.read_foreign(index, Index)["weight_map"].values()]
    return [*folder.glob(f"*.{kind}"), *indices, *(inside(folder, name, links=True) for name in set(shards))]


def _earlier_sha256(path: Path) -> str:
    """What `weights_sha256` was before it saw tokenizer, index and shards in subfolders."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    files += [path / name for name in CONFIGURATIONS if (path / name).exists()]
    return _digest({file.name: file for file in files})


def _digest(files: dict[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, file in files.items():
        digest.update(f"{name}:{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of one file's bytes, as hex; of a file that has not been touched since, once a process."""
    try:
        found = os.stat(regular_file(path))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); restore it") from None
    return _sha256(os.path.abspath(path), found.st_ino, found.st_size, found.st_mtime_ns)


@cache
def _sha256(path: str, *_: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit this code stands at, or None outside a git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
