"""Pairs of MMLU subjects (arXiv 2009.03300) of which ECO (arXiv 2406.07933) forgets one and keeps its neighbour."""

import csv
from pathlib import Path

import numpy as np
import pandas as pd

from utils.data.known.tables import CHOICE_COLUMNS, hub_tables, multiple_choice, present, without_equal_choices
from utils.data.splits import text_key
from utils.errors import UserError, first_line
from utils.storage.reading import regular_file

HUB_ID = "cais/mmlu"
PAIRS = {  # subjects to forget and to keep: ECO's MMLU subsets
    "economics": (("high_school_macroeconomics", "high_school_microeconomics"), ("econometrics",)),
    "physics": (
        ("college_physics", "conceptual_physics", "high_school_physics"),
        ("college_mathematics", "high_school_mathematics"),
    ),
    "law": (("international_law", "professional_law"), ("jurisprudence",)),
}
GENERAL = 500  # rows at most, so that an evaluation stays affordable
CELLS = 6  # of a row of a file: question, four choices, letter


def read_mmlu(folder: Path | None = None, mmlu_pair: str = "economics", seed: int = 42) -> dict[str, pd.DataFrame]:
    """One of ECO's pairs of MMLU subjects as {split: DataFrame with columns question, choices, answer, subject}.

    folder: has {subject}_val.csv and {subject}_test.csv without a header; None takes the hub's configuration `all`,
    one fetch for all subjects. mmlu_pair: economics, physics or law. `choices` is a list of four, `answer` a letter,
    `subject` its name with spaces.

    train_forget and test_forget are two halves of the validation and test questions of the subjects to forget, drawn
    by `seed` within each subject; train_retain and test_retain those of the subjects to keep. MMLU repeats some
    questions; all rows of a question go to the same half. Development questions, meant as examples in a prompt, are
    left out. general, where there are other subjects: at most 500 of their test questions, drawn by `seed`.

    ECO's paper fine-tunes nothing and evaluates all test rows of a subject. These are in the union of the two halves,
    with the validation rows. Rows with two equal choices are left out with a note: MMLU has a few.

    Raises UserError where a file, column, subject or cell is missing, and for an unknown pair.
    """
    if mmlu_pair not in PAIRS:
        raise UserError(f"there is no pair {mmlu_pair!r} of MMLU subjects; choose one of {', '.join(PAIRS)}")
    kinds = dict(zip(("forget", "retain"), PAIRS[mmlu_pair]))
    subjects = [subject for kind in kinds.values() for subject in kind]
    rows = _from_hub(subjects) if folder is None else _from_folder(folder, subjects)
    rows = without_equal_choices(rows, f"MMLU ({mmlu_pair} and general)")
    rng, frames = np.random.default_rng(seed), {}
    for kind in kinds:
        frames[f"train_{kind}"], frames[f"test_{kind}"] = _halves(rows[rows["subject"].isin(kinds[kind])], rng)
    general = rows[~rows["subject"].isin(subjects)]
    if len(general):
        frames["general"] = general.sample(min(GENERAL, len(general)), random_state=rng).sort_index()
    for split, frame in frames.items():
        if not len(frame):
            raise UserError(f"MMLU ({mmlu_pair}) leaves no row for {split}; restore the published files")
        spaced = frame["subject"].str.replace("_", " ")
        frames[split] = frame.assign(subject=spaced)[CHOICE_COLUMNS].reset_index(drop=True)
    return frames


def _halves(frame: pd.DataFrame, rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two halves of the different questions of each subject, with all rows of these questions, order kept."""
    keys = frame[["subject"]].assign(question=frame["question"].map(text_key))
    drawn = keys.drop_duplicates().groupby("subject", sort=False).sample(frac=0.5, random_state=rng)
    first = pd.MultiIndex.from_frame(keys).isin(pd.MultiIndex.from_frame(drawn))
    return frame[first], frame[~first]


def _from_hub(wanted: list[str]) -> pd.DataFrame:
    """Validation and test rows of the `wanted` subjects, test rows of all others."""
    splits = ["validation", "test"]
    tables = hub_tables(HUB_ID, splits, CHOICE_COLUMNS, "all")
    validation, test = (multiple_choice(frame, f"{part} of {HUB_ID}") for frame, part in zip(tables, splits))
    for subject in wanted:
        if subject not in set(test["subject"]):
            raise UserError(f"test of {HUB_ID} has no subject {subject!r}; pass a local folder to --dataset")
    return pd.concat([validation[validation["subject"].isin(wanted)], test], ignore_index=True)


def _from_folder(folder: Path, wanted: list[str]) -> pd.DataFrame:
    """The same of the files of `folder`."""
    subjects = sorted(path.name.removesuffix("_test.csv") for path in folder.glob("*_test.csv"))
    names = [(subject, f"{subject}_{part}.csv") for part in ("val", "test") for subject in wanted]
    names += [(subject, f"{subject}_test.csv") for subject in subjects if subject not in wanted]
    tables = [_read(present(folder / name)).assign(subject=subject) for subject, name in names]
    return pd.concat(tables, ignore_index=True)


def _read(path: Path) -> pd.DataFrame:
    """The rows of a file without header. Cells with commas, quotes or line breaks stand in quotes."""
    try:
        with open(regular_file(path), encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file, strict=True) if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); restore the published file") from None
    for number, row in enumerate(rows, start=1):
        if len(row) != CELLS:
            raise UserError(f"{path}, row {number}: a question, four choices and a letter should stand here; fix it")
    cells = ((question, choices, answer.strip()) for question, *choices, answer in rows)
    return multiple_choice(pd.DataFrame(cells, columns=CHOICE_COLUMNS[:3], dtype=object), path)
