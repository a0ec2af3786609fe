"""ECO's training behind its gate (arXiv 2406.07933): the search for how strongly to corrupt."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from utils.data.names import Person
from utils.data.select import learnt_by, sample_rows
from utils.errors import UserError
from utils.evaluation.scores import joined, score_rows
from utils.interventions import gates
from utils.interventions.corruption import Corruption, has_strength
from utils.interventions.eco import CorruptedEmbeddings, Marks, Tagger, by_list
from utils.interventions.served import Served, load_served
from utils.models.base import ModelSettings
from utils.models.chain import resolve_chain
from utils.tasks.base import Task
from utils.tasks.rows import Splits, load_rows

LADDER = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # where a search without --eco_start begins to look


@dataclass(frozen=True, kw_only=True)
class EcoSettings:
    """ECO's corruption and search: the flags of those names. eco_target: v_r, a number, `auto`, or the path of a
    checkpoint that never saw the forget rows."""

    eco_corruption: str = "noise-first"
    eco_dims: int = 1
    eco_tokens: str = "all"
    eco_token_classifier: str | None = None
    eco_strength: float | None = None
    eco_metric: str | None = None
    eco_target: float | str = "auto"
    eco_samples: int = 200
    eco_steps: int = 10
    eco_bisect: int = 4
    eco_start: float | None = None
    eco_eps: float = 0.999
    eco_lr: float = 100.0
    eco_sigma_min: float = 0.1
    seed: int = 42
    max_length: int = 1024
    eval_batch_size: int = 32

    @property
    def searched(self) -> bool:
        """Whether a strength is searched for."""
        return has_strength(self.eco_corruption) and self.eco_strength is None

    def corruption(self, strength: float) -> Corruption:
        return Corruption(self.eco_corruption, strength, self.eco_dims, self.seed)


def learn(
    served: Served,
    frames: Splits,
    names: Sequence[Person],
    gate: gates.Gate,
    settings: EcoSettings,
    model: ModelSettings,
) -> tuple[CorruptedEmbeddings, dict[str, Any]]:
    """Find the strength behind `gate`, in front of the plain model `served`: (intervention, what eco.json says).

    names: the people whom --eco_tokens=entities corrupts. model: how a checkpoint that --eco_target names is loaded.
    """
    marks = _marks(served, names, settings, model.trust_remote_code)

    def intervention(strength: float) -> CorruptedEmbeddings:
        return CorruptedEmbeddings(corruption=settings.corruption(strength), marks=marks, gate=gate)

    strength, target, curve = settings.eco_strength or 0.0, None, []
    if settings.searched:
        target = _target(served, frames, settings, model)
        strength, curve = search_strength(served, frames, settings, intervention, target)
    found = intervention(strength)
    return found, {
        "corruption": vars(found.corruption),
        "tokens": settings.eco_tokens,
        "names": [asdict(person) for person in names],
        "token_classifier": settings.eco_token_classifier,
        "metric": settings.eco_metric or frames.task.compared,
        "target": target,
        "curve": curve,
    }


def search_strength(
    served: Served,
    frames: Splits,
    settings: EcoSettings,
    intervention: Callable[[float], CorruptedEmbeddings],
    target: float,
) -> tuple[float, list[dict[str, float]]]:
    """(sigma, curve): the strength whose metric on train_forget comes closest to v_r (section 3.3, equation 5).

    intervention: of a strength. target: v_r. curve: [{"strength", "metric"}, ...] of everything that was tried. Without
    --eco_start the zeroth-order search begins at the best of a coarse ladder: at the published start small noise
    changes no answer, and it would not move. Afterwards the gap between the two tried strengths around v_r is halved a
    few times: near a step of the metric the gradient's two sides lie far apart, and the search jumps over it.
    """
    task, forget = frames.task, sample_rows(frames["train_forget"], settings.eco_samples)
    name = settings.eco_metric or task.compared
    seen: dict[float, float] = {}

    def metric(strength: float) -> float:
        if strength not in seen:
            seen[strength] = _score(settings, served.using(intervention(strength)), forget, task)
            print(f"strength {strength:8.3f}: {name} on train_forget {seen[strength]:.3f}")
        return seen[strength]

    def distance(strength: float) -> float:
        return abs(metric(strength) - target)

    print(f"looking for the strength that gives {name} {target:.3f} on train_forget")
    minimum = settings.eco_sigma_min
    start = max(minimum, settings.eco_start or min((max(s, minimum) for s in LADDER), key=distance))
    eps, lr = settings.eco_eps * start, settings.eco_lr
    for strength in zeroth_order(distance, start, settings.eco_steps, eps, lr, minimum):
        distance(strength)  # the last one has not been tried
    for _ in range(settings.eco_bisect):
        around = bracket({s: m for s, m in seen.items() if s >= minimum}, target)
        if around is None:
            break
        distance(math.sqrt(around[0] * around[1]))
    best = min((s for s in seen if s >= minimum), key=lambda strength: (distance(strength), strength))
    return best, [{"strength": s, "metric": seen[s]} for s in sorted(seen)]


def bracket(tried: dict[float, float], target: float) -> tuple[float, float] | None:
    """The neighbouring strengths of `tried` {strength: metric} between which the metric crosses `target`, the pair that
    is closest to it; None where there is none, or one of them hits it."""
    ordered = sorted(tried)
    if target in tried.values():
        return None
    pairs = [(a, b) for a, b in zip(ordered, ordered[1:]) if (tried[a] - target) * (tried[b] - target) < 0]
    return min(pairs, key=lambda pair: sum(abs(tried[s] - target) for s in pair), default=None)


def zeroth_order(
    loss: Callable[[float], float], start: float, steps: int, eps: float, lr: float, minimum: float
) -> list[float]:
    """Minimise a function of one number: g = (l(s + eps) - l(s - eps)) / (2 eps), s <- max(s - lr g, minimum).

    Returns every s visited, the start first (ECO section 3.3). Ends early where the loss is 0 or s stays where it is.
    """
    visited = [max(start, minimum)]
    for _ in range(steps):
        s = visited[-1]
        if loss(s) == 0:
            break
        gradient = (loss(s + eps) - loss(max(s - eps, 1e-8))) / (2 * eps)
        following = max(s - lr * gradient, minimum)
        if following == s:
            break
        visited.append(following)
    return visited


def _score(settings: EcoSettings, served: Served, frame: pd.DataFrame, task: Task) -> float:
    metric = settings.eco_metric or task.compared
    rows = score_rows(served, frame, task, settings.max_length, settings.eval_batch_size, score=metric)
    return task.split_scores(joined(frame, rows, "train_forget"))[metric]


def _target(served: Served, frames: Splits, settings: EcoSettings, model: ModelSettings) -> float:
    """v_r: a number, the metric of a retain model on train_forget, or `auto`: of this model on retain rows that it has
    not learnt, the validation rows that stand in for test_retain."""
    task, n = frames.task, settings.eco_samples
    if settings.eco_target == "auto":
        return _score(settings, served, sample_rows(frames["test_retain"], n), task)
    if isinstance(settings.eco_target, float):
        return settings.eco_target
    retain_model = load_served(settings.eco_target, model, max_length=settings.max_length)
    return _score(settings, retain_model, sample_rows(frames["train_forget"], n), task)


def refuse_metric(settings: EcoSettings, task: Task) -> None:
    """Raise UserError on a --eco_metric that `task` has not."""
    if settings.eco_metric not in (None, *task.searchable):
        listed = ", ".join(task.searchable)
        raise UserError(f"--eco_metric={settings.eco_metric} is no score of these rows; use one of {listed}")


def refuse_target(
    settings: EcoSettings, model: ModelSettings, tuned: dict[str, Any], arguments: dict[str, Any]
) -> None:
    """Raise UserError, before anything is trained, on a --eco_target that cannot work: a checkpoint that is none, or
    `auto` where the model of the manifest `tuned` may have learnt the rows that --validation_share cuts.

    arguments: those of the command, which say which rows it works on.
    """
    if not settings.searched or isinstance(settings.eco_target, float):
        return
    if settings.eco_target != "auto":
        resolve_chain(settings.eco_target, model.trust_remote_code)
    elif tuned and not learnt_by(tuned, load_rows({**arguments, "forget_size": 1.0})):
        raise UserError(
            "--eco_target=auto needs rows that the model has not learnt; fine-tune it with the --validation_share and "
            "the rows of this command, or give a number or a retain model"
        )


def _marks(served: Served, names: Sequence[Person], settings: EcoSettings, trust_remote_code: bool) -> Marks:
    if settings.eco_tokens == "all":
        return Marks()
    if not settings.eco_token_classifier:
        return Marks(by_list(names))
    source = resolve_chain(settings.eco_token_classifier, trust_remote_code)[0].path
    return Marks(Tagger(settings.eco_token_classifier, source, served.model.device, trust_remote_code))
