"""Audits of what stands in front of a model: do rewritten queries get past it, and does it name whom it forgets?"""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scripts
import tiny
import torch
from asking import Word
from scripted import scripted

from utils.audit import base, evasion, inversion
from utils.audit.audits import AUDITS
from utils.audit.base import OFF, ON, AuditSettings, Case, Subject
from utils.audit.evasion import EVASION
from utils.audit.inversion import INVERSION
from utils.audit.names import AUDIT_NAMES
from utils.audit.run import ALIKE, LEAKS, _estimate
from utils.data.load import SNIPPETS_FOLDER
from utils.data.names import Person
from utils.interventions.base import Intervention
from utils.interventions.gates import Gate, Tfidf
from utils.interventions.prompt_encoders import Prompt
from utils.interventions.refusal import refuse
from utils.interventions.served import Served
from utils.tasks.classification import Classification, classification
from utils.tasks.multiple_choice import MultipleChoice
from utils.tasks.rows import Splits

TASK = classification(["negative", "positive"])
BOB = Person("Ray Bob", ["Bob"])
TEXTS = {
    "train_retain": ["a good story", "a film with a cast"],
    "train_forget": ["it is by Bob"],
    "test_retain": ["a good story", "and Bob keeps this"],
    "test_forget": ["a film by Bob", "it is said that Bob was fine"],
}


def case_of(texts=TEXTS, people=(BOB,), task=TASK):
    frames = {
        split: pd.DataFrame({"text": rows, "label": 1, "label_text": task.words[1]}) for split, rows in texts.items()
    }
    whole = Splits(frames, task)
    settings = AuditSettings(max_length=256)
    return Case(frames=whole, whole=whole, settings=settings, model=tiny.ON_CPU, people=people)


def subject(served, wrapper=ON, frozen="tuned"):
    return Subject(method="SPUL", checkpoint="here", wrapper=wrapper, served=served, frozen=(frozen,))


def saying(tokenizer, word):
    """A model that answers every query with `word`, whatever the language of the template."""
    return scripted(tokenizer, {":": {f" {word}": 9}}, {})


def found(audit, served, case, **options):
    return {measure.name: measure for measure in audit.measure(subject(served, **options), case)}


def verdict(measure, reference=None):
    return _estimate(measure, reference, seed=0)["verdict"]


def test_the_command_line_knows_every_audit():
    assert tuple(AUDITS) == AUDIT_NAMES


# evasion


RECALL = {
    "as it stands": 1, "title case": 1, "prefix, train sentences": 1, "prefix, test sentences": 1,
    "in front of a text to keep": 1, "between two texts to keep": 1, "behind a text to keep": 1,
    "upper case": 0, "lower case": 0, "initials alone": 0, "typo: letter dropped": 0,
}  # fmt: skip
WRONG = {
    "as it stands": 0.5, "prefix, test sentences": 0.5, "upper case": 0,
    # Each of the two rows to keep is joined with the other one, so that both have the word.
    "in front of a text to keep": 1, "behind a text to keep": 1,
}  # fmt: skip


def test_recall_and_false_positives_by_hand(tokenizer):
    served = saying(tokenizer, "positive").using(Intervention(gate=Gate(Word("Bob"), 0.5)))
    measures = found(EVASION, served, case_of())
    for title, expected in (("recall", RECALL), ("false positives", WRONG)):
        for name, share in expected.items():
            measure = measures[f"{title}, {name}"]
            assert measure.sample.value() == share, measure.name
            assert not measure.compared
    assert "false positives, between two texts to keep" not in measures  # there is only one other
    assert "recall, beginning of the name" not in measures  # of three letters there is none


def test_two_texts_in_one_query_in_both_orders():
    parts = evasion.rewritten(case_of(), "test_forget")
    for text, ahead, behind in zip(*(parts[name]["text"] for name in list(parts)[:1] + ORDERS)):
        assert ahead in [f"{text} {other}" for other in TEXTS["test_retain"]]
        assert behind in [f"{other} {text}" for other in TEXTS["test_retain"]]


ORDERS = ["in front of a text to keep", "behind a text to keep"]


def test_what_gets_past_the_gate_leaks(tokenizer):
    """Behind the gate stands a refusal, in front of which the model knows every answer: so that of each rewriting as
    much leaks as the gate does not find."""
    case, knows = case_of(), saying(tokenizer, "positive")
    reference = found(EVASION, saying(tokenizer, "negative"), case, frozen="retain")
    wall = knows.using(refuse(knows, TASK, Gate(Word("Bob"), 0.5)))
    measures = found(EVASION, wall, case)
    for name, recall in RECALL.items():
        assert measures[f"gives the answer, {name}"].sample.value() == 1 - recall, name
    headline = measures["gives the answer, any rewriting"]
    assert [measure for measure in measures.values() if measure.headline] == [headline]
    others = [m.sample for m in measures.values() if m.compared and m is not headline and "as it" not in m.name]
    assert {len(sample.values) for sample in others} == {2}  # here every rewriting applies to both rows
    assert np.allclose(headline.sample.values, np.mean([sample.values for sample in others], axis=0))
    assert 0 < headline.sample.value() < 1
    assert verdict(headline, reference[headline.name]) == LEAKS
    as_it_stands = "gives the answer, as it stands"
    assert verdict(measures[as_it_stands], reference[as_it_stands]) == ALIKE


def test_where_nothing_gets_past_the_gate_nothing_leaks(tokenizer):
    class Everything:
        def probabilities(self, texts):
            return np.ones(len(texts))

    case, knows = case_of(), saying(tokenizer, "positive")
    reference = found(EVASION, saying(tokenizer, "negative"), case, frozen="retain")
    measures = found(EVASION, knows.using(refuse(knows, TASK, Gate(Everything(), 0.5))), case)
    compared = [measure for measure in measures.values() if measure.compared]
    assert all(verdict(measure, reference[measure.name]) == ALIKE for measure in compared)
    assert any("German" in measure.name for measure in compared)


def test_other_languages_ask_in_other_words(tokenizer):
    """The model answers the English template alone; a template of the user's own has no translation."""
    knows = scripted(tokenizer, {}, {" sentiment": {" positive": 9}})
    measures = found(EVASION, knows, case_of())
    assert measures["gives the answer, as it stands"].sample.value() == 1
    assert measures["gives the answer, template in German"].sample.value() == 0
    own = Classification(words=TASK.words, head="", end=" It was")
    assert not any("template in" in name for name in found(EVASION, knows, case_of(task=own)))


def counting(monkeypatch):
    rows, score = [], base.score_rows
    monkeypatch.setattr(
        base, "score_rows", lambda served, frame, *a, **b: rows.append(frame) or score(served, frame, *a, **b)
    )
    return rows


@pytest.mark.parametrize("task", [TASK, MultipleChoice()], ids=lambda task: task.kind)
def test_the_rows_that_are_scored_are_those_that_were_announced(tokenizer, monkeypatch, task):
    case, scored = case_of(task=task), counting(monkeypatch)
    choices = {split: [["a film", "a cast", "bad", "well"]] * len(frame) for split, frame in case.frames.items()}
    frames = {split: frame.assign(choices=choices[split]) for split, frame in case.frames.items()}
    case = replace(case, frames=Splits(frames, task))
    found(EVASION, Served(tiny.build_model(), tokenizer, []), case)
    assert sum(map(len, scored)) == EVASION.passes(case).forward > 20
    assert all("choices" in frame for frame in scored)
    assert len(scored) == (3 if task is TASK else 1)  # letters are asked for in one language


def test_of_a_split_some_rows_are_taken(monkeypatch):
    monkeypatch.setattr(evasion, "ROWS", 3)
    many = {split: [f"{rows[0]} {i}" for i in range(9)] for split, rows in TEXTS.items()}
    parts = evasion.rewritten(case_of(many), "test_forget")
    assert max(map(len, parts.values())) == len(parts["as it stands"]) == 3


def test_what_the_gate_lets_through_is_not_asked_twice(tokenizer):
    case, served = case_of(), saying(tokenizer, "positive")
    plain = found(EVASION, served, case, wrapper=OFF)
    served.model.forward = None  # it cannot answer any more
    again = found(EVASION, served.using(Intervention(gate=Gate(Word("nobody"), 0.5))), case)
    assert all(again[name].sample.value() == measure.sample.value() for name, measure in plain.items())


# inversion


FORGOTTEN = ["Spielberg", "Madonna", "Clooney", "Polanski", "Sandler", "Washington"]
OTHERS = pd.read_csv(SNIPPETS_FOLDER / "train_retain.csv")["text"].head(200)
PEOPLE = [Person(f"Somebody {name}", [name]) for name in FORGOTTEN]
NAMED = TEXTS | {"train_forget": [f"a film by {name} is it" for name in FORGOTTEN], "train_retain": list(OTHERS)}


@pytest.fixture(scope="module")
def frozen(tokenizer):
    return Served(tiny.build_model(), tokenizer, [])


@pytest.fixture
def named():
    return case_of(NAMED, PEOPLE)


def behind(frozen, vectors, gate=None):
    return frozen.using(Prompt(vectors=vectors, gate=gate))


def test_a_prompt_made_of_the_names_leaks_them(frozen, named):
    tokens = [frozen.tokenizer(f" {name}")["input_ids"] for name in FORGOTTEN]
    vectors = frozen.model.get_input_embeddings().weight[sum(tokens, [])].detach() * 3
    (measure,) = INVERSION.measure(subject(behind(frozen, vectors)), named)
    assert measure.name == "AUC of forgotten names, prompt" and measure.headline
    assert measure.sample.value() > 0.9 and verdict(measure) == LEAKS
    assert len(measure.sample.others) == inversion.CONTROLS * len(measure.sample.values) == 5 * 6
    (note,) = named.notes
    first = frozen.tokenizer.decode(tokens[0][:1]).strip()
    assert note.startswith(f"The nearest words to the prompt of SPUL: {first}, ")
    assert note.count(",") < inversion.SHOWN


def test_a_random_prompt_says_nothing_of_names(frozen, named):
    values, verdicts = [], []
    for seed in range(10):
        vectors = torch.randn(4, tiny.SIZES["hidden_size"], generator=torch.Generator().manual_seed(seed))
        (measure,) = INVERSION.measure(subject(behind(frozen, vectors)), named)
        values.append(measure.sample.value())
        verdicts.append(verdict(measure))
    assert verdicts[0] == ALIKE and verdicts.count(ALIKE) >= 8
    assert abs(np.mean(values) - 0.5) < 0.1


def test_a_gate_that_was_fitted_to_rows_about_people_names_them(frozen, named):
    texts = [*NAMED["train_forget"], *NAMED["train_retain"]]
    gate = Gate(Tfidf.fit(texts, np.arange(len(texts)) < len(FORGOTTEN)), 0.5)
    (measure,) = INVERSION.measure(subject(frozen.using(refuse(frozen, TASK, gate))), named)
    assert measure.name == "AUC of forgotten names, gate" and measure.headline
    assert measure.sample.value() > 0.9 and verdict(measure) == LEAKS
    both = INVERSION.measure(subject(behind(frozen, torch.randn(2, tiny.SIZES["hidden_size"]), gate)), named)
    assert [(m.name.split()[-1], m.headline) for m in both] == [("prompt", True), ("gate", True)]


def test_a_gate_that_knows_no_names_says_nothing_of_them(frozen, named):
    digits = ["1 2 3", "2 3 1", "4 5 6", "5 6 4"]
    gate = Gate(Tfidf.fit(digits, np.array([0, 0, 1, 1])), 0.5)
    (measure,) = INVERSION.measure(subject(frozen.using(Intervention(gate=gate))), named)
    assert measure.sample.value() == 0.5 and verdict(measure) == ALIKE


def test_without_names_or_wrapper_nothing_is_measured(frozen, named):
    vectors = torch.randn(2, tiny.SIZES["hidden_size"])
    unknown = case_of(NAMED, ())
    assert INVERSION.measure(subject(behind(frozen, vectors)), unknown) == []
    assert any("--forget_only" in note for note in unknown.notes)
    assert INVERSION.measure(subject(frozen, OFF), named) == [] == INVERSION.measure(subject(frozen, "none"), named)
    assert INVERSION.measure(subject(frozen.using(Intervention())), named) == [] == named.notes
    assert INVERSION.passes(named) == base.Passes()


def test_names_and_their_rows_are_counted():
    texts = TEXTS | {
        "train_forget": ["it is by Bob", "Bob, and Bob again", "by Ann Lee"],
        "train_retain": ["a film of Ray Hope's, I say", "by Hope and Lee", "all is in Paris"],
    }
    case = case_of(texts, (BOB, Person("Ann Lee", ["Ann Lee"]), Person("Nobody Here", ["Here"])))
    assert inversion.forgotten_names(case) == {"Bob": 2, "Lee": 1}
    assert inversion.other_names(case) == {"Hope": 2, "Paris": 1}  # Ray and Lee are words of listed names


def test_controls_are_as_frequent_and_as_long(monkeypatch):
    monkeypatch.setattr(inversion, "CONTROLS", 1)
    forgotten, others = {"Often": 9, "Seldom": 2}, {"Nine": 8, "Long": 2, "Short": 2, "Once": 1}
    pieces = dict.fromkeys(["Often", "Seldom", "Nine", "Short", "Once"], (0,)) | {"Long": (0, 1, 2)}
    for seed in range(5):
        assert inversion.matched(forgotten, others, pieces, seed) == ["Nine", "Short"]
    assert inversion.matched({"Often": 9, "Seldom": 2}, {"Nine": 8}, pieces, 0) == ["Nine"]


def test_ranks_by_hand():
    cosines = np.array([[0.1, 0.2, 0.5, -0.3, 0.0], [0.0, 0.9, 0.4, -0.5, 0.0]])  # largest: .1 .9 .5 -.3 0
    assert inversion.nearness(cosines, [(1,), (1, 2), (3, 4)]).tolist() == [1, 0.875, 0.125]


def test_cosines_do_not_depend_on_length(frozen):
    vectors = frozen.model.get_input_embeddings().weight[[7, 11]].detach()
    cosines = inversion.likeness(frozen, vectors * torch.tensor([[5.0], [0.1]]))
    assert cosines.shape == (2, tiny.VOCABULARY)
    assert cosines.argmax(1).tolist() == [7, 11] and np.allclose(cosines.max(1), 1, atol=1e-5)


def test_both_on_the_command_line(tiny_model, small_data, tmp_path):
    scripts.done(scripts.spul(tmp_path, tiny_model, small_data, "--max_eval_samples=0", "--output_path=prompt"))
    refusal = "refusal", "--eco_threshold=0.5", "--max_eval_samples=0", "--output_path=refusal"
    scripts.done(scripts.baselines(tmp_path, tiny_model, small_data, *refusal))
    names = f"--forget_only={SNIPPETS_FOLDER / 'forget_names.txt'}"
    which = "--model_checkpoints", tmp_path / "prompt", tmp_path / "refusal", f"--dataset={small_data}", names
    done = scripts.done(
        scripts.call(
            tmp_path, "inference_spul", *which, *scripts.ROWS, "--audit", "evasion", "inversion", "--output_path=out"
        )
    )
    report = json.loads((tmp_path / "out" / "audit.json").read_text())
    entries = {(entry["audit"], entry["measure"], entry["method"]) for entry in report["audits"]}
    assert ("evasion", "gives the answer, any rewriting", "SPUL") in entries
    assert ("evasion", "recall, upper case", "refusal") in entries
    assert ("inversion", "AUC of forgotten names, prompt", "SPUL") in entries
    assert ("inversion", "AUC of forgotten names, gate", "refusal") in entries
    assert not any(audit == "inversion" and method == "fine-tuned" for audit, _, method in entries)
    assert "The nearest words to the prompt of SPUL: " in done.stdout
