"""Scores over the whole vocabulary, as in the paper (section 4.1), and the records every script writes."""

import argparse
import dataclasses
import resource
import sys

import numpy as np
import pandas as pd
import torch
from scipy.special import rel_entr
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from tqdm import tqdm

from utils import processes
from utils.answers import KnownAnswers, Side, Tokens, by_length, gated, greedy, known_answers, sides, tokenized
from utils.cli import UserError, note_once
from utils.data import SPLITS, UNLEARNING_LABELS, Example, label_words, sample_rows, tokenize
from utils.models import Loaded, check_length, check_tokens, position_limit, vocabulary_size


@torch.inference_mode()
def score_rows(loaded, frame, words, max_length, batch_size, progress=None):
    """One row of results per row of `frame` (text, label_text): prediction, correct, label_prediction,
    label_probabilities, label_mass, loss.

    prediction: the greedy answer (of words of one token each: the arg max over the vocabulary, as published); correct:
    it is the label, in the label's own tokens. label_prediction: the most probable of `words`; label_probabilities:
    {word: f(word | text)}, scaled to sum to 1; label_mass: their sum before scaling; loss: - log f(label | text), nats.
    With a gate also flagged and gate_probability. The order is that of `frame`. Several processes each score a part,
    and every one returns all rows.
    """
    known = known_answers(loaded.tokenizer, words)
    flags, gate = gated(loaded, frame["text"])
    labels = list(frame["label_text"])
    examples = tokenized(loaded, frame["text"], labels, known, max_length, flags)
    run = sides(loaded)
    results, answers = {}, {}
    for batch_rows, n_rows in processes.deal(by_length(examples, batch_size, flags)):
        if not batch_rows:
            continue
        side = run[flags[batch_rows[0]]]
        chosen = [examples[i] for i in batch_rows]
        logits = side.logits(chosen)
        log_p, guesses = _label_scores(side, chosen, words, known, logits)
        for i, own, row_log_p, row_guesses in zip(batch_rows, logits, log_p, guesses):
            targets = torch.tensor(examples[i].completion, device=own.device)
            row_guesses.pop(labels[i], None)
            answers[i] = _followed(known, {labels[i]: own.argmax(-1).tolist(), **row_guesses})
            results[i] = {
                "label_prediction": _best(words, known, row_log_p),
                "label_probabilities": dict(zip(words, row_log_p.softmax(-1).tolist())),
                "label_mass": min(1.0, row_log_p.exp().sum().item()),
                "loss": torch.nn.functional.cross_entropy(own, targets, reduction="sum").item(),
                **gate[i],
            }
        if progress is not None:
            progress.update(n_rows)
    if max(len(known.ids[word]) for word in words) > 1:  # else the published score looks at one token
        begun = [i for i in answers if not known.ended(answers[i])]
        rest = [examples[i] for i in begun], [flags[i] for i in begun]
        ended = greedy(loaded, *rest, known, batch_size, [answers[i] for i in begun])
        answers |= {i: tokens for i, (tokens, _) in zip(begun, ended)}
    for i, tokens in answers.items():
        results[i] |= _prediction(known, tokens, labels[i], examples[i].completion)
    everybody = {i: result for part in processes.gather(results) for i, result in part.items()}
    return pd.DataFrame([everybody[i] for i in range(len(examples))])


def _prediction(known: KnownAnswers, tokens: Tokens, label: str, completion: Tokens) -> dict[str, str | bool]:
    """What a row's answer spells, and whether it is the label: in other tokens it is not, and says so."""
    spelled, right = known.spelled(tokens), tokens == completion
    return {
        "prediction": f"{spelled} (in other tokens)" if spelled == label and not right else spelled,
        "correct": right,
    }


def _label_scores(
    side: Side, examples: list[Example], words: list[str], known: KnownAnswers, logits: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, list[dict[str, list[int]]]]:
    """log f(word | text) for every word, (rows, n_words) float64 on the CPU; and for each row {word: the arg max at
    every one of its tokens}, where words have more than one. logits: at the rows' own labels."""
    ids = [known.ids[word] for word in words]
    if all(len(tokens) == 1 for tokens in ids):
        rows = torch.stack([row[0] for row in logits])
        first = torch.tensor([tokens[0] for tokens in ids], device=rows.device)
        scores = rows[:, first].cpu().double() - rows.logsumexp(-1, keepdim=True).cpu().double()
        return scores, [{} for _ in examples]
    columns, guesses = [], [{} for _ in examples]
    for word, tokens in zip(words, ids):
        rows = side.logits([dataclasses.replace(example, completion=tokens) for example in examples])
        targets = torch.tensor(tokens, device=rows[0].device)
        columns.append(torch.stack([-torch.nn.functional.cross_entropy(r, targets, reduction="sum") for r in rows]))
        for row, row_guesses in zip(rows, guesses):
            row_guesses[word] = row.argmax(-1).tolist()
    return torch.stack(columns, dim=1).cpu().double(), guesses


def _best(words: list[str], known: KnownAnswers, log_p: torch.Tensor) -> str:
    """The most probable of `words`. Where several are, the one of the lowest token: which the arg max takes too."""
    return max(zip(words, log_p.tolist()), key=lambda pair: (pair[1], [-token for token in known.ids[pair[0]]]))[0]


def _followed(known: KnownAnswers, guesses: dict[str, list[int]]) -> Tokens:
    """The greedy answer as far as the passes over known words show it. guesses: {word: the arg max at each of its
    tokens}: behind tokens that the word begins with, the arg max is the answer's next one."""
    tokens = ()
    while not known.ended(tokens):
        fits = (seen[len(tokens)] for word, seen in guesses.items() if known.begins(word, tokens))
        following = next(fits, None)
        if following is None:
            break
        tokens += (following,)
    return tokens


def scores(frame, words):
    """Scores of scored rows (label_text, prediction, ...): shares in [0, 1], loss in nats.

    f1, precision and recall are scikit-learn's, weighted by class size (the paper's tables give accuracy and that F1).
    The published code takes precision and recall as micro averages; with one answer a row both equal the accuracy.
    """
    truth, prediction = frame["label_text"], frame["prediction"]
    precision, recall, f1, _ = precision_recall_fscore_support(truth, prediction, average="weighted", zero_division=0)
    values = {
        "accuracy": accuracy_score(truth, prediction),
        "f1": f1,
        "precision": precision,
        "recall": recall,
        "out_of_label": 1 - prediction.isin(words).mean(),
        "label_accuracy": accuracy_score(truth, frame["label_prediction"]),
        "loss": frame["loss"].mean(),
    }
    return {"n": len(frame), **{key: float(value) for key, value in values.items()}}


def evaluate(loaded, frames, words, args, description):
    """Score the four splits (at most args.max_eval_samples rows each); returns (splits, rows).

    splits: {split: scores}, plus `<retain split>:length_matched` (retain rows drawn to have the forget rows' lengths in
    words) and `<split>:names_other` where the data has that column: a prompt that reacts to length, or to any name,
    has not learnt whom to forget. With a column `nested`, `<test split>:not_nested` are the rows of which no part was
    trained on. rows: the scored rows with a `split` column, in file order.
    """
    frames = {split: sample_rows(frames[split], args.max_eval_samples, args.rows_seed) for split in SPLITS}
    scored = {}
    total = sum(map(len, frames.values()))
    with tqdm(total=total, desc=description, unit="row", dynamic_ncols=True, mininterval=1) as progress:
        for split, frame in frames.items():
            results = score_rows(loaded, frame, words, args.max_length, args.eval_batch_size, progress)
            others = frame.drop(columns=results.columns, errors="ignore")
            scored[split] = pd.concat([others, results], axis=1).assign(split=split)
    if not all(np.isfinite(rows["loss"]).all() for rows in scored.values()):
        raise UserError("the model's loss is not finite on some rows; use --dtype=float32 or another checkpoint")
    splits = {split: scores(rows, words) for split, rows in scored.items()}
    for part, rows in _slices(scored).items():
        splits[part] = scores(rows, words)
    if loaded.gate is not None:
        for split, rows in scored.items():
            splits[split]["flagged"] = float(rows["flagged"].mean())
    return splits, pd.concat(scored.values(), ignore_index=True)


def check_rows(config, tokenizer, frames, args, p=0, template=None):
    """Raise UserError if a row to evaluate, behind `p` virtual tokens, does not fit a model with this configuration: it
    is too long, or holds a token that the model does not know. Asked before training."""
    limit, words = position_limit(config), label_words(frames)
    known = known_answers(tokenizer, words)
    longest = max(len(known.ids[word]) for word in words)
    if longest > 1:  # then the greedy answer may become an unlearning word too
        longest = known.longest
    may_be_long = limit and args.max_length + longest + p > limit
    if may_be_long or len(tokenizer) > vocabulary_size(config):
        for frame in frames.values():
            labels = frame["label_text"]
            rows = tokenize(tokenizer, frame["text"], labels, args.max_length, template=template, answers=known)
            check_length(config, max(len(row.prompt) for row in rows) + longest - 1, p, longest - 1)
            check_tokens(config, tokenizer, rows)


def check_texts(loaded: Loaded, texts: list[str], words: list[str], args: argparse.Namespace) -> None:
    """Raise UserError if a text to answer does not fit the model: before the first answer is printed."""
    known = known_answers(loaded.tokenizer, words)
    cut_for = max(words, key=lambda word: len(known.ids[word]))
    rows = tokenized(loaded, texts, [cut_for] * len(texts), known, args.max_length, [False] * len(texts))
    p = 0 if loaded.prompt is None else len(loaded.prompt)
    check_length(loaded.model.config, max(len(row.prompt) for row in rows) + known.longest - 1, p)
    check_tokens(loaded.model.config, loaded.tokenizer, rows)


def note_other_length(loaded: Loaded, frames: dict[str, pd.DataFrame], args: argparse.Namespace) -> None:
    """Say which checkpoints were trained with another --max_length, where that cuts texts of `frames` elsewhere."""
    for link in loaded.chain:
        trained = (link.manifest or {"arguments": {}})["arguments"].get("max_length", args.max_length)
        if trained == args.max_length:
            continue
        texts = [text for frame in frames.values() for text in frame["text"]]
        rows = tokenize(loaded.tokenizer, texts, [UNLEARNING_LABELS[0]] * len(texts), args.max_length)
        if args.max_length < trained:
            rows = tokenize(loaded.tokenizer, texts, [UNLEARNING_LABELS[0]] * len(texts), trained)
        cut = sum(len(row.prompt) + len(row.completion) > min(trained, args.max_length) for row in rows)
        if cut:
            note_once(
                f"{link.path} was trained with --max_length={trained} and this is {args.max_length}: {cut:,} of "
                f"{len(rows):,} texts are cut elsewhere, which moves the scores; give this command "
                f"--max_length={trained}"
            )


def accuracies(loaded, frames, words, args):
    """{split: accuracy} on args.curve_samples rows a split, for the curve over steps; dropout off meanwhile."""
    was_training = loaded.model.training
    loaded.model.eval()
    result = {}
    for split in SPLITS:
        frame = sample_rows(frames[split], args.curve_samples)
        rows = score_rows(loaded, frame, words, args.max_length, args.eval_batch_size)
        result[split] = float((rows["prediction"] == frame["label_text"]).mean())
    loaded.model.train(was_training)
    return result


def _slices(scored):
    parts = {}
    for phase in ("train", "test"):
        retain, forget = scored[f"{phase}_retain"], scored[f"{phase}_forget"]
        matched = match_lengths(retain["text"], forget["text"])
        if matched:
            parts[f"{phase}_retain:length_matched"] = retain.iloc[matched]
        for rows in (retain, forget):
            split = rows["split"].iloc[0]
            if "names_other" in rows and rows["names_other"].astype(bool).any():
                parts[f"{split}:names_other"] = rows[rows["names_other"].astype(bool)]
            if phase == "test" and "nested" in rows and not rows["nested"].all():
                parts[f"{split}:not_nested"] = rows[~rows["nested"].astype(bool)]
    return parts


def with_distances(records, predictions):
    """`records` with how far each is from the one whose method is "retrained", which never saw the forget rows.

    predictions: for each record a DataFrame with split, label_probabilities and label_mass, same rows in the same
    order. Adds "distance_to_retrained": {"accuracy_forget", "accuracy_retain": mean over train and test of
    |difference|, "js_train_forget", "js_test_forget": mean Jensen-Shannon divergence of the answers, in bits, in
    [0, 1]}. The sides stand apart because their mean rewards a model that was left as it is. Without a retrained
    record they come back as they are.
    """
    methods = [record["method"] for record in records]
    if methods.count("retrained") != 1:
        return records
    if not all("label_mass" in rows for rows in predictions):
        raise UserError("the predictions of an older version have no label_mass; remove them and evaluate again")
    target, target_rows = records[methods.index("retrained")], predictions[methods.index("retrained")]
    return [
        {**record, "distance_to_retrained": _distance(record, rows, target, target_rows)}
        for record, rows in zip(records, predictions)
    ]


def _distance(record: dict, rows: pd.DataFrame, target: dict, target_rows: pd.DataFrame) -> dict[str, float]:
    distance = {}
    for side in ("forget", "retain"):
        pairs = [(record["splits"][s]["accuracy"], target["splits"][s]["accuracy"]) for s in SPLITS if side in s]
        distance[f"accuracy_{side}"] = float(np.mean([abs(own - other) for own, other in pairs]))
    for split in ("train_forget", "test_forget"):
        distance[f"js_{split}"] = js_divergence(_outcomes(rows, split), _outcomes(target_rows, split))
    return distance


def js_divergence(p, q):
    """Mean over rows of the Jensen-Shannon divergence, in bits, of distributions p and q, both (rows, outcomes).

    By hand, since scipy's jensenshannon takes the root of a sum that rounding makes negative where p is almost q.
    """
    mixture = (p + q) / 2
    rows = (rel_entr(p, mixture) + rel_entr(q, mixture)).sum(axis=1) / (2 * np.log(2))
    return float(np.clip(rows, 0, 1).mean())


def _outcomes(rows: pd.DataFrame, split: str) -> np.ndarray:
    """(rows, words + 1) of one split: the probability of every label word, and of anything else, refusals included."""
    rows = rows[rows["split"] == split]
    scaled = np.array([list(row.values()) for row in rows["label_probabilities"]])
    mass = rows["label_mass"].to_numpy()[:, None]
    return np.hstack([scaled * mass, 1 - mass])


def match_lengths(candidates, targets):
    """Positions in `candidates` whose numbers of words are closest to those of `targets`: each used at most once,
    longest targets first. A target stays without a match where the closest is more than 2 words and a quarter away: a
    few rows of the right length say more than many of another."""
    free = sorted(range(len(candidates)), key=lambda i: len(candidates.iloc[i].split()))
    lengths = [len(candidates.iloc[i].split()) for i in free]
    chosen = []
    for length in sorted((len(text.split()) for text in targets), reverse=True):
        if not free:
            break
        at = int(np.searchsorted(lengths, length))
        if at == len(lengths) or (at and length - lengths[at - 1] <= lengths[at] - length):
            at -= 1
        if abs(lengths[at] - length) <= max(2, length / 4):
            lengths.pop(at)
            chosen.append(free.pop(at))
    return sorted(chosen)


def record(method, checkpoint, model, args, splits, seconds, training=None):
    """One record of metrics.json, the schema that every script and table shares. seconds: the evaluation's. training:
    what the training cost (utils.training.Training.cost), where there was one. "validation_share" is there where the
    test splits are rows cut from train."""
    return {
        "method": method,
        "checkpoint": str(checkpoint),
        "model": str(model),
        "dataset": args.dataset,
        "seed": args.seed,
        "splits": splits,
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak_memory(),
        **({"training": training} if training else {}),
        **({"validation_share": args.validation_share} if args.validation_share and not args.final else {}),
    }


def peak_memory():
    """The most memory this process has held so far, in bytes: on the GPUs that it used, else resident."""
    if on_gpus := sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())):
        return on_gpus
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
