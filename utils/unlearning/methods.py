"""The rivals that fine-tune: which loss each puts on forget rows, with what retain term, and their constants."""

import functools
from dataclasses import dataclass, field

import torch

from utils.unlearning import losses

IN_CONTEXT = ("prompting", "icul")
CONSTANTS = ("method_beta", "method_beta2", "method_delta", "rmu_layer", "rmu_steering")


@dataclass(frozen=True)
class Method:
    """forget: function(ForgetTokens, *constants) -> values per completion token or per row, (N,) or (B,).

    constants: {flag: the authors' value}. retain_loss, retain_weight: the authors' choice. fixed: the retain loss is
    part of the method. reference: it compares with the model before unlearning. flipped: rows carry y~ of L_f instead
    of their label. preferred: every row runs a second time, with the answer "unknown".
    """

    forget: object
    constants: dict = field(default_factory=dict)
    retain_loss: str = "ce"
    retain_weight: float = 1.0
    fixed: bool = False
    reference: bool = False
    flipped: bool = False
    preferred: bool = False


METHODS = {
    # SPUL section 4.2, in the published form.
    "gradient_ascent": Method(lambda f: losses.gradient_ascent(f.nll), retain_loss="none"),
    "random_label": Method(lambda f: f.nll, retain_loss="none", flipped=True),
    "gradient_ascent_kl": Method(lambda f: losses.gradient_ascent(f.nll), retain_loss="kl", fixed=True),
    "gradient_ascent_descent": Method(lambda f: losses.gradient_ascent(f.nll), retain_loss="ce", fixed=True),
    # Retain losses and constants are those of the authors' TOFU runs.
    "npo": Method(lambda f, beta: losses.npo(f.s, f.s_ref, beta), {"method_beta": 0.1}, reference=True),
    "simnpo": Method(
        lambda f, beta, delta: losses.simnpo(f.s, f.n_tokens, beta, delta),
        {"method_beta": 4.5, "method_delta": 0.0},
        retain_weight=8.0,
    ),
    "dpo": Method(
        lambda f, beta: losses.dpo(f.s, f.s_ref, f.preferred.s, f.preferred.s_ref, beta),
        {"method_beta": 0.1},
        reference=True,
        preferred=True,
    ),
    "rmu": Method(None, {"rmu_layer": None, "rmu_steering": 6.5}, "activations", 1200.0, fixed=True),
    "undial": Method(
        lambda f, beta: losses.undial(f.logits, f.reference_logits, f.targets, beta),
        {"method_beta": 10.0},
        retain_loss="none",
        reference=True,
    ),
    "wga": Method(lambda f, beta: losses.wga(f.nll, beta), {"method_beta": 1.0}),
    "satimp": Method(
        lambda f, beta1, beta2: losses.satimp(f.nll, beta1, beta2),
        {"method_beta": 5.0, "method_beta2": 1.0},
        retain_weight=10.0,
    ),
    "ceu": Method(lambda f: losses.ceu(f.logits, f.targets), retain_loss="none"),
}


@dataclass(frozen=True)
class ForgetTokens:
    """What a forget loss may look at: the N completion tokens of B forget rows.

    logits, reference_logits (N, |V|), the second None where the method has no reference; targets (N,); rows (N,) in
    [0, B); preferred: the same for the preferred answers, or None.
    """

    logits: torch.Tensor
    reference_logits: torch.Tensor | None
    targets: torch.Tensor
    rows: torch.Tensor
    n_rows: int
    preferred: object = None

    @functools.cached_property
    def nll(self):
        return losses.token_nll(self.logits, self.targets)

    @property
    def s(self):
        return losses.row_sums(self.nll, self.rows, self.n_rows)

    @property
    def s_ref(self):
        return losses.row_sums(losses.token_nll(self.reference_logits, self.targets), self.rows, self.n_rows)

    @property
    def n_tokens(self):
        return losses.row_sums(torch.ones_like(self.nll), self.rows, self.n_rows)
