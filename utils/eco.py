"""ECO (arXiv 2406.07933): a gate, corrupted embeddings behind it, and the search for how strongly to corrupt."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd

from utils import gates, metrics, models
from utils.cli import UserError
from utils.corruption import Corruption, has_strength
from utils.data import SNIPPETS_FOLDER, SPLITS, sample_rows
from utils.names import read_names, spans

FILE = "eco.json"
LADDER = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # where a search without --eco_start begins to look


class Marks:
    """Which prompt tokens are corrupted. `entities` None: all but the last; else function(texts) -> spans a text."""

    def __init__(self, entities=None):
        self.entities = entities

    def spans(self, texts):
        """For each text None (all prompt tokens but the last) or the [(start, end), ...] of its names; a text without
        any name counts as None, as in the authors' code: a flagged query is never left as it is."""
        return [None] * len(texts) if self.entities is None else [found or None for found in self.entities(texts)]


def learn(args, loaded, frames):
    """Train the gate, find the strength; returns (loaded with gate and corruption, settings for `save`)."""
    gate, calibration = train_gate(args, loaded, frames)
    names = _names(args)
    report = {"rates": gates.rates(gate, frames), "evasion": evasion_rates(gate, frames, names)}
    marks = Marks()
    if args.eco_tokens == "entities":
        marks = Marks(_entities(names, args.eco_token_classifier, args.trust_remote_code))
    loaded = dataclasses.replace(loaded, gate=gate, marks=marks)
    strength, target, curve = args.eco_strength or 0.0, None, []
    if has_strength(args.eco_corruption) and args.eco_strength is None:
        strength, target, curve = search_strength(args, loaded, frames)
    corruption = Corruption(args.eco_corruption, strength, args.eco_dims, args.seed)
    settings = {
        "classifier": gate.classifier.kind,
        "threshold": gate.threshold,
        "calibration": calibration,
        "corruption": {"family": corruption.family, "strength": strength, "dims": args.eco_dims, "seed": args.seed},
        "tokens": args.eco_tokens,
        "names": [[person, pattern.pattern] for person, pattern in names],
        "token_classifier": args.eco_token_classifier,
        "metric": args.eco_metric,
        "target": target,
        "curve": curve,
        **report,
    }
    return dataclasses.replace(loaded, corruption=corruption), settings


def train_gate(args, loaded, frames):
    """(Gate, {"retain", "forget": rows held out, "auc", "false_positives", "false_negatives"}) from the train splits,
    a fifth of which is held out to set the threshold."""
    from utils.splits import split_rows

    rows = [frames[split].assign(forget=split == "train_forget") for split in SPLITS[:2]]
    parts = split_rows(pd.concat(rows, ignore_index=True), 0.2, args.seed)
    fit, held = ((parts[f"{phase}_retain"], parts[f"{phase}_forget"]) for phase in ("train", "test"))
    if min(map(len, (*fit, *held))) == 0:
        raise UserError("there are too few train rows to hold some out for the threshold; use more rows")
    texts, labels = _labelled(*fit)
    kind = args.eco_classifier if args.eco_classifier in ("tfidf", "features") else "encoder"
    extra = {"validation": _labelled(*held)} if kind == "encoder" else {}
    classifier = gates.CLASSIFIERS[kind].fit(texts, labels, loaded=loaded, args=args, **extra)
    retain, forget = (classifier.probabilities(list(frame["text"])) for frame in held)
    if args.eco_threshold is not None:
        threshold = args.eco_threshold
    elif args.eco_conformal is not None:
        threshold = gates.conformal_threshold(retain, args.eco_conformal)
    else:
        threshold = gates.threshold_for_rate(retain, args.eco_max_fpr)
    truth = np.r_[np.zeros(len(retain)), np.ones(len(forget))]
    calibration = {
        "retain": len(retain),
        "forget": len(forget),
        "auc": float(gates.roc_auc_score(truth, np.r_[retain, forget])),
        "false_positives": float((retain > threshold).mean()),
        "false_negatives": float((forget <= threshold).mean()),
    }
    return gates.Gate(classifier, threshold), calibration


def search_strength(args, loaded, frames):
    """(sigma, v_r, curve): the strength whose metric on train_forget comes closest to v_r (section 3.3, equation 5).

    curve: [{"strength", "metric"}, ...] of everything that was tried. Without --eco_start the zeroth-order search
    begins at the best of a coarse ladder: at the published start small noise changes no answer, and it would not move.
    """
    from utils.data import label_words

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
    start = args.eco_start or min(LADDER, key=distance)
    zeroth_order(distance, start, args.eco_steps, args.eco_eps * start, args.eco_lr, args.eco_sigma_min)
    best = min(seen, key=lambda strength: (distance(strength), strength))
    return best, target, [{"strength": s, "metric": seen[s]} for s in sorted(seen)]


def zeroth_order(loss, start, steps, eps, lr, minimum):
    """Minimise a function of one number: g = (l(s + eps) - l(s - eps)) / (2 eps), s <- max(s - lr g, minimum).

    Returns every s visited, the start first (ECO section 3.3). Ends early where the loss is 0.
    """
    visited = [max(start, minimum)]
    for _ in range(steps):
        s = visited[-1]
        if loss(s) == 0:
            break
        gradient = (loss(s + eps) - loss(max(s - eps, 1e-8))) / (2 * eps)
        visited.append(max(s - lr * gradient, minimum))
    return visited


def evasion_rates(gate, frames, names):
    """{evasion: {split: share flagged}} on the forget rows that name somebody of `names`, the name rewritten so as to
    slip past the classifier; {} without names. `unchanged` is what to compare with."""
    result = {}
    for split in SPLITS:
        if split.endswith("forget"):
            named = [(text, found) for text in frames[split]["text"] if (found := _found(text, names))]
            for evasion, rewrite in EVASIONS.items() if named else ():
                flags, _ = gate.decide([_rewritten(text, found, rewrite) for text, found in named])
                result.setdefault(evasion, {})[split] = float(flags.mean())
    return result


EVASIONS = {
    "unchanged": lambda name: name,
    "lower case": str.lower,
    "typo": lambda name: re.sub(r"(\w)(\w)(\w)(\w*)$", r"\1\3\2\4", name),  # two letters of the last word swapped
    "initials": lambda name: " ".join(word[0] + "." for word in name.split()),
    "partial": lambda name: name.split()[-1][: max(3, len(name.split()[-1]) // 2)],
}


def save(loaded, settings, folder):
    """Write gate and settings into `folder`: safetensors and JSON, no pickle; the curve also as a picture."""
    loaded.gate.classifier.save(folder)
    (folder / FILE).write_text(json.dumps(settings, indent=2) + "\n")
    if settings["curve"]:
        _draw(settings, folder / "strength.png")


def load(link, loaded, args):
    """`loaded`, the model under the ECO checkpoint `link`, with its gate and corruption."""
    gate = gates.load_gate(link, loaded, args)
    try:
        settings = json.loads((Path(link.path) / FILE).read_text())
        names = [(person, re.compile(pattern)) for person, pattern in settings["names"]]
        marks = Marks()
        if settings["tokens"] == "entities":
            marks = Marks(_entities(names, settings["token_classifier"], args.trust_remote_code))
        return dataclasses.replace(loaded, gate=gate, marks=marks, corruption=Corruption(**settings["corruption"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{link.path}/{FILE} is missing or damaged; train the checkpoint again")


def _labelled(retain, forget):
    texts = [*retain["text"], *forget["text"]]
    return texts, np.r_[np.zeros(len(retain), dtype=int), np.ones(len(forget), dtype=int)]


def _score(args, loaded, frame, words):
    rows = metrics.score_rows(loaded, frame, words, args.max_length, args.eval_batch_size)
    return metrics.scores(pd.concat([frame[["label_text"]].reset_index(drop=True), rows], axis=1), words)[
        args.eco_metric
    ]


def _target(args, loaded, frames, words, forget):
    """v_r: a number, the metric of a retrained checkpoint on train_forget, or `auto`: of this model on test_retain."""
    plain = dataclasses.replace(loaded, gate=None)
    if args.eco_target == "auto":
        return _score(args, plain, sample_rows(frames["test_retain"], args.eco_samples), words)
    try:
        return float(args.eco_target)
    except ValueError:
        return _score(args, models.load(args.eco_target, args), forget, words)


def _names(args):
    path = args.eco_names or (SNIPPETS_FOLDER / "forget_names.txt" if args.dataset == "snippets" else None)
    return read_names(path) if path else []


def _entities(names, token_classifier, trust_remote_code):
    """function(texts) -> for each the spans of its names, by a token classifier or by the list."""
    if not token_classifier:
        return lambda texts: [_found(text, names) for text in texts]
    from transformers import pipeline

    source = str(models.resolve_chain(token_classifier, trust_remote_code)[0].path)
    try:
        tagger = pipeline("token-classification", model=source, aggregation_strategy="simple")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{token_classifier} is no token classifier ({error}); use --eco_names")
    return lambda texts: [[(item["start"], item["end"]) for item in found] for found in tagger(list(texts))]


def _found(text, names):
    return sorted(span for _, pattern in names for span in spans(text, pattern))


def _rewritten(text, found, rewrite):
    for start, end in reversed(found):
        text = text[:start] + rewrite(text[start:end]) + text[end:]
    return text


def _draw(settings, path):
    from utils.report import draw_strength

    draw_strength(settings["curve"], settings["metric"], settings["target"], settings["corruption"]["strength"], path)
