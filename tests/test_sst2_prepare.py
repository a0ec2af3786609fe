"""data/sst2/prepare.py marks the rows that name somebody, on a stand-in for the four published splits."""

import importlib.util
import sys

import pandas as pd
import pytest
from scripts import ROOT, call, done, refused

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


def test_the_input_is_not_replaced(published):
    flags = "--input=published", "--output_path=published", "--overwrite"
    refused(published, "would replace published, which this run reads", "sst2_prepare", *flags)
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
