"""The methods' losses against their equations in plain Python, and what one step of each does to a tiny model."""

import copy
import itertools
import math
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pandas as pd
import pytest
import tiny
import torch
from transformers import AutoTokenizer

import baselines
from utils import cli
from utils.data.batch import collate
from utils.data.splits import TRAIN_SPLITS
from utils.errors import UserError
from utils.interventions.served import Served
from utils.models import pieces
from utils.models.adapters import LoraSettings
from utils.models.forward import completion_logits
from utils.models.layers import checkpoint_layers, decoder_layers
from utils.tasks.classification import classification, draw_unlearning_labels
from utils.tasks.encode import completion_ids, tokenize
from utils.tasks.question_answering import QuestionAnswering
from utils.tasks.rows import Splits, load_splits
from utils.training.loop import Training, TrainingSettings
from utils.unlearning import losses, objectives, reference, rmu
from utils.unlearning.methods import METHODS, Answers, CompletionTokens, MethodSettings
from utils.unlearning.tuning import only_adapter_dropout, trainable

# Three completion tokens over a vocabulary of four: two of row 0, one of row 1. The preferred answers: one, then two.
NOW = [(0.5, 0.2, 0.2, 0.1), (0.1, 0.6, 0.1, 0.2), (0.25, 0.25, 0.4, 0.1)]
BEFORE = [(0.7, 0.1, 0.1, 0.1), (0.2, 0.5, 0.2, 0.1), (0.1, 0.1, 0.3, 0.5)]
TARGETS, ROWS = [0, 1, 3], [0, 0, 1]
PREFERRED_NOW = [(0.3, 0.3, 0.2, 0.2), (0.1, 0.1, 0.1, 0.7), (0.4, 0.2, 0.2, 0.2)]
PREFERRED_BEFORE = [(0.2, 0.4, 0.2, 0.2), (0.25, 0.25, 0.25, 0.25), (0.1, 0.5, 0.2, 0.2)]
PREFERRED_TARGETS, PREFERRED_ROWS = [1, 0, 2], [0, 1, 1]
BETA, BETA2, DELTA = 0.7, 2.0, 0.3


def logits(distributions):
    """Logarithms plus any constant."""
    return torch.tensor(distributions).log() + torch.arange(len(distributions))[:, None] * 2.0


def answers(now, before, targets, rows, preferred=None):
    tokens = (losses.token_nll(of, torch.tensor(targets)) for of in (now, before))
    return Answers.of(*tokens, torch.tensor(rows), 2, preferred)


def forget_values(method, now, *constants):
    """What the method's forget loss gives of the tokens above, with the logits `now`."""
    if not METHODS[method].of_answers:
        tokens = CompletionTokens(now, logits(BEFORE), torch.tensor(TARGETS))
        return METHODS[method].forget(tokens, *constants)
    better = answers(logits(PREFERRED_NOW), logits(PREFERRED_BEFORE), PREFERRED_TARGETS, PREFERRED_ROWS)
    return METHODS[method].forget(answers(now, logits(BEFORE), TARGETS, ROWS, better), *constants)


def minus_log_p(distributions=NOW, targets=TARGETS):
    return [-math.log(p[y]) for p, y in zip(distributions, targets)]


def over_rows(values, rows=ROWS):
    return [sum(value for value, row in zip(values, rows) if row == own) for own in (0, 1)]


def log_sigma(x):
    return -math.log(1 + math.exp(-x))


def cross_entropy(target, p):
    return -sum(t * math.log(q) for t, q in zip(target, p) if t)


def scaled_to_one(values):
    return [value / sum(values) for value in values]


def without_true_token(p, y):
    return scaled_to_one([0.0 if k == y else q for k, q in enumerate(p)])


def lowered_true_token(p, y):
    """softmax(z - beta 1[y]): the true token's probability times exp(-beta), scaled."""
    return scaled_to_one([q * math.exp(-BETA) if k == y else q for k, q in enumerate(p)])


def expected(method):
    """The values of the forget loss, one per token or per row, from probabilities."""
    nll, p = minus_log_p(), [distribution[y] for distribution, y in zip(NOW, TARGETS)]
    s, s_ref = over_rows(nll), over_rows(minus_log_p(BEFORE))
    better = over_rows(minus_log_p(PREFERRED_NOW, PREFERRED_TARGETS), PREFERRED_ROWS)
    better_ref = over_rows(minus_log_p(PREFERRED_BEFORE, PREFERRED_TARGETS), PREFERRED_ROWS)
    if method in ("random_label", "idk"):
        return nll
    if method.startswith("gradient_ascent"):
        return [-value for value in nll]
    if method == "npo":
        return [-2 / BETA * log_sigma(BETA * (a - b)) for a, b in zip(s, s_ref)]
    if method == "simnpo":
        return [-2 / BETA * log_sigma(BETA * (a / n - DELTA)) for a, n in zip(s, (2, 1))]
    if method == "dpo":
        margins = [(a - b) - (c - d) for a, b, c, d in zip(s, s_ref, better, better_ref)]
        return [-1 / BETA * log_sigma(BETA * margin) for margin in margins]
    if method == "altpo":
        margins = [(a - b) - (c - d) for a, b, c, d in zip(s, s_ref, better, better_ref)]
        return [-2 / BETA * log_sigma(BETA * margin) for margin in margins]
    if method == "pdu":  # the mean logit and the largest, shifted alike
        return [(math.log(max(q)) - sum(map(math.log, q)) / 4) ** 2 for q in NOW]
    if method == "undial":
        return [cross_entropy(lowered_true_token(b, y), a) for a, b, y in zip(NOW, BEFORE, TARGETS)]
    if method == "wga":
        return [-(q**BETA) * value for q, value in zip(p, nll)]
    if method == "satimp":
        return [-(q**BETA) * (1 - q) ** BETA2 * value for q, value in zip(p, nll)]
    if method == "ceu":
        return [cross_entropy(without_true_token(a, y), a) for a, y in zip(NOW, TARGETS)]
    raise AssertionError(f"no equation for {method}")


def constants(method):
    values = {"method_beta": BETA, "method_beta2": BETA2, "method_delta": DELTA}
    return [values.get(constant) for constant in METHODS[method].constants]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "rmu"])
def test_forget_losses(method):
    values = forget_values(method, logits(NOW), *constants(method))
    assert values.tolist() == pytest.approx(expected(method), rel=1e-5)


def test_rmu_is_a_mean_square_over_the_numbers_of_a_token():
    activations = torch.tensor([[1.0, 2.0], [0.0, 5.0]])
    assert losses.rmu(activations, torch.tensor([3.0, 1.0])).tolist() == [2.5, 12.5]
    assert losses.rmu(activations, torch.tensor([[1.0, 2.0], [4.0, 3.0]])).tolist() == [0, 10]


def test_row_sums_take_tokens_in_any_order():
    assert losses.row_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 0, 2]), 4).tolist() == [2, 0, 5, 0]


def gradient(method, *values):
    """Of the summed forget loss with respect to the logits (3, 4)."""
    now = logits(NOW).requires_grad_()
    forget_values(method, now, *(values or constants(method))).sum().backward()
    return now.grad.tolist()


def pull(p, target):
    """d/dz of the cross-entropy to `target`: softmax(z) - target."""
    return [q - t for q, t in zip(p, target)]


def one_hot(y):
    return [float(k == y) for k in range(4)]


@pytest.mark.parametrize("method", ["gradient_ascent", "wga", "satimp", "undial", "ceu", "npo"])
def test_gradients(method):
    """By hand: weights and targets count as constants, so each gradient is a multiple of softmax(z) - target."""
    sums, before = over_rows(minus_log_p()), over_rows(minus_log_p(BEFORE))
    for own, p, p_ref, y, row in zip(gradient(method), NOW, BEFORE, TARGETS, ROWS):
        away = pull(p, one_hot(y))
        wanted = {
            "gradient_ascent": [-v for v in away],
            "wga": [-(p[y] ** BETA) * v for v in away],
            "satimp": [-(p[y] ** BETA) * (1 - p[y]) ** BETA2 * v for v in away],
            "undial": pull(p, lowered_true_token(p_ref, y)),
            "ceu": pull(p, without_true_token(p, y)),
            "npo": [-2 / (1 + math.exp(BETA * (sums[row] - before[row]))) * v for v in away],
        }[method]
        assert own == pytest.approx(wanted, abs=1e-6)


def test_npo_tends_to_gradient_ascent_as_beta_tends_to_zero():
    ascent = torch.tensor(gradient("gradient_ascent"))
    distances = [(torch.tensor(gradient("npo", beta)) - ascent).abs().max().item() for beta in (1.0, 0.1, 0.01, 0.001)]
    assert distances[0] > 0.05
    for large, small in zip(distances, distances[1:]):
        assert small == pytest.approx(large / 10, rel=0.3)  # first order in beta


def test_ceu_is_done_where_the_true_token_has_no_probability():
    now = logits(NOW)
    for row, y in enumerate(TARGETS):
        now[row, y] = -200
    now.requires_grad_()
    losses.ceu(now, torch.tensor(TARGETS)).sum().backward()
    assert now.grad.abs().max() < 1e-6
    assert torch.tensor(gradient("ceu")).abs().max() > 0.1


# The losses of a tiny model, as the training loop calls them.

N_RETAIN, N_FORGET = 4, 4
RETAIN, FORGET = [0, 1, 2, 3], [4, 5, 6, 7]  # row numbers of a method with a retain loss
LAYERS = tiny.SIZES["num_hidden_layers"]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def frames(small_data):
    """Two negative and two positive rows of each kind."""
    rows = load_splits(str(small_data))
    chosen = {}
    for split, n in zip(TRAIN_SPLITS, (N_RETAIN, N_FORGET)):
        halves = [rows[split][rows[split]["label"] == label].head(n // 2) for label in (0, 1)]
        chosen[split] = pd.concat(halves).reset_index(drop=True)
    return Splits(chosen, rows.task)


@pytest.fixture
def build(tokenizer, frames, tmp_path):
    """build(method, *flags, architecture) -> (model ready to train, its Objective)."""

    def build(method, *flags, architecture="llama", chosen=frames, change=lambda model: None):
        args = parsed(f"--unlearn_method={method}", *flags, f"--logits_path={tmp_path / 'reference.safetensors'}")
        base = tiny.build_model(architecture).requires_grad_(False)
        change(base)
        link = SimpleNamespace(sha256=f"{architecture} {change}", path=tmp_path)
        asked = cli.take(MethodSettings, args)
        lora = cli.take(LoraSettings, args) if args.tune == "lora" else None
        torch.manual_seed(args.seed)
        served = Served(trainable(base, lora, METHODS[method], asked), tokenizer, [link])
        rows = objectives.Rows(tokenizer, chosen, METHODS[method], asked)
        load = reference.loader(cli.take(reference.ReferenceSettings, args))
        kind = objectives.objective_of(METHODS[method])
        objective = kind(METHODS[method], served, rows, chosen, asked, "as it is", load)
        only_adapter_dropout(served.model)
        return served.model, objective

    return build


@pytest.fixture(scope="module")
def memorised(tokenizer, frames):
    """A function that gives a tiny Llama the weights of one that has learnt these rows by heart."""
    examples = [
        example for frame in frames.values() for example in tokenize(tokenizer, frame["text"], frame["label_text"], 96)
    ]
    model, batch = tiny.build_model("llama"), collate(examples, 1, "cpu")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(15):
        optimizer.zero_grad()
        losses.token_nll(completion_logits(model, batch), batch.targets).mean().backward()
        optimizer.step()
    return lambda fresh: fresh.load_state_dict(model.state_dict())


def parsed(*flags):
    command = ["baselines.py", "--model_checkpoints=tiny", "--dataset=small", "--max_length=96", *flags]
    with mock.patch.object(sys, "argv", command):
        return baselines.parse_args()


def floats(parts):
    return {key: value.item() for key, value in parts.items()}


def nll_of(model, objective, numbers):
    """The mean over rows of - log f(y | x), by the model's own forward pass."""
    with torch.no_grad():
        batch = collate([objective.rows.trained[i] for i in numbers], 1, "cpu")
        log_p = completion_logits(model, batch).log_softmax(-1)
    return -log_p[torch.arange(len(batch.targets)), batch.targets].sum().item() / len(numbers)


def step(model, loss, lr):
    """One step of plain gradient descent."""
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad


def untie(model):
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)


# Architecture, how it is changed, and the factor of its head: distributions shall differ, and a soft cap of 5 matter.
ARCHITECTURES = {
    "llama": ("llama", lambda model: None, 30),
    "gemma2, tied": ("gemma2", lambda model: None, 30),
    "gemma2, untied": ("gemma2", untie, 30),
    "gpt2, with dropout": ("gpt2", lambda model: None, 4),
}


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kl_is_zero_at_the_start_and_that_of_two_models_later(build, name, tune):
    """Later: against a copy of the model from before, which the code itself never holds."""
    architecture, tie, factor = ARCHITECTURES[name]
    before = {}

    def change(model):
        tie(model)
        with torch.no_grad():
            model.get_output_embeddings().weight *= factor
        before["model"] = copy.deepcopy(model)

    model, objective = build("gradient_ascent_kl", f"--tune={tune}", architecture=architecture, change=change)
    _, parts = objective(RETAIN + FORGET, N_FORGET, N_RETAIN)
    assert abs(parts["L_kl"].item()) < 1e-5
    tiny.perturb(model, 0.02 if tune == "full" else 0.1)
    model.eval()
    _, parts = objective(RETAIN + FORGET, N_FORGET, N_RETAIN)
    batch = collate([objective.rows.trained[i] for i in RETAIN], 1, "cpu")
    with torch.no_grad():
        p, q = (completion_logits(m, batch).double().log_softmax(-1) for m in (before["model"], model))
    wanted = (p.exp() * (p - q)).sum().item() / N_RETAIN
    assert wanted > 1e-3
    assert parts["L_kl"].item() == pytest.approx(wanted, rel=1e-3)
    assert parts["L_f"].item() == pytest.approx(-nll_of(model, objective, FORGET), rel=1e-4)


def test_one_step_of_gradient_ascent_raises_the_forget_loss(build):
    model, objective = build("gradient_ascent")
    numbers = list(range(N_FORGET))
    before = nll_of(model, objective, numbers)
    loss, parts = objective(numbers, N_FORGET, 0)
    assert loss.item() == parts["L_f"].item() == pytest.approx(-before, rel=1e-5)
    step(model, loss, 0.01)
    assert nll_of(model, objective, numbers) > before + 0.01


def test_one_step_of_ascent_and_descent_raises_one_loss_and_lowers_the_other(build, frames):
    """Rows to keep are positive, rows to forget negative, so that what one label loses the other can gain."""
    labels = {"train_retain": "positive", "train_forget": "negative"}
    chosen = frames | {split: frame[frame["label_text"] == labels[split]] for split, frame in frames.items()}
    model, objective = build("gradient_ascent_descent", chosen=chosen)
    retain, forget = [0, 1], [2, 3]
    before = nll_of(model, objective, retain), nll_of(model, objective, forget)
    loss, parts = objective(retain + forget, 2, 2)
    assert floats(parts) == pytest.approx({"L_f": -before[1], "L_r": before[0]}, rel=1e-5)
    assert loss.item() == pytest.approx(before[0] - before[1], rel=1e-4, abs=1e-5)
    step(model, loss, 0.02)
    assert nll_of(model, objective, retain) < before[0] - 0.01
    assert nll_of(model, objective, forget) > before[1] + 0.01


@pytest.mark.parametrize("method", ["random_label", "npo", "simnpo", "wga", "satimp", "ceu", "undial", "dpo"])
def test_one_step_lowers_the_forget_loss_of_the_method(build, memorised, method):
    model, objective = build(method, "--retain_loss=none", change=memorised)
    numbers = list(range(N_FORGET))
    before = nll_of(model, objective, numbers)
    loss, parts = objective(numbers, N_FORGET, 0)
    assert set(parts) == {"L_f"}
    step(model, loss, 1e-3)
    after, _ = objective(numbers, N_FORGET, 0)
    if method in ("wga", "satimp"):  # their weight falls with p, so the loss itself may rise
        assert nll_of(model, objective, numbers) > before
    else:
        assert after.item() < loss.item()


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_add_up_to_the_step(build, memorised, method):
    """Also parts with one row, without forget rows and without retain rows."""
    model, objective = build(method, change=memorised)
    tiny.perturb(model, 0.01)
    has_retain = len(objective.rows.trained) > N_FORGET
    numbers, n_retain = ([4, 0, 5, 6, 1, 2, 3, 7], N_RETAIN) if has_retain else ([0, 1, 2, 3], 0)
    cuts = [(0, 1), (1, 4), (4, 7), (7, 8)] if has_retain else [(0, 1), (1, 4)]

    def gradients(parts):
        model.zero_grad()
        total = {}
        for begin, end in parts:
            loss, values = objective(numbers[begin:end], N_FORGET, n_retain, numbers)
            loss.backward()
            for key, value in {"loss": loss, **values}.items():
                total[key] = total.get(key, 0.0) + value.item()
        return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole, wanted = gradients([(0, len(numbers))])
    parts, found = gradients(cuts)
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert torch.allclose(found, wanted, atol=1e-4 * wanted.abs().max().item())
    assert wanted.abs().max() > 1e-4


@pytest.mark.parametrize("method", ["npo", "dpo", "undial"])
def test_the_reference_of_forget_rows_is_the_model_before(build, method):
    """Before training s = s_ref, so NPO and DPO stand at log 2; UNDIAL's target is made of the model itself."""
    _, objective = build(method, "--retain_loss=kl")
    _, parts = objective(RETAIN + FORGET, N_FORGET, N_RETAIN)
    assert parts["L_kl"].item() == pytest.approx(0, abs=1e-6)
    if method != "undial":
        factor = {"npo": 2, "dpo": 1}[method] / 0.1
        assert parts["L_f"].item() == pytest.approx(factor * math.log(2), rel=1e-5)


def test_dpo_against_two_models(build, tokenizer):
    """With the answers of several tokens that ` unknown` has here, and rows that the batch mixes."""
    before = {}
    model, objective = build("dpo", change=lambda model: before.update(model=copy.deepcopy(model)))
    tiny.perturb(model, 0.02)
    unknown = completion_ids(tokenizer, "unknown")
    assert len(unknown) > 1
    wanted = 0
    for i in (6, 4):
        example = objective.rows.trained[i]
        s, s_ref = (log_p(m, example.prompt, example.completion) for m in (model, before["model"]))
        better, better_ref = (log_p(m, example.prompt, unknown) for m in (model, before["model"]))
        wanted -= log_sigma(0.1 * ((better - better_ref) - (s - s_ref))) / 0.1 / 2
    _, parts = objective([6, 1, 4], 2, 1)
    assert parts["L_f"].item() == pytest.approx(wanted, rel=1e-5)
    assert abs(wanted - 10 * math.log(2)) > 1e-3


def test_a_prompt_with_two_answers_of_one_token_is_read_once(build, tokenizer, frames, monkeypatch):
    """The same loss and gradient as with every row read for itself."""
    assert len(completion_ids(tokenizer, "positive")) == 1
    chosen = Splits(frames, replace(frames.task, refusals=("positive",)))
    model, objective = build("dpo", "--retain_loss=kl", chosen=chosen)
    tiny.perturb(model, 0.02)
    read, compute = [], pieces.completion_logits

    def noted(model, batch, *more):
        read.append(len(batch.input_ids))
        return compute(model, batch, *more)

    def run():
        model.zero_grad()
        loss, parts = objective(RETAIN + FORGET, N_FORGET, N_RETAIN)
        loss.backward()
        return floats(parts), torch.cat([p.grad.flatten() for p in model.parameters()])

    monkeypatch.setattr(pieces, "completion_logits", noted)
    once, gradient_once = run()
    monkeypatch.setattr(objectives.TokenObjective, "_read", lambda self, number: number)
    twice, gradient_twice = run()
    assert read == [N_RETAIN + N_FORGET, N_RETAIN + 2 * N_FORGET]
    assert once == pytest.approx(twice, rel=1e-5) and twice["L_kl"] > 1e-6
    assert torch.allclose(gradient_once, gradient_twice, atol=1e-5 * gradient_twice.abs().max().item())


@torch.no_grad()
def log_p(model, prompt, completion):
    """log f(completion | prompt), all logits computed, no padding."""
    found = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return sum(found[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion))


def test_random_label_learns_the_drawn_words(build, tokenizer):
    _, objective = build("random_label")
    words = draw_unlearning_labels(N_FORGET, seed=42)
    assert [tokenizer.decode(e.completion).strip() for e in objective.rows.trained] == words
    assert set(words) == {"neutral", "unknown"}


def test_idk_learns_the_refusal_and_keeps_the_others(build, tokenizer, frames):
    _, objective = build("idk")
    forget, retain = objective.rows.trained[N_RETAIN:], objective.rows.trained[:N_RETAIN]
    assert {tokenizer.decode(e.completion).strip() for e in forget} == {"unknown"}
    labels = [tokenizer.decode(e.completion).strip() for e in retain]
    assert labels == list(frames["train_retain"]["label_text"])
    assert objective(RETAIN + FORGET, N_FORGET, N_RETAIN)[1].keys() == {"L_f", "L_r"}


def test_altpo_prefers_the_answer_of_another_row(build, tokenizer, frames):
    _, objective = build("altpo")
    rows = objective.rows
    own, others = (
        [tokenizer.decode(rows.all[i].completion).strip() for i in numbers]
        for numbers in (FORGET, [rows.alternative[i] for i in FORGET])
    )
    assert set(own) == set(others) == {"positive", "negative"} and all(a != b for a, b in zip(own, others))
    _, parts = objective(RETAIN + FORGET, N_FORGET, N_RETAIN)
    assert parts["L_f"].item() == pytest.approx(20 * math.log(2), rel=1e-5)  # as before unlearning


def test_alternate_answers():
    answers = [f"answer {i % 5}" for i in range(40)]
    rows, task = pd.DataFrame({"text": answers, "label_text": answers}), QuestionAnswering()
    drawn = task.alternate_answers(rows, 7)
    assert drawn == task.alternate_answers(rows, 7) != task.alternate_answers(rows, 8)
    assert set(drawn) == set(answers) and all(a != b for a, b in zip(answers, drawn))
    wrong = rows.assign(perturbed_answer=[[f"not {text}"] for text in answers])
    assert task.alternate_answers(wrong, 7) == [f"not {text}" for text in answers]
    same = rows.assign(label_text="no")
    for kind in (task, classification(["no", "yes"])):
        with pytest.raises(UserError, match="all rows have the same answer"):
            kind.alternate_answers(same, 7)


# PDU


def test_the_dual_variable_follows_the_excess_of_the_retain_loss(build):
    """By hand: bound 0.5, step 2, moving in the second half of the steps; never below 0; kept without retain rows."""
    flags = "--method_epsilon=0.5", "--method_dual_step=2", "--retain_weight=3"
    _, objective = build("pdu", *flags)
    loss, parts = objective(RETAIN + FORGET, N_FORGET, N_RETAIN)
    assert loss.item() == pytest.approx(parts["L_f"].item() + 3 * parts["L_r"].item(), rel=1e-6)
    used = [objective.after_step({"L_r": 0.75}, progress)["retain_weight"] for progress in (0.25, 0.5, 0.75, 1.0)]
    assert used == [3, 3, 3, 3.5]
    assert objective.dual == 4
    objective.after_step({"L_r": 0.0}, 1.0)
    assert objective.dual == 4
    loss, _ = objective(RETAIN + FORGET, N_FORGET, N_RETAIN)
    assert loss.item() == pytest.approx(parts["L_f"].item() + 4 * parts["L_r"].item(), rel=1e-6)
    for _ in range(9):
        objective.after_step({"L_r": 0.01}, 1.0)
    assert objective.dual == 0


@pytest.mark.parametrize("kept", [True, False])
def test_a_resumed_run_has_the_dual_variable_of_an_uninterrupted_one(build, tmp_path, kept):
    """Three steps, interrupted after two; the same without the variable in the state ends elsewhere."""

    def run(steps, state, resume=False):
        flags = "--method_dual_warmup=0", "--method_dual_step=0.5", "--retain_weight=2"
        model, objective = build("pdu", *flags)
        training = Training(
            parameters=dict(model.named_parameters()), examples=objective.rows.trained, loss=objective,
            settings=TrainingSettings(train_batch_size=8, num_epochs=3, save_steps=1, resume=resume, lr=1e-3),
            recorded={}, state_path=tmp_path / state, fingerprint="", chain=[], warmup=0.0,
            buffers=objective.buffers if kept else {}, after_step=objective.after_step,
        )  # fmt: skip
        upcoming = training.steps_from
        training.steps_from = lambda done: itertools.takewhile(lambda step: step[0] <= steps, upcoming(done))
        log = training.run()
        return [line["loss"] for line in log], objective.dual.item()

    whole = run(3, "whole")
    run(2, "part")
    resumed = run(3, "part", resume=True)
    assert (resumed == whole) == kept
    assert whole[1] != 2


# RMU


def test_rmu_against_the_hidden_states_that_transformers_gives(build):
    before = {}
    keep = lambda model: before.update(model=copy.deepcopy(model))  # noqa: E731
    model, objective = build("rmu", "--rmu_layer=2", "--rmu_steering=3", change=keep)
    tiny.perturb(model, 0.02)
    _, parts = objective([5, 0, 3, 7], 2, 2)

    def states(m, i):
        example = objective.rows.trained[i]
        ids = torch.tensor([example.prompt + example.completion[:-1]])
        with torch.no_grad():
            return m(input_ids=ids, output_hidden_states=True).hidden_states[2 + 1][0]  # [0]: the embeddings

    u = objective.target / 3
    assert u.norm().item() == pytest.approx(1, rel=1e-5) and u.min() >= 0
    steered = [(states(model, i) - 3 * u).square().mean().item() for i in (5, 7)]
    held = [(states(model, i) - states(before["model"], i)).square().mean().item() for i in (0, 3)]
    assert floats(parts) == pytest.approx({"L_f": sum(steered) / 2, "L_r": sum(held) / 2}, rel=1e-4)
    assert parts["L_r"].item() > 1e-6


def test_rmu_starts_at_the_retain_activations_and_leaves_no_hook(build):
    model, objective = build("rmu")
    loss, parts = objective(RETAIN + FORGET, N_FORGET, N_RETAIN)
    assert parts["L_r"].item() == pytest.approx(0, abs=1e-10)
    assert loss.item() == pytest.approx(parts["L_f"].item(), rel=1e-5)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rmu_ends_the_pass_behind_its_layer_and_keeps_the_gradient(build, checkpointing):
    change = {"change": checkpoint_layers} if checkpointing else {}
    model, objective = build("rmu", "--rmu_layer=1", **change)
    tiny.perturb(model, 0.02)
    run = []
    for number, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda *_, number=number: run.append(number))
    found = []
    for layers in (objective.layers, (objective.layers[0], None)):
        objective.layers = layers
        objective(RETAIN + FORGET, N_FORGET, N_RETAIN)[0].backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert run == [0, 1, 0, 1, 2, 3]
    assert len(found[0]) > 10 and all(map(torch.equal, *found))


@pytest.mark.parametrize("layer, trained", [("1", {0, 1}), ("3", {1, 2, 3}), ("0", {0})])
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_rmu_trains_its_layer_and_the_two_before(build, layer, trained, tune):
    model, _ = build("rmu", f"--rmu_layer={layer}", f"--tune={tune}")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {int(name.split("layers.")[1].split(".")[0]) for name in names} == trained
    assert tune == "full" or all("lora_" in name for name in names)


def test_the_default_layer_of_rmu_is_as_deep_as_the_authors():
    assert [rmu.layer_number(None, n) for n in (32, 30, LAYERS)] == [7, 7, 1]


# What is trained


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_what_a_step_changes(build, tune):
    model, objective = build("gradient_ascent_descent", f"--tune={tune}")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss, _ = objective(RETAIN + FORGET, N_FORGET, N_RETAIN)
    step(model, loss, 0.1)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if tune == "full" or "lora_B" in name}  # A moves once B is not 0


def test_bfloat16_weights_are_trained_in_float32(build):
    """And computed with in bfloat16 meanwhile, without the losses losing precision."""
    model, objective = build("undial", "--retain_loss=kl", change=lambda model: model.bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = objective(RETAIN + FORGET, N_FORGET, N_RETAIN)
    assert {value.dtype for value in (loss, *parts.values())} == {torch.float32}
    assert parts["L_kl"].item() == pytest.approx(0, abs=1e-4)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
