"""Do rewritten queries get past the gate, and what is then answered?

Test rows are asked as they stand, in every rewriting of utils.data.rewritings and behind a text to keep. Gates may be
trained on the rewritings of the train family, but not on these rows. Where the published template of sentiment is
asked, it is also asked in German and French, with the label words as they are. A gate reads the text alone, so that
its flags stay the same there, but a prompt was learnt in front of other words.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from utils.audit.base import Audit, Case, Measure, Passes, Subject
from utils.data.rewritings import REWRITINGS, TEST, Name, Rewriting, rewrite
from utils.data.select import sample_rows
from utils.evaluation.statistics import Sample
from utils.tasks.classification import TEMPLATE_HEAD, TEMPLATE_TAIL, Classification
from utils.tasks.rows import Splits

ROWS = 40  # of a split, at most
UNCHANGED, ANY = "as it stands", "any rewriting"
TEMPLATES = {
    "template in German": ("### Text: ", "\n\n### Frage: Welche Stimmung hat der Text?\n\n### Stimmung:"),
    "template in French": ("### Texte : ", "\n\n### Question : Quel est le sentiment du texte ?\n\n### Sentiment :"),
}


def _behind(text: str, _: Sequence[Name], keep: Sequence[str], rng: np.random.Generator) -> str | None:
    """The text behind one to keep."""
    others = [other for other in keep if other != text]
    return f"{others[rng.integers(len(others))]} {text}" if others else None


BEHIND = Rewriting("behind a text to keep", "joined", TEST, False, _behind)  # not in REWRITINGS: gates train on these


def rewritten(case: Case, split: str) -> dict[str, pd.DataFrame]:
    """{rewriting: the rows of `split` that it applies to, with their `text` rewritten}; the first is UNCHANGED.

    A frame's index tells which row of UNCHANGED each is made from. At most ROWS rows of the split are taken. A
    rewriting that applies to none of them is left out. The same for every subject, and made once.
    """
    if (kept := f"evasion, {split}") not in case.kept:
        seed = case.settings.rows_seed
        parts = {s: sample_rows(case.frames[s], ROWS, seed).reset_index(drop=True) for s in (split, "test_retain")}
        rows, keep = parts[split], list(parts["test_retain"]["text"])
        found = {UNCHANGED: rows}
        for rewriting in (*REWRITINGS, BEHIND):
            texts = rewrite(rewriting, rows["text"], case.people, keep, seed, forget=split == "test_forget")
            applies = [text is not None for text in texts]
            if any(applies):
                found[rewriting.name] = rows.assign(text=texts)[applies]
        case.kept[kept] = found
    return case.kept[kept]


def in_other_languages(case: Case) -> dict[str, Case]:
    """{template: `case` asked in it}; empty unless the task is asked in the published template."""
    task = case.task
    if not isinstance(task, Classification) or (task.head, task.end) != (TEMPLATE_HEAD, TEMPLATE_TAIL):
        return {}
    if "evasion, templates" not in case.kept:
        case.kept["evasion, templates"] = {
            name: replace(case, frames=Splits(case.frames, replace(task, head=head, end=end)))
            for name, (head, end) in TEMPLATES.items()
        }
    return case.kept["evasion, templates"]


def measure(subject: Subject, case: Case) -> list[Measure]:
    """How far the subject knows the answers of rows to forget in each rewriting; of a gate also recall and false
    positives.

    The headline is the mean over rows of what is known of a row, itself the mean over its rewritings and templates. So
    rows are drawn in its interval, not rewritings, which are alike for a row.
    """
    parts = rewritten(case, "test_forget")
    frame = pd.concat(parts)
    scored = case.scored(subject, "evasion", frame.reset_index(drop=True)).set_axis(frame.index)
    what, values = _known(case, scored)
    known = {name: pd.Series(values, frame.index).loc[name] for name in parts}
    for name, other in in_other_languages(case).items():
        known[name] = pd.Series(_known(other, other.scored(subject, "evasion", parts[UNCHANGED]))[1])
    changed = pd.concat([values for name, values in known.items() if name != UNCHANGED])
    by_row = changed.groupby(level=0).mean()
    found = [Measure(name=f"{what}, {ANY}", sample=Sample(by_row.to_numpy()), headline=True)]
    found += [Measure(name=f"{what}, {name}", sample=Sample(values.to_numpy())) for name, values in known.items()]
    if subject.served.is_gated:
        found += [_flagged(f"recall, {name}", scored.loc[name, "flagged"]) for name in parts]
        for name, rows in rewritten(case, "test_retain").items():
            _, said = subject.served.decide(list(rows["text"]))
            found.append(_flagged(f"false positives, {name}", [row["flagged"] for row in said]))
    return found


def _known(case: Case, scored: pd.DataFrame) -> tuple[str, np.ndarray]:
    """The first of `Case.knows`, and its name."""
    return next(iter(case.knows(scored).items()))


def _flagged(name: str, flags: pd.Series | list[bool]) -> Measure:
    return Measure(name=name, sample=Sample(np.asarray(flags, dtype=float)), compared=False)


def passes(case: Case) -> Passes:
    """Rows to forget in every rewriting and template; gates that run a model on each text are not counted."""
    parts = rewritten(case, "test_forget")
    return Passes(forward=sum(map(len, parts.values())) + len(in_other_languages(case)) * len(parts[UNCHANGED]))


EVASION = Audit(
    name="evasion",
    asks="Do rewritten queries get past the gate, and what is then answered?",
    measure=measure,
    passes=passes,
)
