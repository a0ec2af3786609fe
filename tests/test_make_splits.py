"""data/make_splits.py by its command line: the splits it makes, and every input it refuses.

Most tests run the script inside this process, which saves a second of imports each.
"""

import contextlib
import io
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pandas as pd
import pytest
from marks import mostly_long

from utils.data.splits import SPLITS, text_key
from utils.errors import note_once

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "make_splits.py"


def reviews(n=60):
    """n distinct texts with alternating labels; every fifth names Ann Lee, and `user` is 0 to 3 in turn."""
    texts = [f'Review {i} of {"Ann Lee" if i % 5 == 0 else "annLee"}, a "film"' for i in range(n)]
    return pd.DataFrame({"text": texts, "label": [i % 2 for i in range(n)], "user": [i % 4 for i in range(n)]})


def make(tmp_path, *arguments, frame=None, name="reviews.csv", process=False):
    """Run the script on `frame`, written as a file of that name (None: not written); output goes to tmp_path/out.

    Returns returncode, stdout and stderr, of a new process or of a run in this one.
    """
    path = tmp_path / name
    if frame is not None:
        writers = {
            ".csv": lambda: frame.to_csv(path, index=False),
            ".jsonl": lambda: frame.to_json(path, orient="records", lines=True),
            ".parquet": lambda: frame.to_parquet(path),
        }
        writers[path.suffix]()
    command = [str(SCRIPT), f"--input={path}", f"--output_path={tmp_path / 'out'}", *arguments]
    if process:
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    out, err, code = io.StringIO(), io.StringIO(), 0
    note_once.cache_clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch("sys.argv", command):
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as exit_:
            code = exit_.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def made(tmp_path, *arguments, **options):
    """The four frames that the script writes."""
    result = make(tmp_path, *arguments, **options)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(f"{split}.csv" for split in SPLITS)
    frames = {split: pd.read_csv(tmp_path / "out" / f"{split}.csv", keep_default_na=False) for split in SPLITS}
    for split, frame in frames.items():
        assert f"{split:13s}{len(frame):8,d} rows" in result.stdout
    return frames


def refused(tmp_path, message, *arguments, name="reviews.csv", **options):
    """Check that the script says `message` in one line, exits 2 and leaves nothing behind."""
    before = {path.name for path in tmp_path.iterdir()}
    result = make(tmp_path, *arguments, name=name, **options)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.startswith("make_splits.py: error: ")
    assert result.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} - {name} == before - {name}


@pytest.fixture
def people(tmp_path):
    path = tmp_path / "people.txt"
    path.write_text("# people\n\nAnn Lee\nBob Ray: Ray, Bobby\n")
    return f"--forget_names={path}"


@pytest.mark.parametrize("name", mostly_long(["reviews.csv", "reviews.jsonl", "reviews.parquet"], "reviews.csv"))
def test_by_names(tmp_path, people, name):
    frames = made(tmp_path, people, frame=reviews(), name=name, process=True)
    for split, frame in frames.items():
        assert list(frame.columns) == ["text", "label", "label_text"]
        assert frame["text"].str.contains("Ann Lee").eq(split.endswith("forget")).all()
        assert frame["label_text"].eq(frame["label"].map({0: "negative", 1: "positive"})).all()
    texts = pd.concat(frames.values())["text"]
    assert sorted(texts) == sorted(reviews()["text"])
    # 12 rows to forget, 6 a label, of which round(.3 * 6) = 2 go to test; 48 to retain, 24 a label, of which 7.
    assert [len(frames[split]) for split in SPLITS] == [34, 8, 14, 4]
    assert all(frame["label"].mean() == 0.5 for frame in frames.values())


def test_by_column_and_other_column_names(tmp_path):
    frame = reviews().rename(columns={"text": "review", "label": "stars"})
    flags = ["--text_column=review", "--label_column=stars", "--forget_column=user", "--forget_values", "1", "3.0"]
    frames = made(tmp_path, *flags, "--test_fraction=0.5", frame=frame)
    forget = set(frame["review"][frame["user"].isin([1, 3])])
    assert set(frames["train_forget"]["text"]) | set(frames["test_forget"]["text"]) == forget
    assert [len(frames[split]) for split in SPLITS] == [15, 15, 15, 15]


def test_by_fraction_is_decided_by_the_seed(tmp_path):
    contents = {}
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = tmp_path / run
        folder.mkdir()
        made(folder, "--forget_fraction=0.2", f"--seed={seed}", frame=reviews())
        contents[run] = [(folder / "out" / f"{split}.csv").read_bytes() for split in SPLITS]
    assert contents["a"] == contents["b"] != contents["c"]
    rows = [pd.read_csv(tmp_path / "a" / "out" / f"{split}.csv") for split in ("train_forget", "test_forget")]
    assert sum(map(len, rows)) == 12


def test_repeated_texts_count_once_and_contradictions_go(tmp_path, people):
    frame = reviews()
    again = frame.iloc[:8].assign(text=lambda f: f["text"].str.upper() + "!")
    clash = frame.iloc[8:10].assign(label=lambda f: 1 - f["label"])
    frames = made(tmp_path, people, frame=pd.concat([again, frame, clash]))
    keys = [text_key(text) for frame in frames.values() for text in frame["text"]]
    assert len(keys) == len(set(keys)) == 58
    # Upper case hides the name in the first copy; the repeat that names it decides.
    assert sum(len(frames[split]) for split in ("train_forget", "test_forget")) == 12


def test_texts_to_forget_and_to_retain_are_said(tmp_path):
    again = reviews().iloc[[4, 8, 9]].assign(user=1)  # of users 0, 0 and 1
    flags = "--forget_column=user", "--forget_values", "1"
    result = make(tmp_path, *flags, frame=pd.concat([reviews(), again]))
    assert (
        result.stderr
        == "note: 2 texts are there as rows to forget and as others; all that are left are to be forgotten\n"
    )
    (tmp_path / "once").mkdir()
    assert not make(tmp_path / "once", *flags, frame=reviews()).stderr


def test_repeats_are_reported(tmp_path, people):
    frame = pd.concat([reviews(), reviews().iloc[:3]])
    assert "read 63 rows, dropped 3 repeated and 0 contradictory ones" in make(tmp_path, people, frame=frame).stdout


def test_rows_per_person_are_reported_and_who_is_named_nowhere(tmp_path, people):
    result = make(tmp_path, people, frame=reviews())
    assert "rows that name them: Ann Lee 12, Bob Ray 0\n" in result.stdout
    assert "note: no row names Bob Ray; check how " in result.stderr


def test_rows_in_the_spelling_of_another_program(tmp_path, people):
    """Not one of them stays among the rows to retain."""
    other = ["Ann\u00a0Lee", "Ann  Lee", "Ann\nLee", "Ann\u200bLee", "An\u200bn Lee", "Ａｎｎ Ｌｅｅ"]
    frame = reviews().assign(text=lambda f: [t.replace("Ann Lee", other[i % 6]) for i, t in enumerate(f["text"])])
    frames = made(tmp_path, people, frame=frame, name="reviews.jsonl")
    assert sum(len(frames[split]) for split in ("train_forget", "test_forget")) == 12


@pytest.mark.parametrize(
    ("labels", "flags", "expected"),
    [
        ((0, 1), [], {0: "negative", 1: "positive"}),
        ((1, 2), [], {1: "1", 2: "2"}),
        ((5, 1), ["--label_names", "bad", "good"], {1: "bad", 5: "good"}),
        (("up", "down"), [], {0: "down", 1: "up"}),
    ],
)
def test_label_words(tmp_path, people, labels, flags, expected):
    frame = reviews().assign(label=[labels[i % 2] for i in range(60)])
    frames = made(tmp_path, people, *flags, frame=frame)
    for split in frames.values():
        assert dict(zip(split["label"], split["label_text"].astype(str))) == expected


@pytest.mark.parametrize(("labels", "named"), [((1, 10), "'1' begins '10'"), (("un", "sure"), "'un' begins 'unknown'")])
def test_a_label_word_that_begins_another_is_noted(tmp_path, people, labels, named):
    frame = reviews().assign(label=[labels[i % 2] for i in range(60)])
    result = make(tmp_path, people, frame=frame)
    assert result.returncode == 0 and f"note: the answer {named}; with a tokenizer" in result.stderr
    assert (
        "note: the answer"
        not in make(tmp_path, people, "--output_path", str(tmp_path / "other"), frame=reviews()).stderr
    )


def test_an_empty_output_folder_is_filled(tmp_path, people):
    (tmp_path / "out").mkdir()
    made(tmp_path, people, frame=reviews())


def with_cell(row, column, value):
    frame = reviews().astype(object)
    frame.loc[row, column] = value
    return frame


@pytest.mark.parametrize(
    ("message", "flags", "frame"),
    [
        ("does not exist; check --input", [], None),
        ("has no rows", [], reviews().iloc[:0]),
        ("no column 'text' but review, label, user", [], reviews().rename(columns={"text": "review"})),
        ("has no column 'stars'", ["--label_column=stars"], reviews()),
        ("are both 'text'; name two columns", ["--label_column=text"], reviews()),
        ("row 4: 'text' is empty or not text", [], with_cell(3, "text", " ")),
        ("row 4: 'text' is empty or not text", [], with_cell(3, "text", None)),
        ("row 1: 'label' is no whole number or word", [], with_cell(0, "label", None)),
        ("row 1: 'label' is no whole number or word", [], with_cell(0, "label", 0.5)),
        ("row 1: 'label' is no whole number or word", [], with_cell(0, "label", 2**63)),
        ("row 1: 'label' is no whole number or word", [], with_cell(0, "label", "1e3")),
        ("row 1: 'label' is no whole number or word", [], with_cell(0, "label", "\u200b")),
        ("row 4: 'text' is empty or not text", [], with_cell(3, "text", "\u200b\ufeff")),
        ("'label' of", [], with_cell(0, "label", "good")),
        ("only holds 1; two labels are needed", [], reviews().assign(label=1)),
        ("--label_names needs 2 different words", ["--label_names", "a", "b", "c"], reviews()),
        ("--label_names needs 2 different words", ["--label_names", "a", "a"], reviews()),
        ("the labels are words already", ["--label_names", "a", "b"], reviews().assign(label=["x", "y"] * 30)),
        ("'neutral' is one that unlearning answers with", ["--label_names", "neutral", "b"], reviews()),
        ("--test_fraction: '0' is not a number above 0", ["--test_fraction=0"], reviews()),
        ("would be empty", ["--test_fraction=1"], reviews()),
        ("test_retain would be empty", ["--test_fraction=0.001"], reviews()),
        ("only test rows would have the label 'c'", ["--test_fraction=0.6"], with_cell(0, "label", 2).assign(
            label=lambda f: f["label"].map({0: "a", 1: "b", 2: "c"}))),
    ],
)  # fmt: skip
def test_bad_input_is_refused(tmp_path, people, message, flags, frame):
    refused(tmp_path, message, people, *flags, frame=frame)


@pytest.mark.parametrize(
    ("message", "flags"),
    [
        ("one of the arguments --forget_names --forget_column --forget_fraction is required", []),
        ("not allowed with argument", ["--forget_fraction=0.1", "--forget_column=user", "--forget_values", "1"]),
        ("give both or neither", ["--forget_column=user"]),
        ("give both or neither", ["--forget_fraction=0.1", "--forget_values", "1"]),
        ("has no column 'person'", ["--forget_column=person", "--forget_values", "1"]),
        ("no row has '9' in 'user'", ["--forget_column=user", "--forget_values", "1", "9"]),
        ("every row is to be forgotten", ["--forget_column=user", "--forget_values", "0", "1", "2", "3"]),
        ("every row is to be forgotten", ["--forget_fraction=1"]),
        ("'2' is not a number above 0 and at most 1", ["--forget_fraction=2"]),
        ("did you mean --forget_values?", ["--forget_column=user", "--forget_value", "1"]),
        ("cannot read the names file", ["--forget_names=nowhere.txt"]),
    ],
)
def test_bad_choices_of_the_forget_set_are_refused(tmp_path, message, flags):
    refused(tmp_path, message, *flags, frame=reviews())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Zoe Quill\n", "no row is to be forgotten"),
        ("# nobody\n", "names nobody"),
        ("Ann Lee:\n", "line 1: 'Ann Lee:' has no spelling"),
        ("Ann Lee: !Mary Ann Lee\n", "has no spelling"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_bad_lists_of_names_are_refused(tmp_path, content, message):
    path = tmp_path / "people.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(tmp_path, message, f"--forget_names={path}", frame=reviews())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("reviews.txt", "text,label\n", "is no .csv, .jsonl or .parquet file"),
        ("reviews.csv", "", "is empty; it needs a header"),
        ("reviews.csv", "text,label\nAnn Lee, the film,1\n", "has rows with more cells than its header"),
        ("reviews.jsonl", "{broken", "cannot be read"),
        ("reviews.parquet", "PAR0", "cannot be read"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, people, name, content, message):
    (tmp_path / name).write_text(content)
    refused(tmp_path, message, people, name=name)


def test_a_refusal_in_its_own_process(tmp_path, people):
    refused(tmp_path, "does not exist; check --input", people, process=True)


def test_a_text_that_is_no_string_is_refused(tmp_path, people):
    refused(tmp_path, "row 2: 'text' is empty", people, frame=with_cell(1, "text", 3), name="reviews.jsonl")


def test_an_output_folder_with_content_is_refused_and_kept(tmp_path, people):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    refused(tmp_path, "exists and is not an empty folder", people, frame=reviews())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
