"""Scores of rows: of label words over the whole vocabulary, as in the paper (section 4.1), and of free answers."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from utils import distributed
from utils.data.batch import Example
from utils.evaluation.answering import Acting, by_length, generated, greedy, tokenized
from utils.interventions.served import Served
from utils.tasks import metrics
from utils.tasks.answers import Answers, FreeAnswers, KnownAnswers, free_answers, known_answers
from utils.tasks.base import Asked, Task
from utils.tasks.encode import Tokens


@torch.inference_mode()
def score_rows(
    served: Served,
    frame: pd.DataFrame,
    task: Task,
    max_length: int,
    batch_size: int,
    progress: tqdm | None = None,
    frozen: pd.DataFrame | None = None,
    score: str | None = None,
    logits: dict[int, np.ndarray] | None = None,
) -> pd.DataFrame:
    """One row of results per row of `frame`, as its task reads it, in the same order.

    Where the task has label words: prediction, the greedy answer; where all words have one token, the arg max over the
    vocabulary, as published. correct: whether it is the label, in the label's own tokens. label_prediction: the most
    probable word. label_probabilities: {word: f(word | text)}, scaled to sum to 1. label_mass: their sum before
    scaling. loss: - log f(label | text), nats. Else what the task's `row_scores` gives, from the log-probabilities of
    the completions that it asks about and from a generated answer. With a gate also flagged and gate_probability.

    max_length: most tokens of a row; its text is cut. batch_size: rows a pass. frozen: these results by the model
    without interventions, which are taken where none acts. score: the one score of the split that is wanted, so that
    nothing else is computed for free answers and whole choices; None: all. logits: a dict that is filled with those at
    the first token of the label words, {row: (|V|,) float32}. Several processes each score a part, and every one
    returns all rows.
    """
    known = known_answers(served.tokenizer, task)
    acting, said = served.decide(list(frame["text"]))
    results: dict[int, dict[str, Any]] = {i: dict(row) for i, row in enumerate(said)}
    todo = list(range(len(frame)))
    if frozen is not None:
        todo = [i for i in todo if acting[i] is not None]
        kept = [i for i, number in enumerate(acting) if number is None]
        for i, row in zip(kept, frozen.iloc[kept].to_dict("records")):
            results[i] |= row
        if progress is not None:
            progress.update(len(kept))
    own, numbers = frame.iloc[todo], [acting[i] for i in todo]
    how = served, own, known, max_length, batch_size, numbers
    found = _label_results(*how, progress, logits) if task.words else [{} for _ in todo]
    said_of = _asked(*how, task.asks(own, score), None if task.words else progress)
    answers: list[str | None] = [None] * len(todo)
    if task.generates and (score is None or score in task.generated):
        answers, judged = _generated(*how)
        found = [part | row for part, row in zip(found, judged)]
    for i, row, part, scored, answer in zip(todo, own.to_dict("records"), found, said_of, answers):
        results[i] |= part | task.row_scores(row, scored, answer)
    return pd.DataFrame([results[i] for i in range(len(frame))])


def _asked(
    served: Served,
    frame: pd.DataFrame,
    known: Answers,
    max_length: int,
    batch_size: int,
    acting: Acting,
    asked: Sequence[Mapping[str, str]],
    progress: tqdm | None,
) -> list[dict[str, Asked]]:
    """For each row what the model says about the completions that are `asked` about: {name: Asked}. All of a row stand
    behind the same text, cut for the longest of them."""
    results: list[dict[str, Asked]] = [{} for _ in asked]
    if pairs := [(i, name) for i, completions in enumerate(asked) for name in completions]:
        free = known if known.task.generates else free_answers(known.tokenizer, known.task)
        words, numbers = [asked[i][name] for i, name in pairs], [acting[i] for i, _ in pairs]
        rooms = free.rooms(asked)
        examples = tokenized(served, frame.iloc[[i for i, _ in pairs]], words, free, max_length, numbers, rooms)
        said = _all_scores(served, examples, numbers, batch_size, progress, len(pairs) / len(frame))
        for (i, name), one in zip(pairs, said):
            results[i][name] = one
    return results


def _all_scores(
    served: Served,
    examples: Sequence[Example],
    acting: Acting,
    batch_size: int,
    progress: tqdm | None,
    per_row: float,
) -> list[Asked]:
    """What the model says about the completion of each example, `per_row` of which count as a row of `progress`."""
    found, done = {}, 0.0
    for rows, n_rows in distributed.deal(by_length(examples, batch_size, acting)):
        if rows:
            found |= zip(rows, served.token_scores([examples[i] for i in rows], acting[rows[0]]))
        if progress is not None:
            progress.update(int(done + n_rows / per_row) - int(done))
            done += n_rows / per_row
    everybody = {at: said for part in distributed.all_gather(found) for at, said in part.items()}
    return [everybody[i] for i in range(len(examples))]


def _generated(
    served: Served, frame: pd.DataFrame, known: FreeAnswers, max_length: int, batch_size: int, acting: Acting
) -> tuple[list[str], list[dict[str, float]]]:
    """The greedy answer to each row, as text; and, where the task wants it, how the frozen model judges it,
    {"generated_perplexity"}: that of a checkpoint that stands in front of it, or that is it."""
    words = list(frame["label_text"])  # behind which a text is cut
    examples = tokenized(served, frame, words, known, max_length, acting)
    found = generated(served, examples, acting, known, batch_size)
    texts = [known.spelled(tokens) for tokens, _ in found]
    if not known.task.judged or not _has_fine_tuned(served):
        return texts, [{} for _ in texts]
    plain = tokenized(served.plain, frame, words, known, max_length, [None] * len(frame))
    answered = [dataclasses.replace(row, completion=tokens) for row, (tokens, _) in zip(plain, found)]
    said = _all_scores(served.plain, answered, [None] * len(answered), batch_size, None, 1)
    return texts, [{"generated_perplexity": metrics.perplexity(one.total, len(one.log_p))} for one in said]


def _has_fine_tuned(served: Served) -> bool:
    """Whether the frozen model of `served` may be the fine-tuned one: no method has changed its weights, and it is no
    retain model."""
    manifests = [link.manifest for link in served.chain if link.manifest]
    changed = any(manifest["kind"] == "full" or "unlearn_method" in manifest["arguments"] for manifest in manifests)
    excluded = any(manifest["arguments"].get("exclude_forget") for manifest in manifests)
    return bool(served.interventions) or not (changed or excluded)


def joined(frame: pd.DataFrame, results: pd.DataFrame, split: str) -> pd.DataFrame:
    """The rows of `frame` with what was found of them, and the name of their `split`."""
    others = frame.drop(columns=results.columns, errors="ignore").reset_index(drop=True)
    return pd.concat([others, results], axis=1).assign(split=split)


def probed(logits: Mapping[int, np.ndarray], labels: Sequence[str], seed: int) -> dict[str, float]:
    """{"probe_accuracy", "probe_shuffled"} of rows with these `logits` and `labels`; empty where there are too few."""
    counts = Counter(labels)
    if len(counts) < 2 or min(counts.values()) < 2:
        return {}
    found = metrics.probe_accuracy(np.stack([logits[i] for i in range(len(labels))]), labels, seed)
    return {"probe_accuracy": found.accuracy, "probe_shuffled": found.shuffled}


def _label_results(
    served: Served,
    frame: pd.DataFrame,
    known: KnownAnswers,
    max_length: int,
    batch_size: int,
    acting: Acting,
    progress: tqdm | None,
    kept: dict[int, np.ndarray] | None,
) -> list[dict[str, Any]]:
    """For each row what `score_rows` says of label words. kept: its `logits`."""
    words, labels = known.task.words, list(frame["label_text"])
    examples = tokenized(served, frame, labels, known, max_length, acting)
    results, answers = {}, {}
    for batch_rows, n_rows in distributed.deal(by_length(examples, batch_size, acting)):
        if not batch_rows:
            continue
        number, chosen = acting[batch_rows[0]], [examples[i] for i in batch_rows]
        logits = served.logits(chosen, number)
        log_p, guesses = _label_scores(served, number, chosen, words, known, logits)
        for i, own, row_log_p, row_guesses in zip(batch_rows, logits, log_p, guesses):
            targets = torch.tensor(examples[i].completion, device=own.device)
            if kept is not None:
                kept[i] = own[0].float().cpu().numpy()
            row_guesses.pop(labels[i], None)
            answers[i] = _followed(known, {labels[i]: own.argmax(-1).tolist(), **row_guesses})
            results[i] = {
                "label_prediction": _best(words, known, row_log_p),
                "label_probabilities": dict(zip(words, row_log_p.softmax(-1).tolist())),
                "label_mass": min(1.0, row_log_p.exp().sum().item()),
                "loss": torch.nn.functional.cross_entropy(own, targets, reduction="sum").item(),
            }
        if progress is not None:
            progress.update(n_rows)
    if max(len(known.ids[word]) for word in words) > 1:  # else the published score looks at one token
        begun = [i for i in answers if not known.ended(answers[i])]
        rest = [examples[i] for i in begun], [acting[i] for i in begun]
        ended = greedy(served, *rest, known, batch_size, [answers[i] for i in begun])
        answers |= {i: tokens for i, (tokens, _) in zip(begun, ended)}
    for i, tokens in answers.items():
        results[i] |= _prediction(known, tokens, labels[i], examples[i].completion)
    if kept is not None:
        kept.update({i: row for part in distributed.all_gather(kept) for i, row in part.items()})
    everybody = {i: result for part in distributed.all_gather(results) for i, result in part.items()}
    return [everybody[i] for i in range(len(examples))]


def _prediction(known: KnownAnswers, tokens: Tokens, label: str, completion: Tokens) -> dict[str, str | bool]:
    """What a row's answer spells, and whether it is the label: in other tokens it is not, and says so."""
    spelled, right = known.spelled(tokens), tokens == completion
    return {
        "prediction": f"{spelled} (in other tokens)" if spelled == label and not right else spelled,
        "correct": right,
    }


def _label_scores(
    served: Served,
    number: int | None,
    examples: Sequence[Example],
    words: Sequence[str],
    known: KnownAnswers,
    logits: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, list[dict[str, list[int]]]]:
    """log f(word | text) for every word, (rows, n_words) float64 on the CPU; and for each row a dict.

    The dict is {word: the arg max at every one of its tokens}, empty where all words have one token. logits: at the
    rows' own labels. number: see Served.logits.
    """
    ids = [known.ids[word] for word in words]
    if all(len(tokens) == 1 for tokens in ids):
        rows = torch.stack([row[0] for row in logits])
        first = torch.tensor([tokens[0] for tokens in ids], device=rows.device)
        scores = rows[:, first].cpu().double() - rows.logsumexp(-1, keepdim=True).cpu().double()
        return scores, [{} for _ in examples]
    columns, guesses = [], [{} for _ in examples]
    for word, tokens in zip(words, ids):
        rows = served.logits([dataclasses.replace(example, completion=tokens) for example in examples], number)
        targets = torch.tensor(tokens, device=rows[0].device)
        columns.append(torch.stack([-torch.nn.functional.cross_entropy(r, targets, reduction="sum") for r in rows]))
        for row, row_guesses in zip(rows, guesses):
            row_guesses[word] = row.argmax(-1).tolist()
    return torch.stack(columns, dim=1).cpu().double(), guesses


def _best(words: Sequence[str], known: KnownAnswers, log_p: torch.Tensor) -> str:
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
