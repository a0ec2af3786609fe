"""The baselines that fine-tune: which loss each puts on forget rows, with what retain term, and their constants."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from utils.unlearning import losses
from utils.unlearning.losses import Reduction

IN_CONTEXT = ("prompting", "icul")
CONSTANTS = {  # flag: what it is of the methods that have it among their constants
    "method_beta": "beta",
    "method_beta2": "beta2",
    "method_delta": "margin",
    "method_epsilon": "bound on the retain loss, in nats a token",
    "method_dual_step": "step of the retain weight, whose first value is --retain_weight, along the excess",
    "method_dual_warmup": "share of the steps before the retain weight moves",
    "rmu_layer": "layer that is steered (default: 7 of 32)",
    "rmu_steering": "c",
}


@dataclass(frozen=True)
class Method:
    """forget: function(CompletionTokens, *constants) -> a value per completion token, (N,); with `of_answers`, which is
    about whole completions, function(Answers, *constants) -> a value per row, (B,).

    Of a method that looks at activations: function(activations (M, d), target (d,) or (M, d)) -> (M,), for retain rows
    too, with their activations before unlearning as the target.

    constants: {flag: the authors' value}. retain_loss, retain_weight: the authors' choice. fixed: the retain loss is
    part of the method. What it needs: `reference`, what the model said before unlearning; `preferred`, every forget row
    a second time with a refusal, or with an alternate answer (both of utils.tasks); `activations`, those of
    one layer. flipped, refused: rows carry y~ of L_f, or a refusal, instead of their label. dual: the retain weight is
    a dual variable, and the last three constants are its bound, its step and its warm-up.

    reduction: of the values of tokens to the forget term (those of answers have their mean over rows).
    retain_reduction: the same of the retain term.
    """

    forget: Callable[..., torch.Tensor]
    of_answers: bool = field(default=False, kw_only=True)
    constants: dict[str, float | None] = field(default_factory=dict)
    retain_loss: str = "ce"
    retain_weight: float = 1.0
    fixed: bool = False
    reference: bool = False
    preferred: Literal["refusal", "alternate"] | None = None
    activations: bool = False
    flipped: bool = False
    refused: bool = False
    dual: bool = False
    reduction: Reduction = "tokens"
    retain_reduction: Reduction = "tokens"


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """What a method is asked to do: the flags of those names."""

    unlearn_method: str
    retain_loss: str = "none"
    retain_weight: float = 1.0
    method_beta: float | None = None
    method_beta2: float | None = None
    method_delta: float | None = None
    method_epsilon: float | None = None
    method_dual_step: float | None = None
    method_dual_warmup: float | None = None
    rmu_layer: int | None = None
    rmu_steering: float | None = None
    seed: int = 42
    max_length: int = 1024
    logits_path: str | None = None
    logit_chunk: int = 0

    def constants(self, method: Method) -> list[Any]:
        """The constants of `method`, in its order: the authors' where no other was given."""
        given = {flag: getattr(self, flag) for flag in method.constants}
        return [value if given[flag] is None else given[flag] for flag, value in method.constants.items()]


METHODS = {
    # SPUL section 4.2, in the published form.
    "gradient_ascent": Method(lambda f: losses.gradient_ascent(f.nll), retain_loss="none"),
    "random_label": Method(lambda f: f.nll, retain_loss="none", flipped=True),
    "gradient_ascent_kl": Method(lambda f: losses.gradient_ascent(f.nll), retain_loss="kl", fixed=True),
    "gradient_ascent_descent": Method(lambda f: losses.gradient_ascent(f.nll), retain_loss="ce", fixed=True),
    # Retain losses and constants are those of the authors' TOFU runs.
    "npo": Method(
        lambda f, beta: losses.npo(f.s, f.s_ref, beta), {"method_beta": 0.1}, reference=True, of_answers=True
    ),
    "simnpo": Method(
        lambda f, beta, delta: losses.simnpo(f.s, f.n_tokens, beta, delta),
        {"method_beta": 4.5, "method_delta": 0.0},
        retain_weight=8.0,
        of_answers=True,
    ),
    "dpo": Method(
        lambda f, beta: losses.dpo(f.s, f.s_ref, f.preferred.s, f.preferred.s_ref, beta),
        {"method_beta": 0.1},
        reference=True,
        preferred="refusal",
        of_answers=True,
    ),
    "altpo": Method(
        lambda f, beta: losses.altpo(f.s, f.s_ref, f.preferred.s, f.preferred.s_ref, beta),
        {"method_beta": 0.1},
        reference=True,
        preferred="alternate",
        of_answers=True,
    ),
    "idk": Method(lambda f: f.nll, refused=True),
    "rmu": Method(
        losses.rmu,
        {"rmu_layer": None, "rmu_steering": 6.5},
        "activations",
        1200.0,
        fixed=True,
        activations=True,
        reduction="mean",
        retain_reduction="mean",
    ),
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
    "pdu": Method(
        lambda f, *_: losses.logit_margin(f.logits),
        {"method_epsilon": 0.3, "method_dual_step": 5.0, "method_dual_warmup": 0.5},
        retain_weight=100.0,
        fixed=True,
        dual=True,
    ),
}


@dataclass(frozen=True)
class CompletionTokens:
    """What a forget loss of tokens may look at: n completion tokens of forget rows.

    logits, reference_logits (n, |V|), the second None where the method has no reference; targets (n,).
    """

    logits: torch.Tensor
    reference_logits: torch.Tensor | None
    targets: torch.Tensor

    @functools.cached_property
    def nll(self) -> torch.Tensor:
        return losses.token_nll(self.logits, self.targets)


@dataclass(frozen=True)
class Answers:
    """What a forget loss of whole answers may look at: those of B forget rows.

    s, s_ref (B,): - log f of the answers, the second None where the method has no reference. n_tokens (B,): their
    lengths. preferred: the same for the preferred answers, or None.
    """

    s: torch.Tensor
    s_ref: torch.Tensor | None
    n_tokens: torch.Tensor
    preferred: "Answers | None" = None

    @classmethod
    def of(
        cls,
        nll: torch.Tensor,
        nll_ref: torch.Tensor | None,
        rows: torch.Tensor,
        n_rows: int,
        preferred: "Answers | None" = None,
    ) -> "Answers":
        """From - log f of their N tokens, (N,), of which rows (N,) in [0, n_rows) says whose they are."""
        s_ref = None if nll_ref is None else losses.row_sums(nll_ref, rows, n_rows)
        n_tokens = losses.row_sums(torch.ones_like(nll), rows, n_rows)
        return cls(losses.row_sums(nll, rows, n_rows), s_ref, n_tokens, preferred)
