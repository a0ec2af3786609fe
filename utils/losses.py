"""The losses, as pure functions of log-probabilities (SPUL, arXiv 2406.12038, section 3.2, equations 1 to 4).

N completion tokens of a batch's B rows are listed flat; `rows` (N,) says which row each belongs to. Forget and retain
terms are means over rows, each over its own rows, so a function takes the number of rows it divides by: that of the
whole optimisation step, of which the tensors may be one part (micro-batches then add up to the exact step).
"""

import torch


def token_nll(logits, targets):
    """- log f(y_i | prefix) of each completion token. logits (N, |V|), targets (N,); returns (N,)."""
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def token_kl(reference_logits, logits):
    """KL( reference || model ) of the next-token distributions at each position. Both (N, |V|); returns (N,) nats."""
    reference, model = reference_logits.log_softmax(-1), logits.log_softmax(-1)
    return (reference.exp() * (reference - model)).sum(-1)


def mean_over_rows(per_token, n_rows):
    """(1 / n_rows) x the sum of `per_token` (M,) over the tokens of those rows; 0 where there are none."""
    return per_token.sum() / max(n_rows, 1)


def spul_loss(nll, kl, forget, n_forget, n_retain, alpha, beta):
    """L = L_f + alpha L_r + beta L_kl (equation 4), and its parts.

    nll (N,): - log f(y_i | phi, x, y_<i), with the unlearning word as y on forget rows. kl (M,) or None (beta = 0):
    KL( f(. | x, y_<i) || f(. | phi, x, y_<i) ) at the M tokens of retain rows. forget (N,) bool: the token belongs to a
    forget row. n_forget, n_retain: rows of each kind in the step. Returns (L, {"L_f", "L_r", "L_kl"}), scalars.
    """
    parts = {"L_f": mean_over_rows(nll[forget], n_forget), "L_r": mean_over_rows(nll[~forget], n_retain)}
    loss = parts["L_f"] + alpha * parts["L_r"]
    if kl is not None:
        parts["L_kl"] = mean_over_rows(kl, n_retain)
        loss = loss + beta * parts["L_kl"]
    return loss, parts
