"""ECO's training (arXiv 2406.07933): the gate, its threshold, and the search for how strongly to corrupt."""

import dataclasses
import math

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold

from utils.data.load import SNIPPETS_FOLDER
from utils.data.names import read_names
from utils.data.select import learnt_by, load_rows, sample_rows
from utils.data.splits import SPLITS, split_rows
from utils.errors import UserError
from utils.evaluation.scores import score_rows, split_scores
from utils.interventions import gates
from utils.interventions.corruption import Corruption, has_strength
from utils.interventions.eco import Marks, Tagger, by_list, found_names
from utils.interventions.served import load_served
from utils.models.chain import resolve_chain

FOLDS = 5  # of the cross-fitting that sets the threshold
LADDER = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # where a search without --eco_start begins to look


def learn(args, loaded, frames):
    """Train the gate, find the strength; returns (loaded with gate and corruption, settings for `save`)."""
    names = _names(args)
    loaded = dataclasses.replace(loaded, marks=_marks(args, loaded, names))
    searched = has_strength(args.eco_corruption) and args.eco_strength is None
    if args.eco_target == "auto" and searched:
        _refuse_learnt(args, loaded.chain[-1].manifest)
    elif args.eco_target != "auto" and not isinstance(args.eco_target, float):
        resolve_chain(args.eco_target, args.trust_remote_code)  # ends here, not after the training, if it must
    gate, calibration = train_gate(args, loaded, frames)
    report = {"rates": gates.rates(gate, frames), "evasion": evasion_rates(gate, frames, names)}
    loaded = dataclasses.replace(loaded, gate=gate)
    strength, target, curve = args.eco_strength or 0.0, None, []
    if searched:
        strength, target, curve = search_strength(args, loaded, frames)
    corruption = Corruption(args.eco_corruption, strength, args.eco_dims, args.seed)
    settings = {
        "classifier": gate.classifier.kind,
        "threshold": gate.threshold,
        "calibration": calibration,
        "corruption": {"family": corruption.family, "strength": strength, "dims": args.eco_dims, "seed": args.seed},
        "tokens": args.eco_tokens,
        "names": [dataclasses.asdict(person) for person in names],
        "token_classifier": args.eco_token_classifier,
        "metric": args.eco_metric,
        "target": target,
        "curve": curve,
        **report,
    }
    return dataclasses.replace(loaded, corruption=corruption), settings


def train_gate(args, loaded, frames):
    """(Gate, {"retain", "forget": rows that calibrate it, "auc", "false_positives", "false_negatives" on them}) from
    the train splits. A row that had a say in a classifier cannot calibrate it: one that has not seen it must score it.

    A classifier that is fitted in seconds is cross-fitted: five are trained on four fifths each, every row is scored by
    the one that did not see it, those scores set the threshold, and the one that is kept has seen all rows: it knows
    every forget row. For an encoder, and for a conformal threshold, whose guarantee is for the classifier that gave the
    calibration scores, a fifth is held out for good; of the rest an encoder holds out another fifth to pick the epoch.
    """
    kind = args.eco_classifier if args.eco_classifier in ("tfidf", "features") else "encoder"
    if kind == "encoder" or args.eco_conformal is not None:
        gate, retain, forget = _split_fit(args, loaded, frames, kind)
    else:
        gate, retain, forget = _cross_fit(args, loaded, frames, kind)
    if args.eco_threshold is not None:
        gate.threshold = args.eco_threshold
    else:
        gate.threshold = gates.threshold_for_rate(retain, *_rate(args))
    truth = np.r_[np.zeros(len(retain)), np.ones(len(forget))]
    calibration = {
        "retain": len(retain),
        "forget": len(forget),
        "auc": float(gates.roc_auc_score(truth, np.r_[retain, forget])),
        "false_positives": float((retain > gate.threshold).mean()),
        "false_negatives": float((forget <= gate.threshold).mean()),
    }
    return gate, calibration


def _rate(args) -> tuple[float, str]:
    """The share of retain rows that may be flagged, and the flag that says so."""
    flag = "eco_max_fpr" if args.eco_conformal is None else "eco_conformal"
    return getattr(args, flag), flag


def _refuse_few(args, n: int) -> None:
    """Raise UserError, before a classifier is trained, if the scores of `n` retain rows cannot set the threshold."""
    if args.eco_threshold is None:
        gates.threshold_rank(n, *_rate(args))


def _cross_fit(args, loaded, frames, kind):
    """(Gate fitted on all train rows, scores of the retain and of the forget rows by classifiers that had not seen
    them)."""
    texts, labels = _labelled(frames["train_retain"], frames["train_forget"])
    if min(np.bincount(labels)) < FOLDS:
        raise UserError(f"there are too few train rows to calibrate the classifier: {FOLDS} of each kind are needed")
    _refuse_few(args, len(frames["train_retain"]))
    texts, scores = np.array(texts, dtype=object), np.empty(len(labels))
    for fit, held in StratifiedKFold(FOLDS, shuffle=True, random_state=args.seed).split(texts, labels):
        classifier = gates.CLASSIFIERS[kind].fit(list(texts[fit]), labels[fit], loaded=loaded, args=args)
        scores[held] = gates.Gate(classifier).probabilities(texts[held])
    gate = gates.Gate(gates.CLASSIFIERS[kind].fit(list(texts), labels, loaded=loaded, args=args))
    return gate, scores[labels == 0], scores[labels == 1]


def _split_fit(args, loaded, frames, kind):
    """(Gate fitted on four fifths of the train rows, scores of the retain and of the forget rows held out)."""
    fit, held = _hold_out(frames["train_retain"], frames["train_forget"], args.seed)
    _refuse_few(args, len(held[0]))
    extra = {}
    if kind == "encoder":
        fit, validation = _hold_out(*fit, args.seed)
        extra = {"validation": _labelled(*validation)}
    gate = gates.Gate(gates.CLASSIFIERS[kind].fit(*_labelled(*fit), loaded=loaded, args=args, **extra))
    return gate, *(gate.probabilities(frame["text"]) for frame in held)


def _hold_out(retain, forget, seed):
    """((retain, forget) for training, (retain, forget) held out: a fifth of each label's rows)."""
    rows = pd.concat([retain.assign(forget=False), forget.assign(forget=True)], ignore_index=True)
    parts = split_rows(rows, 0.2, seed)
    pairs = [(parts[f"{phase}_retain"], parts[f"{phase}_forget"]) for phase in ("train", "test")]
    if min(len(frame) for pair in pairs for frame in pair) == 0:
        raise UserError("there are too few train rows to hold some out for the threshold; use more rows")
    return pairs


def search_strength(args, loaded, frames):
    """(sigma, v_r, curve): the strength whose metric on train_forget comes closest to v_r (section 3.3, equation 5).

    curve: [{"strength", "metric"}, ...] of everything that was tried. Without --eco_start the zeroth-order search
    begins at the best of a coarse ladder: at the published start small noise changes no answer, and it would not move.
    Afterwards the gap between the two tried strengths around v_r is halved a few times: near a step of the metric the
    gradient's two sides lie far apart, and the search jumps over it.
    """
    from utils.tasks.classification import label_words

    words, forget = label_words(frames), sample_rows(frames["train_forget"], args.eco_samples)
    target, seen = _target(args, loaded, frames, words, forget), {}

    def metric(strength):
        if strength not in seen:
            corruption = Corruption(args.eco_corruption, strength, args.eco_dims, args.seed)
            corrupted = dataclasses.replace(loaded, corruption=corruption)
            seen[strength] = _score(args, corrupted, forget, words)
            print(f"strength {strength:8.3f}: {args.eco_metric} on train_forget {seen[strength]:.3f}")
        return seen[strength]

    def distance(strength):
        return abs(metric(strength) - target)

    print(f"looking for the strength that gives {args.eco_metric} {target:.3f} on train_forget")
    minimum = args.eco_sigma_min
    start = max(minimum, args.eco_start or min((max(s, minimum) for s in LADDER), key=distance))
    for strength in zeroth_order(distance, start, args.eco_steps, args.eco_eps * start, args.eco_lr, minimum):
        distance(strength)  # the last one has not been tried
    for _ in range(args.eco_bisect):
        around = bracket({s: m for s, m in seen.items() if s >= minimum}, target)
        if around is None:
            break
        distance(math.sqrt(around[0] * around[1]))
    best = min((s for s in seen if s >= minimum), key=lambda strength: (distance(strength), strength))
    return best, target, [{"strength": s, "metric": seen[s]} for s in sorted(seen)]


def bracket(tried, target):
    """The neighbouring strengths of `tried` {strength: metric} between which the metric crosses `target`, the pair that
    is closest to it; None where there is none, or one of them hits it."""
    ordered = sorted(tried)
    if target in tried.values():
        return None
    pairs = [(a, b) for a, b in zip(ordered, ordered[1:]) if (tried[a] - target) * (tried[b] - target) < 0]
    return min(pairs, key=lambda pair: sum(abs(tried[s] - target) for s in pair), default=None)


def zeroth_order(loss, start, steps, eps, lr, minimum):
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


def evasion_rates(gate, frames, names):
    """{evasion: {split: share flagged}} on the forget rows that name somebody of `names`, the name rewritten so as to
    slip past the classifier; {} without names. `unchanged` is what to compare with."""
    result = {}
    for split in SPLITS:
        if split.endswith("forget"):
            named = [(text, found) for text in frames[split]["text"] if (found := found_names(text, names))]
            for evasion, rewrite in EVASIONS.items() if named else ():
                flags, _ = gate.decide([_rewritten(text, found, rewrite) for text, found in named])
                result.setdefault(evasion, {})[split] = float(flags.mean())
    return result


def _typo(name):
    """The first two different neighbours behind the last word's first letter change places (`Scrosese`)."""
    start = name.rfind(" ") + 2
    at = next((i for i in range(start, len(name) - 1) if name[i] != name[i + 1]), None)
    return name[:-1] if at is None else name[:at] + name[at + 1] + name[at] + name[at + 2 :]


EVASIONS = {
    "unchanged": lambda name: name,
    "lower case": str.lower,
    "typo": _typo,
    "initials": lambda name: " ".join(word[0] + "." for word in name.split()),
    "partial": lambda name: name.split()[-1][: max(3, len(name.split()[-1]) // 2)],
}


def _labelled(retain, forget):
    texts = [*retain["text"], *forget["text"]]
    return texts, np.r_[np.zeros(len(retain), dtype=int), np.ones(len(forget), dtype=int)]


def _score(args, loaded, frame, words):
    rows = score_rows(loaded, frame, words, args.max_length, args.eval_batch_size)
    return split_scores(pd.concat([frame[["label_text"]].reset_index(drop=True), rows], axis=1), words)[args.eco_metric]


def _target(args, loaded, frames, words, forget):
    """v_r: a number, the metric of a retrained checkpoint on train_forget, or `auto`: of this model on retain rows that
    it has not learnt, the validation rows that stand in for test_retain."""
    plain = dataclasses.replace(loaded, gate=None)
    if args.eco_target == "auto":
        return _score(args, plain, sample_rows(frames["test_retain"], args.eco_samples), words)
    if isinstance(args.eco_target, float):
        return args.eco_target
    return _score(args, load_served(args.eco_target, args), forget, words)


def _refuse_learnt(args, tuned: dict | None) -> None:
    """Raise UserError if the model of the manifest `tuned` may have learnt the rows that --validation_share cuts."""
    if tuned and not learnt_by(tuned, load_rows({**vars(args), "forget_size": 1.0})):
        raise UserError(
            "--eco_target=auto needs rows that the model has not learnt; fine-tune it with the --validation_share and "
            "the rows of this command, or give a number or a retrained checkpoint"
        )


def _names(args):
    known = SNIPPETS_FOLDER / "forget_names.txt" if args.dataset == "snippets" else None
    path = args.eco_names or args.forget_only or known
    return read_names(path) if path else []


def _marks(args, loaded, names):
    if args.eco_tokens == "all":
        return Marks()
    if not args.eco_token_classifier:
        return Marks(by_list(names))
    source = resolve_chain(args.eco_token_classifier, args.trust_remote_code)[0].path
    return Marks(Tagger(args.eco_token_classifier, source, loaded, args))


def _rewritten(text, found, rewrite):
    for start, end in reversed(found):
        text = text[:start] + rewrite(text[start:end]) + text[end:]
    return text
