"""Answers drawn many times: what leaks is counted right, and a model that knows its rows is found out."""

import math

import memorised
import pandas as pd
import pytest
import tiny
from scripted import one, scripted

from utils.audit.base import NONE, Subject
from utils.audit.sampling import LEAK, SAMPLING, leak_at_k, measure
from utils.interventions.refusal import Refusal
from utils.interventions.served import Served
from utils.models.generate import generate
from utils.tasks.classification import classification
from utils.tasks.question_answering import QuestionAnswering


def test_leak_at_k_by_hand():
    """Of 4 answers of which 1 leaks half of the pairs hold it, and one in four alone does."""
    assert leak_at_k(4, 1, 2) == 0.5
    assert leak_at_k(4, 1, 1) == 0.25
    assert leak_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert [leak_at_k(4, 0, 2), leak_at_k(4, 4, 1), leak_at_k(10, 3, 8)] == [0, 1, 1]
    assert leak_at_k(2000, 1, 1000) == 0.5  # of binomials with six hundred digits
    assert leak_at_k(10**5, 1, 1) == pytest.approx(1e-5, rel=1e-9)


A, B = 8.0, 5.0  # logits of film behind the query and of well behind film; all others are 0


def by_script(method, tokenizer, script, *interventions):
    served = scripted(tokenizer, script, {})
    served = Served(served.model, tokenizer, [], tuple(interventions))
    return Subject(method=method, checkpoint=method, wrapper=NONE, served=served, frozen=(method,))


def values(measures):
    return {found.name: found.sample.values.tolist() for found in measures}


def p_of(logit, temperature, size):
    return math.exp(logit / temperature) / (math.exp(logit / temperature) + size - 1)


def test_label_words_are_not_drawn_but_computed(tokenizer):
    """p = exp(a / T) / (exp(a / T) + |V| - 1), a product over tokens, and leak@k = 1 - (1 - p)^k."""
    task, n = classification(["film", "bad well"]), len(tokenizer)
    frame = pd.DataFrame({"text": ["a", "b c"], "label": [0, 1], "label_text": task.words})
    script = {":": {" film": A, " bad": B}, " bad": {" well": B}}
    subject = by_script("x", tokenizer, script)
    found = values(measure(subject, memorised.case_of(frame, task, samples=16)))
    assert set(found) == {f"leak@{k}, T={t}" for k in (1, 8, 16) for t in ("0.7", "1")}
    for temperature in (0.7, 1.0):
        film = math.exp(A / temperature) / (math.exp(A / temperature) + math.exp(B / temperature) + n - 2)
        bad = film * math.exp((B - A) / temperature) * p_of(B, temperature, n)
        for k in (1, 8, 16):
            expected = [1 - (1 - p) ** k for p in (film, bad)]
            assert found[f"leak@{k}, T={temperature:g}"] == pytest.approx(expected, rel=1e-3)


def test_no_more_answers_are_counted_than_drawn(tokenizer):
    task = classification(["film", "bad"])
    frame = pd.DataFrame({"text": ["a"], "label": [0], "label_text": ["film"]})
    for samples, ks in ((1, {1}), (4, {1, 4}), (8, {1, 8}), (9, {1, 8, 9})):
        found = measure(by_script("x", tokenizer, {}), memorised.case_of(frame, task, samples=samples))
        assert {int(one.name.split(",")[0][5:]) for one in found} == ks
        assert [one.name for one in found if one.headline] == ["leak@1, T=1"]


def test_a_model_that_gives_the_label_leaks(tokenizer):
    task = classification(["film", "bad"])
    frame = pd.DataFrame({"text": list("abcdefgh"), "label": 0, "label_text": "film"})
    subjects = [
        by_script("retain model", tokenizer, {":": {" film": 6.0}}),
        by_script("knows", tokenizer, {":": {" film": 20.0}}),
        by_script("knows no more", tokenizer, {":": {" film": 6.0}}),
        by_script("avoids it", tokenizer, {":": {" film": -6.0}}),
    ]
    found = memorised.entries(SAMPLING, memorised.case_of(frame, task, samples=8), *subjects)
    verdicts = [found[subject.method, "leak@1, T=1"]["verdict"] for subject in subjects[1:]]
    assert verdicts == ["leaks", "as the retain model", "over-unlearnt"]


def test_a_fixed_answer_never_leaks(tokenizer):
    task = classification(["film", "bad"])
    frame = pd.DataFrame({"text": list("ab"), "label": 0, "label_text": "film"})
    refusal = Refusal(word="film", tokens=(one(tokenizer, " film"),))
    found = measure(by_script("x", tokenizer, {}, refusal), memorised.case_of(frame, task, samples=4))
    assert {value for row in found for value in row.sample.values} == {0.0}
    asked = memorised.case_of(memorised.questions(), memorised.QUESTIONS, samples=2)
    found = measure(memorised.subject_of("x", tiny.build_model(), tokenizer, refusal), asked)
    assert {value for row in found for value in row.sample.values} == {0.0}


def test_drawn_answers_are_counted_row_by_row(tokenizer, monkeypatch):
    """Four of five words are a recall of 0.8, which leaks; three are not. Of 4 answers to a row 0, 1 and 2 leak."""
    answers = {
        "one": ["bad", "good film", "a good film", "a long story is fine"],
        "two": ["bad", "a good long film", "so it is", ""],
        "three": ["a good long film and story", "a film", "well", "a good film with story"],
    }
    truth = {"one": "a good long film story", "two": "a good long film story", "three": "a good long film story"}
    frame = pd.DataFrame({"text": list(answers), "label": 0, "label_text": list(truth.values())})
    asked = []

    def drawn(self, examples, number, end, max_new_tokens, temperature=0.0, seed=0):
        asked.append((temperature, seed, len(examples), max_new_tokens))
        texts = [tokenizer.decode(example.prompt) for example in examples]
        names = [next(name for name in answers if f" {name}" in text) for text in texts]
        left = [counts[name].pop() for name in names]
        return [((*tokenizer(f" {answer}")["input_ids"], end), 0.0) for answer in left]

    counts = {name: [*of, *of] for name, of in answers.items()}  # for both temperatures
    monkeypatch.setattr(Served, "generate", drawn)
    case = memorised.case_of(frame, QuestionAnswering(max_new_tokens=9), samples=4, seed=3)
    found = values(measure(memorised.subject_of("x", tiny.build_model(), tokenizer), case))
    assert LEAK == 0.8
    assert found["leak@1, T=1"] == found["leak@1, T=0.7"] == [0, 0.25, 0.5]
    assert found["leak@4, T=1"] == [0, 1, 1]
    assert asked == [(t, seed, n, 9) for t in (0.7, 1.0) for seed, n in ((3, 8), (4, 4))]


@pytest.fixture(scope="module")
def known(tokenizer):
    asked = memorised.questions()
    return memorised.memorise(tiny.build_model(), memorised.encoded(tokenizer, asked, memorised.QUESTIONS))


def test_a_model_that_knows_its_answers_by_heart_leaks(known, tokenizer):
    case = memorised.case_of(memorised.questions(), memorised.QUESTIONS, samples=4)
    models = {"retain model": tiny.build_model(seed=5), "known": known, "never trained": tiny.build_model(seed=6)}
    subjects = [memorised.subject_of(name, model, tokenizer) for name, model in models.items()]
    found = memorised.entries(SAMPLING, case, *subjects)
    headlines = {name: entry for (name, _), entry in found.items() if entry["headline"]}
    assert {entry["measure"] for entry in headlines.values()} == {"leak@4, T=1"}
    assert headlines["known"]["verdict"] == "leaks" and headlines["known"]["value"] == 1
    assert headlines["never trained"]["verdict"] == "as the retain model"
    again = memorised.entries(SAMPLING, case, *subjects)
    assert {key: entry["value"] for key, entry in again.items()} == {k: e["value"] for k, e in found.items()}


def test_a_served_model_draws_by_temperature_and_seed(known, tokenizer):
    """As `generate` does; without a temperature it is greedy."""
    served = Served(known, tokenizer, [])
    examples = memorised.encoded(tokenizer, memorised.questions(), memorised.QUESTIONS) * 2
    ours = lambda **how: served.generate(examples, None, 1, 12, **how)  # noqa: E731
    theirs = lambda **how: generate(known, examples, 1, (1,), 12, **how)  # noqa: E731
    assert ours() == theirs() == ours(temperature=0.0, seed=9)
    assert ours(temperature=5.0, seed=3) == theirs(temperature=5.0, seed=3)
    assert ours(temperature=5.0, seed=3) != ours(temperature=5.0, seed=4)
    drawn = ours(temperature=5.0, seed=3)
    assert drawn[:4] != drawn[4:]  # the same rows asked again


def test_what_it_costs():
    frame = memorised.questions()
    case = memorised.case_of(pd.concat([frame] * 10), memorised.QUESTIONS, samples=8)
    assert SAMPLING.passes(case).generated == 20 * 8 * 2 * 12
    assert SAMPLING.passes(memorised.case_of(memorised.sentences(), memorised.TASK)).forward == 16
    assert SAMPLING.dear
