"""The losses against their equations, worked out in plain Python from probabilities."""

import math

import pytest
import torch

from utils.unlearning.losses import mean_over_rows, spul_loss, token_kl, token_nll

# One distribution over three tokens for each completion token; the logits are their logarithms plus any constant.
PROMPTED = [(0.5, 0.25, 0.25), (0.1, 0.8, 0.1), (0.2, 0.2, 0.6), (0.7, 0.2, 0.1)]
UNPROMPTED = [(0.6, 0.3, 0.1), (0.3, 0.3, 0.4), (0.25, 0.5, 0.25), (0.9, 0.05, 0.05)]
TARGETS = [0, 2, 1, 0]


def logits(distributions):
    shifts = torch.arange(len(distributions))[:, None] * 3.0
    return torch.tensor(distributions).log() + shifts


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def spul(rows, forget_rows, alpha=0.5, beta=2.0):
    """spul_loss as spul.py calls it, for tokens that belong to `rows` of which `forget_rows` are to be forgotten."""
    n_rows = len(set(rows))
    forget = torch.tensor([row in forget_rows for row in rows])
    nll = token_nll(logits(PROMPTED[: len(rows)]), torch.tensor(TARGETS[: len(rows)]))
    retain = [i for i, row in enumerate(rows) if row not in forget_rows]
    kl = token_kl(logits([UNPROMPTED[i] for i in retain]), logits([PROMPTED[i] for i in retain])) if retain else None
    kl = torch.zeros(0) if kl is None else kl
    loss, parts = spul_loss(nll[forget], nll[~forget], kl, len(forget_rows), n_rows - len(forget_rows), alpha, beta)
    return loss.item(), {key: value.item() for key, value in parts.items()}


def test_token_nll_is_minus_the_log_probability():
    nll = token_nll(logits(PROMPTED), torch.tensor(TARGETS))
    assert nll.tolist() == pytest.approx([math.log(2), math.log(10), math.log(5), -math.log(0.7)], rel=1e-5)


def test_kl_is_reference_to_model():
    """KL is not symmetric: the frozen model's distribution is the one that weighs."""
    reference, model = (0.5, 0.25, 0.25), (0.25, 0.5, 0.25)
    skewed = (0.9, 0.05, 0.05)
    assert token_kl(logits([reference]), logits([model])).item() == pytest.approx(0.25 * math.log(2), rel=1e-5)
    forward, backward = divergence(reference, skewed), divergence(skewed, reference)
    assert abs(forward - backward) > 0.1
    assert token_kl(logits([reference]), logits([skewed])).item() == pytest.approx(forward, rel=1e-5)


def test_kl_of_a_distribution_with_itself_is_zero():
    scaled = logits(PROMPTED) * 30
    assert token_kl(scaled, scaled.clone()).abs().max() == 0
    assert token_kl(scaled, scaled + 7).abs().max() < 1e-5


def test_kl_of_improbable_tokens_is_finite():
    certain = torch.tensor([[200.0, 0.0, -200.0]])
    assert token_kl(certain, -certain).item() == pytest.approx(400, rel=1e-5)


def test_kl_sends_no_gradient_to_a_frozen_reference_and_one_to_the_model():
    reference, model = logits(UNPROMPTED), logits(PROMPTED).requires_grad_()
    token_kl(reference, model).sum().backward()
    expected = torch.tensor(PROMPTED) - torch.tensor(UNPROMPTED)  # d KL(p || softmax z) / dz = softmax z - p
    assert torch.allclose(model.grad, expected, atol=1e-6)


def test_single_token_labels():
    loss, parts = spul(rows=[0, 1, 2, 3], forget_rows={1, 2})
    forget = (math.log(10) + math.log(5)) / 2
    retain = (math.log(2) - math.log(0.7)) / 2
    kl = (divergence(UNPROMPTED[0], PROMPTED[0]) + divergence(UNPROMPTED[3], PROMPTED[3])) / 2
    assert parts == pytest.approx({"L_f": forget, "L_r": retain, "L_kl": kl}, rel=1e-5)
    assert loss == pytest.approx(forget + 0.5 * retain + 2.0 * kl, rel=1e-5)


def test_multi_token_labels_sum_over_tokens_and_average_over_rows():
    """Row 0 (forget) has one token, row 1 (retain) three: L_r and L_kl are sums of three, divided by one row."""
    loss, parts = spul(rows=[0, 1, 1, 1], forget_rows={0})
    retain = math.log(10) + math.log(5) - math.log(0.7)
    kl = sum(divergence(UNPROMPTED[i], PROMPTED[i]) for i in (1, 2, 3))
    assert parts == pytest.approx({"L_f": math.log(2), "L_r": retain, "L_kl": kl}, rel=1e-5)
    assert loss == pytest.approx(math.log(2) + 0.5 * retain + 2.0 * kl, rel=1e-5)


def test_two_forget_rows_of_two_tokens():
    _, parts = spul(rows=[0, 0, 1, 1], forget_rows={0, 1})
    assert parts["L_f"] == pytest.approx((math.log(2) + math.log(10) + math.log(5) - math.log(0.7)) / 2, rel=1e-5)


def test_a_batch_without_forget_rows():
    loss, parts = spul(rows=[0, 1], forget_rows=set())
    retain = (math.log(2) + math.log(10)) / 2
    kl = (divergence(UNPROMPTED[0], PROMPTED[0]) + divergence(UNPROMPTED[1], PROMPTED[1])) / 2
    assert parts == pytest.approx({"L_f": 0, "L_r": retain, "L_kl": kl}, rel=1e-5)
    assert loss == pytest.approx(0.5 * retain + 2.0 * kl, rel=1e-5)


def test_a_batch_without_retain_rows():
    loss, parts = spul(rows=[0, 1], forget_rows={0, 1})
    assert parts == pytest.approx({"L_f": (math.log(2) + math.log(10)) / 2, "L_r": 0, "L_kl": 0}, rel=1e-5)
    assert loss == pytest.approx(parts["L_f"])


def test_without_kl_there_is_no_third_part():
    nll = torch.tensor([1.0, 3.0])
    loss, parts = spul_loss(nll[:1], nll[1:], None, 1, 1, alpha=0.25, beta=0.5)
    assert {key: value.item() for key, value in parts.items()} == {"L_f": 1, "L_r": 3}
    assert loss.item() == 1.75


def test_micro_batches_add_up_to_the_step():
    """Terms are divided by the rows of the whole step, so the parts of a step add up whatever they hold."""
    nll, kl = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.5, 0.25])
    forget, retain = nll[::2], nll[1::2]
    whole, _ = spul_loss(forget, retain, kl, 2, 2, 0.5, 2.0)
    halves = [spul_loss(*(part[i : i + 1] for part in (forget, retain, kl)), 2, 2, 0.5, 2.0)[0] for i in (0, 1)]
    assert whole.item() == pytest.approx((1 + 4) / 2 + 0.5 * (2 + 8) / 2 + 2.0 * 0.75 / 2)
    assert sum(halves).item() == pytest.approx(whole.item())


@pytest.mark.parametrize(("n_rows", "expected"), [(2, 2.5), (5, 1.0)])
def test_mean_over_rows_divides_by_rows_not_by_tokens(n_rows, expected):
    assert mean_over_rows(torch.tensor([1.0, 1.5, 2.5]), n_rows).item() == expected


def test_mean_over_no_rows_is_zero():
    assert mean_over_rows(torch.zeros(0), 0).item() == 0
