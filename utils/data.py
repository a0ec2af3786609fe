"""Splits, template, tokenising and batches (SPUL, arXiv 2406.12038, section 4.1; protocol in the README)."""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from utils.cli import UserError, first_line, note_once
from utils.names import Person, count_rows, mentions, note_absent, read_names
from utils.reading import refuse_special, regular_file
from utils.splits import (
    READERS,
    SPLITS,
    UNLEARNING_LABELS,
    is_text,
    mark_nested,
    note_overlap,
    read_table,
    split_rows,
    whole_number,
)

TRAIN_SPLITS = SPLITS[:2]
HUB_DATASETS = {"sst2": "karuna-bhaila/Unlearning_SST2", "yelp": "karuna-bhaila/Unlearning_Yelp_Polarity"}
SNIPPETS_FOLDER = Path(__file__).resolve().parents[1] / "data" / "snippets"
SUBSET_SEED = 42  # the published protocol draws forget subsets with default_rng(42), whatever the training seed
SELECTION = (  # arguments that decide which rows a command works on
    "forget_size", "max_train_samples", "forget_share", "forget_only", "rows_seed", "validation_share", "final",
)  # fmt: skip

TEMPLATE_HEAD = "### Text: "
TEMPLATE_TAIL = "\n\n### Question: What is the sentiment of the given text?\n\n### Sentiment:"


def load_splits(dataset):
    """The four splits of `dataset` as {split: DataFrame with columns text, label, label_text, ...}.

    `dataset` is `sst2`, `yelp` (hub ids above), `snippets` (embedded) or a folder: four CSV, JSONL or Parquet files,
    or what `datasets.DatasetDict.save_to_disk` wrote. Raises UserError on a missing split or column, an empty split,
    a cell that is empty or not text, and labels that contradict each other.
    """
    if dataset in HUB_DATASETS:
        frames = _from_hub(HUB_DATASETS[dataset])
    elif dataset == "snippets":
        frames = _from_files(SNIPPETS_FOLDER)
    elif os.path.isdir(dataset):
        folder = Path(dataset)
        frames = _from_disk(folder) if (folder / "dataset_dict.json").exists() else _from_files(folder)
    else:
        known = ", ".join([*HUB_DATASETS, "snippets"])
        raise UserError(f"dataset {dataset!r} is neither one of {known} nor an existing folder; check --dataset")
    frames = {split: _checked(split, frames[split], dataset) for split in SPLITS}
    _check_labels(frames)
    return frames


def read_texts(path):
    """The texts of a .txt (one a line), .csv, .jsonl or .parquet file (column `text`); UserError on bad input."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; pass an existing file to --input_file")
    regular_file(path)
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines ends them at a form feed, too
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text; save it as UTF-8, one text a line")
        texts = [line.strip() for line in lines if is_text(line)]
    elif path.suffix in READERS:
        frame = read_table(path)
        if "text" not in frame:
            raise UserError(f"{path} has no column 'text'; name the column of texts so")
        texts = list(frame["text"])
    else:
        raise UserError(f"{path} is neither .txt, .csv, .jsonl nor .parquet; convert it to one of them")
    if not texts or not all(map(is_text, texts)):
        raise UserError(f"{path} has no text or a row whose text is empty; fix the file")
    return texts


def dataset_name(dataset):
    """The short name that output folders carry: `sst2` for `sst2`, the last part of a folder's path."""
    return Path(dataset).resolve().name if os.path.isdir(dataset) else dataset


def _from_hub(hub_id):
    from datasets import load_dataset

    try:
        loaded = load_dataset(hub_id)
    except Exception as error:  # the hub client raises a dozen types: offline, not found, gated, broken
        raise UserError(f"cannot fetch dataset {hub_id} ({first_line(error)}); pass a local folder to --dataset")
    return _frames_of(loaded, hub_id)


def _from_disk(folder):
    from datasets import load_from_disk

    for inner in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        refuse_special(inner)
    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"{folder} is not a readable save_to_disk folder ({first_line(error)}); write it again")
    return _frames_of(loaded, folder)


def _frames_of(dataset_dict, source):
    missing = [split for split in SPLITS if split not in dataset_dict]
    if missing:
        raise UserError(f"{source} has no split {missing[0]!r}; the four splits are {', '.join(SPLITS)}")
    return {split: dataset_dict[split].to_pandas() for split in SPLITS}


def _from_files(folder):
    frames = {}
    for split in SPLITS:
        paths = [folder / f"{split}{suffix}" for suffix in READERS if (folder / f"{split}{suffix}").is_file()]
        if not paths:
            raise UserError(f"{folder} has no {split}.csv, .jsonl or .parquet; the four splits are {', '.join(SPLITS)}")
        if len(paths) > 1:
            raise UserError(f"{folder} has {paths[0].name} and {paths[1].name}; keep one of them")
        frames[split] = read_table(paths[0])
    return frames


def _checked(split, frame, source):
    for column in ("text", "label", "label_text"):
        if column not in frame.columns:
            raise UserError(f"{split} of {source} has no column {column!r}; it needs text, label, label_text")
    if not len(frame):
        raise UserError(f"{split} of {source} has no rows; every split needs at least one")
    for column in ("text", "label_text"):
        bad = [not is_text(cell) for cell in frame[column]]
        if any(bad):
            raise UserError(
                f"{split} of {source}, row {bad.index(True) + 1}: {column} is empty or not text; fix the row"
            )
    labels = [whole_number(cell) for cell in frame["label"]]
    if None in labels:
        row = labels.index(None) + 1
        raise UserError(f"{split} of {source}, row {row}: label is not a whole number of 64 bits; fix the row")
    for column in frame.columns.intersection(["names_other", "nested"]):
        marks = [whole_number(cell) for cell in frame[column]]
        if not set(marks) <= {0, 1}:
            raise UserError(f"{split} of {source} has a {column} that is neither 0 nor 1; fix or drop the column")
        frame = frame.assign(**{column: marks})
    words = [word.strip() for word in frame["label_text"]]
    return frame.assign(label=labels, label_text=words).reset_index(drop=True)


def _check_labels(frames):
    """Every label has one word, every word one label, and the test splits use no label that train lacks."""
    words = {}
    for split in SPLITS:
        for label, word in sorted(set(zip(frames[split]["label"], frames[split]["label_text"]))):
            if split not in TRAIN_SPLITS and (label, word) not in words.items():
                raise UserError(f"{split} has the unknown label {label} ({word!r}); the train splits have {words}")
            if words.setdefault(label, word) != word or list(words.values()).count(word) > 1:
                raise UserError(f"{split}: label {label} and the word {word!r} do not pair one to one in {words}")
    clash = set(words.values()) & set(UNLEARNING_LABELS)
    if clash:
        raise UserError(f"the label word {clash.pop()!r} is one that unlearning answers with; rename it in the data")


def label_words(frames):
    """The answers that count as in-label, ordered by label number."""
    pairs = pd.concat([frames[split][["label", "label_text"]] for split in TRAIN_SPLITS]).drop_duplicates()
    return list(pairs.sort_values("label")["label_text"])


def load_rows(arguments: dict) -> dict[str, pd.DataFrame]:
    """The four splits that a command works on. arguments: those of the command, or those that a manifest recorded.

    Says on stderr where one of the splits has texts of another.
    """
    chosen = {name: arguments[name] for name in SELECTION if arguments.get(name) is not None}
    if chosen.get("validation_share") and not chosen.get("final"):
        note_once("what is called test are the train rows that --validation_share put aside; --final shows test rows")
    frames = select_rows(load_splits(arguments["dataset"]), **chosen)
    note_overlap(frames)
    return frames


def select_rows(
    frames: dict[str, pd.DataFrame],
    forget_size: float = 1.0,
    max_train_samples: int | None = None,
    forget_share: float | None = None,
    forget_only: str | None = None,
    rows_seed: int = SUBSET_SEED,
    validation_share: float | None = None,
    final: bool = False,
) -> dict[str, pd.DataFrame]:
    """The training protocol's row selection; returns new frames, order kept.

    `forget_only` names a file with a list of people (utils.names): forget rows, train and test, that name none of them
    are left out. `max_train_samples` keeps so many train rows in all, of them `forget_share` forget rows (default: the
    share the data has), drawn by `rows_seed`. `validation_share` puts that share of each train split aside; these rows
    stand in for the test splits, so that settings are chosen without them, unless `final`. `forget_size` < 1 then keeps
    int(size * n) rows of train_forget, drawn with NumPy default_rng(42) (the published protocol). Nothing depends on
    the training seed, and what a `forget_size` keeps is part of what is kept without one, so spul.py sees rows that
    qlora.py has seen. A column `nested` of the test splits is about the train rows that are kept, `forget_size` aside,
    since the model that unlearns has seen them. Says on stderr how many rows to forget name whom. Raises UserError when
    a split would be left without a row, or has not as many as were asked for.
    """
    whole, frames = frames, dict(frames)
    if final and not validation_share:
        raise UserError("--final goes with --validation_share, without which test rows are evaluated anyway")
    if forget_only:
        frames |= _that_name(read_names(forget_only), frames, forget_only)
    sizes = {split: len(frames[split]) for split in TRAIN_SPLITS}
    if forget_share and not max_train_samples:
        raise UserError("--forget_share is a share of --max_train_samples; give both")
    if max_train_samples and (forget_share or max_train_samples < sum(sizes.values())):
        forget = max(1, round(max_train_samples * (forget_share or sizes["train_forget"] / sum(sizes.values()))))
        wanted = {"train_retain": max_train_samples - forget, "train_forget": forget}
        if wanted["train_retain"] < 1:
            raise UserError(f"--max_train_samples={max_train_samples} leaves no retain row; use more rows")
        for split in TRAIN_SPLITS:
            if wanted[split] > sizes[split]:
                named = f" that name people of {forget_only}" if forget_only and split == "train_forget" else ""
                raise UserError(
                    f"{split} has {sizes[split]} rows{named}, --max_train_samples={max_train_samples} and "
                    f"--forget_share ask for {wanted[split]}; change one of them"
                )
            frames[split] = sample_rows(frames[split], wanted[split], rows_seed)
    if validation_share:
        frames |= _without_validation(frames, validation_share, rows_seed, final)
    if "nested" in whole["test_retain"] and any(len(frames[split]) < len(whole[split]) for split in TRAIN_SPLITS):
        frames = mark_nested(frames)
    if forget_size < 1:
        kept = int(forget_size * len(frames["train_forget"]))
        if not kept:
            raise UserError(f"--forget_size={forget_size} leaves no forget row; choose a larger share")
        frames["train_forget"] = sample_rows(frames["train_forget"], kept)
    return frames


def _that_name(people: list[Person], frames: dict[str, pd.DataFrame], path: str) -> dict[str, pd.DataFrame]:
    """The forget splits without the rows that name nobody of `people`, who are of the list at `path`."""
    kept, counts = {}, {}
    for split in ("train_forget", "test_forget"):
        found = [mentions(text, people) for text in frames[split]["text"]]
        kept[split] = frames[split][[bool(names) for names in found]].reset_index(drop=True)
        if not len(kept[split]):
            raise UserError(f"no row of {split} names anybody of {path}; name others")
        counts[split] = count_rows(found, people)
    listed = [f"{person.name} {' + '.join(str(counts[split][person.name]) for split in counts)}" for person in people]
    note_once(f"rows of {' + '.join(counts)} that name them: {', '.join(listed)}")
    note_absent({name: sum(counts[split][name] for split in counts) for name in counts["train_forget"]}, path)
    return kept


def _without_validation(
    frames: dict[str, pd.DataFrame], share: float, seed: int, final: bool
) -> dict[str, pd.DataFrame]:
    """The train splits without a share of their rows, by label, and unless `final` these rows as the test splits."""
    changed = {}
    for kind in ("retain", "forget"):
        parts = split_rows(frames[f"train_{kind}"].assign(forget=kind == "forget"), share, seed)
        changed |= {split: parts[split] for split in (f"train_{kind}", f"test_{kind}")}
    for split, frame in changed.items():
        if not len(frame):
            raise UserError(f"--validation_share={share} leaves no row for {split}; use another share or more rows")
    return {split: frame for split, frame in changed.items() if split in TRAIN_SPLITS or not final}


def sample_rows(frame: pd.DataFrame, n: int | None, seed: int = SUBSET_SEED) -> pd.DataFrame:
    """`n` rows of `frame` drawn by default_rng(seed) without replacement, in file order; all if n is larger or None."""
    if n is None or n >= len(frame):
        return frame
    rows = np.random.default_rng(seed).choice(len(frame), n, replace=False)
    return frame.iloc[np.sort(rows)].reset_index(drop=True)


def learnt_by(manifest: dict, frames: dict[str, pd.DataFrame]) -> bool:
    """Whether the checkpoint of `manifest` was trained on the train rows of `frames`, on all of them and no others."""
    splits = TRAIN_SPLITS[:1] if manifest["arguments"].get("exclude_forget") else TRAIN_SPLITS
    return manifest["data_fingerprint"] == fingerprint({split: frames[split] for split in splits})


def fingerprint(frames):
    """SHA-256 over text and label of the given splits' rows, in order: the same for the same data in any format."""
    digest = hashlib.sha256()
    for split, frame in sorted(frames.items()):
        rows = list(zip(frame["text"], frame["label"].tolist(), frame["label_text"]))
        digest.update(json.dumps([split, rows]).encode())
    return digest.hexdigest()


def draw_unlearning_labels(n, seed):
    """y~ of L_f: n words drawn once, uniformly from {neutral, unknown}, by `seed`."""
    return [UNLEARNING_LABELS[i] for i in np.random.default_rng(seed).integers(len(UNLEARNING_LABELS), size=n)]


@dataclass(frozen=True)
class Example:
    """One row as token ids: `prompt` (template with the text) and `completion` (the answer's tokens). `marked`: the
    prompt positions that a corruption changes, if one is applied."""

    prompt: tuple
    completion: tuple
    forget: bool = False
    marked: tuple = ()

    def __len__(self):
        return len(self.prompt) + len(self.completion) - 1  # the last completion token is predicted, never read


def tokenize(tokenizer, texts, words, max_length, forget=False, template=None, marks=None, answers=None):
    """One Example a row. Text is cut so that prompt + completion fit `max_length`; template and completion never are.

    template: None for the published one, else an object whose `around(texts)` gives what stands before and behind each
    text. marks: None, or one item a text: the (start, end) character spans whose tokens become `marked`; where it is
    None, or none of them is left after cutting, all prompt tokens but the last do. answers: the data's
    utils.answers.KnownAnswers, which say whether a word's tokens are all of its answer; None where no word begins
    another. Raises UserError when template and completion alone do not fit.
    """
    texts = list(texts)
    if not texts:
        return []
    frames = template.around(texts) if template else [(TEMPLATE_HEAD, TEMPLATE_TAIL)] * len(texts)
    completions = answers.ids if answers else {word: completion_ids(tokenizer, word) for word in set(words)}
    longest = max(len(completions[word]) for word in words)
    room = max_length - longest
    cut = _prompts(tokenizer, room)
    rows = [(head, text, tail) for text, (head, tail) in zip(texts, frames)]
    new = list(dict.fromkeys(row for row in rows if row not in cut))
    if new:
        encoded = tokenizer(["".join(row) for row in new], return_offsets_mapping=True)
        for row, ids, offsets in zip(new, encoded["input_ids"], encoded["offset_mapping"]):
            cut[row] = _cut(row, ids, offsets, max_length, longest)
    examples = []
    for i, (row, word) in enumerate(zip(rows, words)):
        ids, offsets = cut[row]
        marked = _marked(offsets, len(row[0]), marks[i]) if marks else ()
        examples.append(Example(ids, completions[word], forget, marked))
    return examples


@lru_cache(maxsize=4)
def _prompts(tokenizer, room):
    """{(head, text, tail): token ids and offsets} of what was tokenised with at most `room` tokens: evaluation asks for
    the same rows again."""
    return {}


def _cut(row, ids, offsets, max_length, longest):
    """Token ids and character offsets of head + text + tail, cut inside the text so that `longest` more tokens fit."""
    while offsets[-1][1] == 0:  # an end-of-text token that the tokenizer appends must not precede the answer
        ids, offsets = ids[:-1], offsets[:-1]
    excess = len(ids) + longest - max_length
    if excess > 0:
        begin = len(row[0])
        end = begin + len(row[1])
        inside = [at for at, (start, stop) in enumerate(offsets) if begin <= start < stop <= end]
        if excess >= len(inside):
            needed = len(ids) - len(inside) + longest + 1
            raise UserError(f"--max_length={max_length} cannot hold template and label; use at least {needed}")
        kept = slice(0, inside[-1] + 1 - excess), slice(inside[-1] + 1, None)
        ids, offsets = (list(items[kept[0]]) + list(items[kept[1]]) for items in (ids, offsets))
    return tuple(ids), tuple(offsets)


def _marked(offsets, begin, spans):
    """Positions of the tokens that overlap `spans` of the text, which starts at character `begin`; all but the last
    where there are no spans, or all of them were cut away."""
    shifted = [(begin + start, begin + end) for start, end in spans or ()]
    named = tuple(at for at, (start, stop) in enumerate(offsets) if any(start < b and stop > a for a, b in shifted))
    return named or tuple(range(len(offsets) - 1))


def completion_ids(tokenizer, word):
    """Token ids of ` word` as it continues the template's last word (sentencepiece and byte-level BPE differ alone)."""
    anchor = TEMPLATE_TAIL.split()[-1]
    before = tokenizer(anchor, add_special_tokens=False)["input_ids"]
    after = tokenizer(f"{anchor} {word}", add_special_tokens=False)["input_ids"]
    if after[: len(before)] != before or len(after) == len(before):
        after, before = tokenizer(f" {word}", add_special_tokens=False)["input_ids"], []
    return tuple(after[len(before) :])


@dataclass(frozen=True)
class Batch:
    """B rows, right-padded to T tokens, with the N completion tokens of all rows listed flat.

    input_ids, attention_mask: (B, T). Completion token n stands in row `rows[n]`, is predicted at position
    `positions[n]` and is `targets[n]`; all (N,). `forget`: (B,) bool.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    forget: torch.Tensor


def collate(examples, pad_id, device):
    """A Batch of `examples` on `device`. Masks come from lengths, so the pad token may be any token."""
    length = max(map(len, examples))
    input_ids = torch.full((len(examples), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    rows, positions, targets = [], [], []
    for row, example in enumerate(examples):
        ids = example.prompt + example.completion[:-1]
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        rows += [row] * len(example.completion)
        positions += range(len(example.prompt) - 1, len(ids))
        targets += example.completion
    forget = torch.tensor([example.forget for example in examples])
    flat = (torch.tensor(values) for values in (rows, positions, targets))
    return Batch(*(t.to(device) for t in (input_ids, attention_mask, *flat, forget)))


def epoch_batches(
    examples: list[Example],
    batch_size: int,
    seed: int,
    epoch: int,
    forget_per_batch: int = 0,
    length_pool: int | None = 0,
    retain_ratio: float | None = None,
) -> list[list[int]]:
    """The row numbers of every batch of one epoch: a pure function of its arguments, so a resumed run sees the same.

    forget_per_batch = 0: all rows shuffled together, each once, as published. n > 0: every batch has n forget rows
    (drawn in shuffled passes) and the epoch ends when each retain row was seen once. length_pool = k > 0: rows are
    sorted by length within pools of k batches, which saves padding; each row still counts once. None: pools of the
    size that the published code has, 50 batches or a quarter of the epoch (Trainer's `group_by_length`). There the
    batches of a pool come longest first; here all are shuffled, so that a short run meets every length.
    retain_ratio = r: the epoch's retain rows are r per forget row, drawn anew every epoch (all if there are fewer).
    """
    rng = np.random.default_rng([seed, epoch])
    forget = [i for i, e in enumerate(examples) if e.forget]
    retain = [i for i, e in enumerate(examples) if not e.forget]
    if retain_ratio:
        kept = min(len(retain), max(1, round(retain_ratio * len(forget))))
        retain = sorted(rng.choice(retain, kept, replace=False))
    if length_pool is None:
        length_pool = min(50, (len(retain) + len(forget)) // (4 * batch_size))
    if forget_per_batch:
        retain = rng.permutation(retain)
        n_batches = -(-len(retain) // (batch_size - forget_per_batch))
        passes = -(-n_batches * forget_per_batch // len(forget))
        forget = np.concatenate([rng.permutation(forget) for _ in range(passes)])[: n_batches * forget_per_batch]
        parts = [(retain, batch_size - forget_per_batch), (forget, forget_per_batch)]
    else:
        parts = [(rng.permutation(sorted([*retain, *forget])), batch_size)]
    chunked = [_chunks(_sorted_in_pools(rows, size * length_pool, examples), size) for rows, size in parts]
    batches = [[int(i) for part in batch for i in part] for batch in zip(*chunked)]
    return [batches[i] for i in rng.permutation(len(batches))] if length_pool else batches


def _sorted_in_pools(rows, pool, examples):
    if not pool:
        return rows
    return [i for part in _chunks(rows, pool) for i in sorted(part, key=lambda i: len(examples[i]))]


def _chunks(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]
