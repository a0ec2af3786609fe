"""Scores by hand: a language model whose every logit the test wrote, and small tables."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
import tiny
import torch
from scripted import BAD, FILM, WELL, one, score, scripted
from transformers import LlamaConfig

from utils.data.batch import Example, collate
from utils.data.splits import SPLITS
from utils.errors import UserError
from utils.evaluation.answering import answer_texts
from utils.evaluation.record import js_divergence
from utils.evaluation.run import EvaluationSettings, accuracies, check_rows, evaluate_splits, match_lengths
from utils.evaluation.scores import score_rows
from utils.interventions.prompt_encoders import Prompt
from utils.interventions.served import Served
from utils.models.forward import completion_logits
from utils.tasks.classification import classification
from utils.tasks.encode import completion_ids, tokenize
from utils.tasks.rows import Splits
from utils.tasks.scores import label_scores


@pytest.fixture(scope="module")
def neutral(tokenizer):
    """The several tokens of ` neutral`."""
    ids = completion_ids(tokenizer, "neutral")
    assert len(ids) > 2
    return ids


def chain(ids, value=30.0):
    """A script by which each token of `ids` is followed by the next one."""
    return {a: {b: value} for a, b in zip(ids, ids[1:])}


def test_rows_must_fit_with_every_label_word(tokenizer, neutral):
    """Of labels with several tokens the longest counts, and the unlearning words, which are looked for then too."""
    model = SimpleNamespace(config=LlamaConfig(max_position_embeddings=20))
    text = " film" * 5
    length = len(tokenize(tokenizer, [text], ["positive"], 200)[0])
    unlearning = max(len(neutral), len(completion_ids(tokenizer, "unknown")))
    film = len(neutral) + 3
    assert len(completion_ids(tokenizer, "film" + " film" * (film - 1))) == film
    cases = (
        (["positive", "negative"], 1),
        (["positive", "film" + " film" * (film - 1)], film),
        (["positive", "a film"], unlearning),
    )
    assert film > unlearning > 2
    for words, longest in cases:
        frame = pd.DataFrame({"text": [text] * 2, "label": [0, 1], "label_text": words})
        frames = Splits(dict.fromkeys(SPLITS, frame), classification(words))
        needed = length + longest - 1  # the last token is predicted, never read
        model.config.max_position_embeddings = needed
        check_rows(model.config, tokenizer, frames, 200)
        model.config.max_position_embeddings = needed - 1
        with pytest.raises(UserError, match=f"the longest row has {needed} tokens"):
            check_rows(model.config, tokenizer, frames, 200)


WORDS = ["negative", "positive"]


def test_single_token_labels(tokenizer, neutral):
    """` film` argues for positive, ` bad` for negative and ` well` for a word that is no label."""
    seen = {
        FILM: {" positive": 6.0, " negative": 4.0},
        BAD: {" positive": 2.0, " negative": 5.0},
        WELL: {" of": 9.0, " positive": 1.0},
    }
    rows = score(
        scripted(tokenizer, {}, seen),
        ["a film", "a bad", "it is well", "a film"],
        ["positive"] * 3 + ["negative"],
        WORDS,
    )
    assert list(rows["prediction"]) == ["positive", "negative", "of", "positive"]
    assert list(rows["correct"]) == [True, False, False, False]
    assert list(rows["label_prediction"]) == ["positive", "negative", "positive", "positive"]
    rest = len(tokenizer) - 2  # tokens with logit 0
    expected = [
        math.log(math.exp(6) + math.exp(4) + rest) - 6,
        math.log(math.exp(2) + math.exp(5) + rest) - 2,
        math.log(math.exp(9) + math.exp(1) + rest) - 1,
        math.log(math.exp(6) + math.exp(4) + rest) - 4,
    ]
    assert list(rows["loss"]) == pytest.approx(expected, rel=1e-5)


def test_labels_of_unequal_length(tokenizer, neutral):
    """The other label is recognised whole, not by as many of its tokens as the true one has."""
    seen = {FILM: {neutral[0]: 9.0}, BAD: {" positive": 5.0}, WELL: {" of": 9.0}}
    loaded = scripted(tokenizer, chain(neutral), seen)
    rows = score(loaded, ["a film", "a film", "a bad"], ["positive", "neutral", "neutral"], ["neutral", "positive"])
    assert list(rows["prediction"]) == ["neutral", "neutral", "positive"]
    assert list(rows["correct"]) == [False, True, False]
    assert (
        label_scores(rows.assign(label_text=["positive", "neutral", "neutral"]), ["neutral", "positive"])[
            "out_of_label"
        ]
        == 0
    )


def test_multi_token_labels(tokenizer):
    """All tokens must be right; the label whose tokens are jointly most probable counts, not the best first token."""
    good, poor = completion_ids(tokenizer, "good enough"), completion_ids(tokenizer, "rather poor")
    assert len(good) > 1 and len(poor) > 1 and not set(good) & set(poor)
    seen = {FILM: {good[0]: 3.0, poor[0]: 4.0}, BAD: {good[0]: 8.0, poor[0]: 2.0}}
    after = chain(good, 20.0) | chain(poor, 12.0)
    loaded = scripted(tokenizer, after, seen)
    words = ["good enough", "rather poor"]
    rows = score(loaded, ["a film", "a bad"], ["good enough", "good enough"], words)
    log_z = math.log(math.exp(3) + math.exp(4) + len(tokenizer) - 2)
    first = {"good enough": log_z - 3, "rather poor": log_z - 4}
    # behind the first token the seen tokens still argue, so every later position has their logits too
    later = {
        "good enough": (len(good) - 1) * (math.log(math.exp(20) + math.exp(3) + math.exp(4) + len(tokenizer) - 3) - 20),
        "rather poor": (len(poor) - 1) * (math.log(math.exp(12) + math.exp(3) + math.exp(4) + len(tokenizer) - 3) - 12),
    }
    total = {word: first[word] + later[word] for word in words}
    assert rows["loss"][0] == pytest.approx(total["good enough"], rel=1e-4)
    assert rows["label_prediction"][0] == min(total, key=total.get)
    assert not rows["correct"][0]
    assert len(good) != len(poor) and rows["prediction"][0] == "rather poor"  # not `rather enough`
    assert rows["correct"][1]
    assert rows["prediction"][1] == rows["label_prediction"][1] == "good enough"


def test_labels_of_different_token_counts(tokenizer, neutral):
    """One label of one token beside one of several."""
    seen = {FILM: {" positive": 2.0, neutral[0]: 3.0}, BAD: {" positive": 3.0, neutral[0]: 2.0}}
    rows = score(
        scripted(tokenizer, chain(neutral), seen),
        ["a film", "a bad", "a film"],
        ["neutral", "neutral", "positive"],
        ["neutral", "positive"],
    )
    assert list(rows["label_prediction"]) == ["neutral", "positive", "neutral"]
    assert list(rows["correct"]) == [True, False, False]
    assert rows["prediction"][0] == "neutral"
    assert rows["prediction"][2] != "positive"


def test_scores_equal_sklearn_and_hand_counts():
    truth = ["positive", "positive", "negative", "negative", "positive", "negative"]
    prediction = ["positive", "neutral", "negative", "positive", "positive", "unknown"]
    best_label = ["positive", "positive", "negative", "positive", "positive", "negative"]
    loss = [0.5, 2.0, 0.25, 4.0, 0.25, 5.0]
    frame = pd.DataFrame({"label_text": truth, "prediction": prediction, "label_prediction": best_label, "loss": loss})
    scores = label_scores(frame, WORDS)
    assert list(scores) == ["n", "accuracy", "f1", "precision", "recall", "out_of_label", "label_accuracy", "loss"]
    # positive: 2 of 3 found, 2 of 3 such answers right; negative: 1 of 3 found, its only such answer right
    f1 = {"positive": 2 / 3, "negative": 2 * 1 * (1 / 3) / (1 + 1 / 3)}
    assert scores == pytest.approx(
        {
            "n": 6,
            "accuracy": 3 / 6,
            "f1": (f1["positive"] + f1["negative"]) / 2,
            "precision": (2 / 3 + 1) / 2,
            "recall": (2 / 3 + 1 / 3) / 2,
            "out_of_label": 2 / 6,
            "label_accuracy": 5 / 6,
            "loss": 2.0,
        }
    )
    sklearn_f1 = sklearn.metrics.f1_score(truth, prediction, average="weighted", zero_division=0)
    assert scores["f1"] == pytest.approx(sklearn_f1)


def test_f1_is_weighted_by_class_size():
    frame = pd.DataFrame({"label_text": ["a"] * 9 + ["b"], "prediction": ["a"] * 10}).assign(loss=0.0)
    scores = label_scores(frame.assign(label_prediction=frame["prediction"]), ["a", "b"])
    assert scores["f1"] == pytest.approx(0.9 * 2 * 0.9 / 1.9)
    assert scores["out_of_label"] == 0


def test_answers_that_are_no_label_at_all():
    frame = pd.DataFrame({"label_text": WORDS, "prediction": ["unknown", ""], "label_prediction": WORDS, "loss": 1.0})
    scores = label_scores(frame, WORDS)
    assert (scores["accuracy"], scores["f1"], scores["out_of_label"], scores["label_accuracy"]) == (0, 0, 1, 1)


@pytest.fixture(scope="module")
def llama(tokenizer):
    """A random model with a prompt whose answers, and whose better one of the two labels, differ from text to text."""
    model = tiny.build_model("llama", seed=3)
    torch.manual_seed(0)
    texts = sentences(23)
    batch = collate(tokenize(tokenizer, texts["text"], texts["label_text"], 200), 0, "cpu")
    prompt, hidden = torch.randn(4, tiny.SIZES["hidden_size"]) * 0.1, []
    watch = model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: hidden.append(inputs[0].detach()))
    completion_logits(model, batch, prompt)
    watch.remove()
    mean = hidden[0].mean(0)
    difference = torch.randn(len(mean))
    difference -= (difference @ mean) / (mean @ mean) * mean  # so that neither label is the better one on average
    head = model.get_output_embeddings().weight.data.mul_(20)
    head[one(tokenizer, " negative")] = head[one(tokenizer, " positive")] + difference
    return Served(model, tokenizer, [], (Prompt(vectors=prompt),))


def sentences(n):
    rng = np.random.default_rng(0)
    words = [
        "a",
        "film",
        "the",
        "good",
        "bad",
        "story",
        "of",
        "actors",
        "is",
        "it",
        "never",
        "long",
        "well",
        ",",
        "and",
    ]
    texts = [" ".join(rng.choice(words, rng.integers(2, 30))) for _ in range(n)]
    return pd.DataFrame({"text": texts, "label_text": rng.choice(WORDS, n)})


def test_evaluation_depends_neither_on_order_nor_on_batch_size(llama):
    frame = sentences(23)
    expected = score_rows(llama, frame, classification(WORDS), 200, 32)
    assert expected["prediction"].nunique() > 2
    assert expected["label_prediction"].nunique() == 2
    order = np.random.default_rng(1).permutation(23)
    for batch_size in (1, 5, 23):
        shuffled = score_rows(llama, frame.iloc[order].reset_index(drop=True), classification(WORDS), 200, batch_size)
        wanted = expected.iloc[order].reset_index(drop=True)
        for column in ("prediction", "correct", "label_prediction"):
            assert list(shuffled[column]) == list(wanted[column])
        assert list(shuffled["loss"]) == pytest.approx(list(wanted["loss"]), rel=1e-4)


def test_evaluation_uses_the_prompt(llama):
    frame = sentences(8)
    without = score_rows(Served(llama.model, llama.tokenizer, []), frame, classification(WORDS), 200, 8)
    assert (score_rows(llama, frame, classification(WORDS), 200, 8)["loss"] - without["loss"]).abs().min() > 1e-3


def evaluation_frames():
    frames = {split: sentences(6).assign(label=0) for split in SPLITS}
    frames["train_retain"] = sentences(12).assign(names_other=[True, False] * 6)
    frames["test_retain"] = frames["test_retain"].assign(nested=[1, 0] * 3)
    frames["test_forget"] = frames["test_forget"].assign(nested=1)
    return frames


def test_evaluate_scores_every_split_and_its_slices(llama):
    args = EvaluationSettings(max_eval_samples=None, max_length=200, eval_batch_size=4)
    frames = evaluation_frames()
    splits, rows = evaluate_splits(llama, frames, classification(WORDS), args, "test")
    sizes = {split: len(frames[split]) for split in SPLITS}
    slices = {"train_retain:length_matched": 6, "test_retain:length_matched": 6, "train_retain:names_other": 6}
    slices["test_retain:not_nested"] = 3  # every row of test_forget is nested
    assert {split: scores["n"] for split, scores in splits.items()} == {**sizes, **slices}
    assert list(rows["split"]) == [split for split in SPLITS for _ in range(sizes[split])]
    assert list(rows["text"]) == [text for split in SPLITS for text in frames[split]["text"]]
    named = rows[(rows["split"] == "train_retain") & rows["names_other"].eq(True)]
    assert splits["train_retain:names_other"]["loss"] == pytest.approx(named["loss"].mean())
    unseen = rows[(rows["split"] == "test_retain") & rows["nested"].eq(0)]
    assert splits["test_retain:not_nested"]["loss"] == pytest.approx(unseen["loss"].mean())
    for split in SPLITS:
        of_split = rows[rows["split"] == split]
        assert splits[split]["accuracy"] == of_split["correct"].mean()
        assert splits[split]["loss"] == pytest.approx(of_split["loss"].mean())


def test_evaluate_at_most_so_many_rows(llama):
    args = EvaluationSettings(max_eval_samples=5, max_length=200, eval_batch_size=4)
    splits, rows = evaluate_splits(llama, evaluation_frames(), classification(WORDS), args, "test")
    assert {splits[split]["n"] for split in SPLITS} == {5}
    assert len(rows) == 20


def test_columns_of_the_data_do_not_get_into_the_scores(llama):
    """Whatever else the user's files hold, also under names that the scores use."""
    args = EvaluationSettings(max_eval_samples=3, max_length=200, eval_batch_size=4)
    extra = {"loss": "x", "prediction": "x", "correct": "x", "split": "x", "label_prediction": "x", "method": "x"}
    frames = {split: sentences(6) for split in SPLITS}
    expected, _ = evaluate_splits(llama, frames, classification(WORDS), args, "test")
    assert (
        evaluate_splits(llama, {s: f.assign(**extra) for s, f in frames.items()}, classification(WORDS), args, "test")[
            0
        ]
        == expected
    )


def test_accuracies_of_the_curve_switch_dropout_off_and_on_again(llama):
    args = EvaluationSettings(curve_samples=3, max_length=200, eval_batch_size=4)
    model = llama.model.train()
    shares = accuracies(llama, evaluation_frames(), classification(WORDS), args)
    assert list(shares) == list(SPLITS) and all(0 <= share <= 1 for share in shares.values())
    assert model.training
    model.eval()
    accuracies(llama, evaluation_frames(), classification(WORDS), args)
    assert not model.training


def texts_of(*lengths):
    return pd.Series(["w " * length for length in lengths])


@pytest.mark.parametrize(
    ("candidates", "targets", "chosen"),
    [
        ([3, 9, 5, 20], [5, 9], [1, 2]),
        ([1, 2, 3, 4], [30, 30], []),  # none is near
        ([1, 24, 37, 38], [30, 30, 30], [1, 2]),  # a quarter off is near enough
        ([10, 10, 2], [9, 1], [0, 2]),  # either ten would do
        ([4, 8], [6], [0]),  # as near: the shorter one
        ([5], [5, 5, 2], [0]),  # fewer candidates than targets
        ([7, 1, 7, 1], [], []),
    ],
)
def test_match_lengths(candidates, targets, chosen):
    matched = match_lengths(texts_of(*candidates), texts_of(*targets))
    assert sorted(candidates[i] for i in matched) == sorted(candidates[i] for i in chosen)
    assert len(set(matched)) == len(matched) and matched == sorted(matched)


def test_an_answer_ends_at_a_known_word(tokenizer, neutral):
    """` positive` is one token and stops there; ` neutral` takes its several; an unknown one goes on to that length."""
    of, the = one(tokenizer, " of"), one(tokenizer, " the")
    seen = {FILM: {" positive": 7.0}, BAD: {neutral[0]: 6.0}, WELL: {of: 5.0}}
    after = chain(neutral) | {of: {the: 30.0}, the: {of: 30.0}, one(tokenizer, " positive"): {of: 30.0}}
    loaded = scripted(tokenizer, after, seen)
    answers = answer_texts(loaded, ["a film", "a bad", "it is well"], classification(WORDS), 200, 2)
    longest = max(len(completion_ids(tokenizer, word)) for word in [*WORDS, "neutral", "unknown"])
    assert [text for text, _ in answers] == ["positive", "neutral", " ".join((["of", "the"] * longest)[:longest])]
    rest = len(tokenizer) - 1
    probabilities = [math.exp(value) / (math.exp(value) + rest) for value in (7, 6, 5)]
    assert [p for _, p in answers] == pytest.approx(probabilities, rel=1e-4)


@torch.no_grad()
def test_answers_are_greedy_decoding_with_the_prompt(llama):
    """Word by word as the plain model generates behind the virtual tokens."""
    texts = list(sentences(5)["text"])
    answers = answer_texts(llama, texts, classification(WORDS), 200, 3)
    for text, (said, probability) in zip(texts, answers):
        example = tokenize(llama.tokenizer, [text], ["positive"], 200)[0]
        ids, log_p = (), 0.0
        while len(ids) < max(len(completion_ids(llama.tokenizer, w)) for w in [*WORDS, "neutral", "unknown"]):
            batch = collate([Example(example.prompt + ids, (0,))], 0, "cpu")
            log_probabilities = completion_logits(llama.model, batch, llama.interventions[0].vectors)[0].log_softmax(-1)
            ids += (int(log_probabilities.argmax()),)
            log_p += float(log_probabilities.max())
            if llama.tokenizer.decode(ids).strip() in [*WORDS, "neutral", "unknown"]:
                break
        assert said == llama.tokenizer.decode(ids).strip()
        assert probability == pytest.approx(math.exp(log_p), rel=1e-3)


def test_js_divergence():
    """One bit between answers without overlap, none between equal ones, never a NaN between almost equal ones."""
    sure, other, even = [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]
    assert js_divergence(np.array([sure]), np.array([other])) == pytest.approx(1)
    by_hand = 0.5 * np.log2(4 / 3) + 0.5 * (0.5 * np.log2(2 / 3) + 0.5 * np.log2(2))
    assert js_divergence(np.array([sure, even]), np.array([even, even])) == pytest.approx(by_hand / 2)
    close = np.array([[0.1, 0.9]]) + np.array([[1, -1]]) * np.linspace(0, 1e-9, 2000)[:, None]
    assert 0 <= js_divergence(close, close[::-1]) < 1e-12
