"""ECO: corruption, gate and search against hand-computed values; checkpoints and the router by the command line."""

import dataclasses
import functools
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import scripts
import several
import tiny
import torch
from asking import Word
from safetensors.torch import load_file, save_file
from scripts import call, done, numbers, refused, tree
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
)

from utils.data.batch import Example, collate
from utils.data.splits import SPLITS
from utils.errors import UserError
from utils.evaluation.answering import answer_texts
from utils.evaluation.scores import score_rows
from utils.interventions import eco, gates
from utils.interventions.corruption import CHANGES, DIMENSIONS, FAMILIES, ORDERS, Corruption, corrupt, has_strength
from utils.interventions.served import Served
from utils.models.forward import completion_logits
from utils.models.layers import record_activations
from utils.storage.checkpoints import file_sha256
from utils.tasks.classification import classification
from utils.tasks.encode import tokenize
from utils.tasks.rows import Splits, load_splits
from utils.unlearning import eco_search, gate_training

pytestmark = pytest.mark.slow

WORDS = ["negative", "positive"]

# Corruption. Every expected array is written out; the noise is what a generator of seed 0 draws first.
E = torch.tensor([[1.0, -4.0, 3.0, -2.0], [5.0, 6.0, -8.0, 7.0]])
NOISE = torch.randn((2, 2), generator=torch.Generator().manual_seed(0)).tolist()
(N00, N01), (N10, N11) = NOISE
EXPECTED = {  # s = 10, n = 2
    "noise-first": [[1 + 10 * N00, -4 + 10 * N01, 3, -2], [5 + 10 * N10, 6 + 10 * N11, -8, 7]],
    "noise-largest": [[1, -4 + 10 * N00, 3 + 10 * N01, -2], [5, 6, -8 + 10 * N10, 7 + 10 * N11]],
    "set-noise-first": [[10 * N00, 10 * N01, 3, -2], [10 * N10, 10 * N11, -8, 7]],
    "zero-first": [[0, 0, 3, -2], [0, 0, -8, 7]],
    "zero-largest": [[1, 0, 0, -2], [5, 6, 0, 0]],
    "flip-first": [[-1, 4, 3, -2], [-5, -6, -8, 7]],
    "flip-largest": [[1, 4, -3, -2], [5, 6, 8, -7]],
    "add-first": [[11, 6, 3, -2], [15, 16, -8, 7]],
    "add-largest": [[11, -4, 13, -2], [5, 16, -8, 17]],
    "add-least": [[1, 6, 3, 8], [15, 6, 2, 7]],
    "subtract-first": [[-9, -14, 3, -2], [-5, -4, -8, 7]],
    "subtract-largest": [[-9, -4, -7, -2], [5, -4, -8, -3]],
    "subtract-least": [[1, -14, 3, -12], [-5, 6, -18, 7]],
    "reverse": [[5, 6, -8, 7], [1, -4, 3, -2]],
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_family_has_its_expected_array_here():
    assert set(FAMILIES) - set(EXPECTED) == {"noise-random", "shuffle"}


@pytest.mark.parametrize("family", EXPECTED)
def test_a_corruption_by_hand(family):
    before = E.clone()
    torch.testing.assert_close(corrupt(family, E, 10.0, 2, generator()), torch.tensor(EXPECTED[family]).float())
    assert torch.equal(E, before)


def test_noise_on_random_dimensions():
    seed = next(s for s in range(99) if set(torch.randperm(4, generator=generator(s))[:2].tolist()) == {1, 3})
    rng = generator(seed)
    chosen = torch.randperm(4, generator=rng)[:2]
    noise = torch.randn((2, 2), generator=rng)
    expected = E.clone()
    expected[:, chosen] += 10 * noise
    torch.testing.assert_close(corrupt("noise-random", E, 10.0, 2, generator(seed)), expected)


def test_shuffle_moves_whole_embeddings():
    e = torch.arange(10.0)[:, None].expand(10, 3)
    order = torch.randperm(10, generator=generator())
    assert torch.equal(corrupt("shuffle", e, 0.0, 1, generator())[:, 2], order.float())


@pytest.mark.parametrize("family", FAMILIES)
def test_more_dimensions_than_there_are_is_all_of_them(family):
    assert torch.equal(corrupt(family, E, 2.0, 9, generator()), corrupt(family, E, 2.0, 4, generator()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_token(family):
    result = corrupt(family, E[:1], 2.0, 1, generator())
    assert result.shape == (1, 4)
    assert int((result != E[:1]).sum()) == (0 if family in ORDERS else 1)


def test_the_strength_scales_what_has_one():
    for family in FAMILIES:
        same = torch.equal(corrupt(family, E, 1.0, 2, generator()), corrupt(family, E, 2.0, 2, generator()))
        assert same != has_strength(family)
    assert {family.rsplit("-", 1)[0] for family in DIMENSIONS} == set(CHANGES)


@pytest.fixture(scope="module")
def llama(tokenizer):
    """A random model, head enlarged so that corruption changes answers, with noise on every dimension."""
    model = tiny.build_model("llama", seed=3)
    model.get_output_embeddings().weight.data.mul_(20)
    corruption = Corruption("noise-first", 5.0, 999, seed=7)
    return Served(model, tokenizer, [], (eco.CorruptedEmbeddings(corruption=corruption, marks=eco.Marks()),))


def sentences(n=14):
    rng = np.random.default_rng(0)
    words = ["a", "film", "the", "good", "bad", "story", "of", "actors", "is", "never", "long", "well", "and"]
    texts = [" ".join(rng.choice(words, rng.integers(3, 12))) for _ in range(n)]
    return pd.DataFrame({"text": texts, "label_text": rng.choice(WORDS, n)})


def embeddings_seen(loaded, run):
    """(ids, embeddings) of every pass of the model while `run` is called, the corruption applied."""
    seen = []
    hooked = loaded.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append([kwargs["input_ids"]]), with_kwargs=True
    )
    first = loaded.model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen[-1].append(inputs[0]))
    try:
        run()
    finally:
        hooked.remove()
        first.remove()
    return seen


@torch.inference_mode()
def changed(loaded, ids, embedded):
    """For every row the positions whose embeddings are not the plain ones."""
    plain = loaded.model.get_input_embeddings()(ids)
    return [torch.nonzero((row != own).any(-1)).flatten().tolist() for row, own in zip(embedded, plain)]


def test_corrupted_are_all_prompt_tokens_but_the_last_and_no_completion(llama):
    """In scoring and in generation, where the answer's own tokens come back as input."""
    frame = sentences(5).assign(label_text="neutral")
    examples = tokenize(llama.tokenizer, frame["text"], frame["label_text"], 200)
    lengths = [len(e.prompt) for e in sorted(examples, key=len)]
    assert len(examples[0].completion) > 2
    score = lambda: score_rows(llama, frame, classification(WORDS), 200, 5)  # noqa: E731
    said = lambda: answer_texts(llama, list(frame["text"]), classification(WORDS), 200, 5)  # noqa: E731
    passes = {"score": embeddings_seen(llama, score), "answer": embeddings_seen(llama, said)}
    assert max(ids.shape[1] for ids, _ in passes["answer"]) > max(lengths)
    for ids, embedded in [*passes["score"], *passes["answer"]]:
        assert changed(llama, ids, embedded) == [list(range(n - 1)) for n in lengths]


def test_corrupted_are_the_names_alone_where_there_are_any(llama):
    marks = eco.Marks(lambda texts: [[match.span() for match in re.finditer("good", text)] for text in texts])
    loaded = llama.using(dataclasses.replace(llama.interventions[0], marks=marks))
    texts = ["a good film", "the story is long , much longer than that"]
    passes = embeddings_seen(loaded, lambda: answer_texts(loaded, texts, classification(WORDS), 200, 2))
    for ids, embedded in passes:
        good, story = changed(loaded, ids, embedded)
        assert loaded.tokenizer.decode(ids[0][good]).strip() == "good"
        assert story == list(range(len(story))) and len(story) > 8


def test_a_name_that_was_cut_away_does_not_spare_the_query(tokenizer):
    text = "a story of a good film " * 5 + "Scorsese"
    span = [(text.index("Scorsese"), len(text))]
    whole = tokenize(tokenizer, [text], ["positive"], 200, marks=[span])[0]
    cut = tokenize(tokenizer, [text], ["positive"], 40, marks=[span])[0]
    assert tokenizer.decode([whole.prompt[i] for i in whole.marked]).strip() == "Scorsese"
    assert cut.marked == tuple(range(len(cut.prompt) - 1))


def test_hooks_are_gone_after_an_exception(llama):
    example = tokenize(llama.tokenizer, ["a film"], ["positive"], 200, marks=[None])[0]
    batch = collate([example], 0, "cpu")
    plain = completion_logits(llama.model, batch)
    with (
        pytest.raises(RuntimeError, match="on the way"),
        llama.interventions[0].corruption.applied(llama.model, [example]),
    ):
        assert not torch.equal(completion_logits(llama.model, batch), plain)
        raise RuntimeError("on the way")
    assert torch.equal(completion_logits(llama.model, batch), plain)
    assert not llama.model.get_input_embeddings()._forward_hooks


def test_the_noise_belongs_to_the_query_and_the_seed(llama):
    rows = [Example((5, 6, 7), (1,), marked=(0, 1)), Example((5, 6, 8), (1,), marked=(0, 1)), Example((9, 6, 7), (1,))]
    draws = [torch.randn(4, generator=llama.interventions[0].corruption._generator(row)) for row in rows]
    assert torch.equal(draws[0], draws[1])  # the marked tokens are the same
    assert not torch.equal(draws[0], draws[2])
    other = Corruption("noise-first", 5.0, 999, seed=8)
    assert not torch.equal(draws[0], torch.randn(4, generator=other._generator(rows[0])))


def same_rows(found, wanted):
    for column in ("prediction", "correct", "label_prediction", "flagged", "gate_probability"):
        assert list(found[column]) == list(wanted[column])
    assert list(found["loss"]) == pytest.approx(list(wanted["loss"]), rel=1e-4)


def test_batches_order_and_neighbours_change_nothing(llama):
    loaded = llama.behind(gates.Gate(Word("good"), 0.5))
    frame = sentences()
    expected = score_rows(loaded, frame, classification(WORDS), 30, 32)
    assert 3 < expected["flagged"].sum() < 11 and expected["prediction"].nunique() > 2
    lengths = [len(e.prompt) for e in tokenize(loaded.tokenizer, frame["text"], frame["label_text"], 200)]
    assert min(lengths) < 29 < max(lengths)  # some are cut
    order = np.random.default_rng(1).permutation(len(frame))
    for rows, size in ((order, 3), (order[:5], 1)):
        part = score_rows(loaded, frame.iloc[rows].reset_index(drop=True), classification(WORDS), 30, size)
        same_rows(part, expected.iloc[rows].reset_index(drop=True))


def test_rows_that_are_not_flagged_are_those_of_the_plain_model_bit_for_bit(llama):
    loaded = llama.behind(gates.Gate(Word("good"), 0.5))
    frame = sentences()
    scored = score_rows(loaded, frame, classification(WORDS), 200, 4)
    flags = scored["flagged"].to_numpy()
    plain = Served(llama.model, llama.tokenizer, [])
    alone = score_rows(plain, frame[~flags].reset_index(drop=True), classification(WORDS), 200, 4)
    assert list(scored["loss"][~flags]) == list(alone["loss"])
    assert list(scored["label_probabilities"][~flags]) == list(alone["label_probabilities"])
    everywhere = score_rows(llama, frame, classification(WORDS), 200, 4)
    assert list(scored["loss"][flags]) == pytest.approx(list(everywhere["loss"][flags]), rel=1e-4)
    assert (scored["loss"] - score_rows(plain, frame, classification(WORDS), 200, 4)["loss"]).abs()[flags].min() > 1e-3


# Gate.


def test_a_text_is_classified_once():
    gate = gates.Gate(Word("good"), 0.5)
    assert gate.decide(pd.Series(["good", "bad", "good"]))[0].tolist() == [True, False, True]
    assert gate.decide(["bad", "a"])[1].tolist() == [0, 0]
    assert gate.classifier.asked == ["good", "bad", "a"]


class Memory(gates.Classifier):
    """Knows the forget rows it was trained on, and no other."""

    kind = "tfidf"

    def __init__(self, texts):
        self.texts = set(texts)

    @classmethod
    def fit(cls, texts, labels, **_):
        return cls(text for text, label in zip(texts, labels) if label)

    def probabilities(self, texts):
        return np.array([float(text in self.texts) for text in texts])


@pytest.mark.parametrize("conformal", [None, 0.5])
def test_the_threshold_comes_from_rows_that_the_classifier_had_not_seen(monkeypatch, conformal):
    monkeypatch.setitem(gates.CLASSIFIERS, "tfidf", Memory)
    frames = {
        split: pd.DataFrame({"text": [f"{split} {i}" for i in range(n)], "label": [0, 1] * (n // 2)})
        for split, n in (("train_retain", 40), ("train_forget", 20), ("test_retain", 2), ("test_forget", 2))
    }
    settings = gate_training.GateSettings(eco_conformal=conformal, eco_max_fpr=0.1), gates.ClassifierSettings()
    found = gate_training.train_gate(None, frames, [], *settings)
    gate, calibration = found.gate(None), found.description["calibration"]
    assert calibration["auc"] == 0.5 and calibration["false_negatives"] == 1  # a row seen in training would score 1
    assert (calibration["retain"], calibration["forget"]) == ((40, 20) if conformal is None else (8, 4))
    flags = gate.decide(frames["train_forget"]["text"])[0]
    assert flags.sum() == (20 if conformal is None else 16)
    with pytest.raises(UserError, match="too few train rows"):
        gate_training.train_gate(None, frames | {"train_forget": frames["train_forget"][:2]}, [], *settings)


@pytest.mark.parametrize(("rate", "flagged"), [(0.1, 0), (0.19, 1), (0.2, 1), (0.3, 2), (0.4, 3), (0.5, 3), (1, 9)])
def test_threshold_for_rate_by_hand(rate, flagged):
    scores = np.array([0.5, 0.1, 0.9, 0.7, 0.6, 0.6, 0.8, 0.3, 0.2, 0.4])  # two equal: they go together
    threshold = gates.threshold_for_rate(scores, rate, "eco_max_fpr")
    assert (scores > threshold).sum() == flagged
    assert threshold - gates.ROUNDING in scores


def test_threshold_ranks_by_hand():
    scores = np.arange(1, 20) / 20  # 19 of them: rank ceil(20 * .9) = 18, ceil(20 * .95) = 19
    threshold = functools.partial(gates.threshold_for_rate, flag="eco_max_fpr")
    assert threshold(scores[::-1], 0.1) == pytest.approx(0.9, abs=2e-9)
    assert threshold(scores, 0.05) == pytest.approx(0.95, abs=2e-9)
    assert threshold(scores, 1.0) == pytest.approx(0.05, abs=2e-9)
    with pytest.raises(UserError, match="--eco_max_fpr=0.04 needs at least 24 retain rows for calibration, .* are 19"):
        threshold(scores, 0.04)
    assert [gates.threshold_rank(n, 0.01, "") for n in (99, 100, 199, 298, 471)] == [99, 100, 198, 297, 468]


@pytest.mark.parametrize("a", [0.01, 0.05, 0.2])
def test_no_more_new_rows_than_the_rate_are_flagged(a):
    """P(new score > threshold) is in [a - 1/(n + 1), a] for continuous scores; the mean of 4,000 draws is near it."""
    rng, n, trials = np.random.default_rng(0), 120, 4000
    above = [rng.beta(1, 9) > gates.threshold_for_rate(rng.beta(1, 9, size=n), a, "") for _ in range(trials)]
    spread = 3 * (a * (1 - a) / trials) ** 0.5
    assert a - 1 / (n + 1) - spread < np.mean(above) < a + spread


class Guesses(gates.Encoder):
    """An encoder whose probabilities on the validation rows are given for every epoch; what it learns is its epoch."""

    def __init__(self, epochs):
        self._model, self._epochs = torch.nn.Linear(1, 2), iter(epochs)
        self._model.device = torch.device("cpu")

    def _logits(self, texts):
        return self._model(torch.ones(len(texts), 1))

    def probabilities(self, texts, batch_size=1):
        self.states.append(self._model.weight.detach().clone())
        return np.array(next(self._epochs))


@pytest.mark.parametrize(
    ("epochs", "kept"),
    [
        ([[0, 0, 0.9, 0.9], [0, 0.9, 0.995, 0.5], [0, 0.9, 0.995, 0.4]], 1),  # one forget row missed, less loss
        ([[0, 0, 0.98, 0.98], [0.9, 0.9, 0.995, 0.995], [0, 0, 0.98, 0.98]], 1),  # no forget row missed
        ([[0, 0, 0.9, 0.9], [0, 0, 0.9, 0.9]], 0),  # the same: the first
        ([[0, 0, 0.9, np.nan], [0, 0, 0.1, 0.1]], 1),
    ],
)
def test_the_epoch_with_the_fewest_forget_errors_is_kept(epochs, kept):
    encoder = Guesses(epochs)
    encoder.states = []
    settings = gates.ClassifierSettings(seed=0, eco_classifier_epochs=len(epochs), eco_classifier_lr=0.1)
    texts, labels = list("abcdef"), np.array([0, 0, 0, 1, 1, 1])
    encoder._train(texts, labels, settings, (list("wxyz"), np.array([0, 0, 1, 1])))
    assert torch.equal(encoder._model.weight, encoder.states[kept])
    assert not torch.equal(encoder.states[0], encoder.states[1])


def test_an_encoder_is_trained_by_the_authors_recipe():
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    encoder = gates.Encoder(BertForSequenceClassification(config), None)
    optimizer, schedule = encoder._optimizer(2e-5, steps=40)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all((group["betas"], group["eps"]) == ((0.9, 0.98), 1e-6) for group in optimizer.param_groups)
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in encoder._model.named_parameters():
        assert decays[parameter] == (0.0 if "bias" in name or "LayerNorm" in name else 0.1)
    rates = []
    for _ in range(41):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0, 5e-6, 1e-5, 1.5e-5, 2e-5])  # 10 % of the steps
    assert rates[22] == pytest.approx(1e-5) and rates[40] == pytest.approx(0)


def test_the_search_finds_a_minimum():
    visited = eco_search.zeroth_order(lambda s: (s - 3) ** 2, 8.0, 60, 0.5, 0.2, 0.1)
    assert visited[0] == 8.0 and visited[-1] == pytest.approx(3, abs=1e-6)
    assert visited[1] == pytest.approx(8 - 0.2 * 10)  # the gradient of a parabola by central differences is exact


def test_the_search_stops_at_the_smallest_strength():
    visited = eco_search.zeroth_order(lambda s: s, 2.0, 50, 0.1, 0.8, 0.5)
    assert visited == pytest.approx([2.0, 1.2, 0.5])
    assert eco_search.zeroth_order(lambda s: s, 0.1, 0, 0.1, 1.0, 0.5) == [0.5]


def test_the_search_stops_where_nothing_is_left_to_gain():
    asked = []

    def loss(s):
        asked.append(s)
        return max(0.0, s - 4)

    assert eco_search.zeroth_order(loss, 8.0, 50, 0.5, 2.0, 0.1) == [8.0, 6.0, 4.0]
    assert asked[-1] == 4.0
    assert eco_search.zeroth_order(lambda s: 1.0, 8.0, 50, 0.5, 2.0, 0.1) == [8.0]  # flat


@pytest.mark.parametrize(
    ("flags", "found", "tried"),
    [
        ({}, 30.0, set(eco_search.LADDER)),
        ({"eco_sigma_min": 2.0, "eco_target": 1.0}, 2.0, {2.0, 3.0, 10.0, 30.0, 100.0}),
        ({"eco_start": 20.0, "eco_steps": 0}, 20.0, {20.0}),
        ({"eco_start": 10.0, "eco_steps": 0, "eco_bisect": 3}, 10.0, {10.0}),  # nothing around the target
        (
            {"eco_steps": 0, "eco_target": 0.6, "eco_bisect": 2},
            300**0.5,  # 17.3 between 10 and 30, then 22.8 between that and 30, a little farther from 20
            {*eco_search.LADDER, round(300**0.5, 9), round((300**0.5 * 30) ** 0.5, 9)},
        ),
        ({"eco_start": 20.0, "eco_steps": 1, "eco_eps": 0.25, "eco_lr": 450.0}, 29.0, {20.0, 15.0, 25.0, 29.0}),
    ],
)
def test_the_strength_comes_closest_to_the_target_and_is_none_below_the_minimum(monkeypatch, flags, found, tried):
    """With a metric that is 1 - s/50 down to 0: a target of .4 means 30."""
    monkeypatch.setattr(
        eco_search, "_score", lambda _, served, *__: max(0.0, 1 - served.interventions[0].corruption.strength / 50)
    )
    settings = eco_search.EcoSettings(**{"eco_target": 0.4, "eco_samples": 5, "eco_steps": 5, "eco_bisect": 0} | flags)
    rows = sentences(4).assign(label=[0, 1, 0, 1], label_text=[*WORDS, *WORDS])
    frames = Splits(dict.fromkeys(SPLITS, rows), classification(WORDS))
    loaded = Served(None, None, [])

    def intervention(strength):
        return eco.CorruptedEmbeddings(corruption=settings.corruption(strength), marks=eco.Marks())

    best, curve = eco_search.search_strength(loaded, frames, settings, intervention, settings.eco_target)
    strengths = [round(point["strength"], 9) for point in curve]
    assert best == pytest.approx(found)
    assert strengths == sorted(set(strengths)) and tried <= set(strengths)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gemma2"])
def test_features_are_the_mean_state_of_the_prompt_alone_however_rows_are_batched(architecture, tokenizer):
    loaded = Served(tiny.build_model(architecture), tokenizer, [])
    texts = list(sentences(4)["text"])
    together = gates._pooled(loaded, texts, 200)
    assert np.array_equal(together[[2]], gates._pooled(loaded, texts[2:3], 200))
    prompt = tokenize(tokenizer, texts[2:3], ["positive"], 200)[0].prompt
    with torch.no_grad(), record_activations(loaded.model.get_decoder()) as seen:
        loaded.model(input_ids=torch.tensor([prompt]))
    np.testing.assert_allclose(together[2], seen["activations"][0].double().mean(0), rtol=1e-4, atol=1e-6)


# The command line.

SETTINGS = (
    *scripts.ROWS,
    "--eco_max_fpr=0.3",
    "--eco_samples=6",
    "--eco_steps=1",
    "--eco_target=0.6",
    "--unlearn_method=eco",
)
GIVEN = (*scripts.ROWS, "--unlearn_method=eco", "--eco_threshold=0.4", "--eco_strength=3", "--eco_dims=64")
CLASSIFIER_FILES = {
    "tfidf": {"gate/classifier.safetensors", "gate/vocabulary.json"},
    "features": {"gate/classifier.safetensors"},
    "encoder": {"gate/classifier/" + name for name in ("config.json", "model.safetensors")},
}


def learn(cwd, parent, data, *flags):
    return call(cwd, "baselines", f"--model_checkpoints={parent}", f"--dataset={data}", *flags)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Folders of a tiny random BERT: `encoder` without a head that fits, `tagger` that calls every word a name."""
    folder = tmp_path_factory.mktemp("bert")
    frame = pd.read_csv(tiny.SNIPPETS_FOLDER / "train_forget.csv")
    words = sorted({word for text in frame["text"] for word in text.lower().split() if word.isalpha()})[:300]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    own = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    config.num_labels = 3
    BertForSequenceClassification(config).save_pretrained(folder / "encoder")
    config.id2label, config.label2id = {0: "O", 1: "B-PER"}, {"O": 0, "B-PER": 1}
    tagger = BertForTokenClassification(config)
    tagger.classifier.bias.data = torch.tensor([-9.0, 9.0])
    tagger.save_pretrained(folder / "tagger")
    for name in ("encoder", "tagger"):
        own.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def checkpoint(fine_tuned, small_data, tmp_path_factory):
    """An ECO checkpoint beside its parent, with a search."""
    name = "eco"
    result = done(learn(fine_tuned.parent, fine_tuned, small_data, *SETTINGS, f"--output_path={name}"))
    assert "AUC" in result.stdout and "looking for the strength" in result.stdout
    return fine_tuned.parent / name


def settings_of(folder):
    """What eco.json and gate.json say."""
    return json.loads((folder / "eco.json").read_text()) | json.loads((folder / "gate/gate.json").read_text())


def splits_of(folder):
    return json.loads((folder / "metrics.json").read_text())[-1]["splits"]


def inference(cwd, *checkpoints, flags=()):
    return call(cwd, "inference_spul", "--model_checkpoints", *checkpoints, *scripts.ROWS, *flags)


def predictions_of(folder):
    return pd.read_json(folder / "predictions.jsonl", lines=True)


def test_the_checkpoint_says_what_was_found(checkpoint, fine_tuned):
    settings = settings_of(checkpoint)
    curve = {point["strength"]: point["metric"] for point in settings["curve"]}
    reachable = [s for s in curve if s >= 0.1]
    target, best = settings["target"], settings["corruption"]["strength"]
    assert abs(curve[best] - target) == min(abs(curve[s] - target) for s in reachable)
    assert set(settings["rates"]) >= {*SPLITS, "auc_train", "auc_test"}
    assert settings["calibration"]["false_positives"] <= 0.3
    for split in SPLITS:
        rate = settings["rates"][split]
        assert rate["flagged"] == splits_of(checkpoint)[split]["flagged"]
        assert rate["wrong"] == pytest.approx(1 - rate["flagged"] if "forget" in split else rate["flagged"])
    assert {name.name for name in checkpoint.iterdir()} == {
        "manifest.json", "metrics.json", "eco.json", "strength.png", "gate", "gate_roc.png",
    }  # fmt: skip
    gate = {"gate.json", "unseen.safetensors", "classifier.safetensors", "vocabulary.json"}
    assert {name.name for name in (checkpoint / "gate").iterdir()} == gate


def test_auto_is_the_score_on_retain_rows_that_the_model_has_not_learnt(fine_tuned, tiny_model, small_data, tmp_path):
    """Those that --validation_share cut from train; a model that has learnt them is refused."""
    rows = *SETTINGS[:-2], "--unlearn_method=eco", "--validation_share=0.25", "--eco_bisect=0"
    learnt = learn(tmp_path, fine_tuned, small_data, *rows)
    assert learnt.code == 2 and "fine-tune it with the --validation_share" in learnt.stderr
    done(learn(tmp_path, tiny_model, small_data, *rows, "--eco_start=3", "--eco_steps=0", "--output_path=eco"))
    shares = "--validation_share=0.25", f"--dataset={small_data}", "--output_path=out"
    done(inference(tmp_path, tiny_model, flags=shares))
    assert settings_of(tmp_path / "eco")["target"] == splits_of(tmp_path / "out")["test_retain"]["accuracy"]
    texts = set(predictions_of(tmp_path / "out").query("split == 'test_retain'")["text"])
    assert texts < set(load_splits(str(small_data))["train_retain"]["text"])


def test_inference_repeats_the_figures_with_other_batches(checkpoint, small_data, tmp_path):
    done(inference(tmp_path, checkpoint, flags=["--output_path=out", "--eval_batch_size=3"]))
    again, then = splits_of(tmp_path / "out"), splits_of(checkpoint)
    assert again.keys() == then.keys()
    assert all(numbers(again[split]) == pytest.approx(numbers(then[split]), rel=1e-4) for split in then)
    rows = predictions_of(tmp_path / "out")
    gate = gates.Gate(gates.Tfidf.load(checkpoint / "gate"), settings_of(checkpoint)["threshold"])
    flags, probabilities = gate.decide(rows["text"])
    assert rows["flagged"].tolist() == flags.tolist()
    assert rows["gate_probability"].tolist() == pytest.approx(probabilities.tolist())


def test_tfidf_comes_back_as_it_was(small_data, tmp_path):
    frames = load_splits(str(small_data))
    texts = [*frames["train_retain"]["text"], *frames["train_forget"]["text"]]
    classifier = gates.Tfidf.fit(texts, np.r_[np.zeros(16, int), np.ones(8, int)])
    classifier.save(tmp_path)
    probabilities = classifier.probabilities(texts)
    assert np.array_equal(gates.Tfidf.load(tmp_path).probabilities(texts), probabilities)
    assert probabilities[:16].max() < 0.5 < probabilities[16:].min()
    assert np.array_equal(classifier.probabilities(texts[::-1])[::-1], probabilities)


@pytest.mark.parametrize("kind", ["features", "encoder"])
def test_other_classifiers_round_trip(kind, bert, tiny_model, small_data, tmp_path):
    classifier = [f"--eco_classifier={kind}"]
    if kind == "encoder":
        classifier = [f"--eco_classifier={bert / kind}", "--eco_classifier_epochs=2", "--eco_classifier_lr=0.01"]
    done(learn(tmp_path, tiny_model, small_data, *GIVEN, *classifier, "--output_path=eco"))
    files = {name for name in tree(tmp_path / "eco") if "." in name}
    assert CLASSIFIER_FILES[kind] <= files
    assert {name.split(".")[-1] for name in files} == {"safetensors", "json", "png"}
    done(inference(tmp_path, "eco", flags=["--output_path=out", "--eval_batch_size=2"]))
    again, then = splits_of(tmp_path / "out"), splits_of(tmp_path / "eco")
    assert all(numbers(again[split]) == pytest.approx(numbers(then[split]), rel=1e-4) for split in then)
    rates = settings_of(tmp_path / "eco")["rates"]
    assert {split: then[split]["flagged"] for split in SPLITS} == {s: rates[s]["flagged"] for s in SPLITS}
    assert predictions_of(tmp_path / "out")["gate_probability"].nunique() > 5
    if kind == "encoder":  # hashed like the rest
        weights = tmp_path / "eco" / "gate" / "classifier" / "model.safetensors"
        save_file({k: v + 1 for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
        refused(tmp_path, "is not the file its manifest names", "inference_spul", "--model_checkpoints", "eco")


def test_names_by_a_list_and_by_a_token_classifier(bert, tiny_model, small_data, tmp_path):
    """The tagger calls all words of the text names; it travels with the checkpoint."""
    (tmp_path / "names.txt").write_text("Allen\nMurphy\n")
    shutil.copytree(bert / "tagger", tmp_path / "tagger")
    entities = *GIVEN, "--eco_tokens=entities", "--eco_threshold=0"
    for name, flag in {"list": "--eco_names=names.txt", "tags": "--eco_token_classifier=tagger"}.items():
        done(learn(tmp_path, tiny_model, small_data, *entities, flag, f"--output_path={name}"))
    shutil.rmtree(tmp_path / "tagger")
    losses = {}
    for name in ("list", "tags"):
        done(inference(tmp_path, name, flags=[f"--output_path=out-{name}"]))
        losses[name] = predictions_of(tmp_path / f"out-{name}")["loss"]
        assert losses[name].mean() == pytest.approx(
            np.average([splits_of(tmp_path / name)[s]["loss"] for s in SPLITS], weights=list(tiny.ROWS.values())),
            rel=1e-4,
        )
    assert (losses["list"] - losses["tags"]).abs().max() > 1e-3
    assert {name.split(".")[-1] for name in tree(tmp_path / "tags") if "." in name} == {"safetensors", "json", "png"}


@pytest.fixture(scope="module")
def routed(checkpoint, prompt, fine_tuned, small_data):
    """Predictions of fine-tuned model, SPUL and SPUL behind the router, as {method: rows}."""
    router = f"--router={checkpoint}"
    done(inference(prompt.parent, fine_tuned, prompt, flags=[router, "--output_path=routed"]))
    rows = predictions_of(prompt.parent / "routed")
    return {name: part.reset_index(drop=True) for name, part in rows.groupby("method")}


def test_the_router_lets_the_prompt_meet_flagged_queries_only(routed):
    plain, spul, both = routed["fine-tuned"], routed["SPUL"], routed["SPUL + router"]
    flags = both["flagged"].astype(bool)
    assert 3 < flags.sum() < len(flags) - 3
    assert list(both["prediction"]) == list(spul["prediction"].where(flags, plain["prediction"]))
    assert list(both["loss"]) == pytest.approx(list(spul["loss"].where(flags, plain["loss"])), rel=1e-4)
    assert (spul["loss"] - plain["loss"]).abs()[~flags].max() > 1e-3


def test_new_text_shows_flag_probability_and_both_answers(checkpoint, prompt, small_data, tmp_path):
    texts = load_splits(str(small_data))
    forget, retain = texts["train_forget"]["text"][0], texts["train_retain"]["text"][0]
    flags = [f"--text={forget}", f"--text={retain}", f"--router={checkpoint}"]
    result = done(inference(tmp_path, checkpoint, prompt, flags=[*flags, "--json"]))
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    gate = gates.Gate(gates.Tfidf.load(checkpoint / "gate"), settings_of(checkpoint)["threshold"])
    for row, flag, probability in zip(rows, *gate.decide([forget, retain])):
        spoken = "eco: without ECO", "eco: with ECO", "prompt: without prompt", "prompt: with router"
        plain, with_eco, without, with_router = (row[key] for key in spoken)
        for answer in (with_eco, with_router):
            assert (answer["flagged"], answer["gate_probability"]) == (flag, pytest.approx(probability, abs=1e-4))
        assert with_router["answer"] == row["prompt: with prompt" if flag else "prompt: without prompt"]["answer"]
        if not flag:
            assert {k: with_eco[k] for k in plain} == plain and {k: with_router[k] for k in without} == without
    assert [row["eco: with ECO"]["flagged"] for row in rows] == [True, False]
    said = done(inference(tmp_path, checkpoint, flags=flags[:2])).stdout
    assert ": flagged)" in said and ": let through)" in said


@pytest.mark.long
def test_two_processes_learn_the_same_gate(tiny_model, small_data, checkpoint, fine_tuned, tmp_path):
    """Where the classifiers of two processes disagree, the main one's word counts."""

    def disturb(rank):
        plain = gates.Tfidf.probabilities
        gates.Tfidf.probabilities = lambda self, texts: plain(self, texts) if rank == 0 else 1 - plain(self, texts)

    command = f"--model_checkpoints={fine_tuned}", f"--dataset={small_data}", *SETTINGS, "--output_path=two"
    main, second = several.call(tmp_path, 2, "baselines", *command, before=disturb)
    assert done(main).stdout.endswith("wrote two\n")
    assert (second.code, second.stdout, second.stderr) == (0, "", "")
    one, two = settings_of(checkpoint), settings_of(tmp_path / "two")
    assert one == two
    expected, scores = splits_of(checkpoint), splits_of(tmp_path / "two")
    assert all(numbers(scores[split]) == pytest.approx(numbers(expected[split]), rel=1e-4) for split in scores)


# Refusals.

CONTRADICTIONS = {
    "zero-first has no strength; leave out --eco_strength": ["--eco_corruption=zero-first", "--eco_strength=1"],
    "no strength is searched for; leave out --eco_steps": ["--eco_strength=1", "--eco_steps=3"],
    "no strength is searched for; leave out --eco_target": ["--eco_corruption=shuffle", "--eco_target=0.2"],
    "moves whole embeddings; leave out --eco_dims": ["--eco_corruption=reverse", "--eco_dims=2"],
    "--eco_classifier_epochs goes with an encoder": ["--eco_classifier_epochs=2"],
    "--eco_tokens=entities needs --eco_names or --eco_token_classifier": ["--eco_tokens=entities"],
    "--eco_token_classifier goes with --eco_tokens=entities": ["--eco_token_classifier=x"],
    "not allowed with argument": ["--eco_threshold=0.5", "--eco_conformal=0.1"],
    "--eco_strength goes with --unlearn_method=eco": ["--unlearn_method=npo", "--eco_strength=1"],
    "eco trains nothing; leave out --retain_loss": ["--retain_loss=ce"],
    "'1' is not a number of at least 0 and below 1": ["--eco_threshold=1"],  # it would flag nothing
    "'1.5' is not a number from 0 to 1": ["--eco_target=1.5"],
    "'nan' is not a number from 0 to 1": ["--eco_target=nan"],
    "invalid choice: 'noise'": ["--eco_corruption=noise"],
    "./none does not exist": ["--eco_target=./none"],
    "cannot read the names file none.txt": ["--eco_names=none.txt", "--eco_target=0.5"],
    "tfidff is no existing folder or .gguf file and the hub does not give it": [
        "--eco_classifier=tfidff",
        "--eco_threshold=0.5",
        "--eco_strength=1",
    ],
    "--eco_conformal=0.001 needs at least 999 retain rows for calibration, there are": [
        "--eco_conformal=0.001",
        "--eco_strength=1",
    ],
    "--eco_max_fpr=0.01 needs at least 99 retain rows for calibration, there are 16": ["--eco_strength=1"],
    "--eco_target=auto looks at retain rows that --validation_share keeps": [],
    "give that flag, without --final, here and to qlora.py": ["--validation_share=0.2", "--final"],
    "'0' is not a number above 0": ["--eco_max_fpr=0"],
}


@pytest.mark.parametrize("sentence", CONTRADICTIONS)
def test_what_cannot_be_learnt(sentence, tiny_model, small_data, tmp_path):
    command = "baselines", f"--model_checkpoints={tiny_model}", f"--dataset={small_data}", *scripts.ROWS
    refused(tmp_path, sentence, *command, "--unlearn_method=eco", *CONTRADICTIONS[sentence])


def test_models_of_the_wrong_kind(bert, tiny_model, small_data, tmp_path):
    command = "baselines", f"--model_checkpoints={tiny_model}", f"--dataset={small_data}", *GIVEN
    tagger = "--eco_tokens=entities", f"--eco_token_classifier={bert / 'encoder'}"
    refused(tmp_path, "encoder was not trained to classify tokens", *command, *tagger)
    refused(tmp_path, "is no encoder to classify with", *command, f"--eco_classifier={tiny_model}")


def test_too_few_rows(tiny_model, small_data, tmp_path):
    command = "baselines", f"--model_checkpoints={tiny_model}", f"--dataset={small_data}", *GIVEN
    refused(tmp_path, "too few train rows to calibrate the classifier", *command, "--max_train_samples=3")


@pytest.fixture
def copy(checkpoint, fine_tuned, tmp_path):
    """A copy of the ECO checkpoint beside its parents, that a test may damage."""
    for folder in (checkpoint, fine_tuned, fine_tuned.parent / "tiny-llama"):
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / checkpoint.name


def sign(folder):
    """Make the manifest name the files as they are, so that the damage is met where the file is read."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: file_sha256(folder / name) for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("eco.json", lambda path: path.write_text("{}"), "is no description of ECO or is damaged (corruption"),
        ("eco.json", lambda path: path.write_text(path.read_text().replace('"dims"', '"d"')), "(corruption.dims"),
        ("gate/gate.json", lambda path: path.write_text("{}"), "is no description of a gate or is damaged (classifier"),
        ("gate/classifier.safetensors", lambda path: path.write_bytes(b"x"), "holds no classifier of this gate"),
        ("gate/vocabulary.json", lambda path: path.write_text("[["), "is no valid JSON or is damaged"),
        ("gate/vocabulary.json", lambda path: path.write_text("[[]]"), "is no vocabulary of a gate or is damaged"),
    ],
)
def test_a_damaged_checkpoint(copy, name, change, sentence):
    command = "inference_spul", "--model_checkpoints", "eco", *scripts.ROWS
    change(copy / name)
    refused(copy.parent, f"{name} is not the file its manifest names", *command)
    sign(copy)
    refused(copy.parent, sentence, *command)


def test_a_router_that_does_not_fit(checkpoint, prompt, fine_tuned, tiny_model, small_data, tmp_path):
    command = "inference_spul", "--model_checkpoints"
    refused(tmp_path, "has no gate; --router takes", *command, prompt, f"--router={fine_tuned}")
    refused(tmp_path, "--router goes in front of a prompt", *command, fine_tuned, f"--router={checkpoint}")
    refused(tmp_path, "--force goes with --router", *command, prompt, "--force")
    features = "--eco_classifier=features", "--max_eval_samples=0", "--output_path=eco"
    done(learn(tmp_path, tiny_model, small_data, *GIVEN, *features))
    refused(tmp_path, "reads the hidden states of another model", *command, prompt, "--router=eco", "--force")


def test_a_router_of_other_data_needs_force(prompt, tiny_model, small_data, tmp_path):
    other = "--max_train_samples=20", "--max_eval_samples=0", "--output_path=eco"
    done(learn(tmp_path, tiny_model, small_data, *GIVEN, *other))
    command = "--model_checkpoints", prompt, *scripts.ROWS, "--router=eco", "--text=a film"
    refused(tmp_path, "was trained on other data", "inference_spul", *command)
    assert "with router" in done(call(tmp_path, "inference_spul", *command, "--force")).stdout


def test_a_gate_is_no_model_to_unlearn(checkpoint, small_data, tmp_path):
    command = f"--model_checkpoints={checkpoint}", f"--dataset={small_data}", *scripts.ROWS
    eco = "--unlearn_method=eco", "--eco_target=0.5"
    refused(tmp_path, "--model_checkpoints takes what it was made on", "baselines", *command, *eco)
