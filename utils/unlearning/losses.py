"""The losses, as pure functions of log-probabilities (SPUL, arXiv 2406.12038, section 3.2, equations 1 to 4).

N completion tokens of a batch's B rows are listed flat; `rows` (N,) says which row each belongs to. Forget and retain
terms are means over rows or tokens, each over its own, so a function takes the number it divides by: that of the whole
optimisation step, of which the tensors may be one part (micro-batches then add up to the exact step).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["sum", "mean", "tokens"]  # of a term's token values, see `reduced`
Parts = tuple[Tensor, dict[str, Tensor]]  # a loss and what it is the sum of, all scalars


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """- log f(y_i | prefix) of each completion token. logits (N, |V|), targets (N,); returns (N,)."""
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def token_kl(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """KL( reference || model ) of the next-token distributions at each position. Both (N, |V|); returns (N,) nats."""
    reference, model = reference_logits.log_softmax(-1), logits.log_softmax(-1)
    return (reference.exp() * (reference - model)).sum(-1)


def word_kl(reference: Tensor, log_p: Tensor) -> Tensor:
    """KL( r || q ) of each row, q = softmax of log f(word | x) over the label words: the term of L_hide (ours).

    reference (B, n_words): r, whose rows sum to 1 and may hold zeros. log_p (B, n_words): nats, each word with all its
    tokens. Returns (B,) nats.
    """
    return torch.nn.functional.kl_div(log_p.log_softmax(-1), reference, reduction="none").sum(-1)


def mean_over_rows(per_token: Tensor, n_rows: int) -> Tensor:
    """(1 / n_rows) x the sum of `per_token` (M,) over the tokens of those rows; 0 where there are none."""
    return per_token.sum() / max(n_rows, 1)


def reduced(values: Tensor, of_rows: Tensor, n: int, reduction: Reduction, n_rows: int, n_tokens: int) -> Tensor:
    """A term of the loss, a scalar, from the values of the completion tokens of some of its rows.

    values (M,), of_rows (M,) in [0, n): whose token each is. n_rows, n_tokens: the rows of the term in the whole
    optimisation step, and their completion tokens. reduction: `sum` over a row's tokens or their `mean`, then the mean
    over rows; `tokens`: the mean over all tokens. With completions of one token all three are the same.
    """
    if reduction == "tokens":
        return mean_over_rows(values, n_tokens)
    if reduction == "mean":
        values = values / row_sums(torch.ones_like(values), of_rows, n)[of_rows]
    return mean_over_rows(values, n_rows)


def spul_loss(
    nll_forget: Tensor,
    nll_retain: Tensor,
    kl: Tensor | None,
    n_forget: int,
    n_retain: int,
    alpha: float,
    beta: float,
    hide: float = 0.0,
    hidden: Tensor | None = None,
) -> Parts:
    """L = L_f + alpha L_r + beta L_kl (equation 4), and its parts; with `hidden` also + hide L_hide (ours).

    nll_forget, nll_retain: - log f(y_i | phi, x, y_<i) of the tokens of forget rows, where y is the unlearning word,
    and of the M tokens of retain rows. kl (M,): KL( f(. | x, y_<i) || f(. | phi, x, y_<i) ) at these; None where beta
    is 0. n_forget, n_retain: rows of each kind in the step. hidden (F,): `word_kl` of the forget rows; None where hide
    is 0. Returns (L, {"L_f", "L_r", "L_kl", "L_hide"}), scalars.
    """
    parts = {"L_f": mean_over_rows(nll_forget, n_forget), "L_r": mean_over_rows(nll_retain, n_retain)}
    loss = parts["L_f"] + alpha * parts["L_r"]
    if kl is not None:
        parts["L_kl"] = mean_over_rows(kl, n_retain)
        loss = loss + beta * parts["L_kl"]
    if hidden is not None:
        parts["L_hide"] = mean_over_rows(hidden, n_forget)
        loss = loss + hide * parts["L_hide"]
    return loss, parts


@dataclass(frozen=True)
class Shares:
    """What becomes of equation 4 behind a gate. forget, retain: the shares of the rows that it flags, in [0, 1]; those
    are computed. *_constant: what the others add to L_f and L_r."""

    forget: float
    retain: float
    forget_constant: float = 0.0
    retain_constant: float = 0.0


def behind_gate(
    parts: dict[str, Tensor], shares: Shares, of_step: float, alpha: float, beta: float, hide: float = 0.0
) -> Parts:
    """Equation 4 over all rows of the served model, from its parts over the flagged rows (`spul_loss`).

    A row that is let through is answered by the frozen model: no L_kl, and no gradient. What such rows would add to
    L_hide, a constant, is left out. of_step: the share of the step's rows that `parts` are about, so that the constants
    of micro-batches add up to one.
    """
    scaled = {
        "L_f": shares.forget * parts["L_f"] + of_step * shares.forget_constant,
        "L_r": shares.retain * parts["L_r"] + of_step * shares.retain_constant,
    }
    loss = scaled["L_f"] + alpha * scaled["L_r"]
    if "L_kl" in parts:
        scaled["L_kl"] = shares.retain * parts["L_kl"]
        loss = loss + beta * scaled["L_kl"]
    if "L_hide" in parts:
        scaled["L_hide"] = shares.forget * parts["L_hide"]
        loss = loss + hide * scaled["L_hide"]
    return loss, scaled


def with_retain_weight(parts: dict[str, Tensor], weight: float | Tensor) -> Parts:
    """(L_f + weight x the retain term, parts)."""
    retain = sum(value for key, value in parts.items() if key != "L_f")
    return parts["L_f"] + weight * retain, parts


# Forget losses of the baselines. Each returns one value per completion token, or per row where its equation is about
# whole completions; the caller takes the mean over forget rows or their tokens (`reduced`). nll = - log f(y_i | x,
# y_<i) of a token, s = its sum over a row's completion (`row_sums`), *_ref = the same under the model before
# unlearning, no gradient.


def row_sums(per_token: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """s: the sum of `per_token` (N,) over the tokens of each row. rows (N,) int in [0, n_rows); returns (n_rows,)."""
    return per_token.new_zeros(n_rows).index_add(0, rows, per_token)


def gradient_ascent(nll: Tensor) -> Tensor:
    """GA: - nll (SPUL section 4.2; arXiv 1910.12427). (N,) -> (N,)."""
    return -nll


def npo(s: Tensor, s_ref: Tensor, beta: float) -> Tensor:
    """NPO, arXiv 2404.05868, equation 3: -(2 / beta) log sigma( beta (s - s_ref) ). (B,), (B,) -> (B,).

    Its gradient is that of gradient ascent times a weight in (0, 2) that tends to 1 as beta tends to 0.
    """
    return -2 / beta * torch.nn.functional.logsigmoid(beta * (s - s_ref))


def simnpo(s: Tensor, n_tokens: Tensor, beta: float, delta: float) -> Tensor:
    """SimNPO, arXiv 2410.07163, equation 4: -(2 / beta) log sigma( beta (s / |y| - delta) ). (B,), (B,) -> (B,).

    The margin stands inside the factor beta, as in the authors' code; the paper writes gamma = beta delta. Theirs is 0.
    """
    return -2 / beta * torch.nn.functional.logsigmoid(beta * (s / n_tokens - delta))


def dpo(s: Tensor, s_ref: Tensor, s_preferred: Tensor, s_preferred_ref: Tensor, beta: float) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7) with y = the true answer as the rejected one and "unknown" as the preferred
    one (TOFU, arXiv 2401.06121): -(1 / beta) log sigma( beta ((s - s_ref) - (s_preferred - s_preferred_ref)) ).
    All (B,) -> (B,). The factor 1 / beta, as in NPO, leaves the gradient's size comparable over beta.
    """
    margin = (s - s_ref) - (s_preferred - s_preferred_ref)
    return -1 / beta * torch.nn.functional.logsigmoid(beta * margin)


def altpo(s: Tensor, s_ref: Tensor, s_preferred: Tensor, s_preferred_ref: Tensor, beta: float) -> Tensor:
    """AltPO, arXiv 2409.13474, section 3: `dpo` with an alternate answer in the domain of the true one as the preferred
    one, and the factor 2 / beta that the authors' code has, as NPO. All (B,) -> (B,)."""
    return 2 * dpo(s, s_ref, s_preferred, s_preferred_ref, beta)


def logit_margin(logits: Tensor) -> Tensor:
    """PDU's forget loss, arXiv 2506.05314: (largest logit - mean logit)^2 of each token, 0 where the distribution is
    flat. (N, |V|) -> (N,)."""
    return (logits.amax(-1) - logits.mean(-1)).square()


def undial(logits: Tensor, reference_logits: Tensor, targets: Tensor, beta: float) -> Tensor:
    """UNDIAL, arXiv 2402.10052, section 3: cross-entropy to softmax(z_ref - beta 1[true token]).

    logits, reference_logits (N, |V|), targets (N,) -> (N,).
    """
    lowered = reference_logits.scatter_add(
        -1, targets[:, None], reference_logits.new_full((len(targets), 1), -float(beta))
    )
    return _cross_entropy(lowered.softmax(-1), logits)


def wga(nll: Tensor, beta: float) -> Tensor:
    """WGA, arXiv 2502.19301, section 5: - p^beta nll, p = exp(-nll), the weight not differentiated. (N,) -> (N,)."""
    return -(nll.detach().neg() * beta).exp() * nll


def satimp(nll: Tensor, beta1: float, beta2: float) -> Tensor:
    """SatImp, arXiv 2505.11953, section 4: - p^beta1 (1 - p)^beta2 nll, the weight not differentiated. (N,) -> (N,)."""
    p = nll.detach().neg().exp()
    return -(p**beta1) * (1 - p) ** beta2 * nll


def ceu(logits: Tensor, targets: Tensor) -> Tensor:
    """CE-U, arXiv 2503.01224, section 3: cross-entropy to softmax(z, true token at minus infinity), the target not
    differentiated. logits (N, |V|), targets (N,) -> (N,). Minimal, with zero gradient, where p(true token) = 0."""
    return _cross_entropy(logits.detach().scatter(-1, targets[:, None], -torch.inf).softmax(-1), logits)


def rmu(activations: Tensor, target: Tensor) -> Tensor:
    """RMU, arXiv 2403.03218, section 4: mean over the d numbers of (activation - target)^2 for each token. Forget rows:
    target = c u, (d,); retain rows: target = the activations before unlearning, (M, d). (M, d) -> (M,)."""
    return (activations.float() - target.float()).square().mean(-1)


def _cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """- sum over the vocabulary of target log softmax(logits). Both (N, |V|) -> (N,)."""
    return -(target * logits.log_softmax(-1)).sum(-1)
