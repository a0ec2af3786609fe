"""Checkpoint folders that describe themselves, written whole or not at all; no pickle."""

import hashlib
import json
import os
import shutil
import subprocess
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from utils.cli import UserError

MANIFEST = "manifest.json"
KINDS = ("lora", "full", "prompt", "in-context", "eco")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "scikit-learn", "numpy")
OURS = (MANIFEST, "metrics.json", "source.json")  # one of them is in every folder that the scripts write
READ = (  # arguments that may name a file or folder
    "model_name", "model_checkpoints", "init_checkpoint", "parent_path", "router", "dataset", "input", "forget_only",
    "forget_names", "eco_names", "eco_classifier", "eco_token_classifier", "eco_target",
)  # fmt: skip
CONFIGURATIONS = ("config.json", "adapter_config.json", "template.json", "eco.json", "vocabulary.json")


@dataclass(frozen=True)
class Link:
    """One model of a chain base -> adapter -> prompt: where it lies, and its manifest (None for a plain model)."""

    path: Path
    name: str
    manifest: dict | None = None

    @property
    def kind(self):
        return self.manifest["kind"] if self.manifest else "model"

    @cached_property
    def sha256(self):
        """Hash of the model as it lay there when first asked for: `resolve_chain` asks before anything is loaded."""
        return weights_sha256(self.path)


def check_output(path, overwrite, args=None, ours=OURS):
    """Raise UserError before any work if `path` cannot become an output folder; creates nothing.

    What --overwrite may replace is an empty folder or one that this project wrote, which holds one of the files `ours`;
    and nothing that the run reads: what the command's `args` (READ) name, and what that was trained on.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another --output_path or add --overwrite")
    for file in (path, path.with_name(f"{path.name}.old"), path.with_name(f"{path.name}.tmp")):
        if file.exists() and not file.is_dir():
            raise UserError(f"{file} is a file; choose another --output_path")
    if path.is_dir() and any(path.iterdir()) and not any((path / name).exists() for name in ours):
        raise UserError(f"{path} is no folder that this project wrote; --overwrite does not delete it")
    for other in _inputs(args):
        if path == Path(os.path.abspath(other)) or path in Path(os.path.abspath(other)).parents:
            raise UserError(f"--output_path={path} would replace {other}, which this run reads; choose another one")
    ancestor = path.parent
    while not ancestor.exists():
        ancestor = ancestor.parent
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {ancestor}; choose another --output_path")


def _inputs(args):
    """The files and folders that `args` name, and the parents that the manifests among them name."""
    values = [getattr(args, name, None) for name in READ]
    given = [path for value in values if value for path in (value if isinstance(value, list) else [value])]
    found = [path for path in given if isinstance(path, (str, Path))]  # --eco_target may be a number
    for path in found:  # which grows
        with suppress(OSError, ValueError, KeyError, TypeError):
            found.append(parent_path(path, json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))))
    return found


@contextmanager
def new_folder(path):
    """Yields a temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    An old folder at `path` is replaced; a kill between the two renames leaves it as `<path>.old`, which `recover`
    puts back.
    """
    path = Path(os.path.abspath(path))
    temporary, old = path.with_name(f"{path.name}.tmp"), path.with_name(f"{path.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def recover(path):
    """Undo a replacement that was killed halfway: `<path>.old` without `path` goes back."""
    path = Path(os.path.abspath(path))
    old = path.with_name(f"{path.name}.old")
    if (old / MANIFEST).exists() and not path.exists():
        with suppress(FileNotFoundError):  # another process was quicker
            old.rename(path)


def write_json(path, value):
    """Write `value` as indented JSON, whole or not at all; NaN is refused with ValueError, since JSON has none."""
    text, temporary = json.dumps(value, indent=2, allow_nan=False) + "\n", f"{path}.tmp"
    try:
        Path(temporary).write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_manifest(folder, final_path, kind, chain, args, data_fingerprint, words, metrics, training=None):
    """Describe the checkpoint in `folder`, which will lie at `final_path`.

    chain: the Links of what it was trained on; its parent is the last. A local parent is recorded relative to the
    checkpoint, so that a tree of checkpoints can be moved as a whole. words: the data's label words, so that a
    checkpoint can answer without its data. metrics: records of utils.metrics, or None. training:
    utils.training.Training.cost, or None.
    """
    parent = chain[-1]
    local = parent.path.exists() and not is_hub_name(parent.name)
    path = os.path.relpath(parent.path.resolve(), Path(final_path).resolve()) if local else parent.name
    configurations = [folder / name for name in CONFIGURATIONS if (folder / name).exists()]
    hashed = {*folder.glob("*.safetensors"), *configurations, *folder.glob("tokenizer*"), *folder.glob("*/*.*")}
    manifest = {
        "kind": kind,
        "parent": {"path": path, "sha256": parent.sha256},
        "base": base_name(chain),
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "data_fingerprint": data_fingerprint,
        "label_words": words,
        "seed": args.seed,
        "libraries": {name: _version(name) for name in LIBRARIES},
        "git_commit": _git_commit(),
        "files": {p.relative_to(folder).as_posix(): file_sha256(p) for p in sorted(hashed)},
        "training": training,
        "metrics": metrics,
    }
    write_json(folder / MANIFEST, manifest)


def base_name(chain):
    """The name of the pre-trained model under a chain of Links, as the first command that used it named it."""
    recorded = [link.manifest["base"] for link in chain if link.manifest and "base" in link.manifest]
    return recorded[0] if recorded else chain[0].name


def read_manifest(path, verify=True):
    """The manifest of checkpoint folder `path`, or None for a folder that is a plain model.

    verify=False: the contents of its files are not looked at. Raises UserError for a folder that is neither, a manifest
    that is not ours, and weights that are gone or altered.
    """
    file = Path(path) / MANIFEST
    if not file.exists():
        if (Path(path) / "config.json").exists():
            return None
        raise UserError(
            f"{path} holds neither {MANIFEST} nor config.json; pass what qlora.py or spul.py wrote, or a model"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        kind, files = manifest["kind"], dict(manifest["files"])
        Path(manifest["parent"]["path"]), manifest["parent"]["sha256"]
        dict(manifest["arguments"]), manifest["data_fingerprint"], manifest["seed"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not a manifest of this project or is damaged; train the checkpoint again")
    if kind not in KINDS:
        raise UserError(f"{file} names the unknown kind {kind!r}; this version reads {', '.join(KINDS)}")
    for name, digest in files.items():
        if not (Path(path) / name).exists():
            raise UserError(f"{path} has lost its file {name}; restore it or train the checkpoint again")
        if verify and file_sha256(Path(path) / name) != digest:
            raise UserError(f"{Path(path) / name} is not the file its manifest names (SHA-256 differs); restore it")
    return manifest


def first_manifest(names):
    """The manifest of the first of the checkpoints `names` that has one; {} where all are plain models."""
    for name in names:
        recover(name)
    path = next((name for name in names if (Path(name) / MANIFEST).exists()), None)
    return read_manifest(path) if path else {}


def parent_path(path, manifest, override=None):
    """Where the parent of the checkpoint at `path` is to be found: a path or a hub name. `override` goes first."""
    recorded = manifest["parent"]["path"]
    if override or is_hub_name(recorded):
        return override or recorded
    # From where the checkpoint lies; it may be read through a link. Older ones count from where they were written.
    places = [os.path.normpath(place / recorded) for place in (Path(path).resolve(), Path(path).absolute())]
    return next(filter(os.path.exists, places), places[0])


def verify_parent(link, child):
    """Raise UserError unless `link` is, weight for weight, the parent that checkpoint `child` was trained on."""
    if link.sha256 != child.manifest["parent"]["sha256"]:
        raise UserError(
            f"{link.path} is not the model that {child.path} was trained on (SHA-256 differs); "
            "point --parent_path at the right one"
        )


def is_hub_name(name):
    """Whether `name` has the form of a hub id (owner/name or name) rather than of a relative path to a parent."""
    return not str(name).startswith((".", "/")) and len(Path(name).parts) <= 2 and not os.path.exists(name)


def weights_sha256(path):
    """SHA-256 over the names and contents of the files that make a model: one GGUF file, or a folder's weights (.bin
    only where there is no safetensors, as in loading) and the configuration without which they mean something else."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    files += [path / name for name in CONFIGURATIONS if (path / name).exists()]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def file_sha256(path):
    """SHA-256 of one file's bytes, as hex; of a file that has not been touched since, once a process."""
    found = os.stat(path)
    return _sha256(os.path.abspath(path), found.st_ino, found.st_size, found.st_mtime_ns)


@cache
def _sha256(path, *_):
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _version(library):
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _git_commit():
    """The commit this code stands at, or None outside a git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
