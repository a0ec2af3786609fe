"""SciQ (arXiv 1707.06209): science questions, of which those about one topic, genetics, are to be forgotten."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from utils.data.known.tables import (
    CHOICE_COLUMNS,
    LETTERS,
    check_texts,
    hub_tables,
    present,
    with_columns,
    without_equal_choices,
)
from utils.data.splits import read_table
from utils.errors import UserError, note_once

HUB_ID = "allenai/sciq"
TRAIN_FILE, TEST_FILE, CHOICES_FILE = "train_plus_valid_qa.jsonl", "test_qa.jsonl", "test884_with_distractors.csv"
DISTRACTORS = ["distractor1", "distractor2", "distractor3"]
TOPIC = (  # about 6 % of the questions have one of these words in question or answer
    "allele", "centromere", "chromatid", "chromatin", "chromosome", "clone", "cloning", "codon", "diploid", "dna",
    "exon", "gamete", "gene", "genetic", "genetically", "genetics", "genome", "genomic", "genotype", "haploid",
    "heredity", "hereditary", "heritable", "heterozygous", "histone", "homozygous", "inherit", "inheritance",
    "inherited", "intron", "meiosis", "mendel", "mendelian", "mitosis", "mrna", "mutant", "mutated", "mutation",
    "nucleic", "nucleotide", "phenotype", "plasmid", "recessive", "rna", "rrna", "telomere", "trait", "transcription",
    "trna",
)  # fmt: skip
ON_TOPIC = re.compile(rf"\b(?:{'|'.join(TOPIC)})s?\b", re.IGNORECASE)


def read_sciq(folder: Path | None = None, seed: int = 42) -> dict[str, pd.DataFrame]:
    """SciQ's four splits as {split: DataFrame with columns question, choices, answer, subject}.

    Forget rows have a word of `TOPIC` in question or right answer, as a whole word, case aside; retain rows have none.
    Train rows are those of train and validation, test rows those of test. For the rest see `sciq_tables`.
    """
    frames = {}
    for part, frame in sciq_tables(folder, seed).items():
        right = (choices[LETTERS.index(letter)] for choices, letter in zip(frame["choices"], frame["answer"]))
        forget = np.array([bool(ON_TOPIC.search(f"{q}\n{a}")) for q, a in zip(frame["question"], right)], dtype=bool)
        frames |= {f"{part}_retain": frame[~forget], f"{part}_forget": frame[forget]}
    for split, frame in frames.items():
        if not len(frame):
            raise UserError(f"SciQ leaves no row for {split}; restore the published files")
    return {split: frame.reset_index(drop=True) for split, frame in frames.items()}


def sciq_tables(folder: Path | None, seed: int) -> dict[str, pd.DataFrame]:
    """SciQ's rows as {"train": train and validation, "test": test}, columns question, choices, answer, subject.

    folder: has train_plus_valid_qa.jsonl, test_qa.jsonl and test884_with_distractors.csv; None takes the hub's.
    `choices` is a list of four in an order drawn by `seed`, `answer` the letter of the right one. The files have wrong
    choices for 884 test rows only. For every other row three are drawn from the answers of the other rows, which are
    easier to tell from the right one; a note says so. Rows with two equal choices are left out with a note.

    Raises UserError where a file, column or text is missing, or the answers are too few to draw from.
    """
    rng = np.random.default_rng(seed)
    tables = _from_hub() if folder is None else _from_folder(folder, rng)
    frames = {part: _shuffled(frame, rng) for part, frame in tables.items()}
    return {part: without_equal_choices(frame, f"SciQ ({part})") for part, frame in frames.items()}


def _shuffled(frame: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """`frame` (question, correct_answer and three distractors) as multiple choice, each row in an order of its own."""
    cells = frame[["correct_answer", *DISTRACTORS]].to_numpy(dtype=object)
    orders = [rng.permutation(len(LETTERS)) for _ in cells]  # where each of the four comes from; 0 is the right one
    choices = [list(row[order]) for row, order in zip(cells, orders)]
    letters = [LETTERS[int(np.argmin(order))] for order in orders]
    columns = zip(frame["question"], choices, letters, ["science"] * len(frame))
    return pd.DataFrame(columns, columns=CHOICE_COLUMNS)


def _from_hub() -> dict[str, pd.DataFrame]:
    splits, columns = ["train", "validation", "test"], ["question", "correct_answer", *DISTRACTORS]
    tables = hub_tables(HUB_ID, splits, columns)
    for split, frame in zip(splits, tables):
        check_texts(frame, columns, f"{split} of {HUB_ID}")
    return {"train": pd.concat(tables[:2], ignore_index=True), "test": tables[2]}


def _from_folder(folder: Path, rng: np.random.Generator) -> dict[str, pd.DataFrame]:
    columns = ["question", "correct_answer"]
    tables = {}
    for part, name in (("train", TRAIN_FILE), ("test", TEST_FILE)):
        path = present(folder / name)
        frame = with_columns(read_table(path), ["question", "answer"], path).set_axis(columns, axis=1)
        check_texts(frame, columns, path)
        tables[part] = frame
    path = present(folder / CHOICES_FILE)
    given = with_columns(read_table(path), [*columns, *DISTRACTORS], path)
    check_texts(given, given.columns, path)
    tables["test"] = tables["test"].merge(given.drop_duplicates(columns), how="left", on=columns)
    return {part: _completed(frame.reindex(columns=given.columns), part, rng) for part, frame in tables.items()}


def _completed(frame: pd.DataFrame, part: str, rng: np.random.Generator) -> pd.DataFrame:
    """`frame` with three distractors drawn for each row without, all different and none the right answer, case aside.

    They are drawn from the right answers of the other rows.
    """
    pool = frame["correct_answer"][~frame["correct_answer"].str.casefold().duplicated()].to_numpy(dtype=object)
    if len(pool) <= len(DISTRACTORS):
        raise UserError(f"SciQ ({part}) has {len(pool)} different answers, too few to draw three wrong ones from")
    without = frame["distractor1"].isna()
    if without.any():
        note_once(
            f"SciQ's files give no wrong choices for {without.sum():,} of {len(frame):,} {part} rows; "
            "theirs are drawn from the answers of other rows"
        )
    drawn = []
    for answer in frame["correct_answer"][without]:
        few = pool[rng.choice(len(pool), len(LETTERS), replace=False)]
        drawn.append([wrong for wrong in few if wrong.casefold() != answer.casefold()][: len(DISTRACTORS)])
    frame = frame.astype(object)
    frame.loc[without, DISTRACTORS] = np.array(drawn, dtype=object).reshape(-1, len(DISTRACTORS))
    return frame
