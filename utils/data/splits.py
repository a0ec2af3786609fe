"""Making the four splits: tables of texts, one row per text, a stratified test share; which texts overlap."""

import contextlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import UserError, first_line, note_once
from utils.storage.files import new_file
from utils.storage.formats import SPLITS
from utils.storage.reading import regular_file

TRAIN_SPLITS = SPLITS[:2]
UNLEARNING_LABELS = ("neutral", "unknown")  # y~ of L_f, section 3.2 of the paper; no class may be called so
PREFIX = 4  # words by which `nested` looks up a text


def _read_csv(path: Path) -> pd.DataFrame:
    """Every cell is text, so that nothing guesses what a number or an empty cell means."""
    return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")


def _read_jsonl(path: Path) -> pd.DataFrame:
    """Every cell as JSON has it: pandas would round large numbers and take some texts for dates."""
    with open(path, encoding="utf-8-sig") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line of it is no JSON object")
    return pd.DataFrame(rows, dtype=object)


READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": pd.read_parquet}


def read_table(path: str | Path, suffix: str | None = None) -> pd.DataFrame:
    """The rows of an existing .csv, .jsonl or .parquet file. Raises UserError where it cannot be read.

    suffix: which of them it is, where its name does not say so.
    """
    path = Path(path)
    suffix = suffix or path.suffix
    if suffix not in READERS:
        raise UserError(f"{path} is no .csv, .jsonl or .parquet file; convert it or rename it")
    try:
        frame = READERS[suffix](regular_file(path))
    except pd.errors.EmptyDataError:
        raise UserError(f"{path} is empty; it needs a header and at least one row") from None
    except (MemoryError, UserError):
        raise
    except Exception as error:  # pandas and pyarrow raise a dozen types on a damaged file
        raise UserError(f"{path} cannot be read ({first_line(error)}); check the file") from None
    if suffix == ".csv" and not isinstance(frame.index, pd.RangeIndex):  # pandas takes surplus cells for row names
        raise UserError(f"{path} has rows with more cells than its header; put quotes around texts with commas")
    return frame.reset_index(drop=True)


def is_text(cell: object) -> bool:
    """Whether a cell is a string with something to see in it, and without halves of characters (lone surrogates)."""
    visible = isinstance(cell, str) and any(unicodedata.category(char)[0] in "LNPS" for char in cell)
    return visible and not re.search("[\ud800-\udfff]", cell)


def whole_number(cell: object) -> int | None:
    """A cell as the whole number of at most 64 bits that it is, else None (a date or a missing cell, too)."""
    if isinstance(cell, str) and re.fullmatch(r"\s*[-+]?\d+(\.0*)?\s*", cell):
        cell = int(cell.partition(".")[0])
    if isinstance(cell, (np.integer, np.floating, np.bool_)):
        cell = cell.item()
    if not isinstance(cell, (int, float, Decimal)) or cell != cell or cell % 1 != 0:
        return None
    return int(cell) if -(2**63) <= cell < 2**63 else None


def drop_repeats(frame: pd.DataFrame) -> tuple[pd.DataFrame, int, int]:
    """One row per text (letters and digits decide, case does not), so no text can straddle two splits.

    `frame` has columns text, label and forget (bool). The first row of a text stays, as forget if any of its repeats
    is; texts whose repeats disagree in label all go. Returns the frame, order kept, and the numbers of rows dropped as
    repeats and as contradictions.
    """
    groups = frame.groupby([text_key(text) for text in frame["text"]], sort=False)
    forget = groups["forget"].transform("any")
    agrees = groups["label"].transform("nunique") == 1
    first = groups.cumcount() == 0
    kept = frame.assign(forget=forget)[agrees & first].reset_index(drop=True)
    return kept, int((agrees & ~first).sum()), int((~agrees).sum())


def text_key(text: str) -> str:
    """What two texts share that differ only in case, spacing or punctuation."""
    return re.sub(r"[\W_]+", "", text.casefold()) or text


def note_overlap(frames: dict[str, pd.DataFrame]) -> None:
    """Say where rows to forget are trained as rows to keep, too, and where test rows are train rows (by `text_key`)."""
    keys = {split: frame["text"].map(text_key) for split, frame in frames.items()}
    both = len(set(keys["train_forget"]) & set(keys["train_retain"]))
    if both:
        note_once(
            f"{both:,} of the {keys['train_forget'].nunique():,} texts of train_forget are in train_retain, too, where "
            "they are trained to be kept; take them out of one of the two"
        )
    trained = set(keys["train_retain"]) | set(keys["train_forget"])
    seen = {split: int(keys[split].isin(trained).sum()) for split in SPLITS[2:]}
    if any(seen.values()):
        counts = " and ".join(f"{n:,} of {len(keys[split]):,} rows of {split}" for split, n in seen.items() if n)
        note_once(f"{counts} are train rows, too (but for case, spaces and punctuation), so they are not unseen")


def mark_nested(frames: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """`frames` with a column `nested` in the test splits: 1 where a row overlaps a train row, else 0.

    Two rows overlap where one contains the other, word by word. SST-2's rows are phrases cut from sentences, so that an
    unseen row may be a part of a trained one. Which train rows there are decides, so a selection of rows is marked anew
    (`utils.data.select.select_rows`). Only train rows of the same kind (retain or forget) count. That a retain
    row of one word, `film`, stands in a forget row does not mean that the latter has been seen.
    """
    marked = dict(frames)
    for kind in ("retain", "forget"):
        test = frames[f"test_{kind}"]
        marked[f"test_{kind}"] = test.assign(nested=nested(test["text"], frames[f"train_{kind}"]["text"]).astype(int))
    return marked


def nested(texts: Iterable[str], others: Iterable[str]) -> np.ndarray:
    """For each of the n `texts` whether it contains, or is contained in, one of `others`: (n,) bool.

    A text is contained in another where its words stand there in a row, case aside. Takes seconds for tens of thousands
    of sentences.
    """
    texts, others = ([tuple(text.casefold().split()) for text in rows] for rows in (texts, others))
    inside = set().union(*_runs(texts, others))
    around = [bool(found) for found in _runs(others, texts)]
    return np.array([words in inside for words in texts], dtype=bool) | np.array(around, dtype=bool)


def _runs(needles: Sequence[tuple], haystacks: Sequence[tuple]) -> Iterator[set[tuple]]:
    """For each of `haystacks` the `needles` (both tuples of words) that are a run of its words."""
    by_prefix = {}
    for needle in set(needles):
        by_prefix.setdefault(needle[:PREFIX], []).append(needle)
    for words in haystacks:
        found = set()
        for start in range(len(words)):
            for end in range(start + 1, min(start + PREFIX, len(words)) + 1):
                candidates = by_prefix.get(words[start:end], ())
                found.update(needle for needle in candidates if words[start : start + len(needle)] == needle)
        yield found


def split_rows(frame: pd.DataFrame, test_fraction: float, seed: int) -> dict[str, pd.DataFrame]:
    """The four splits of `frame` (columns label and forget, bool) as {split: frame}, row order kept.

    test_fraction: in [0, 1]. Every combination of forget and label gives round(test_fraction * n) of its n rows to
    test, drawn by `seed`.
    """
    rng = np.random.default_rng(seed)
    test = np.zeros(len(frame), dtype=bool)
    strata = frame.groupby(["forget", "label"]).indices
    for _, rows in sorted(strata.items()):
        test[rng.permutation(rows)[: round(test_fraction * len(rows))]] = True
    forget = frame["forget"].to_numpy()
    masks = (~test & ~forget, ~test & forget, test & ~forget, test & forget)
    return {split: frame[mask].drop(columns="forget").reset_index(drop=True) for split, mask in zip(SPLITS, masks)}


def write_splits(frames: Mapping[str, pd.DataFrame], folder: str | Path) -> None:
    """Write `{split}.csv` into the existing `folder`; the files appear whole, all at once, or not at all."""
    with contextlib.ExitStack() as stack:
        for split in SPLITS:
            file = stack.enter_context(new_file(Path(folder) / f"{split}.csv"))
            frames[split].to_csv(file, index=False, lineterminator="\n", encoding="utf-8")


def describe(frames: Mapping[str, pd.DataFrame]) -> str:
    """One line per split: rows and the share of every label word."""
    lines = []
    for split in SPLITS:
        shares = frames[split]["label_text"].value_counts(normalize=True).sort_index()
        balance = ", ".join(f"{word} {share:.1%}" for word, share in shares.items())
        lines.append(f"{split:13s}{len(frames[split]):8,d} rows: {balance}")
    return "\n".join(lines)
