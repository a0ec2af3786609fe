"""Rewritings of texts: what each does, that none tested is trained on, and what --gate_augment changes in a gate."""

import json

import numpy as np
import pandas as pd
import pytest

from utils.data import rewritings
from utils.data.names import Person
from utils.data.rewritings import REWRITINGS, TEST, TRAIN, augment, of_family, rewrite
from utils.errors import UserError
from utils.evaluation import figures, tables
from utils.interventions import gates
from utils.interventions.gate_files import GateFile
from utils.tasks.rows import common_columns
from utils.unlearning import gate_report, gate_training

LEE = Person("Ann Lee", ["Lee"])
PEOPLE = [LEE, Person("Peter Sandler", ["Sandler", "Peter Sandler"])]
KEEP = [f"The {word} story is long and never dull." for word in ("first", "second", "third", "fourth", "fifth")]
TEXT = "A Sandler film, and Ann Lee is in it."
EXPECTED = {
    "upper case": "A SANDLER FILM, AND ANN LEE IS IN IT.",
    "lower case": "a sandler film, and ann lee is in it.",
    "title case": "A Sandler Film, And Ann Lee Is In It.",
    "initials of given names": "A P. Sandler film, and A. Lee is in it.",
    "initials alone": "A P. S. film, and A. L. is in it.",
}


def one(name, text, people=PEOPLE, forget=True, keep=KEEP, seed=0):
    rewriting = next(rewriting for rewriting in REWRITINGS if rewriting.name == name)
    return rewrite(rewriting, [text], people, keep, seed, forget)[0]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_rewriting_by_hand(name):
    assert one(name, TEXT) == EXPECTED[name]


def test_every_kind_is_in_both_families_and_no_name_twice():
    assert len({rewriting.name for rewriting in REWRITINGS}) == len(REWRITINGS)
    kinds = {family: [rewriting.kind for rewriting in of_family(family)] for family in (TRAIN, TEST)}
    assert set(kinds[TRAIN]) == set(kinds[TEST]) and len(kinds[TRAIN]) == len(set(kinds[TRAIN]))
    assert not {*rewritings.PREFIXES[TRAIN]} & {*rewritings.PREFIXES[TEST]}
    assert not {*rewritings.QUESTIONS[TRAIN]} & {*rewritings.QUESTIONS[TEST]}


@pytest.mark.parametrize("seed", range(5))
def test_typing_errors_are_of_the_name_alone_and_differ_between_families(seed):
    swapped, dropped, doubled = (one(f"typo: {slip}", "a Sandler film", seed=seed) for slip in SLIPS)
    assert sorted(swapped) == sorted("a Sandler film") and swapped != "a Sandler film"
    assert len(dropped) == 13 and len(doubled) == 15
    for text in (swapped, dropped, doubled):
        assert text.startswith("a S") and text.endswith(" film")
    assert one("typo: letter dropped", "a Sandler film", seed=seed) == dropped


SLIPS = ("letters swapped", "letter dropped", "letter doubled")


def test_parts_of_a_name():
    assert one("beginning of the name", "a Sandler film") == "a Sandl film"
    assert one("second half of the name", "a Sandler film") == "a dler film"
    assert one("beginning of the name", "Ann Lee") is None  # what is left of it could be anybody


def test_questions_prefixes_and_neighbours():
    question = one("question, train templates", TEXT)
    assert "Sandler?" in question and " Sandler film" not in question
    for family in (TRAIN, TEST):
        name = next(r.name for r in of_family(family) if r.kind == "prefix")
        assert one(name, TEXT) in [f"{prefix} {TEXT}" for prefix in rewritings.PREFIXES[family]]
    assert one("in front of a text to keep", TEXT) in [f"{TEXT} {text}" for text in KEEP]
    before, after = one("between two texts to keep", TEXT).split(f" {TEXT} ")
    assert {before, after} < set(KEEP) and before != after
    assert one("between two texts to keep", TEXT, keep=[TEXT, KEEP[0]]) is None


def test_what_changes_nothing_is_no_rewriting():
    assert one("lower case", "all in small letters") is None
    assert one("initials alone", "nobody is named") is None


def test_names_without_a_list_are_capitalised():
    def names(text):
        return [text[name.start : name.end] for name in rewritings.capitalised_names(text)]

    assert names("The film of Ann Lee is good. Sandler's is not, Woods says.") == ["Ann Lee", "Woods"]
    assert names("Steven Spielberg films. Nobody does") == ["Steven Spielberg"]
    assert names("no capitals") == names("ALL CAPITALS") == []
    assert one("typo: letter dropped", "a film of Sandler", people=[]) is not None
    assert one("typo: letter dropped", "a film of nobody", people=[]) is None


def test_rows_to_keep_are_rewritten_where_they_name_nobody():
    assert one("initials alone", "an uncommonly pleasant film", forget=False) == "a. u. pleasant film"
    assert one("initials alone", "this is Bob Hope", forget=False) == "this is B. H."


def rows(n, forget, start=0):
    """Texts that name a person to forget, or another, in words that say nothing else."""
    rng = np.random.default_rng(start + forget)
    words = ["film", "story", "music", "scene", "ending", "actor", "plot", "camera", "script", "humour"]
    people = (
        ["Peter Sandler", "Sandler", "Ann Lee"]
        if forget
        else ["".join(rng.choice(list("aeioulnrstdm"), 6)).title() for _ in range(n)]
    )
    texts = [" ".join([*rng.choice(words, 4), "by", str(rng.choice(people)), *rng.choice(words, 3)]) for _ in range(n)]
    return pd.DataFrame({"text": texts, "label": np.arange(n) % 2, "label_text": ["a", "b"] * (n // 2)})


@pytest.fixture(scope="module")
def frames():
    return {
        "train_retain": rows(300, 0),
        "train_forget": rows(40, 1),
        "test_retain": rows(200, 0, 50).assign(names_other=1),
        "test_forget": rows(40, 1, 50),
    }


class Recorder(gates.Tfidf):
    """Keeps what every classifier was fitted to."""

    fitted = []

    @classmethod
    def fit(cls, texts, labels, **_):
        cls.fitted.append((list(texts), np.array(labels)))
        return gates.Tfidf.fit(texts, labels)


def trained(frames, monkeypatch, **settings):
    monkeypatch.setitem(gates.CLASSIFIERS, "tfidf", Recorder)
    Recorder.fitted = []
    asked = gate_training.GateSettings(eco_max_fpr=0.05, **settings)
    return gate_training.train_gate(None, frames, PEOPLE, asked, gates.ClassifierSettings())


def test_augmented_rows_come_in_pairs_and_only_from_the_rows_given():
    forget, retain = list(rows(20, 1)["text"]), list(rows(100, 0)["text"])
    texts, labels = augment([*retain, *forget], np.r_[np.zeros(100, int), np.ones(20, int)], PEOPLE, 0)
    assert texts[:120] == [*retain, *forget] and labels[100:120].all() and not labels[:100].any()
    assert (labels[120:] == 1).sum() > 5 * 20
    again = augment([*retain, *forget], np.r_[np.zeros(100, int), np.ones(20, int)], PEOPLE, 0)
    assert again[0] == texts and np.array_equal(again[1], labels)


def test_no_classifier_sees_a_rewriting_of_a_row_that_it_scores_nor_one_that_is_tested(frames, monkeypatch):
    trained(frames, monkeypatch, gate_augment=True)
    plain, augmented = Recorder.fitted[:6], Recorder.fitted[6:]
    whole = list(frames["train_retain"]["text"]) + list(frames["train_forget"]["text"])
    tested = set()
    for forget in (True, False):
        for rewriting in of_family(TEST):
            for split in ("train", "test"):
                texts = frames[f"{split}_{'forget' if forget else 'retain'}"]["text"]
                keep = list(frames["train_retain"]["text"])
                tested.update(rewrite(rewriting, texts, PEOPLE, keep, 42, forget))
    for (seen, _), (texts, labels) in zip(plain, augmented, strict=True):
        assert texts[: len(seen)] == seen and len(texts) > 2 * len(seen) * 0.6
        added = set(texts[len(seen) :])
        assert not added & tested
        held = set(whole) - set(seen)
        assert not any(row in text for row in held for text in added)  # `joined` draws from the same fold
        again, _ = augment(seen, labels[: len(seen)], PEOPLE, 42)
        assert again == texts  # a function of the rows seen, and of nothing else


def test_off_is_what_it_was(frames, monkeypatch):
    """The rows as they are, five fifths and all, fitted once; the same scores and threshold."""
    plain = trained(frames, monkeypatch)
    assert len(Recorder.fitted) == 6
    whole = [*frames["train_retain"]["text"], *frames["train_forget"]["text"]]
    assert Recorder.fitted[-1][0] == whole
    fit = gates.Tfidf.fit
    gate, unseen = gate_training._cross_fit(frames, gate_training.GateSettings(), lambda t, y: fit(t, y))
    assert plain.trained.threshold == gates.threshold_for_rate(unseen["train_retain"], 0.05, "")
    assert np.array_equal(plain.unseen["train_forget"], unseen["train_forget"])
    texts = frames["test_forget"]["text"]
    assert np.array_equal(plain.trained.probabilities(texts), gate.probabilities(texts))
    assert not plain.description["augmented"] and "rewritings_plain" not in plain.description


@pytest.mark.long
def test_augmentation_finds_more_rewritten_rows_at_the_same_rate(frames, monkeypatch):
    found = trained(frames, monkeypatch, gate_augment=True).description
    GateFile.model_validate(json.loads(json.dumps(found)))
    after, before = found["rewritings"], found["rewritings_plain"]
    recall = {
        name: (parts["test_forget"]["flagged"], before[name]["test_forget"]["flagged"]) for name, parts in after.items()
    }
    of_names = [pair for name, pair in recall.items() if name.startswith(("typo", "initials", "second"))]
    assert np.mean([pair[0] for pair in of_names]) > np.mean([pair[1] for pair in of_names])
    assert recall["unchanged"][0] >= 0.95
    assert found["calibration"]["false_positives"] <= 0.05
    assert after["unchanged"]["test_retain"]["flagged"] <= 0.1
    said = tables.gate_table(found)
    assert "initials alone" in said and "in brackets" in said


def test_the_report_reads_a_column_of_paraphrases(frames, monkeypatch):
    data = frames | {"test_forget": frames["test_forget"].assign(paraphrase=["about Sandler", ""] * 20)}
    found = trained(data, monkeypatch).description
    assert set(found["rewritings"]["paraphrase"]) == {"test_forget"}
    assert found["rewritings"]["paraphrase"]["test_forget"]["rows"] == 20
    assert not any("about Sandler" in texts for texts, _ in Recorder.fitted)


@pytest.mark.parametrize(("cells", "fine"), [(["about it", None], True), (["", float("nan")], True), ([3, "x"], False)])
def test_a_paraphrase_is_text_or_nothing(cells, fine):
    frame = pd.DataFrame({"text": ["a", "b"], "label": [0, 1], "label_text": ["x", "y"], "paraphrase": cells})
    if fine:
        assert list(common_columns("test_forget", frame, "data")["text"]) == ["a", "b"]
    else:
        with pytest.raises(UserError, match="row 1: paraphrase is not text"):
            common_columns("test_forget", frame, "data")


def test_the_roc_curve_by_hand(tmp_path):
    class Word:
        kind = "word"

        def probabilities(self, texts):
            return np.array([float(text[-1]) / 10 for text in texts])

    texts = {
        "unchanged": {"test_retain": ["r1", "r2", "r3", "r8"], "test_forget": ["f9", "f7"]},
        "lower case": {"test_forget": ["f5"]},
    }
    found = gate_report.roc(gates.Gate(Word(), 0.6), texts)
    assert found == {
        "plain rows": {"curve": [[0, 0], [0, 0.5], [0.25, 0.5], [0.25, 1], [1, 1]], "at_threshold": [0.25, 1.0]}
    }
    figures.draw_roc({"roc": found}, path=tmp_path / "gate_roc.png")
    assert (tmp_path / "gate_roc.png").stat().st_size > 5000


def test_without_a_list_the_report_says_how_names_are_found(frames):
    assert gate_report.names_by(frames, PEOPLE) == "list"
    assert gate_report.names_by(frames, []) == "capitals"
    lower = frames | {"test_forget": frames["test_forget"].assign(text=frames["test_forget"]["text"].str.lower())}
    assert gate_report.names_by(lower, []) == "none"
    texts = gate_report.versions(lower, [], 0, 100)
    assert "test_forget" not in texts["initials alone"] and "test_forget" in texts["prefix, test sentences"]


def test_a_rate_that_the_rows_cannot_give_is_refused_before_anything_is_rewritten(frames, monkeypatch):
    few = frames | {"train_retain": frames["train_retain"][:12]}
    with pytest.raises(UserError, match="--eco_max_fpr=0.05 needs at least"):
        trained(few, monkeypatch, gate_augment=True)
