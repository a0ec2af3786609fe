"""Evaluation of a model on the four splits and their slices (SPUL, section 4.1), and what is asked before it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedConfig

from utils.data.batch import Example
from utils.data.select import learnt_by, sample_rows
from utils.data.splits import SPLITS
from utils.errors import UserError, note_once
from utils.evaluation.answering import room_for
from utils.evaluation.expected import Meter
from utils.evaluation.frozen import Frozen
from utils.evaluation.scores import joined, prepare, probed, score_rows
from utils.evaluation.statistics import clopper_pearson
from utils.interventions.base import Template
from utils.interventions.served import Served
from utils.models.lengths import check_length, check_tokens, position_limit, vocabulary_size
from utils.storage.checkpoints import Link
from utils.tasks.answers import Answers, free_answers, known_answers
from utils.tasks.base import Frames, Recorded, Scores, Task
from utils.tasks.encode import tokenize
from utils.tasks.rows import Splits


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """Which rows are looked at and how they are read: the flags of those names. max_eval_samples: of a split, at most;
    drawn by rows_seed."""

    dataset: str = "sst2"
    seed: int = 42
    max_length: int = 1024
    eval_batch_size: int = 32
    max_eval_samples: int | None = None
    rows_seed: int = 42


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(RowSettings):
    """What is evaluated and how: the flags of those names.

    dataset, seed, validation_share and final change no score; they are what a record says of its run. How attention is
    computed and whether layers are compiled has been done when the model was loaded; saved scores depend on it.
    """

    curve_samples: int = 200
    curve_splits: Sequence[str] = SPLITS
    validation_share: float | None = None
    final: bool = False
    probe: bool = False
    attn_implementation: str = "auto"
    compile: bool = False
    fresh_scores: bool = False


GATE_COLUMNS = ("flagged", "gate_probability", "request")  # what a gate says of a row, as far as there is one


@torch.inference_mode()
def evaluate_splits(
    served: Served,
    frames: Frames,
    task: Task,
    settings: EvaluationSettings,
    description: str,
    frozen: Frozen | None = None,
) -> tuple[dict[str, Recorded], pd.DataFrame]:
    """Score every split (at most settings.max_eval_samples rows each); returns (splits, rows).

    splits: {split or slice: the task's `split_scores`; "accuracy_ci": [low, high], the exact 95 % interval of an
    accuracy; of a split where there is a gate also the share "flagged" and the headline on these rows,
    "flagged_accuracy"}. Slices:
    `<retain split>:length_matched` are retain rows with the forget rows' lengths in words. `<split>:names_other` are
    rows that name somebody who is not to be forgotten, where the data has that column. A prompt that reacts to length,
    or to any name, has not learnt whom to forget. `<test split>:not_nested` are the rows that overlap no train row,
    where the data has a column `nested`. rows: the scored rows with a `split` column, in file order. description: of
    the progress bar. frozen: `rows` of the model without interventions, so that what these let through is not computed
    again. Raises UserError where a loss is not finite.
    """
    frames, scored, probes = chosen(frames, settings), {}, {}
    known = {s: frozen.of(s, len(frame)) if frozen and not settings.probe else None for s, frame in frames.items()}
    prepared = {s: prepare(served, frame, task, settings.max_length, known[s]) for s, frame in frames.items()}
    lengths = [list(map(len, one.examples)) for one in prepared.values()]
    n_rows, n_todo = sum(map(len, frames.values())), sum(map(len, lengths))
    others = f"; {n_rows - n_todo:,} are known" if n_todo < n_rows else ""
    print(f"{description}: {n_todo:,} rows to score, {sum(map(sum, lengths)):,} tokens{others}")
    with Meter(lengths, description, task.generates) as progress:
        for split, frame in frames.items():
            sizes = settings.max_length, settings.eval_batch_size
            logits = {} if settings.probe else None
            how = {"frozen": known[split], "logits": logits, "prepared": prepared[split]}
            results = score_rows(served, frame, task, *sizes, progress, **how)
            progress.ended()
            if logits:
                probes[split] = probed(logits, list(frame["label_text"]), settings.seed)
            scored[split] = joined(frame, results, split)
    if not all(np.isfinite(rows["loss"]).all() for rows in scored.values()):
        raise UserError("the model's loss is not finite on some rows; use --dtype=float32 or another checkpoint")
    splits = {part: _with_interval(task.split_scores(rows)) for part, rows in {**scored, **_slices(scored)}.items()}
    for split, scores in probes.items():
        splits[split] |= scores
    if served.is_gated:
        for split, rows in scored.items():
            flags = rows["flagged"].astype(bool)
            splits[split]["flagged"] = float(flags.mean())
            if flags.any():
                splits[split]["flagged_accuracy"] = task.split_scores(rows[flags])[task.headline]
    return splits, pd.concat(scored.values(), ignore_index=True)


def chosen(frames: Frames, settings: RowSettings) -> dict[str, pd.DataFrame]:
    """The rows that are evaluated, {split: rows}."""
    return {s: sample_rows(frame, settings.max_eval_samples, settings.rows_seed) for s, frame in frames.items()}


def _with_interval(scores: Scores) -> Recorded:
    """`scores` with "accuracy_ci" behind their accuracy, where they have one."""
    found: Recorded = {}
    for name, value in scores.items():
        found[name] = value
        if name == "accuracy":
            found["accuracy_ci"] = list(clopper_pearson(round(value * scores["n"]), int(scores["n"])))
    return found


def check_rows(
    config: PreTrainedConfig,
    tokenizer: Any,
    frames: Splits,
    max_length: int,
    p: int = 0,
    template: Template | None = None,
) -> None:
    """Raise UserError if a row to evaluate, behind `p` virtual tokens, does not fit a model with this configuration.

    Such a row is too long, or holds a token that the model does not know. Asked before training. template: what stands
    around the texts; None for the published one.
    """
    limit, task = position_limit(config), frames.task
    known = known_answers(tokenizer, task)
    longest = known.longest if task.generates else max(len(known.ids[word]) for word in task.words)
    if longest > 1:  # then the greedy answer may become an unlearning word too
        longest = known.longest
    everything = pd.concat(frames.values(), ignore_index=True)  # so that one sentence is about the longest row of all
    _check_asked(config, tokenizer, everything, known, max_length, p, template)
    may_be_long = limit and max_length + longest + p > limit
    if may_be_long or len(tokenizer) > vocabulary_size(config) or task.generates:
        rows = tokenize(tokenizer, everything, everything["label_text"], max_length, template=template, answers=known)
        _check_answers(config, rows, known, longest, p)
        check_tokens(config, tokenizer, rows)


def _check_asked(
    config: PreTrainedConfig,
    tokenizer: Any,
    frame: pd.DataFrame,
    known: Answers,
    max_length: int,
    p: int,
    template: Template | None,
) -> None:
    """`check_rows` of the completions that scores ask about, some of which no row is trained on."""
    asked = known.task.asks(frame)
    if pairs := [(i, text) for i, completions in enumerate(asked) for text in completions.values()]:
        numbers, words = map(list, zip(*pairs))
        free = free_answers(tokenizer, known.task)
        how = {"template": template, "answers": free, "rooms": free.rooms(asked)}
        rows = tokenize(tokenizer, frame.iloc[numbers], words, max_length, **how)
        check_length(config, max(map(len, rows)), p)
        check_tokens(config, tokenizer, rows)


def _check_answers(config: PreTrainedConfig, rows: Sequence[Example], known: Answers, longest: int, p: int) -> None:
    """Raise UserError where the greedy answers to `rows`, of up to `longest` tokens behind `p` virtual ones, need more
    positions than the model knows."""
    limit, n_read = position_limit(config), max(len(row.prompt) for row in rows)
    if not known.task.generates:
        check_length(config, n_read + longest - 1, p, longest - 1)
    elif limit and n_read + p + longest > limit:
        raise UserError(
            f"the longest query has {n_read + p} tokens and its answer up to {longest}, but the model has {limit} "
            f"positions; use --max_new_tokens={max(1, limit - n_read - p)} or a smaller --max_length"
        )


def check_served(served: Served, frames: Splits, max_length: int) -> None:
    """`check_rows` of a model that is ready to answer, with everything that may stand around or before a text."""
    for template, n_tokens in served.surroundings:
        check_rows(served.model.config, served.tokenizer, frames, max_length, n_tokens, template)


def check_texts(served: Served, texts: Sequence[str], task: Task, max_length: int) -> None:
    """Raise UserError if a text to answer does not fit the model: before the first answer is printed."""
    known = known_answers(served.tokenizer, task)
    cut_for, config = [room_for(known)] * len(texts), served.model.config
    for template, n_tokens in served.surroundings:
        rows = tokenize(served.tokenizer, texts, cut_for, max_length, template=template, answers=known)
        _check_answers(config, rows, known, known.longest, n_tokens)
        check_tokens(config, served.tokenizer, rows)


def note_other_rows(chains: Sequence[list[Link]], frames: Frames, forget_size: float) -> None:
    """Say which checkpoints were trained on other rows than those that the train columns of the table are about."""
    for chain in chains:
        manifest = chain[-1].manifest
        if manifest is None or (chain[-1].kind == "lora" and forget_size < 1):  # it knows more rows than these
            continue
        if not learnt_by(manifest, frames):
            note_once(
                f"{chain[-1].path} was trained on other rows than the train columns show; give this command the "
                "--dataset, --max_train_samples, --forget_share, --forget_only, --rows_seed, --validation_share and "
                "--forget_size of its training"
            )


def note_other_length(served: Served, frame: pd.DataFrame, task: Task, max_length: int) -> None:
    """Say which checkpoints were trained with another --max_length, where that cuts some texts of `frame` elsewhere."""
    for link in served.chain:
        trained = (link.manifest or {"arguments": {}})["arguments"].get("max_length", max_length)
        if trained == max_length:
            continue
        known = known_answers(served.tokenizer, task)
        words = [room_for(known)] * len(frame)
        rows = tokenize(served.tokenizer, frame, words, max(trained, max_length), answers=known)
        cut = sum(len(row.prompt) + len(row.completion) > min(trained, max_length) for row in rows)
        if cut:
            note_once(
                f"{link.path} was trained with --max_length={trained} and this is {max_length}: {cut:,} of "
                f"{len(rows):,} texts are cut elsewhere, which moves the scores; give this command "
                f"--max_length={trained}"
            )


def refuse_probe(settings: EvaluationSettings, task: Task) -> None:
    """Raise UserError where `task` has nothing that a probe could read off."""
    if settings.probe and not task.probed:
        raise UserError("--probe asks whether the right one of several choices can be read off; leave it out")


def accuracies(
    served: Served, frames: Frames, task: Task, settings: EvaluationSettings, frozen: Frozen | None = None
) -> dict[str, float]:
    """{split of settings.curve_splits: the score that ECO's search compares, too, in [0, 1]} on settings.curve_samples
    rows a split, for the curve over steps: the accuracy, or of free answers, which take long to generate, the mean
    probability of a token.

    frozen: these scores by the frozen model, by earlier calls; it is filled. Only what stands behind a gate makes use
    of it: of other models the weights may have changed since. Dropout is off meanwhile; every module is in its own mode
    again afterwards.
    """
    modes = {module: module.training for module in served.model.modules()}
    served.model.eval()
    result = {}
    for split in settings.curve_splits:
        frame = sample_rows(frames[split], settings.curve_samples)
        how = settings.max_length, settings.eval_batch_size
        known = frozen.of(split, len(frame)) if frozen and served.is_gated else None
        rows = score_rows(served, frame, task, *how, frozen=known, score=task.compared)
        result[split] = task.split_scores(joined(frame, rows, split))[task.compared]
    for module, training in modes.items():
        module.training = training
    return result


def _slices(scored: Frames) -> dict[str, pd.DataFrame]:
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


def match_lengths(candidates: pd.Series, targets: Iterable[str]) -> list[int]:
    """Positions in `candidates`, in order, whose numbers of words are closest to those of `targets`.

    Each position is used at most once, longest targets first. The closest may be 2 words away, or a quarter of the
    target's words where that is more. Beyond that a target stays without a match: a few rows of the right length say
    more than many of another.
    """
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
