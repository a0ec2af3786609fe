"""Relearning, quantisation, soft attack: models that hide what they know, ones that never knew it, restoration."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scripts
import tiny
import torch
from asking import Word
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, LlamaConfig

from utils.audit import attacks, quantisation, relearning, run, soft_attack
from utils.audit.base import NONE, ON, AuditSettings, Case, Subject
from utils.data.batch import collate
from utils.errors import UserError
from utils.interventions import gates
from utils.interventions.corruption import Corruption
from utils.interventions.eco import CorruptedEmbeddings, Marks
from utils.interventions.gates import ClassifierSettings, Features, Gate
from utils.interventions.prompt_encoders import Prompt
from utils.interventions.refusal import refuse
from utils.interventions.served import Served
from utils.models.forward import completion_logits, prompt_prefix
from utils.tasks.answers import known_answers
from utils.tasks.classification import Classification
from utils.tasks.encode import tokenize
from utils.tasks.rows import Splits

WORDS = ("negative", "positive")
TASK = Classification(words=WORDS, head="", end=" is")
SETTINGS = AuditSettings(seed=1, max_length=32, attack_share=0.25)
SIZES = {"train_retain": 32, "train_forget": 32, "test_retain": 16, "test_forget": 32}


def one_token_rows(tokenizer):
    """Splits whose texts are words of one token, each another one, and whose labels say nothing but by heart."""
    rng = np.random.default_rng(0)
    pieces = [piece[1:] for piece in tokenizer.get_vocab() if piece[0] == "Ġ" and piece[1:].isalpha()]
    words, frames = iter(rng.permutation(sorted(piece for piece in pieces if len(piece) > 3))), {}
    for split, n in SIZES.items():
        labels = rng.permutation(n) % 2
        frames[split] = pd.DataFrame({"text": [f" {next(words)}" for _ in range(n)], "label": labels})
        frames[split]["label_text"] = [WORDS[label] for label in labels]
    return Splits(frames, TASK)


def make_case(frames, **settings):
    return Case(frames=frames, whole=frames, settings=replace(SETTINGS, **settings), model=tiny.ON_CPU)


def subject(model, tokenizer, method, *interventions):
    served = Served(model, tokenizer, []).using(*interventions)
    return Subject(
        method=method, checkpoint=method, wrapper=ON if interventions else NONE, served=served, frozen=(method,)
    )


def other_labels(frame):
    return frame.assign(label_text=[WORDS[1 - WORDS.index(word)] for word in frame["label_text"]])


def build():
    """A random Llama of two small layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    config = LlamaConfig(**sizes, num_key_value_heads=2, **tiny.COMMON)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval().requires_grad_(False)


def teach(model, tokenizer, frame, steps=30, parameters=None):
    """`model`, fine-tuned on the labels of `frame` until it has them by heart; all weights, or `parameters`."""
    answers = known_answers(tokenizer, TASK)
    examples = tokenize(tokenizer, frame["text"], list(frame["label_text"]), max_length=32, answers=answers)
    parameters = list(model.parameters()) if parameters is None else parameters
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer, batch = torch.optim.AdamW(parameters, lr=1e-2), collate(examples, 1, "cpu")
    for _ in range(steps):
        torch.nn.functional.cross_entropy(completion_logits(model, batch), batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def frames(tokenizer):
    return one_token_rows(tokenizer)


@pytest.fixture(scope="module")
def retain(tokenizer, frames):
    """The retain-only model."""
    return teach(build(), tokenizer, frames["train_retain"])


@pytest.fixture(scope="module")
def other(tokenizer, frames):
    """Another one that has not seen the rows to forget."""
    return teach(build(), tokenizer, frames["test_retain"])


@pytest.fixture(scope="module")
def fine_tuned_on_forget(tokenizer, frames):
    return teach(build(), tokenizer, frames["train_forget"])


def verdicts(audit, subjects, case):
    """{(method, measure): (value, verdict, None where nothing is compared)}; the headline is the first measure."""
    found = [(subject, audit, audit.measure(subject, case), 0.0) for subject in subjects]
    entries = run._report(found, case, case.settings)["audits"]
    assert all(entry["headline"] == (entry["measure"] == entries[0]["measure"]) for entry in entries)
    return {(entry["method"], entry["measure"]): (entry["value"], entry.get("verdict")) for entry in entries}


def values(measures):
    return {measure.name: measure.sample.value() for measure in measures}


def knows(subject, case, label="before"):
    return case.knowledge(subject, label, case.frames["train_forget"])[0].sample.value()


def state(model):
    """All that an attack could leave behind."""
    tensors = {
        name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.state_dict(keep_vars=True).items()
    }
    return tensors, [name for name, _ in model.named_modules()], len(list(model.parameters()))


def same(before, after):
    assert before[0].keys() == after[0].keys() and before[1:] == after[1:]
    return all(torch.equal(old, new) and a == b for (old, a), (new, b) in zip(before[0].values(), after[0].values()))


def answers_to(subject, case, frame):
    """The logits at the answers of `frame`, as numbers."""
    acting, _ = subject.served.decide(list(frame["text"]))
    examples = attacks.asked(subject, frame, acting, case)
    with torch.no_grad():
        return torch.cat([torch.cat(subject.served.logits([row], n)) for row, n in zip(examples, acting)])


def broken_prompt(size=48):
    return Prompt(vectors=torch.randn(2, size, generator=torch.Generator().manual_seed(3)))


# Relearning


def test_what_was_only_hidden_comes_back_from_other_rows(tokenizer, frames, retain, other):
    """A model that has learnt to say the opposite turns round on all rows when it is taught a quarter of them. One that
    never saw them does not, and unrelated rows bring nothing back."""
    hidden = subject(teach(build(), tokenizer, other_labels(frames["train_forget"])), tokenizer, "hidden")
    case = make_case(frames, attack_steps=20, attack_lr=1e-2)
    assert knows(hidden, case) == 0
    subjects = [subject(retain, tokenizer, "retain model"), hidden, subject(other, tokenizer, "other")]
    found = verdicts(relearning.RELEARNING, subjects, case)
    assert found["hidden", "gives the answer, after some forget rows"][1] == "leaks"
    assert found["other", "gives the answer, after some forget rows"][1] == "as the retain model"
    assert found["hidden", "gives the answer, after retain rows"][1] != "leaks"


def test_the_attacker_has_its_share_and_the_others_are_asked(frames):
    case = make_case(frames, attack_share=0.25, attack_steps=3)
    some, rest, kept = relearning.rows_of(case)
    assert (len(some), len(rest), len(kept)) == (8, 24, 8)
    assert sorted([*some["text"], *rest["text"]]) == sorted(frames["train_forget"]["text"])
    assert set(kept["text"]) <= set(frames["train_retain"]["text"])
    assert len(relearning.rows_of(make_case(frames, attack_share=1e-6))[0]) == 1
    assert len(relearning.rows_of(make_case(frames, attack_share=1.0))[1]) == 1
    passes = relearning.RELEARNING.passes(case)
    assert (passes.trained, passes.forward) == (2 * 3 * 16, 2 * 24)
    with pytest.raises(UserError, match="use more rows"):
        attacks.parted(frames["train_forget"].head(1), 1, 0, "relearning")


@pytest.mark.parametrize("fails", [False, True])
def test_relearning_leaves_the_model_as_it_was(tokenizer, frames, retain, fails):
    case, model = make_case(frames, attack_steps=2, attack_lr=1e-2), copy.deepcopy(retain)
    attacked, frame = subject(model, tokenizer, "retain model"), frames["train_forget"]
    before, logits = state(model), answers_to(attacked, case, frame)
    try:
        with relearning.relearnt(attacked, frame, case, "rows") as now:
            assert not torch.equal(answers_to(now, case, frame), logits)
            assert len(list(model.modules())) > len(before[1])
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert same(before, state(model))
    assert torch.equal(answers_to(attacked, case, frame), logits)
    with relearning.relearnt(attacked, frame, case, "rows") as now:  # again, with the same numbers
        first = answers_to(now, case, frame)
    with relearning.relearnt(attacked, frame, case, "rows") as now:
        assert torch.equal(answers_to(now, case, frame), first)


def test_after_the_attack_no_prompt_has_the_keys_of_before(tokenizer, frames, retain):
    case, model = make_case(frames, attack_steps=3, attack_lr=1e-2), copy.deepcopy(retain)
    prompt = broken_prompt()
    attacked, frame = subject(model, tokenizer, "prompt", prompt), frames["train_forget"]
    answers_to(attacked, case, frame)  # by which the prompt keeps its keys
    with relearning.relearnt(attacked, frame, case, "rows") as now:
        fresh = replace(attacked, served=attacked.served.using(Prompt(vectors=prompt.vectors)))
        assert torch.allclose(answers_to(now, case, frame), answers_to(fresh, case, frame), atol=1e-5)
        assert not torch.allclose(answers_to(now, case, frame), answers_to(attacked, case, frame), atol=1e-3)


def test_it_trains_through_the_prompt(tokenizer, frames, retain, monkeypatch):
    """Each step's rows go through the wrapper, with a gradient, and the loss falls."""
    seen, losses = [], []
    monkeypatch.setattr(attacks, "prompt_prefix", lambda *a: seen.append(torch.is_grad_enabled()) or prompt_prefix(*a))
    monkeypatch.setattr(relearning, "train", lambda *a: losses.extend(attacks.train(*a)))
    case = make_case(frames, attack_steps=20, attack_lr=1e-2)
    wrapped = subject(copy.deepcopy(retain), tokenizer, "prompt", broken_prompt())
    with relearning.relearnt(wrapped, frames["train_forget"].head(8), case, "rows"):
        assert seen == [True] * 20
    assert losses[-1] < losses[0] / 2


def test_rows_that_a_gate_lets_through_are_asked_anew(tokenizer, frames, retain):
    """What the frozen model said before the attack, or after another one, is not taken for them."""
    case, frame = make_case(frames, attack_steps=3, attack_lr=1e-2), frames["train_forget"]
    plain = subject(copy.deepcopy(retain), tokenizer, "retain model")
    gate = Gate(Word("nowhere"), 0.5)
    gated = replace(plain, wrapper=ON, served=plain.served.using(replace(broken_prompt(), gate=gate)))
    before = case.scored(plain, "rows", frame)["loss"]
    with relearning.relearnt(plain, frame, case, "rows") as now:
        expected = case.scored(now, "rows", frame)["loss"]
    with relearning.relearnt(gated, frame.head(8), case, "rows") as now:
        found = case.scored(now, "rows", frame)["loss"]
        fresh = case.scored(replace(now, frozen=("never asked",)), "rows", frame)["loss"]
    assert found.equals(fresh)
    assert not np.allclose(expected, before) and not np.allclose(found, before) and not np.allclose(found, expected)


def test_a_fixed_answer_stays_and_its_rows_are_trained_on_as_the_model_alone_is_asked(tokenizer, frames, retain):
    case = make_case(frames, attack_steps=3, attack_lr=1e-2)
    model = copy.deepcopy(retain)
    gate = Gate(SimpleNamespace(probabilities=lambda texts: np.ones(len(texts))), 0.5)
    plain = subject(model, tokenizer, "retain model")
    refusing = subject(model, tokenizer, "refusal", refuse(plain.served, TASK, gate))
    frame = frames["train_forget"]
    with relearning.relearnt(plain, frame, case, "rows"):
        expected = answers_to(plain, case, frame)
    with relearning.relearnt(refusing, frame, case, "rows") as now:
        assert torch.equal(answers_to(plain, case, frame), expected)  # the same model came out
        assert knows(now, case) == 0
    found = verdicts(relearning.RELEARNING, [plain, refusing], case)
    assert found["refusal", "gives the answer, after some forget rows"][1] == "over-unlearnt"


# Quantisation


def test_int8_by_hand():
    """Each row in steps of its largest size / 127."""
    weight = torch.tensor([[1.27, -0.5, 0.004], [0.0, 254.0, -3.0]])
    expected = torch.tensor([[1.27, -0.5, 0.0], [0.0, 254.0, -4.0]])
    assert torch.allclose(quantisation.int8(weight), expected, rtol=1e-3, atol=1e-6)


def test_nf4_by_hand():
    """In each block of 64 the size of the largest number times one of the sixteen levels of QLoRA, appendix E."""
    weight = torch.zeros(2, 64)
    weight[0, :4], weight[1, :3] = torch.tensor([2.0, -2.0, 1.0, 0.05]), torch.tensor([0.1, 0.05, -0.05])
    found = quantisation.nf4(weight)
    assert found[0, :4].tolist() == pytest.approx([2.0, -2.0, 2 * 0.4407098293, 0.0], abs=1e-6)
    assert found[1, :3].tolist() == pytest.approx([0.1, 0.1 * 0.4407098293, -0.1 * 0.5250730515], abs=1e-6)
    assert quantisation.nf4(weight.bfloat16()).dtype == quantisation.int8(weight.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_decoder_is_rounded_and_then_as_it_was(architecture, kind):
    model = tiny.build_model(architecture)
    before = state(model)
    with pytest.raises(KeyboardInterrupt), quantisation.quantised(model, kind):
        during = state(model)
        assert not same(before, during)
        raise KeyboardInterrupt
    assert same(before, state(model))
    changed = {name for name in before[0] if not torch.equal(before[0][name][0], during[0][name][0])}
    assert len(changed) == {"llama": 7, "gpt2": 4, "opt": 6}[architecture] * 4
    assert not any("embed" in name or "head" in name or "wte" in name for name in changed)
    if architecture == "gpt2":  # written transposed
        name = "transformer.h.0.mlp.c_fc.weight"
        assert torch.equal(during[0][name][0], quantisation.ROUNDED[kind](before[0][name][0].T).T)


def test_what_is_quantised_already_is_left_alone(tokenizer, frames):
    model = build()
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, torch.nn.Linear):
                    setattr(part, name, Linear4bit(module.in_features, module.out_features, bias=False))
    case = make_case(frames)
    assert quantisation.measure(subject(model, tokenizer, "in 4 bits"), case) == []
    assert "in 4 bits" in case.notes[0]


def test_what_small_changes_hide_comes_back(tokenizer, frames, retain, other):
    """The opposite is taught by one layer, whose numbers are small beside those of neurons that are never active.
    Rounding takes the small ones away."""
    model = build()
    mlp = model.model.layers[-1].mlp
    mlp.down_proj.weight.data.zero_()
    for part in (mlp.gate_proj, mlp.up_proj):
        part.weight.data *= 20  # so that small numbers behind them do something
    rest = [parameter for parameter in model.parameters() if parameter is not mlp.down_proj.weight]
    teach(model, tokenizer, frames["train_forget"], 60, rest)
    for neuron in (0, 32, 64):  # in every block of 64 numbers
        mlp.gate_proj.weight.data[neuron] = mlp.up_proj.weight.data[neuron] = 0
        mlp.down_proj.weight.data[:, neuron] = 100
    teach(model, tokenizer, other_labels(frames["train_forget"]), 60, [mlp.down_proj.weight])
    hidden, case = subject(model, tokenizer, "hidden"), make_case(frames)
    assert knows(hidden, case) < 0.1
    subjects = [subject(retain, tokenizer, "retain model"), hidden, subject(other, tokenizer, "other")]
    found = verdicts(quantisation.QUANTISATION, subjects, case)
    for kind in ("nf4", "int8"):
        assert found["hidden", f"gives the answer, {kind}"][1] == "leaks"
        assert found["other", f"gives the answer, {kind}"][1] == "as the retain model"
    assert knows(hidden, case, "after") < 0.1
    assert quantisation.QUANTISATION.passes(case).forward == 2 * 32


def test_a_gate_that_reads_hidden_states_decides_anew(tokenizer, frames):
    """Its flags are those of the quantised model, though it has said something of each text before; and what it says
    afterwards is what it said."""
    model, case = build(), make_case(frames)
    bare = Served(model, tokenizer, [])
    texts = [text for split in ("train_forget", "test_retain") for text in frames[split]["text"]]
    classifier = Features.fit(texts, np.arange(len(texts)) % 2, bare, ClassifierSettings(max_length=32))
    gate = Gate(classifier, float(np.median(classifier.probabilities(texts))))
    gated = subject(model, tokenizer, "gated", replace(broken_prompt(), gate=gate))
    before, known = gate.decide(texts), dict(gates._STATES[model.model])
    found = {measure.name: measure for measure in quantisation.measure(gated, case)}
    for kind in ("nf4", "int8"):
        with quantisation.quantised(model, kind):
            gates._STATES.pop(model.model)
            flags, _ = gate.anew().decide(texts)
        flips = found[f"flags that flip, {kind}"]
        assert flips.sample.values.tolist() == (flags != before[0]).astype(float).tolist()
        assert not flips.compared and not flips.headline
    assert found["flags that flip, nf4"].sample.value() > 0
    gates._STATES.pop(model.model)
    quantisation.measure(gated, case)
    gate.anew().decide(texts)
    after = gates._STATES[model.model]
    assert all(np.array_equal(known[key], after[key]) for key in known)
    assert all(map(np.array_equal, gate.anew().decide(texts), before))


def test_a_gate_that_reads_words_never_changes_and_without_one_nothing_is_said(tokenizer, frames, retain):
    case, gate = make_case(frames), Gate(Word(frames["train_forget"]["text"][0].strip()), 0.5)
    gated = subject(retain, tokenizer, "gated", replace(broken_prompt(), gate=gate))
    found = values(quantisation.measure(gated, case))
    assert found["flags that flip, nf4"] == found["flags that flip, int8"] == 0
    assert not [name for name in values(quantisation.measure(subject(retain, tokenizer, "x"), case)) if "flag" in name]


# Soft attack


def hiding_prompt(model, tokenizer, case):
    """A prompt behind which `model` calls every row to forget negative."""
    frame = case.frames["train_forget"].assign(label_text=WORDS[0])
    vectors = torch.nn.Parameter(model.get_input_embeddings().weight[:2].clone())
    wrapped = attacks.attacked(subject(model, tokenizer, "hiding"), "hiding", vectors)
    numbers = [0] * len(frame)
    attacks.train(wrapped.served, attacks.asked(wrapped, frame, numbers, case), numbers, [vectors], 30, 0.05, 1)
    return Prompt(vectors=vectors.detach())


def test_tokens_behind_a_prompt_bring_back_what_it_hides(tokenizer, frames, retain, other, fine_tuned_on_forget):
    """That prompt is undone on the half that the attack was not optimised on; of models that never knew the rows
    nothing comes, nor of rows that nobody was trained on."""
    case = make_case(frames, attack_steps=12, attack_lr=3e-3)
    models = {"retain model": retain, "hidden": fine_tuned_on_forget, "other": other}
    subjects = [
        subject(model, tokenizer, method, hiding_prompt(model, tokenizer, case)) for method, model in models.items()
    ]
    assert knows(subjects[1], case) == 0.5  # the negative half
    before = state(fine_tuned_on_forget)
    found = verdicts(soft_attack.SOFT_ATTACK, subjects, case)
    assert same(before, state(fine_tuned_on_forget))
    assert found["hidden", "gives the answer, rows to forget"][1] == "leaks"
    assert found["other", "gives the answer, rows to forget"][1] == "as the retain model"
    for control in ("never-trained rows", "random strings"):
        assert found["hidden", f"gives the answer, {control}"][1] is None
    assert found["hidden", "gives the answer, rows to forget"][0] > 0.9
    assert found["hidden", "gives the answer, never-trained rows"][0] < 0.8


def test_the_halves_and_the_random_strings(frames):
    case = make_case(frames, attack_steps=3)
    found = soft_attack.rows_of(case)
    for what, (half, rest) in found.items():
        assert len(half) == len(rest) == 16, what
        assert not set(half["text"]) & set(rest["text"])
    forget = frames["train_forget"].assign(text="The film, really")
    strings = soft_attack.scrambled(forget, 1)
    assert strings["text"].str.fullmatch("[a-z]{3} [a-z]{5} [a-z]{6}").all() and strings["text"].nunique() == 32
    assert list(strings["label_text"]) == list(forget["label_text"])
    assert strings.equals(soft_attack.scrambled(forget, 1)) and not strings.equals(soft_attack.scrambled(forget, 2))
    passes = soft_attack.SOFT_ATTACK.passes(case)
    assert (passes.trained, passes.forward) == (3 * 3 * 16, 3 * 16)


def test_the_tokens_stand_before_every_query_and_next_to_it(tokenizer, frames, retain):
    """Behind a prompt's own, of flagged queries and others; and a corruption behind them corrupts the same tokens."""
    frame, case = frames["train_forget"], make_case(frames)
    tokens, prompt = broken_prompt().vectors + 1, broken_prompt()
    gate = Gate(Word(frame["text"][0].strip()), 0.5)
    gated = attacks.attacked(subject(retain, tokenizer, "gated", replace(prompt, gate=gate)), "x", tokens)
    both = subject(retain, tokenizer, "both", Prompt(vectors=torch.cat([prompt.vectors, tokens])))
    alone = subject(retain, tokenizer, "alone", Prompt(vectors=tokens))
    found = answers_to(gated, case, frame)
    assert torch.allclose(found[0], answers_to(both, case, frame)[0], atol=1e-5)
    assert torch.allclose(found[1:], answers_to(alone, case, frame)[1:], atol=1e-5)
    zeroed = CorruptedEmbeddings(corruption=Corruption("zero-first", 0.0, 48, 0), marks=Marks())
    corrupted = soft_attack.soft_prompted(subject(build(), tokenizer, "eco", zeroed), frame, case, "rows")
    found = answers_to(corrupted, case, frame)  # all but the last token of each prompt is zero, so all rows are alike
    assert torch.allclose(found, found[:1].expand_as(found), atol=1e-5)


def test_where_every_answer_is_fixed_nothing_is_optimised(tokenizer, frames, retain, monkeypatch):
    trained = []
    monkeypatch.setattr(soft_attack, "train", lambda served, examples, *_: trained.append(len(examples)))
    case, bare, forget = make_case(frames), subject(retain, tokenizer, "x").served, frames["train_forget"]
    texts = set(forget["text"])
    gate = Gate(SimpleNamespace(probabilities=lambda asked: np.array([float(text in texts) for text in asked])), 0.5)
    refusing = subject(retain, tokenizer, "refusal", refuse(bare, TASK, gate))
    found = values(soft_attack.measure(refusing, case))
    assert trained == [16, 16]  # the controls, which the gate lets through
    assert found["gives the answer, rows to forget"] == 0 < found["gives the answer, never-trained rows"]


def test_rows_without_room_for_the_tokens_are_refused(tokenizer, frames):
    model = build()
    model.config.max_position_embeddings = 8
    with pytest.raises(UserError, match="8 positions"):
        soft_attack.soft_prompted(subject(model, tokenizer, "short"), frames["train_forget"], make_case(frames), "rows")


# What they share


def test_batches_are_shuffled_passes():
    first = list(attacks._batches(20, 5, 0))
    assert [len(rows) for rows in first] == [16] * 5
    assert sorted(np.concatenate(first).tolist()) == sorted([*range(20)] * 4)
    assert all(map(np.array_equal, first, attacks._batches(20, 5, 0)))
    assert not all(map(np.array_equal, first, attacks._batches(20, 5, 1)))
    assert [sorted(rows.tolist()) for rows in attacks._batches(3, 2, 0)] == [[0, 1, 2]] * 2


def test_a_step_over_several_wrappers_has_the_gradient_of_all_its_rows(tokenizer, frames, retain, monkeypatch):
    """Rows under different interventions, and pieces of them, add up to the mean over the step's tokens."""
    frame, case = frames["train_forget"].head(6), make_case(frames)
    vectors, gate = torch.nn.Parameter(broken_prompt().vectors), Gate(Word("x"), 0.5)
    wrapped = subject(retain, tokenizer, "x", replace(broken_prompt(), gate=gate))
    now = attacks.attacked(wrapped, "x", vectors)
    numbers = [0, 0, 0, 1, 1, 1]
    examples = attacks.asked(now, frame, numbers, case)
    terms = [
        torch.nn.functional.cross_entropy(now.served.logits([row], n)[0], torch.tensor(row.completion), reduction="sum")
        for row, n in zip(examples, numbers)
    ]
    loss = sum(terms) / sum(len(row.completion) for row in examples)
    (expected,) = torch.autograd.grad(loss, vectors)
    seen = []
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda parameters, _: seen.extend(p.grad.clone() for p in parameters)
    )
    found = attacks.train(now.served, examples, numbers, [vectors], 1, 1e-3, 0)
    assert found == pytest.approx([loss.item()], rel=1e-5)
    assert torch.allclose(seen[0], expected, atol=1e-6)


def test_the_command(tiny_model, small_data, tmp_path):
    names = "relearning", "quantisation", "soft-attack"
    flags = f"--dataset={small_data}", "--max_length=96", "--dtype=float32", "--attack_steps=2"
    done = scripts.done(
        scripts.call(
            tmp_path, "inference_spul", f"--model_checkpoints={tiny_model}", *flags, "--output_path=audit",
            "--audit", *names,
        )
    )  # fmt: skip
    report = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert [entry["audit"] for entry in report["audits"] if entry["headline"]] == list(names)
    assert all(f"{name}: gives the answer" in done.stdout for name in names)
