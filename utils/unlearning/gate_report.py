"""What a gate does on test rows that are rewritten: recall and false positives of each rewriting, and the ROC curve."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import roc_curve

from utils.data.names import Person
from utils.data.rewritings import TEST, capitalised_names, of_family, rewrite
from utils.data.select import sample_rows
from utils.data.splits import is_text
from utils.interventions import gates

Frames = Mapping[str, pd.DataFrame]
ROWS = {"tfidf": 1000, "other": 100}  # of a split that are rewritten, at most: other classifiers run a model on each
UNCHANGED, PARAPHRASE = "unchanged", "paraphrase"
Versions = dict[str, dict[str, list[str]]]
"""{rewriting: {split: texts}}; the first is UNCHANGED, the rows as they are."""


def versions(frames: Frames, names: Sequence[Person], seed: int, most: int) -> Versions:
    """The test rows, and their rewritings of the family that no gate is trained on.

    Of each split at most `most` rows, the same for every gate. `test_retain:names_other` are the rows to keep that name
    somebody else, where the data has that column. A column `paraphrase` gives a rewriting of that name; a row whose
    cell is empty has none. A rewriting that applies to no row is left out.
    """
    parts = {"test_forget": frames["test_forget"], "test_retain": frames["test_retain"]}
    if "names_other" in frames["test_retain"]:
        marked = frames["test_retain"]["names_other"].astype(bool)
        parts["test_retain:names_other"] = frames["test_retain"][marked].reset_index(drop=True)
    parts = {split: sample_rows(frame, most) for split, frame in parts.items() if len(frame)}
    keep = list(parts["test_retain"]["text"])
    found: Versions = {UNCHANGED: {split: list(frame["text"]) for split, frame in parts.items()}}
    for rewriting in of_family(TEST):
        for split, frame in parts.items():
            new = rewrite(rewriting, frame["text"], names, keep, seed, forget=split == "test_forget")
            found.setdefault(rewriting.name, {})[split] = [text for text in new if text is not None]
    for split, frame in parts.items():
        if PARAPHRASE in frame:
            found.setdefault(PARAPHRASE, {})[split] = [text for text in frame[PARAPHRASE] if is_text(text)]
    found = {name: {split: texts for split, texts in rows.items() if texts} for name, rows in found.items()}
    return {name: rows for name, rows in found.items() if rows}


def names_by(frames: Frames, names: Sequence[Person]) -> str:
    """How the names in rows to forget are found: by `list`, by `capitals`, or by `none`, so that only rewritings that
    need no name apply."""
    if names:
        return "list"
    return "capitals" if any(map(capitalised_names, frames["test_forget"]["text"])) else "none"


def shares(gate: gates.Gate, texts: Versions) -> dict[str, dict[str, dict[str, float]]]:
    """{rewriting: {split: {"flagged": share, "rows": how many}}}: of forget rows the recall, else false positives."""
    return {
        name: {
            split: {"flagged": float(gate.decide(rows)[0].mean()), "rows": len(rows)} for split, rows in parts.items()
        }
        for name, parts in texts.items()
    }


def roc(gate: gates.Gate, texts: Versions) -> dict[str, dict[str, Any]]:
    """{"plain rows", "rewritten rows": {"curve": [[false positive rate, recall], ...], "at_threshold": one such pair}}.

    Rewritten rows of all kinds are taken together, in which every row stands as often as rewritings apply to it. A kind
    without a row of both sides is left out.
    """
    groups = {"plain rows": [UNCHANGED], "rewritten rows": [name for name in texts if name != UNCHANGED]}
    found = {}
    for group, kinds in groups.items():
        sides = [[t for kind in kinds for t in texts[kind].get(split, ())] for split in ("test_retain", "test_forget")]
        if not all(sides):
            continue
        retain, forget = map(gate.probabilities, sides)
        truth = np.r_[np.zeros(len(retain)), np.ones(len(forget))]
        rates = np.stack(roc_curve(truth, np.r_[retain, forget])[:2], axis=1).round(5)
        at = [float((scores > gate.threshold).mean()) for scores in (retain, forget)]
        found[group] = {"curve": rates.tolist(), "at_threshold": at}
    return found


def describe(
    gate: gates.Gate, plain: gates.Gate | None, frames: Frames, names: Sequence[Person], seed: int
) -> dict[str, Any]:
    """What gate.json says of rewritten rows: "names_by", "rewritings" and "roc" of `gate`; "rewritings_plain" and
    "roc_plain" of a gate `plain` that was trained without them, if there is one."""
    texts = versions(frames, names, seed, ROWS.get(gate.classifier.kind, ROWS["other"]))
    found = {"names_by": names_by(frames, names), "rewritings": shares(gate, texts), "roc": roc(gate, texts)}
    if plain is not None:
        found |= {"rewritings_plain": shares(plain, texts), "roc_plain": roc(plain, texts)}
    return found
