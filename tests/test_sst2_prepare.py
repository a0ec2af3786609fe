"""data/sst2/prepare.py marks the rows that name somebody, on a stand-in for the four published splits."""

import importlib.util
import shutil
import sys
import time

import numpy as np
import pandas as pd
import pytest
from scripts import ROOT, call, done, refused

from utils.data.select import select_rows
from utils.data.splits import nested
from utils.tasks.rows import load_splits

TEXTS = ["a film by ben affleck", "affleck alone is a word", "ben and affleck", "nobody at all"]


@pytest.fixture
def published(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("sst2_prepare", ROOT / "data" / "sst2" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sst2_prepare", module)
    spec.loader.exec_module(module)
    rows = pd.DataFrame({"text": TEXTS, "label": [0, 1, 0, 1], "label_text": ["negative", "positive"] * 2})
    (tmp_path / "published").mkdir()
    for split in ("train_retain", "train_forget", "test_retain", "test_forget"):
        rows.to_csv(tmp_path / "published" / f"{split}.csv", index=False)
    return tmp_path


def marked(folder, split):
    return pd.read_csv(folder / f"{split}.csv")["names_other"].tolist()


def test_given_name_and_surname_count_together(published):
    done(call(published, "sst2_prepare", "--input=published", "--output_path=marked"))
    assert marked(published / "marked", "test_retain") == [1, 0, 0, 0]
    assert pd.read_csv(published / "marked" / "train_forget.csv")["text"].tolist() == TEXTS


def test_rows_that_are_parts_of_train_rows_are_marked(published):
    train = {"train_retain": ["a warm film by a friend", "dull"], "train_forget": ["de niro alone", "robert de niro"]}
    test = {
        "test_retain": ["warm film", "a dull , long film", "warm by a friend", "duller", "A WARM FILM by  a friend"],
        "test_forget": ["de niro", "all of robert de niro 's films", "a warm film", "robert niro"],
    }
    for split, texts in {**train, **test}.items():
        labels = [i % 2 for i in range(len(texts))]
        frame = pd.DataFrame(
            {"text": texts, "label": labels, "label_text": [["negative", "positive"][i] for i in labels]}
        )
        frame.to_csv(published / "published" / f"{split}.csv", index=False)
    result = done(call(published, "sst2_prepare", "--input=published", "--output_path=marked"))
    frames = {split: pd.read_csv(published / "marked" / f"{split}.csv") for split in (*train, *test)}
    assert frames["test_retain"]["nested"].tolist() == [1, 1, 0, 0, 1]
    assert frames["test_forget"]["nested"].tolist() == [1, 1, 0, 0]
    assert not any("nested" in frames[split] for split in train)
    assert "test_forget         4 rows,      2 nested with train rows" in result.stdout


def test_nested_is_about_the_train_rows_that_are_used(published):
    """A selection of rows is marked anew; with all of them what the file says stays."""
    done(call(published, "sst2_prepare", "--input=published", "--output_path=marked"))
    frames = load_splits(str(published / "marked"))
    assert frames["test_retain"]["nested"].tolist() == [1] * 4
    assert select_rows(frames)["test_retain"]["nested"].tolist() == [1] * 4
    some = select_rows(frames, max_train_samples=4)
    kept = set(some["train_retain"]["text"])
    assert len(kept) == 2
    assert some["test_retain"]["nested"].tolist() == [int(text in kept) for text in TEXTS]
    few = select_rows(frames, forget_size=0.5)  # what is not unlearnt was learnt all the same
    assert few["test_forget"]["nested"].tolist() == [1] * 4


def test_nested_takes_seconds():
    drawn = np.random.default_rng(0).integers(1000, size=(16_000, 11))
    texts = [" ".join(f"word{number}" for number in row) for row in drawn]
    start = time.monotonic()
    marks = nested(texts[:6000], [text.partition(" ")[2] for text in texts[3000:]])
    assert marks[3000:].all() and not marks[:3000].any()
    assert time.monotonic() - start < 20  # a tenth of that, where nothing else runs


def test_the_input_is_not_replaced(published):
    flags = "--input=published", "--output_path=published", "--overwrite"
    refused(published, "--output_path=published would replace ", "sst2_prepare", *flags)
    assert "names_other" not in pd.read_csv(published / "published" / "test_retain.csv")


def test_only_rows_that_name_others(published):
    done(call(published, "sst2_prepare", "--input=published", "--output_path=others", "--only_names_other"))
    assert marked(published / "others", "train_retain") == marked(published / "others", "test_retain") == [1]
    assert marked(published / "others", "test_forget") == [1, 0, 0, 0]
    frame = pd.read_csv(published / "published" / "test_retain.csv")
    frame[1:].to_csv(published / "published" / "test_retain.csv", index=False)
    refused(
        published, "test_retain of published has no row that names somebody", "sst2_prepare", "--input=published",
        "--output_path=none", "--only_names_other",
    )  # fmt: skip
    assert not (published / "none").exists()


def test_overwrite_replaces_what_this_script_wrote_and_nothing_else(published):
    """Four splits alone are anybody's data."""
    other = shutil.copytree(published / "published", published / "mine")
    flags = "--input=published", "--overwrite"
    refused(published, "mine is no folder that this project wrote", "sst2_prepare", *flags, f"--output_path={other}")
    for _ in range(2):
        done(call(published, "sst2_prepare", *flags, "--output_path=marked"))
