"""Making the four splits: one row per text, a stratified test share, and the CSV files the scripts read."""

import os
import tempfile

import numpy as np

SPLITS = ("train_retain", "train_forget", "test_retain", "test_forget")
UNLEARNING_LABELS = ("neutral", "unknown")  # y~ of L_f, section 3.2 of the paper; no class may be called so


def drop_repeats(frame):
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


def text_key(text):
    """What two texts share that differ only in case, spacing or punctuation."""
    return "".join(char for char in text.casefold() if char.isalnum()) or text


def split_rows(frame, test_fraction, seed):
    """The four splits of `frame` (columns label and forget, bool) as {split: frame}, row order kept.

    Every combination of forget and label gives round(test_fraction * n) of its n rows to test, drawn by `seed`.
    """
    rng = np.random.default_rng(seed)
    test = np.zeros(len(frame), dtype=bool)
    strata = frame.groupby(["forget", "label"]).indices
    for _, rows in sorted(strata.items()):
        test[rng.permutation(rows)[: round(test_fraction * len(rows))]] = True
    forget = frame["forget"].to_numpy()
    masks = (~test & ~forget, ~test & forget, test & ~forget, test & forget)
    return {split: frame[mask].drop(columns="forget").reset_index(drop=True) for split, mask in zip(SPLITS, masks)}


def write_splits(frames, folder):
    """Write `{split}.csv` into the existing `folder`; each file appears whole, under its final name, or not at all."""
    with tempfile.TemporaryDirectory(prefix=".splits-", dir=folder) as temporary:
        paths = [os.path.join(temporary, f"{split}.csv") for split in SPLITS]
        for split, path in zip(SPLITS, paths):
            frames[split].to_csv(path, index=False, lineterminator="\n", encoding="utf-8")
        for path in paths:
            os.replace(path, os.path.join(folder, os.path.basename(path)))


def describe(frames):
    """One line per split: rows and the share of every label word."""
    lines = []
    for split in SPLITS:
        shares = frames[split]["label_text"].value_counts(normalize=True).sort_index()
        balance = ", ".join(f"{word} {share:.1%}" for word, share in shares.items())
        lines.append(f"{split:13s}{len(frames[split]):8,d} rows: {balance}")
    return "\n".join(lines)
