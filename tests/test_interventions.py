"""Several things between a query and the frozen model: which one acts, and that it does as it would alone."""

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from scripted import one

from utils.evaluation.answering import answer_texts
from utils.evaluation.scores import score_rows
from utils.interventions import eco, gates, in_context
from utils.interventions.base import Intervention
from utils.interventions.corruption import Corruption
from utils.interventions.prompt_encoders import Prompt
from utils.interventions.served import Served
from utils.tasks.classification import classification

WORDS = ["negative", "positive"]
TEXTS = ["a good film", "a bad film", "the story is long", "good and bad", "it is never well"]


class Word(gates.Classifier):
    """Sure of texts with the word, and nearly sure that others are not meant."""

    kind = "word"

    def __init__(self, word):
        self.word = word

    def probabilities(self, texts):
        return np.array([0.9 if self.word in text.split() else 0.1 for text in texts])


class Sure(gates.Classifier):
    """Gives every text the same probability."""

    def __init__(self, probability):
        self.probability = probability

    def probabilities(self, texts):
        return np.full(len(texts), self.probability)


def gate(word):
    return gates.Gate(Word(word), 0.5)


@pytest.fixture(scope="module")
def served(tokenizer):
    model = tiny.build_model("llama", seed=3)
    model.get_output_embeddings().weight.data.mul_(20)
    assert one(tokenizer, " positive") != one(tokenizer, " negative")
    return Served(model, tokenizer, [])


@pytest.fixture(scope="module")
def kinds(served):
    torch.manual_seed(1)
    prompt = Prompt(vectors=torch.randn(4, tiny.SIZES["hidden_size"]), gate=gate("good"))
    corruption = Corruption("noise-first", 5.0, 999, seed=7)
    corrupted = eco.CorruptedEmbeddings(corruption=corruption, marks=eco.Marks(), gate=gate("bad"))
    return prompt, corrupted


def scored(served, texts=TEXTS):
    frame = pd.DataFrame({"text": texts, "label_text": ["negative"] * len(texts)})
    return score_rows(served, frame, classification(WORDS), 200, 2)


def test_one_of_those_that_flag_a_query_acts_on_it(served, kinds):
    acting, said = served.using(*kinds).decide(TEXTS)
    assert acting == [0, 1, None, 0, None]
    assert [row["flagged"] for row in said] == [True, True, False, True, False]
    assert [row["gate_probability"] for row in said] == [0.9, 0.9, 0.1, 0.9, 0.1]
    assert served.decide(TEXTS) == ([None] * 5, [{}] * 5)
    ungated = in_context.instruct("Say unknown.", [])
    assert served.using(kinds[1], ungated).decide(TEXTS)[0] == [1, 0, 1, 0, 1]
    assert served.using(ungated, kinds[1], ungated).decide(TEXTS)[0] == [0, 1, 0, 1, 0]
    assert served.using(ungated).decide(TEXTS) == ([0] * 5, [{}] * 5)
    assert served.using(*kinds).decide([]) == ([], [])


def by_margin(served, *pairs):
    """What is decided on one text by gates of these (probability, threshold)."""
    gate = lambda p, threshold: gates.Gate(Sure(p), threshold)  # noqa: E731
    with np.errstate(all="raise"):
        (acting,), (said,) = served.using(*(Intervention(gate=gate(*pair)) for pair in pairs)).decide(["a film"])
    return acting, said["flagged"], said["gate_probability"]


def test_the_gate_whose_probability_lies_furthest_above_its_threshold_in_log_odds(served):
    """By hand: logit(0.9) - logit(0.5) = 2.197, logit(0.6) - logit(0.1) = 2.603, logit(0.95) - logit(0.9) = 0.747."""
    assert gates.Gate(Sure(0.9), 0.5).margins(np.array([0.9, 0.5])) == pytest.approx([2.19722, 0], abs=1e-5)
    assert by_margin(served, (0.9, 0.5), (0.6, 0.1), (0.95, 0.9)) == (1, True, 0.6)
    assert by_margin(served, (0.9, 0.5), (0.99, 0.995)) == (0, True, 0.9)
    assert by_margin(served, (0.4, 0.5), (0.2, 0.9)) == (None, False, 0.4)
    assert by_margin(served, (0.9, 0.5), (0.9, 0.5)) == (0, True, 0.9)


def test_probabilities_of_0_and_1_and_a_threshold_of_0_are_compared_too(served):
    assert by_margin(served, (1.0, 0.9), (1.0, 0.5)) == (1, True, 1.0)
    assert by_margin(served, (0.9, 0.5), (0.1, 0.0)) == (1, True, 0.1)
    assert by_margin(served, (0.0, 0.0), (0.0, 0.5), (1e-320, 0.0)) == (2, True, 1e-320)
    assert by_margin(served, (0.0, 0.0), (0.0, 0.5))[:2] == (None, False)


def test_each_row_is_what_its_own_intervention_makes_it(served, kinds):
    """Behind the gates as without them, whatever stands in the other rows of a batch."""
    prompt, corrupted = kinds
    rows = scored(served.using(prompt, corrupted))
    alone = {0: scored(served.using(Prompt(vectors=prompt.vectors))), None: scored(served)}
    alone[1] = scored(served.using(eco.CorruptedEmbeddings(corruption=corrupted.corruption, marks=corrupted.marks)))
    for i, number in enumerate([0, 1, None, 0, None]):
        assert rows["loss"][i] == pytest.approx(alone[number]["loss"][i], rel=1e-4)
        others = [alone[other]["loss"][i] for other in alone if other != number]
        assert all(abs(rows["loss"][i] - loss) > 1e-3 for loss in others)


def test_words_of_a_gated_instruction_stand_around_flagged_queries_only(served):
    instruction = in_context.instruct("Say unknown.", [])
    behind = served.using(instruction).behind(gate("good"))
    assert {surroundings[0] for surroundings in behind.surroundings} == {instruction.template, None}
    rows, plain, everywhere = scored(behind), scored(served), scored(served.using(instruction))
    assert list(rows["loss"] == plain["loss"]) == [False, True, True, False, True]
    assert rows["loss"][0] == pytest.approx(everywhere["loss"][0], rel=1e-4)
    said, unsaid = (answer_texts(model, TEXTS, classification(WORDS), 200, 2) for model in (behind, served))
    assert [said[i][0] for i in (1, 2, 4)] == [unsaid[i][0] for i in (1, 2, 4)]
    assert [said[i][1] for i in (1, 2, 4)] == pytest.approx([unsaid[i][1] for i in (1, 2, 4)], rel=1e-4)


def test_without_its_interventions_a_model_is_the_plain_one(served, kinds):
    both = served.using(*kinds)
    assert both.is_gated and not both.plain.is_gated and both.plain.interventions == ()
    assert list(scored(both.plain)["loss"]) == list(scored(served)["loss"])
