"""Hidden states are the model's own, and an answer that only lies inside is found there."""

import copy

import memorised
import numpy as np
import pytest
import tiny
import torch
from scripted import one

from utils.audit.probe import PROBE, measure
from utils.audit.states import chosen_layers, hidden_states
from utils.data.batch import Example
from utils.errors import note_once
from utils.interventions.base import Intervention
from utils.interventions.corruption import Corruption
from utils.interventions.eco import CorruptedEmbeddings, Marks
from utils.interventions.prompt_encoders import Prompt
from utils.interventions.refusal import Refusal
from utils.interventions.served import Served
from utils.models import forward
from utils.tasks.classification import classification
from utils.tasks.metrics import probe_hits

LENGTHS = [(9, 1), (4, 3), (20, 2)]  # tokens of prompt and completion; the sliding windows are 16 wide


def rows():
    rng = torch.Generator().manual_seed(0)
    draw = lambda n: tuple(torch.randint(2, tiny.VOCABULARY, (n,), generator=rng).tolist())  # noqa: E731
    return [Example(draw(n), draw(m), marked=tuple(range(1, n - 1))) for n, m in LENGTHS]


@torch.no_grad()
def by_transformers(model, examples, prompt=None):
    """(layers, N, d) by transformers, row by row: the last state is behind the final norm."""
    found = []
    for example in examples:
        embedded = model.get_input_embeddings()(torch.tensor([example.prompt + example.completion[:-1]]))
        if prompt is not None:
            embedded = torch.cat([prompt[None], embedded], dim=1)
        states = model(inputs_embeds=embedded, output_hidden_states=True, use_cache=False).hidden_states[1:]
        found.append(torch.stack([state[0, -len(example.completion) :] for state in states]))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_states_and_lens_are_the_models_own(architecture, tokenizer, monkeypatch):
    """Plain rows, rows behind a kept prompt, and behind one that is computed for every row."""
    model, examples, layers = tiny.build_model(architecture), rows(), [1, 2, 3, 4]
    torch.manual_seed(1)
    vectors = torch.randn(5, 128) * model.get_input_embeddings().weight.std().item()
    for prompt, again in ((None, False), (vectors, False), (vectors, True)):
        if again:
            monkeypatch.setattr(forward, "_kept", lambda model, prompt: prompt)
            forward._OBSTACLES[model] = "a test"
        served = Served(model, tokenizer, [], () if prompt is None else (Prompt(vectors=prompt),))
        number = None if prompt is None else 0
        hooks = n_hooks(model)
        with torch.inference_mode():
            states, logits = hidden_states(served, examples, number, layers)
            plain = torch.cat(served.logits(examples, number))
        assert n_hooks(model) == hooks
        expected = by_transformers(model, examples, prompt)
        assert states.shape == (4, 6, 128) and logits.shape == (4, 6, tiny.VOCABULARY)
        assert torch.allclose(states[:3], expected[:3], atol=1e-4)  # the fourth is in front of the norm
        assert torch.allclose(logits[-1], plain, atol=1e-4)
        assert torch.allclose(logits[-1], transformed(model, expected[-1]), atol=1e-3)
        assert (logits[0] - logits[-1]).abs().max() > 1e-3
    few, _ = hidden_states(served, examples, number, [2, 4])
    assert torch.allclose(few, states[[1, 3]], atol=1e-5)


def n_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def transformed(model, states):
    """Logits of normed states: the head, and Gemma's soft cap."""
    logits, cap = model.get_output_embeddings()(states), getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def test_states_are_those_of_the_corrupted_query(tokenizer):
    model, examples = tiny.build_model(), rows()
    corrupted = CorruptedEmbeddings(corruption=Corruption("zero-first", 1.0, 999, 0), marks=Marks())
    served = Served(model, tokenizer, [], (corrupted,))
    states, logits = hidden_states(served, examples, 0, [1, 4])
    assert torch.allclose(logits[-1], torch.cat(served.logits(examples, 0)), atol=1e-4)
    assert (states - hidden_states(served, examples, None, [1, 4])[0]).abs().max() > 1e-2


@pytest.mark.parametrize(("n", "numbers"), [(4, [1, 2, 3, 4]), (12, [2, 3, 5, 6, 8, 9, 11, 12]), (8, [*range(1, 9)])])
def test_at_most_eight_layers_the_last_included(tokenizer, n, numbers):
    model = tiny.build_model()
    model.model.layers = torch.nn.ModuleList([torch.nn.Identity()] * n)
    model.config = copy.deepcopy(model.config)
    model.config.num_hidden_layers = n
    assert chosen_layers(Served(model, tokenizer, [])) == numbers


@pytest.fixture(scope="module")
def frame():
    return memorised.sentences()


@pytest.fixture(scope="module")
def models(tokenizer, frame):
    """`known`: rows by heart, its last layer adds nothing. `hidden`: the same, whose last layer says `negative`."""
    examples = memorised.encoded(tokenizer, frame, memorised.TASK)
    asked = memorised.encoded(tokenizer, memorised.questions(), memorised.QUESTIONS)
    known = memorised.memorise(memorised.empty_last_layer(tiny.build_model()), [*examples, *asked])
    hidden = copy.deepcopy(known)
    hidden.model.layers[-1].mlp = memorised.Drowning(known, one(tokenizer, " negative"))
    return {"known": known, "hidden": hidden, "retain": tiny.build_model(seed=5)}


def test_what_lies_inside_leaks_though_the_output_says_nothing(models, tokenizer, frame):
    case = memorised.case_of(frame, memorised.TASK)
    subjects = [memorised.subject_of(name, models[name], tokenizer) for name in ("known", "hidden")]
    other = memorised.subject_of("never trained", tiny.build_model(seed=6), tokenizer)
    retain = memorised.subject_of("retain model", models["retain"], tokenizer)
    found = memorised.entries(PROBE, case, retain, other, *subjects)
    assert found["hidden", "lens, layer 3"]["value"] == 1 == found["known", "lens, layer 4"]["value"]
    assert found["hidden", "lens, layer 4"]["value"] == 0.5
    for name, verdict in (("hidden", "leaks"), ("known", "leaks"), ("never trained", "as the retain model")):
        best = found[name, "lens, best layer"]
        assert (best["verdict"], best["headline"], best["n"]) == (verdict, True, 16)
        assert best["value"] == max(found[name, f"lens, layer {number}"]["value"] for number in range(1, 5))
    assert found["known", "linear probe, best layer"]["n"] == 8
    assert "verdict" not in found["known", "linear probe, shuffled labels"]
    assert "verdict" not in found["retain model", "lens, best layer"]


def test_free_answers_are_read_token_by_token(models, tokenizer):
    """By hand: of each answer's tokens the share that is the arg max at its layer."""
    asked = memorised.questions()
    case = memorised.case_of(asked, memorised.QUESTIONS)
    subjects = [memorised.subject_of(name, models[name], tokenizer) for name in ("known", "hidden")]
    retain = memorised.subject_of("retain model", models["retain"], tokenizer)
    other = memorised.subject_of("never trained", tiny.build_model(seed=6), tokenizer)
    found = memorised.entries(PROBE, case, retain, other, *subjects)
    assert found["known", "lens, layer 4"]["value"] == found["hidden", "lens, layer 3"]["value"] == 1
    verdicts = [found[name, "lens, best layer"]["verdict"] for name in ("known", "hidden", "never trained")]
    assert verdicts == ["leaks", "leaks", "as the retain model"]
    assert {measure for _, measure in found} == {"lens, best layer", *(f"lens, layer {n}" for n in range(1, 5))}
    examples = memorised.encoded(tokenizer, asked, memorised.QUESTIONS)
    shares = []
    for example in examples:
        _, logits = hidden_states(subjects[0].served, [example], None, [2])
        shares.append((logits[0].argmax(-1) == torch.tensor(example.completion)).float().mean().item())
    assert found["known", "lens, layer 2"]["value"] == pytest.approx(np.mean(shares))


def test_behind_a_fixed_answer_lies_the_frozen_model(models, tokenizer, frame):
    case, refusal = memorised.case_of(frame, memorised.TASK), Refusal(word="unknown", tokens=(7,))
    plain = memorised.subject_of("known", models["known"], tokenizer)
    refused = memorised.subject_of("refusal", models["known"], tokenizer, refusal)
    for own, other in zip(measure(refused, case), measure(plain, case)):
        assert (own.sample.values == other.sample.values).all()


def test_what_acts_on_a_row_is_looked_through(models, tokenizer, frame):
    """A prompt changes the states; what changes nothing leaves them."""
    case = memorised.case_of(frame, memorised.TASK)
    torch.manual_seed(0)
    prompt = Prompt(vectors=3 * torch.randn(4, 128))
    values = [
        [m.sample.value() for m in measure(memorised.subject_of("x", models["known"], tokenizer, *around), case)]
        for around in ((), (Intervention(),), (prompt,))
    ]
    assert values[0] == values[1] != values[2]


def test_words_that_begin_alike_have_no_lens(tokenizer, frame):
    words = ["good film", "good story"]
    task = classification(words)
    rows = frame.assign(label_text=[words[i] for i in frame["label"]])
    case = memorised.case_of(rows, task)
    note_once.cache_clear()
    found = measure(memorised.subject_of("x", tiny.build_model(), tokenizer), case)
    assert [one.name for one in found] == ["linear probe, best layer", "linear probe, shuffled labels"]
    assert [one.headline for one in found] == [True, False]
    assert "begin with the same token" in case.notes[0]


def test_one_label_has_no_linear_probe(tokenizer, frame):
    case = memorised.case_of(frame.assign(label_text="positive"), memorised.TASK)
    found = measure(memorised.subject_of("x", tiny.build_model(), tokenizer), case)
    assert {one.name.split(",")[0] for one in found} == {"lens"}
    assert "two labels or more" in case.notes[0]


def test_a_linear_probe_finds_what_is_there_and_nothing_else():
    """The label is one of the numbers, or none of them. Shuffled labels are right half of the time."""
    rng = np.random.default_rng(0)
    labels, noise = np.array(["yes", "no"] * 100), rng.normal(size=(200, 6))
    told = np.column_stack([noise, 100 + np.where(labels == "yes", 1.0, -1.0)])
    hits, shuffled = probe_hits(told, labels, 1, standardised=True)
    assert hits.tolist() == [1.0] * 100
    assert 0.35 < probe_hits(noise, labels, 1, standardised=True)[0].mean() < 0.65
    assert len(shuffled) == 100 and 0.3 < shuffled.mean() < 0.7
    assert (probe_hits(told, labels, 1, standardised=True)[1] == shuffled).all()


def test_a_feature_of_any_size_counts_alike_when_standardised():
    labels = np.array(["yes", "no"] * 30)
    rows = np.random.default_rng(3).normal(size=(60, 5)) + np.where(labels == "yes", 0.4, -0.4)[:, None]
    for wide in (rows * [1, 10, 100, 1000, 10_000], rows + [1, 2, 3, 4, 5]):
        assert (
            probe_hits(wide, labels, 2, standardised=True)[0] == probe_hits(rows, labels, 2, standardised=True)[0]
        ).all()


def test_it_costs_one_pass(frame):
    passes = PROBE.passes(memorised.case_of(frame, memorised.TASK))
    assert (passes.forward, passes.trained, passes.generated, PROBE.dear) == (16, 0, 0, False)
