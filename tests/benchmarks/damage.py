"""Damages checkpoints, references, states and data in hundreds of ways and looks at what the scripts make of them.

python tests/benchmarks/damage.py --output_path=damage.json

Everything is tiny and random, built once; each case is a fresh copy with one damage, read by the real script in this
process under a time limit. Where a manifest vouches for the damaged file, a second case signs it again, so that the
file itself has to be looked at. Counts what was refused with one sentence and exit code 2, what was accepted with the
same answer bit by bit, and what went wrong: accepted with another answer, a traceback, a hang, something left behind.
"Other input" is a text or table that nothing vouches for: it was read as what it now says.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import scripts  # noqa: E402  (the environment decides how libraries load)
import tiny  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, safe_open, save_file  # noqa: E402

from utils import cli  # noqa: E402
from utils.data.load import SNIPPETS_FOLDER  # noqa: E402
from utils.interventions.gate_files import UNSEEN  # noqa: E402
from utils.storage import checkpoints  # noqa: E402

BASE, ADAPTER = "tiny-llama", "lora"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
MADE_FROM = {ADAPTER: BASE}
MADE_FROM |= dict.fromkeys(["full", "prompt", "gated", "prompting", "icul", "eco", "refusal"], ADAPTER)
TEXTS = [f"--text={text}" for text in ("a good film", "Spielberg never made a worse one", "dull")]
UNLEARN = f"--model_checkpoints={ADAPTER}", "--dataset=data", *scripts.ROWS, "--max_eval_samples=0"
TRAIN = "spul", *UNLEARN[:2], *scripts.SPUL, "--max_eval_samples=0", "--max_steps=2", "--output_path=out"
OUTCOMES = ("refused", "harmless", "wrongly accepted", "other input", "traceback", "hang", "leftover")


class TooLong(BaseException):
    """The time limit of a case; no script catches it."""


@dataclass(frozen=True)
class Case:
    """One damage to `file`, done by `change`(path), and the `command` that meets it. signed: whether the manifests are
    made to vouch for the result. recorded: whether anything recorded what the file was."""

    file: str
    damage: str
    change: Callable[[Path], None]
    command: tuple[str, ...]
    signed: bool = False
    recorded: bool = True


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the bytes that are flipped and the values put in")
    parser.add_argument("--seconds", type=cli.positive_int, default=60, help="time limit of a case")
    parser.add_argument("--only", default="", help="the cases whose name holds this text")
    parser.add_argument("--output_path", type=cli.path, help="file for every outcome, as JSON")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        build(whole)
        cases = [case for case in list_cases(whole, random.Random(args.seed)) if args.only in name_of(case)]
        plain = {}
        results = []
        for i, case in enumerate(cases):
            if case.command not in plain:
                plain[case.command] = answer(copied(whole, Path(place) / "plain"), case.command, args.seconds)
                assert plain[case.command][0] == "accepted", plain[case.command]
            outcome, said = judge(copied(whole, Path(place) / f"case-{i}"), case, plain[case.command], args.seconds)
            results.append({"case": name_of(case), "outcome": outcome, "said": said})
            if outcome not in OUTCOMES[:2]:
                print(f"{outcome:16} {name_of(case)}: {said}", flush=True)
    print(summary(results))
    if args.output_path:
        Path(args.output_path).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def name_of(case: Case) -> str:
    return f"{case.file}, {case.damage}{', signed' if case.signed else ''}"


def build(folder: Path) -> None:
    """One checkpoint of every kind, a reference, an interrupted run, a list of names and files of texts in `folder`."""
    folder.mkdir()
    tiny.save(folder / BASE)
    tiny.save_splits(folder / "data")
    shutil.copy(SNIPPETS_FOLDER / "forget_names.txt", folder / "names.txt")
    (folder / "texts.txt").write_text("a good film\ndull\n")
    (folder / "texts.csv").write_text("text\na good film\ndull\n")
    (folder / "texts.jsonl").write_text('{"text": "a good film"}\n{"text": "dull"}\n')
    tune = "--max_eval_samples=0", "--lr=2e-3", f"--output_path={ADAPTER}"
    scripts.done(scripts.qlora(folder, BASE, "data", *tune))
    scripts.done(scripts.call(folder, *TRAIN, "--output_path=prompt", "--logits_path=reference"))
    gate = "--gate=tfidf", "--eco_threshold=0.3", "--beta=0"
    scripts.done(scripts.call(folder, *TRAIN, *gate, "--output_path=gated"))
    baselines = {
        "full": ("gradient_ascent", "--max_steps=1", "--train_batch_size=8"),
        "prompting": ("prompting", "--instruction=Say unknown."),
        "icul": ("icul", "--max_length=400"),
        "eco": ("eco", "--eco_threshold=0.3", "--eco_strength=3", "--eco_dims=64", "--eco_names=names.txt"),
        "refusal": ("refusal", "--eco_threshold=0.3"),
    }
    for name, (method, *flags) in baselines.items():
        command = "baselines", *UNLEARN, f"--unlearn_method={method}", *flags, f"--output_path={name}"
        scripts.done(scripts.call(folder, *command))
    interrupt(folder)


def interrupt(folder: Path) -> None:
    """Leave the state of a run that was interrupted in its second step."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def stop(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return clip(*arguments, **options)

    with mock.patch.object(torch.nn.utils, "clip_grad_norm_", stop):
        assert scripts.call(folder, *TRAIN, "--logits_path=reference", "--save_steps=1").code == 130


def copied(whole: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder, symlinks=True)
    return folder


def answer(folder: Path, command: tuple[str, ...], seconds: int) -> tuple[str, str]:
    """("accepted", what came out), ("refused", the sentence), ("traceback" or "hang", what was the matter)."""

    def stop(*_):
        raise TooLong

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        result = scripts.call(folder, *command)
    except TooLong:
        return "hang", f"over {seconds} seconds"
    except Exception as error:
        return "traceback", repr(error)[:300]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    lines = [line for line in result.stderr.replace("\r", "\n").split("\n") if line.strip()]
    said = [line for line in lines if not scripts.is_aside(line)]
    if result.code == 2 and len(said) == 1 and ": error: " in said[0]:
        return "refused", said[0]
    if result.code != 0:
        return "traceback", f"exit {result.code}: {said}"
    written = folder / "out" / "adapter_model.safetensors"
    return "accepted", checkpoints.file_sha256(written) if written.exists() else result.stdout


def judge(folder: Path, case: Case, plain: tuple[str, str], seconds: int) -> tuple[str, str]:
    """(one of OUTCOMES, what was said) for `case` in a fresh copy; the copy is removed."""
    case.change(folder / case.file)
    if case.signed:
        sign(folder)
    before = scripts.tree(folder)
    outcome, said = answer(folder, case.command, seconds)
    if outcome == "accepted":
        outcome = "harmless" if said == plain[1] else "wrongly accepted" if case.recorded else "other input"
    elif scripts.tree(folder) != before:
        outcome, said = "leftover", f"{set(scripts.tree(folder)) - set(before)} after: {said}"
    shutil.rmtree(folder)
    return outcome, said if outcome != "harmless" else ""


def sign(folder: Path) -> None:
    """Let every manifest name files and parent as they are now."""
    for name, parent in MADE_FROM.items():
        file = folder / name / checkpoints.MANIFEST
        with contextlib.suppress(Exception):  # of a file that cannot be hashed there is nothing to sign
            manifest = json.loads(file.read_text(encoding="utf-8"))
            files = checkpoints.model_files(file.parent)
            manifest["files"] = {name: checkpoints.file_sha256(file.parent / name) for name in files}
            manifest["parent"]["sha256"] = checkpoints.weights_sha256(folder / parent)
            file.write_text(json.dumps(manifest), encoding="utf-8")


# What is damaged, and how.


def list_cases(whole: Path, rng: random.Random) -> Iterator[Case]:
    for name in MADE_FROM:
        ask = "inference_spul", f"--model_checkpoints={name}", *scripts.ROWS, "--max_length=400", "--json", *TEXTS
        for file in sorted(found for found in (whole / name).rglob("*") if found.is_file()):
            path = file.relative_to(whole).as_posix()
            if file.name == checkpoints.MANIFEST:
                yield from cases_of(path, {**any_file(rng), **any_json(), **fields(file, rng)}, ask)
            elif file.relative_to(whole / name).as_posix() in checkpoints.model_files(whole / name):
                yield from cases_of(path, any_file(rng), ask)
                inner = fields(file, rng) | any_json() if file.suffix == ".json" else tensors(rng)
                if file.name not in (*TOKENIZER, "encoder.safetensors", UNSEEN):  # what the command reads
                    yield from cases_of(path, inner, ask, signed=True)
    resume = *TRAIN, "--logits_path=reference", "--resume"
    yield from cases_of("out.training.safetensors", {**any_file(rng), **tensors(rng), **metadata()}, resume)
    started = *TRAIN, "--logits_path=reference", "--overwrite"
    yield from cases_of("reference", {**any_file(rng), **tensors(rng), **metadata()}, started)
    reuse = *TRAIN, "--logits_path=reference", "--overwrite", "--init_checkpoint=prompt"
    yield from cases_of("prompt/encoder.safetensors", tensors(rng), reuse, signed=True)
    behind = *TRAIN, "--gate=./refusal", "--beta=0", "--overwrite"
    yield from cases_of(f"refusal/gate/{UNSEEN}", tensors(rng), behind, signed=True)
    ask = "inference_spul", f"--model_checkpoints={ADAPTER}", *scripts.ROWS, "--json", *TEXTS
    yield from cases_of(f"{BASE}/model.safetensors", {**any_file(rng), **tensors(rng)}, ask)
    yield from cases_of(f"{BASE}/config.json", {**any_file(rng), **any_json()}, ask)
    yield from cases_of(f"{BASE}/tokenizer.json", any_file(rng), ask)
    yield from cases_of(f"{BASE}/model.safetensors", tensors(rng), ask, signed=True)
    yield from cases_of(f"{BASE}/config.json", any_json(), ask, signed=True)
    plan = "qlora", f"--model_name={BASE}", "--dataset=data", *scripts.QLORA, "--dry_run", "--forget_only=names.txt"
    for file in ("data/train_forget.csv", "names.txt"):
        yield from cases_of(file, {**any_file(rng), **any_text()}, plan, recorded=False)
    for file in ("texts.txt", "texts.csv", "texts.jsonl"):
        from_file = *ask[:-3], f"--input_file={file}"
        yield from cases_of(file, {**any_file(rng), **any_text()}, from_file, recorded=False)


def cases_of(file: str, changes: dict[str, Callable], command: tuple[str, ...], **options: bool) -> list[Case]:
    return [Case(file, damage, change, command, **options) for damage, change in changes.items()]


def any_file(rng: random.Random) -> dict[str, Callable]:
    def flipped(at: float, bit: int) -> Callable:
        def change(path: Path) -> None:
            content = bytearray(path.read_bytes())
            content[int(at * len(content))] ^= 1 << bit
            path.write_bytes(content)

        return change

    changes = {
        "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "empty": lambda path: path.write_bytes(b""),
        "gone": Path.unlink,
        "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
        "a folder": lambda path: (path.unlink(), path.mkdir()),
        "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
        "a link to nowhere": lambda path: (path.unlink(), path.symlink_to("nowhere")),
        "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
        "a link to a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
        "a link out of the folder": lambda path: path.rename(path.parents[1] / "away") and path.symlink_to("../away"),
    }
    places = [(rng.random(), rng.randrange(8)) for _ in range(3)]
    return changes | {f"bit {bit} at {at:.3f}": flipped(at, bit) for at, bit in places}


def any_text() -> dict[str, Callable]:
    """Other encodings of a text."""
    return {
        "UTF-16": lambda path: path.write_bytes(path.read_text(encoding="utf-8").encode("utf-16")),
        "Latin-1": lambda path: path.write_bytes(path.read_bytes() + b"\xe9\xff"),
        "a mark in front": lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()),
        "zero bytes": lambda path: path.write_bytes(path.read_bytes() + bytes(4)),
    }


def any_json() -> dict[str, Callable]:
    def first_key_twice(path: Path) -> None:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            key = next(iter(value))
            text = json.dumps(value)
            path.write_text(f"{text[:-1]}, {json.dumps(key)}: {json.dumps(value[key])}}}", encoding="utf-8")
        else:
            path.write_text("[[[", encoding="utf-8")

    def with_more(literal: str) -> Callable:
        def change(path: Path) -> None:
            text = path.read_text(encoding="utf-8").rstrip()
            key = "" if text[-1] == "]" else '"more": '
            path.write_text(f"{text[:-1]}, {key}{literal}{text[-1]}", encoding="utf-8")

        return change

    return any_text() | {
        "a key twice": first_key_twice,
        "nested deeply": lambda path: path.write_text("[" * 100_000, encoding="utf-8"),
        "a list": lambda path: path.write_text("[]", encoding="utf-8"),
        "null": lambda path: path.write_text("null", encoding="utf-8"),
        "more behind it": lambda path: path.write_bytes(path.read_bytes() + b"{}"),
        "NaN inside": with_more("NaN"),
        "a huge number inside": with_more("9" * 5000),
        "a number beyond floats inside": with_more("-1e999"),
    }


def fields(file: Path, rng: random.Random) -> dict[str, Callable]:
    """Every field of a JSON object, and those of the objects in it, gone or of another type."""
    value = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        return {}
    paths = [(key,) for key in value]
    paths += [(key, inner) for key in ("parent", "corruption", "files") if key in value for inner in value[key]]
    paths += [("arguments", key) for key in ("dataset", "exclude_forget", "unlearn_method") if "arguments" in value]
    changes = {}
    for path in paths:
        wrong = [None, True, -1, 0.5, "x", "", [], {}, ["x"], [[]], float("nan"), 10**400]
        kind = type(value.get(path[0])) if len(path) == 1 else type(value[path[0]].get(path[1]))
        for new in rng.sample([new for new in wrong if type(new) is not kind or new != new], 2):
            shown = "a number of 401 digits" if new == 10**400 else repr(new)
            changes[f"{'.'.join(path)} is {shown}"] = set_field(path, new)
        changes[f"{'.'.join(path)} is gone"] = set_field(path)
    return changes


def set_field(path: tuple[str, ...], *new: object) -> Callable:
    def change(file: Path) -> None:
        value = json.loads(file.read_text(encoding="utf-8"))
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        if new:
            inner[path[-1]] = new[0]
        else:
            inner.pop(path[-1], None)
        file.write_text(json.dumps(value), encoding="utf-8")

    return change


def tensors(rng: random.Random) -> dict[str, Callable]:
    """What can be wrong in a whole safetensors file."""

    def edited(change: Callable) -> Callable:
        def damage(path: Path) -> None:
            found = load_file(path)
            with safe_open(path, "pt") as file:
                recorded = file.metadata()
            name = sorted(found)[int(place * len(found))]
            found = {key: value.clone() for key, value in found.items()}
            result = change(found, name)
            save_file({key: value.contiguous() for key, value in (result or found).items()}, path, recorded)

        return damage

    place = rng.random()
    put = lambda f: lambda t, n: t | {n: f(t[n])}  # noqa: E731
    changes = {
        "half of the tensors": lambda t, n: {key: t[key] for key in sorted(t)[: len(t) // 2]} or {"x": t[n]},
        "a tensor gone": lambda t, n: {k: v for k, v in t.items() if k != n} or {"x": torch.zeros(1)},
        "a tensor more": lambda t, n: t | {"more": torch.zeros(2)},
        "a tensor renamed": lambda t, n: {k + "s" * (k == n): v for k, v in t.items()},
        "half precision": put(lambda v: v.half() if v.is_floating_point() else v.int()),
        "double precision": put(lambda v: v.float() if v.dtype == torch.float64 else v.double()),
        "complex": put(lambda v: v.to(torch.complex64)),
        "whole numbers": put(lambda v: v.to(torch.int16)),
        "flat": put(lambda v: v[None]),
        "no row": put(lambda v: v.reshape(-1)[:0]),
        "a row less": put(lambda v: v.reshape(-1)[:-1] if v.dim() < 2 else v[:-1]),
        "a row twice": put(lambda v: torch.cat([v.reshape(1) if not v.dim() else v] * 2)),
        "NaN": put(lambda v: torch.full_like(v, float("nan")) if v.is_floating_point() else v.float() * float("nan")),
        "infinite": put(
            lambda v: torch.full_like(v, float("inf")) if v.is_floating_point() else v.float() + float("inf")
        ),
    }
    return {damage: edited(change) for damage, change in changes.items()}


def metadata() -> dict[str, Callable]:
    """The text in the header of a safetensors file, gone or of another type."""

    def edited(change: Callable) -> Callable:
        def damage(path: Path) -> None:
            with safe_open(path, "pt") as file:
                recorded = file.metadata()
            save_file(load_file(path), path, change(recorded))

        return damage

    every = {
        "text gone": lambda text: None,
        "text of numbers": lambda text: dict.fromkeys(text, "3"),
        "text of NaN": lambda text: dict.fromkeys(text, "NaN"),
        "text nested deeply": lambda text: dict.fromkeys(text, "[" * 50_000),
        "text empty": lambda text: dict.fromkeys(text, ""),
        "text without its last part": lambda text: {key: text[key] for key in sorted(text)[:-1]},
        "another hash": lambda text: text | {"sha256": text["sha256"].replace("a", "b")},
    }
    return {damage: edited(change) for damage, change in every.items()}


def summary(results: list[dict]) -> str:
    """A table: outcomes by the file that was damaged."""
    counts = collections.defaultdict(collections.Counter)
    for result in results:
        file = result["case"].split(",")[0]
        for key in (file, "all"):
            counts[key][result["outcome"]] += 1
    order = [*(key for key in counts if key != "all"), "all"]
    width = max(map(len, order))
    lines = [" ".join([" " * width, *(f"{outcome:>16}" for outcome in OUTCOMES)])]
    lines += [" ".join([f"{key:{width}}", *(f"{counts[key][outcome]:16}" for outcome in OUTCOMES)]) for key in order]
    return "\n".join(lines)


if __name__ == "__main__":
    main(parse_args())
