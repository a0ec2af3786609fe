"""The embedded dataset: what its readme promises, and that its script still makes it."""

import importlib
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from utils.data.names import mentions, read_names
from utils.data.splits import SPLITS, text_key

FOLDER = Path(__file__).resolve().parents[1] / "data" / "snippets"


@pytest.fixture(scope="module")
def frames():
    return {split: pd.read_csv(FOLDER / f"{split}.csv", keep_default_na=False) for split in SPLITS}


@pytest.fixture(scope="module")
def names():
    return read_names(FOLDER / "forget_names.txt")


def prepare(*arguments):
    command = [sys.executable, FOLDER / "prepare.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_the_script_makes_the_committed_files_again(tmp_path):
    result = prepare(f"--output_path={tmp_path}")
    if "cannot download" in result.stderr:
        pytest.skip("pip reaches no package index")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{split}.csv" for split in SPLITS)
    for split in SPLITS:
        assert (tmp_path / f"{split}.csv").read_bytes() == (FOLDER / f"{split}.csv").read_bytes(), split


@pytest.mark.long
def test_a_wrong_sdist_is_refused(tmp_path):
    (tmp_path / "wrong.tar.gz").write_bytes(b"not an archive")
    for sdist in (tmp_path / "wrong.tar.gz", tmp_path / "missing.tar.gz"):
        result = prepare(f"--sdist={sdist}", f"--output_path={tmp_path / 'out'}")
        assert result.returncode == 2
        assert "is not a readable vaderSentiment 3.3.2 sdist" in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_columns_and_cells(frames):
    for frame in frames.values():
        assert list(frame.columns) == ["text", "label", "label_text", "names_other"]
        assert (frame["text"] == frame["text"].map(lambda text: " ".join(text.split()))).all()
        assert frame["text"].str.len().min() > 0
        assert (frame["label_text"] == frame["label"].map({0: "negative", 1: "positive"})).all()
        assert set(frame["names_other"]) == {0, 1}


def test_the_forget_share(frames):
    total = sum(map(len, frames.values()))
    assert 0.04 <= (len(frames["train_forget"]) + len(frames["test_forget"])) / total <= 0.08


def test_no_text_is_there_twice(frames):
    keys = [text_key(text) for frame in frames.values() for text in frame["text"]]
    assert len(set(keys)) == len(keys)


def test_forget_rows_and_no_others_name_a_listed_person(frames, names):
    for split, frame in frames.items():
        named = [bool(mentions(text, names)) for text in frame["text"]]
        assert all(named) if split.endswith("forget") else not any(named)


def test_the_marks_of_the_committed_rows_are_those_of_the_script(frames, names, monkeypatch):
    """On the rows to forget and a tenth of the others, so that it takes a second."""
    monkeypatch.syspath_prepend(FOLDER)
    prepare = importlib.import_module("prepare")
    monkeypatch.delitem(sys.modules, "prepare")
    others, given = read_names(FOLDER / "other_names.txt"), prepare.given_name_pattern(FOLDER / "given_names.txt")
    for split, frame in frames.items():
        rows = frame if split.endswith("forget") else frame[::10]
        assert [int(prepare.names_other(text, names, others, given)) for text in rows["text"]] == list(
            rows["names_other"]
        )


def test_the_people_of_the_demo_are_of_the_list(frames):
    """Line by line, and every one of them is named in both forget splits."""
    lines = [set((FOLDER / name).read_text().splitlines()[1:]) for name in ("demo_names.txt", "forget_names.txt")]
    assert len(lines[0]) == 4 and lines[0] < lines[1]
    people = read_names(FOLDER / "demo_names.txt")
    for split, rows in ("train_forget", 75), ("test_forget", 26):
        found = [mentions(text, people) for text in frames[split]["text"]]
        named = {person for some in found for person in some}
        assert sum(map(bool, found)) == rows and named == {person.name for person in people}


def test_the_list_of_people(frames, names):
    people = [person.name for person in names]
    assert len(set(people)) == len(people)
    texts = [*frames["train_forget"]["text"], *frames["test_forget"]["text"]]
    found = {person for text in texts for person in mentions(text, names)}
    assert found == set(people)


def test_test_rows_are_30_percent_of_every_stratum(frames):
    for kind in ("retain", "forget"):
        train, test = frames[f"train_{kind}"]["label"], frames[f"test_{kind}"]["label"]
        for label in (0, 1):
            n_train, n_test = (train == label).sum(), (test == label).sum()
            assert n_test == round(0.3 * (n_train + n_test))


@pytest.mark.parametrize(
    ("text", "people"),
    [
        ("Hugh Grant's charm", ["Hugh Grant"]),
        ("the Cary Grant of Room for One More", []),
        ("Grant is no Cary Grant", ["Hugh Grant"]),
        ("a diesel engine, Dieselpunk, BioDiesel", []),
        ("(Scorsese's) best, with De Niro.", ["Robert De Niro", "Martin Scorsese"]),
    ],
)
def test_whole_words_in_the_given_case(text, people, names):
    assert mentions(text, names) == people


def test_data_of_the_users_are_not_replaced(tmp_path):
    (tmp_path / "train_retain.csv").write_text("mine", encoding="utf-8")
    result = prepare(f"--output_path={tmp_path}")
    assert result.returncode == 2 and "has a train_retain.csv already" in result.stderr
