"""Scores over the whole vocabulary, as in the paper (section 4.1), and the records every script writes."""

import contextlib
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
from utils.cli import UserError
from utils.data import SPLITS, UNLEARNING_LABELS, Example, collate, completion_ids, label_words, sample_rows, tokenize
from utils.forward import completion_logits
from utils.models import check_length, position_limit


@torch.inference_mode()
def score_rows(loaded, frame, words, max_length, batch_size, progress=None):
    """One row of results per row of `frame` (text, label_text): prediction, correct, label_prediction,
    label_probabilities, loss.

    prediction: what the arg max over the vocabulary spells at the positions of the label's tokens (if the words differ
    in length and the label is missed: the greedy answer, as `answer` gives it); label_prediction: the most probable of
    `words`; label_probabilities: {word: f(word | text)}, scaled to sum to 1; loss: - log f(label |
    text), nats. With a gate also flagged and gate_probability. The order is that of `frame`. Several processes each
    score a part, and every one returns all rows.
    """
    completions = [completion_ids(loaded.tokenizer, word) for word in words]
    flags, gated = _gated(loaded, frame["text"])
    examples = _tokenized(loaded, frame["text"], frame["label_text"], max_length, flags)
    sides = _sides(loaded)
    results = {}
    for batch_rows, n_rows in processes.deal(_by_length(examples, batch_size, flags)):
        if not batch_rows:
            continue
        side = sides[flags[batch_rows[0]]]
        chosen = [examples[i] for i in batch_rows]
        logits = _by_row(side, chosen)
        scores = _label_scores(side, chosen, completions, logits)
        for i, example, own, row_scores in zip(batch_rows, chosen, logits, scores):
            targets = torch.tensor(example.completion, device=own.device)
            guess = own.argmax(-1)
            right = torch.equal(guess, targets)
            spelled, word = loaded.tokenizer.decode(guess.tolist()).strip(), frame["label_text"].iloc[i]
            results[i] = {
                "prediction": word if right else f"{spelled} (in other tokens)" if spelled == word else spelled,
                "correct": right,
                "label_prediction": words[int(row_scores.argmax())],
                "label_probabilities": dict(zip(words, row_scores.double().softmax(-1).tolist())),
                "loss": torch.nn.functional.cross_entropy(own, targets, reduction="sum").item(),
                **gated[i],
            }
        if progress is not None:
            progress.update(n_rows)
    if len(set(map(len, completions))) > 1:  # as many positions as the label has may cut another answer short
        wrong = [i for i, result in results.items() if not result["correct"]]
        texts = list(frame["text"].iloc[wrong])
        for i, (spelled, _) in zip(wrong, answer(loaded, texts, words, max_length, batch_size) if wrong else ()):
            same = spelled == frame["label_text"].iloc[i]
            results[i]["prediction"] = f"{spelled} (in other tokens)" if same else spelled
    everybody = {i: result for part in processes.gather(results) for i, result in part.items()}
    return pd.DataFrame([everybody[i] for i in range(len(examples))])


def _tokenized(loaded, texts, words, max_length, flags):
    marks = None
    if loaded.marks:  # found only where they count: finding names may take a model
        found = iter(loaded.marks.spans([text for text, flag in zip(texts, flags) if flag]))
        marks = [next(found) if flag else None for flag in flags]
    return tokenize(loaded.tokenizer, texts, words, max_length, template=loaded.template, marks=marks)


def _gated(loaded, texts):
    """([flag, ...], [{"flagged", "gate_probability"} or {}, ...]) of the texts; without a gate all are flagged."""
    if loaded.gate is None:
        return [True] * len(texts), [{}] * len(texts)
    flags, probabilities = loaded.gate.decide(texts)
    return flags.tolist(), [
        {"flagged": bool(flag), "gate_probability": float(p)} for flag, p in zip(flags, probabilities)
    ]


@dataclasses.dataclass(frozen=True)
class _Side:
    """How flagged rows are run, or the others: the model with its prompt and corruption, or the model alone."""

    loaded: object
    prefix: object
    corruption: object


def _sides(loaded):
    """{flag: _Side}. A batch is all of one side, so that rows that are not flagged run as the plain model does."""
    return {True: _Side(loaded, loaded.prefix, loaded.corruption), False: _Side(loaded, None, None)}


def _by_length(examples, batch_size, flags):
    """Row numbers in batches of similar length and one flag: least padding; results are put back by row number."""
    batches = []
    for flag in (True, False):
        order = sorted((i for i in range(len(examples)) if flags[i] == flag), key=lambda i: len(examples[i]))
        batches += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches


def _by_row(side, examples):
    """Logits at each example's completion tokens: a list of (m, |V|) tensors."""
    model = side.loaded.model
    batch = collate(examples, side.loaded.pad_id, model.device)
    corrupted = side.corruption.applied(model, examples) if side.corruption else contextlib.nullcontext()
    with corrupted:
        return completion_logits(model, batch, side.prefix).split([len(e.completion) for e in examples])


def _label_scores(side, examples, completions, logits):
    """log f(word | text) for every word: a list of (n_words,) tensors. Words of one token need no further pass."""
    if all(len(ids) == 1 for ids in completions):
        first = torch.tensor([ids[0] for ids in completions], device=logits[0].device)
        return [row[0].log_softmax(-1)[first] for row in logits]
    columns = []
    for ids in completions:
        rows = _by_row(side, [dataclasses.replace(e, completion=ids) for e in examples])
        targets = torch.tensor(ids, device=rows[0].device)
        columns.append(torch.stack([-torch.nn.functional.cross_entropy(r, targets, reduction="sum") for r in rows]))
    return list(torch.stack(columns, dim=1))


@torch.inference_mode()
def answer(loaded, texts, words, max_length, batch_size):
    """The model's greedy answer to each text and its probability: a list of (str, float).

    An answer runs for as many tokens as the longest known word has and ends early where it spells a known one.
    """
    known = [*words, *UNLEARNING_LABELS]
    longest = max(len(completion_ids(loaded.tokenizer, word)) for word in known)
    flags, _ = _gated(loaded, texts)
    cut_for = max(words, key=lambda word: len(completion_ids(loaded.tokenizer, word)))
    examples = _tokenized(loaded, texts, [cut_for] * len(texts), max_length, flags)
    sides = _sides(loaded)
    p = 0 if loaded.prompt is None else len(loaded.prompt)
    check_length(loaded.model.config, max(len(e.prompt) for e in examples) + longest - 1, p)
    answers = [None] * len(texts)
    for batch_rows in _by_length(examples, batch_size, flags):
        chosen, log_p, spelled = [examples[i] for i in batch_rows], 0.0, [()] * len(batch_rows)
        done = {}
        for _ in range(longest):
            longer = [Example(e.prompt + s, (0,), marked=e.marked) for e, s in zip(chosen, spelled)]
            logits = torch.cat(_by_row(sides[flags[batch_rows[0]]], longer))
            best, tokens = logits.log_softmax(-1).max(-1)
            log_p = log_p + best
            spelled = [s + (int(t),) for s, t in zip(spelled, tokens)]
            for i, s, p in zip(batch_rows, spelled, log_p):
                text = loaded.tokenizer.decode(s).strip()
                if text in known:
                    done.setdefault(i, (text, p.exp().item()))
                answers[i] = done.get(i, (text, p.exp().item()))
    return answers


def scores(frame, words):
    """Scores of scored rows (label_text, prediction, ...): shares in [0, 1], loss in nats; sklearn's weighted F1."""
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


def check_lengths(model, tokenizer, frames, args, p=0, template=None):
    """Raise UserError if a row to evaluate, behind `p` virtual tokens, does not fit the model; ask before training."""
    limit, words = position_limit(model.config), label_words(frames)
    known = [len(completion_ids(tokenizer, word)) for word in words]
    if len(set(known)) > 1:  # then `answer` looks for the unlearning words too
        known += [len(completion_ids(tokenizer, word)) for word in UNLEARNING_LABELS]
    if limit and args.max_length + max(known) + p > limit:
        for frame in frames.values():
            rows = tokenize(tokenizer, frame["text"], frame["label_text"], args.max_length, template=template)
            check_length(model.config, max(len(row.prompt) for row in rows) + max(known) - 1, p, max(known) - 1)


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

    predictions: for each record a DataFrame with split and label_probabilities, same rows in the same order. Adds
    "distance_to_retrained": {"accuracy": mean over the four splits of |difference|, "js_train_forget",
    "js_test_forget": mean Jensen-Shannon divergence of the answer distributions over the label words, in bits, in
    [0, 1]}. Without a retrained record they come back as they are.
    """
    methods = [record["method"] for record in records]
    if methods.count("retrained") != 1:
        return records
    target, target_rows = records[methods.index("retrained")], predictions[methods.index("retrained")]
    result = []
    for record, rows in zip(records, predictions):
        gaps = [abs(record["splits"][s]["accuracy"] - target["splits"][s]["accuracy"]) for s in SPLITS]
        distance = {"accuracy": float(np.mean(gaps))}
        for split in ("train_forget", "test_forget"):
            distance[f"js_{split}"] = js_divergence(_probabilities(rows, split), _probabilities(target_rows, split))
        result.append({**record, "distance_to_retrained": distance})
    return result


def js_divergence(p, q):
    """Mean over rows of the Jensen-Shannon divergence, in bits, of distributions p and q, both (rows, words).

    By hand, since scipy's jensenshannon takes the root of a sum that rounding makes negative where p is almost q.
    """
    mixture = (p + q) / 2
    rows = (rel_entr(p, mixture) + rel_entr(q, mixture)).sum(axis=1) / (2 * np.log(2))
    return float(np.clip(rows, 0, 1).mean())


def _probabilities(rows, split):
    """(rows, words) of the predictions of one split."""
    return np.array([list(row.values()) for row in rows.loc[rows["split"] == split, "label_probabilities"]])


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
