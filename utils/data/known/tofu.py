"""TOFU (arXiv 2401.06121): questions about 200 invented authors, of whom the last few are to be forgotten."""

from pathlib import Path

import pandas as pd

from utils.data.known.tables import as_lists, check_texts, hub_tables, present, with_columns
from utils.data.splits import read_table
from utils.errors import UserError

HUB_ID = "locuslab/TOFU"
SPLITS = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
SUFFIXES = (".jsonl", ".json")  # both hold JSON lines; the hub's files have the second
ROWS_PER_AUTHOR = 20
ROW = ["question", "answer"]
REWORDED = ["paraphrased_question", "paraphrased_answer", "perturbed_answer"]
OUTSIDE = ("real_authors", "world_facts")


def read_tofu(
    folder: Path | None = None, tofu_split: str = "forget10", tofu_authors: int | None = None
) -> dict[str, pd.DataFrame]:
    """TOFU's rows as {split: DataFrame}, from `folder` or, where it is None, from the hub.

    tofu_split: forget01, forget05 or forget10, that is the last 2, 10 or 20 of the 200 authors.
    tofu_authors: keeps the first so many retain authors, 20 rows each; None keeps all.

    train_forget, train_retain: question, answer, paraphrased_question, paraphrased_answer and perturbed_answer (a list
    of five wrong answers). Of the retain rows only those of the first 20 authors have the last three; others have None.
    test_forget, test_retain: the same facts asked in other words, since TOFU has no unseen facts.
    `question` is the paraphrased question of a train row that has one, `answer` its original answer.
    real_authors, world_facts: knowledge from outside, which must stay. `perturbed_answer` is a list of three.

    Raises UserError where a file, column or text is missing, where rows cannot be joined one to one, and where
    `tofu_split` or `tofu_authors` is none that there is.
    """
    if tofu_split not in SPLITS:
        raise UserError(f"TOFU has no split {tofu_split!r}; choose one of {', '.join(SPLITS)}")
    forget = _joined(folder, tofu_split, f"{tofu_split}_perturbed")
    retain = _joined(folder, SPLITS[tofu_split], "retain_perturbed")
    if tofu_authors is not None:
        authors = len(retain) // ROWS_PER_AUTHOR
        if not 1 <= tofu_authors <= authors:
            raise UserError(
                f"tofu_authors={tofu_authors} cannot be had of {SPLITS[tofu_split]}; choose 1 to {authors} authors"
            )
        retain = retain.head(tofu_authors * ROWS_PER_AUTHOR)
    frames = {
        "train_retain": retain,
        "train_forget": forget,
        "test_retain": _in_other_words(retain),
        "test_forget": _in_other_words(forget),
    }
    return frames | {name: _table(folder, f"{name}_perturbed", [*ROW, REWORDED[-1]]) for name in OUTSIDE}


def _joined(folder: Path | None, name: str, reworded: str) -> pd.DataFrame:
    """The rows of table `name`, in order, with the columns of table `reworded`, or None where it lacks a row.

    Two authors share the question "What is the full name of the author?", so question and answer together say which
    row is meant.
    """
    rows, others = _table(folder, name, ROW), _table(folder, reworded, [*ROW, *REWORDED])
    for table, frame in ((name, rows), (reworded, others)):
        repeated = frame["question"][frame.duplicated(ROW)]
        if len(repeated):
            raise UserError(f"{table} of TOFU has the row {repeated.iloc[0]!r} twice; take one of them out")
    joined = rows.merge(others, how="left", on=ROW, indicator=True)
    found = joined.pop("_merge") == "both"
    lost = len(others) - found.sum()
    if lost:
        raise UserError(f"{lost} of {len(others)} rows of {reworded} are not in {name} of TOFU; take both anew")
    return joined.astype({column: object for column in REWORDED}).where(joined.notna(), None)


def _in_other_words(frame: pd.DataFrame) -> pd.DataFrame:
    asked = frame[frame["paraphrased_question"].notna()].reset_index(drop=True)
    return asked.assign(question=asked["paraphrased_question"]).drop(columns="paraphrased_question")


def _table(folder: Path | None, name: str, columns: list[str]) -> pd.DataFrame:
    """`columns` of one table of TOFU, checked."""
    if folder is None:
        source, (frame,) = f"{HUB_ID} ({name})", hub_tables(HUB_ID, ["train"], columns, name)
    else:
        paths = [folder / f"{name}{suffix}" for suffix in SUFFIXES if (folder / f"{name}{suffix}").exists()]
        if len(paths) > 1:
            raise UserError(f"{folder} has {paths[0].name} and {paths[1].name}; keep one of them")
        source = present(paths[0] if paths else folder / f"{name}{SUFFIXES[0]}")
        frame = with_columns(read_table(source, ".jsonl"), columns, source)
    check_texts(frame, [column for column in columns if column != "perturbed_answer"], source)
    if "perturbed_answer" in columns:
        frame = frame.assign(perturbed_answer=as_lists(frame["perturbed_answer"], source))
    return frame
