"""Evaluation of a model on the four splits and their slices (SPUL, section 4.1), and what is asked before it."""

import argparse

import numpy as np
import pandas as pd
from tqdm import tqdm

from utils.data.select import sample_rows
from utils.data.splits import SPLITS, UNLEARNING_LABELS
from utils.errors import UserError, note_once
from utils.evaluation.answering import tokenized
from utils.evaluation.scores import score_rows, split_scores
from utils.interventions.served import Loaded
from utils.models.lengths import check_length, check_tokens, position_limit, vocabulary_size
from utils.tasks.answers import known_answers
from utils.tasks.classification import label_words
from utils.tasks.encode import tokenize


def evaluate_splits(loaded, frames, words, args, description):
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
    splits = {split: split_scores(rows, words) for split, rows in scored.items()}
    for part, rows in _slices(scored).items():
        splits[part] = split_scores(rows, words)
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
