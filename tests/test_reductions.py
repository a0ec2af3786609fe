"""Answers of several lengths: what each term of each method is a sum or a mean of, worked out by hand."""

import math
import random
from types import SimpleNamespace

import pytest
import tiny
import torch

from utils.data.batch import Example, collate
from utils.interventions.served import Served
from utils.training.loop import Training, TrainingSettings
from utils.unlearning.losses import reduced
from utils.unlearning.methods import METHODS, MethodSettings
from utils.unlearning.objectives import FineTuning, objective_of
from utils.unlearning.reference import HIDDEN_STATES, Reference
from utils.unlearning.tuning import trainable

PAD, RETAIN, FORGET = 1, [0, 1, 2], [3, 4, 5]
LENGTHS = [1, 4, 2, 3, 1, 6]  # tokens of the answers of these rows
BETTER = [2, 1, 5]  # of the preferred answers
STEP = [4, 0, 5, 2, 3, 1]
OF_ANSWERS = {"npo", "simnpo", "dpo", "altpo"}


def examples():
    generator = random.Random(5)
    draw = lambda n: tuple(generator.randrange(2, tiny.VOCABULARY) for _ in range(n))  # noqa: E731
    rows = [Example(draw(4 + i), draw(n), i in FORGET) for i, n in enumerate(LENGTHS)]
    return rows, [Example(rows[i].prompt, draw(n), True) for i, n in zip(FORGET, BETTER)]


def load(served, rows, numbers, frames, measure=HIDDEN_STATES, depends_on=None):
    values = [measure.compute(served, collate([rows[i]], PAD, "cpu")) for i in numbers]
    return Reference(torch.cat(values), measure.counts(rows, numbers))


def of_method(name, retain_loss, weight=1.0):
    """(objective whose model moved a little since its reference was made, the model before)."""
    method, (rows, better) = METHODS[name], examples()
    asked = MethodSettings(unlearn_method=name, retain_loss=retain_loss, retain_weight=weight)
    model, before = tiny.build_model(), tiny.build_model()
    served = Served(trainable(model, None, method, asked), SimpleNamespace(pad_token_id=PAD), [])
    source = tiny.rows_of(method, rows, better)
    objective = objective_of(method)(method, served, source, {"train_retain": None}, asked, "", load)
    tiny.perturb(model, 0.02)
    return objective, before


@torch.no_grad()
def log_p(model, example):
    """Log-probabilities (tokens of the answer, |V|), one row alone and every position."""
    ids = torch.tensor([example.prompt + example.completion])
    return model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1].log_softmax(-1)


def nll(model, example):
    return [-row[token].item() for row, token in zip(log_p(model, example), example.completion)]


def log_sigma(x):
    return -math.log(1 + math.exp(-x))


def forget_term(name, model, before, constants):
    rows, better = examples()
    values = [nll(model, rows[i]) for i in FORGET]
    tokens = [value for row in values for value in row]
    n = sum(LENGTHS[i] for i in FORGET)
    if name in OF_ANSWERS:
        s, s_ref = (sum(row) for row in values), [sum(nll(before, rows[i])) for i in FORGET]
        beta = constants[0]
        if name == "simnpo":
            margins = [sum(row) / len(row) - constants[1] for row in values]
        else:
            margins = [a - b for a, b in zip(s, s_ref)]
        if name in ("dpo", "altpo"):
            gains = [sum(nll(model, row)) - sum(nll(before, row)) for row in better]
            margins = [a - b for a, b in zip(margins, gains)]
        factor = 1 if name == "dpo" else 2
        return sum(-factor / beta * log_sigma(beta * margin) for margin in margins) / len(FORGET)
    if name == "pdu":
        z = [model(input_ids=torch.tensor([rows[i].prompt + rows[i].completion])).logits[0] for i in FORGET]
        z = [row[len(rows[i].prompt) - 1 : -1] for i, row in zip(FORGET, z)]
        return sum(((row.max(-1).values - row.mean(-1)) ** 2).sum().item() for row in z) / n
    if name in ("random_label", "idk"):
        return sum(tokens) / n
    if name.startswith("gradient_ascent"):
        return -sum(tokens) / n
    if name == "wga":
        return sum(-(math.exp(-value) ** constants[0]) * value for value in tokens) / n
    if name == "satimp":
        p = [math.exp(-value) for value in tokens]
        return sum(-(a ** constants[0]) * (1 - a) ** constants[1] * value for a, value in zip(p, tokens)) / n
    total = 0
    for i in FORGET:
        now, ref = log_p(model, rows[i]), log_p(before, rows[i])
        for k, token in enumerate(rows[i].completion):
            z = (ref if name == "undial" else now)[k].clone()
            z[token] -= constants[0] if name == "undial" else math.inf
            total -= (z.softmax(-1) * now[k]).sum().item()
    return total / n


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.activations])
def test_forget_terms(name):
    objective, before = of_method(name, "none")
    _, parts = objective(STEP, 3, 3, STEP)
    wanted = forget_term(name, objective.served.model, before, objective.constants)
    assert parts["L_f"].item() == pytest.approx(wanted, rel=1e-4)
    assert METHODS[name].of_answers == (name in OF_ANSWERS)


@pytest.mark.parametrize("retain_loss", ["ce", "kl"])
def test_the_retain_term_is_a_mean_over_all_tokens_of_the_retain_rows(retain_loss):
    objective, before = of_method("npo", retain_loss, weight=3.0)
    loss, parts = objective(STEP, 3, 3, STEP)
    model, rows = objective.served.model, examples()[0]
    if retain_loss == "ce":
        total = sum(sum(nll(model, rows[i])) for i in RETAIN)
    else:
        pairs = [(log_p(before, rows[i]), log_p(model, rows[i])) for i in RETAIN]
        total = sum((p.exp() * (p - q)).sum().item() for p, q in pairs)
    name = {"ce": "L_r", "kl": "L_kl"}[retain_loss]
    assert parts[name].item() == pytest.approx(total / (1 + 4 + 2), rel=1e-4)
    assert loss.item() == pytest.approx(parts["L_f"].item() + 3 * parts[name].item(), rel=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_of_unequal_answers_add_up(name):
    """Only with the numbers of the whole step: a part alone does not know how many tokens the others have."""
    method = METHODS[name]
    objective, _ = of_method(name, method.retain_loss if method.activations else "ce")
    whole = objective(STEP, 3, 3, STEP)[1]
    parts = [objective(part, 3, 3, STEP)[1] for part in (STEP[:1], STEP[1:3], STEP[3:])]
    for key, value in whole.items():
        assert sum(part[key].item() for part in parts) == pytest.approx(value.item(), rel=1e-4)
    alone = [objective(part, 3, 3)[1]["L_r"].item() for part in (STEP[:3], STEP[3:])]
    assert (sum(alone) == pytest.approx(whole["L_r"].item(), rel=1e-4)) == method.activations


def test_fine_tuning_is_a_mean_over_all_tokens_of_a_step_in_micro_batches_too():
    """As the loop calls it, gradient included."""
    rows, model = examples()[0], tiny.build_model()
    parameters = dict(model.named_parameters())
    found = []
    for size in (None, 2):
        settings = TrainingSettings(micro_batch_size=size)
        loss = FineTuning(model, rows, PAD)
        training = Training(parameters, rows, loss, settings, {}, None, "", [], 0.0)
        model.zero_grad()
        found.append((training.accumulate(STEP)["loss"], model.lm_head.weight.grad.clone()))
    wanted = sum(sum(nll(model, row)) for row in rows) / sum(LENGTHS)
    assert [loss for loss, _ in found] == pytest.approx([wanted, wanted], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_the_three_reductions_by_hand():
    """Two rows of one and three tokens, in a step of four rows and ten tokens."""
    values, of_rows = torch.tensor([6.0, 3.0, 9.0, 12.0]), torch.tensor([0, 1, 1, 1])
    expected = {"sum": (6 + 24) / 4, "mean": (6 + 8) / 4, "tokens": 30 / 10}
    for reduction, value in expected.items():
        assert reduced(values, of_rows, 2, reduction, 4, 10).item() == value


def test_with_answers_of_one_token_all_reductions_are_one_to_the_last_digit():
    values = torch.randn(7, generator=torch.Generator().manual_seed(0))
    found = {reduced(values, torch.arange(7), 7, reduction, 9, 9).item() for reduction in ("sum", "mean", "tokens")}
    assert len(found) == 1


def test_rmu_is_a_mean_over_a_row_then_over_rows():
    objective, _ = of_method("rmu", "activations")
    method = METHODS["rmu"]
    assert (method.reduction, method.retain_reduction) == ("mean", "mean")
    _, parts = objective(FORGET, 3, 0, FORGET)
    each = [objective([i], 1, 0, [i])[1]["L_f"].item() for i in FORGET]
    assert parts["L_f"].item() == pytest.approx(sum(each) / 3, rel=1e-5)
