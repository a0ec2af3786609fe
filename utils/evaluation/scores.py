"""Scores of rows: of label words over the whole vocabulary, as in the paper (section 4.1), and of free answers."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch

from utils import distributed
from utils.data.batch import Example
from utils.evaluation.answering import Acting, by_length, generated, greedy, tokenized
from utils.evaluation.frozen import RowScores
from utils.interventions.served import Served
from utils.tasks import metrics
from utils.tasks.answers import Answers, KnownAnswers, free_answers, known_answers
from utils.tasks.base import Asked, Task
from utils.tasks.encode import Tokens


class Progress(Protocol):
    """What is told how many rows are done, a progress bar say."""

    def update(self, n: int) -> object: ...


@torch.inference_mode()
def score_rows(
    served: Served,
    frame: pd.DataFrame,
    task: Task,
    max_length: int,
    batch_size: int,
    progress: Progress | None = None,
    frozen: list[RowScores | None] | None = None,
    score: str | None = None,
    logits: dict[int, np.ndarray] | None = None,
    prepared: "Prepared | None" = None,
) -> pd.DataFrame:
    """One row of results per row of `frame`, as its task reads it, in the same order.

    Where the task has label words: prediction, the greedy answer; where all words have one token, the arg max over the
    vocabulary, as published. correct: whether it is the label, in the label's own tokens. label_prediction: the most
    probable word. label_probabilities: {word: f(word | text)}, scaled to sum to 1. label_mass: their sum before
    scaling. loss: - log f(label | text), nats. Else what the task's `row_scores` gives, from the log-probabilities of
    the completions that it asks about and from a generated answer. With a gate also flagged and gate_probability.

    max_length: most tokens of a row; its text is cut. batch_size: rows a pass. frozen: for each row what the model
    without interventions gives (utils.evaluation.frozen): taken where none acts, and put in where it is missing. score:
    the one score of the split that is wanted, so that nothing else is computed for free answers and whole choices;
    None: all. logits: a dict that is filled with those at the first token of the label words, {row: (|V|,) float32}.
    prepared: what `prepare` gave for these rows, if that is known. Several processes each score a part, and every one
    returns all rows.
    """
    prepared = prepared or prepare(served, frame, task, max_length, frozen)
    acting, numbers, own = prepared.acting, prepared.numbers, prepared.rows
    asked = _questions(prepared, task.asks(own, score))
    if task.words:
        found, said_of = _label_results(prepared, batch_size, asked, progress, logits)
    else:
        found, said_of = [{} for _ in numbers], _asked(served, asked, batch_size, numbers, progress)
    answers: list[str | None] = [None] * len(numbers)
    if task.generates and (score is None or score in task.generated):
        answers, judged = _generated(prepared, batch_size)
        found = [part | row for part, row in zip(found, judged)]
    results = [dict(row) for row in prepared.said]
    for i, row, part, scored, answer in zip(prepared.todo, own.to_dict("records"), found, said_of, answers):
        scores = part | task.row_scores(row, scored, answer)
        results[i] |= scores
        if frozen is not None and acting[i] is None:
            frozen[i] = scores
    for i in set(range(len(frame))) - set(prepared.todo):
        results[i] |= frozen[i]
    return pd.DataFrame(results)


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """The rows of a table that are to be computed, `rows`, which are the numbers `todo` of it, as `served` reads them.

    acting, said: of every row of the table, see `decide`. known: the answers of its task. max_length: most tokens.
    """

    served: Served
    rows: pd.DataFrame
    todo: list[int]
    acting: Acting
    said: list[dict[str, Any]]
    known: Answers
    max_length: int

    @property
    def numbers(self) -> Acting:
        """The intervention that acts on each of `rows`."""
        return [self.acting[i] for i in self.todo]

    @cached_property
    def examples(self) -> list[Example]:
        """Each of `rows` with its label behind it."""
        words = list(self.rows["label_text"])
        return tokenized(self.served, self.rows, words, self.known, self.max_length, self.numbers)


def prepare(
    served: Served,
    frame: pd.DataFrame,
    task: Task,
    max_length: int,
    frozen: Sequence[RowScores | None] | None = None,
) -> Prepared:
    """What of `frame` is to be computed: rows on which something acts, or that `frozen` lacks."""
    acting, said = decide(served, frame)
    todo = [i for i, number in enumerate(acting) if number is not None or frozen is None or frozen[i] is None]
    return Prepared(served, frame.iloc[todo], todo, acting, said, known_answers(served.tokenizer, task), max_length)


def decide(served: Served, frame: pd.DataFrame) -> tuple[Acting, list[dict[str, Any]]]:
    """For each row the number of the intervention that acts on it, None also for one that changes nothing; and what the
    gates said, as `Served.decide` has it."""
    acting, said = served.decide(list(frame["text"]))
    return [None if number is None or served.acting(number).changes_nothing else number for number in acting], said


@dataclasses.dataclass(frozen=True)
class _Question:
    """A prompt, and the completions that are asked about behind it; `example` has the longest of them."""

    example: Example
    completions: Mapping[str, Tokens]


def _questions(prepared: Prepared, asked: Sequence[Mapping[str, str]]) -> dict[int, _Question]:
    """{row: its question}, of the rows whose completions are `asked` about. All of a row stand behind the same text,
    which is cut for the longest of them."""
    rows = [i for i, completions in enumerate(asked) if completions]
    if not rows:
        return {}
    known, numbers = prepared.known, [prepared.numbers[i] for i in rows]
    free = known if known.task.generates else free_answers(known.tokenizer, known.task)
    longest = [max(asked[i].values(), key=lambda text: len(free.ids[text])) for i in rows]
    rooms, chosen = [len(free.ids[text]) for text in longest], prepared.rows.iloc[rows]
    examples = tokenized(prepared.served, chosen, longest, free, prepared.max_length, numbers, rooms)
    return {
        i: _Question(example, {name: free.ids[text] for name, text in asked[i].items()})
        for i, example in zip(rows, examples)
    }


def _asked(
    served: Served,
    questions: Mapping[int, _Question],
    batch_size: int,
    acting: Acting,
    progress: Progress | None = None,
) -> list[dict[str, Asked]]:
    """For each row what the model says about the completions of its question: {name: Asked}; empty without one."""
    rows, found = list(questions), {}
    batches = by_length([questions[i].example for i in rows], batch_size, [acting[i] for i in rows])
    for places, n_rows in distributed.deal(batches):
        if own := [questions[rows[at]] for at in places]:
            several = [list(question.completions.items()) for question in own]
            tokens = [[ids for _, ids in pairs] for pairs in several]
            found |= {rows[at]: {} for at in places}
            for i, j, logits in served.completions([q.example for q in own], tokens, acting[rows[places[0]]]):
                name, ids = several[i][j]
                found[rows[places[i]]][name] = _said(logits, ids)
        if progress is not None:
            progress.update(n_rows)
    everybody = {i: said for part in distributed.all_gather(found) for i, said in part.items()}
    return [
        {name: everybody[i][name] for name in questions[i].completions} if i in questions else {}
        for i in range(len(acting))
    ]


def _said(logits: torch.Tensor, tokens: Tokens) -> Asked:
    """What `logits` (m, |V|) say about the m `tokens`."""
    targets = torch.tensor(tokens, device=logits.device)
    log_p = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return Asked(tuple(log_p.tolist()), tuple((logits.argmax(-1) == targets).tolist()))


def _generated(prepared: Prepared, batch_size: int) -> tuple[list[str], list[dict[str, float]]]:
    """The greedy answer to each row, as text; and, where the task wants it, how the frozen model judges it,
    {"generated_perplexity"}: that of a checkpoint that stands in front of it, or that is it."""
    served, known = prepared.served, prepared.known
    found = generated(served, prepared.examples, prepared.numbers, known, batch_size)
    texts = [known.spelled(tokens) for tokens, _ in found]
    if not known.task.judged or not may_be_fine_tuned(served):
        return texts, [{} for _ in texts]
    plain = dataclasses.replace(prepared, served=served.plain, acting=[None] * len(prepared.acting)).examples
    answered = {
        i: _Question(dataclasses.replace(row, completion=tokens), {"": tokens})
        for i, (row, (tokens, _)) in enumerate(zip(plain, found))
    }
    said = [one[""] for one in _asked(served.plain, answered, batch_size, [None] * len(answered))]
    return texts, [{"generated_perplexity": metrics.perplexity(one.total, len(one.log_p))} for one in said]


def may_be_fine_tuned(served: Served) -> bool:
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
    prepared: Prepared,
    batch_size: int,
    questions: Mapping[int, _Question],
    progress: Progress | None,
    kept: dict[int, np.ndarray] | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Asked]]]:
    """For each row what `score_rows` says of label words, and what `_asked` says of its question. kept: its `logits`.

    Label words and the completions of a question stand behind the same prompt, unless that was cut for them.
    """
    served, known, acting, examples = prepared.served, prepared.known, prepared.numbers, prepared.examples
    words, labels = known.task.words, list(prepared.rows["label_text"])
    beside = {i: q for i, q in questions.items() if _same_prompt(q.example, examples[i])}
    scored = [] if all(len(known.ids[word]) == 1 for word in words) else [known.ids[word] for word in words]
    results, answers, said_of = {}, {}, {}
    for batch_rows, n_rows in distributed.deal(by_length(examples, batch_size, acting)):
        if not batch_rows:
            continue
        names = [list(beside[i].completions.items()) if i in beside else [] for i in batch_rows]
        tokens = [[examples[i].completion, *scored, *(ids for _, ids in own)] for i, own in zip(batch_rows, names)]
        by_row, of_words = {}, {}
        for at, j, logits in served.completions([examples[i] for i in batch_rows], tokens, acting[batch_rows[0]]):
            if j == 0:
                by_row[at] = logits.clone() if len(tokens[at]) > 1 else logits
            elif j <= len(scored):
                of_words[at, j - 1] = _word_score(logits, tokens[at][j])
            else:
                name, ids = names[at][j - 1 - len(scored)]
                said_of.setdefault(batch_rows[at], {})[name] = _said(logits, ids)
        own_logits = [by_row[at] for at in range(len(batch_rows))]
        log_p, guesses = _label_scores(words, known, own_logits, of_words)
        for i, own, row_log_p, row_guesses in zip(batch_rows, own_logits, log_p, guesses):
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
    alone = {i: question for i, question in questions.items() if i not in beside}
    said_alone = _asked(served, alone, batch_size, acting)
    found = {i: one for part in distributed.all_gather(results) for i, one in part.items()}
    said = {i: one for part in distributed.all_gather(said_of) for i, one in part.items()}
    rows = range(len(examples))
    in_order = {i: {name: said[i][name] for name in question.completions} for i, question in beside.items()}
    return [found[i] for i in rows], [in_order.get(i, said_alone[i]) for i in rows]


def _same_prompt(one: Example, other: Example) -> bool:
    return one.prompt == other.prompt and one.marked == other.marked


def _prediction(known: KnownAnswers, tokens: Tokens, label: str, completion: Tokens) -> dict[str, str | bool]:
    """What a row's answer spells, and whether it is the label: in other tokens it is not, and says so."""
    spelled, right = known.spelled(tokens), tokens == completion
    return {
        "prediction": f"{spelled} (in other tokens)" if spelled == label and not right else spelled,
        "correct": right,
    }


def _word_score(logits: torch.Tensor, tokens: Tokens) -> tuple[float, list[int]]:
    """log f(word | text), nats, of a word of several `tokens`, and the arg max at each of them."""
    targets = torch.tensor(tokens, device=logits.device)
    total = -torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return total.item(), logits.argmax(-1).tolist()


def _label_scores(
    words: Sequence[str],
    known: KnownAnswers,
    own: Sequence[torch.Tensor],
    of_words: Mapping[tuple[int, int], tuple[float, list[int]]],
) -> tuple[torch.Tensor, list[dict[str, list[int]]]]:
    """log f(word | text) for every word, (rows, n_words) float64 on the CPU; and for each row a dict.

    The dict is {word: the arg max at every one of its tokens}, empty where all words have one token. own: the logits at
    each row's label. of_words: {(row, word number): its `_word_score`}, of words of several tokens.
    """
    if not of_words:
        rows = torch.stack([row[0] for row in own])
        first = torch.tensor([known.ids[word][0] for word in words], device=rows.device)
        scores = rows[:, first].cpu().double() - rows.logsumexp(-1, keepdim=True).cpu().double()
        return scores, [{} for _ in own]
    table = [[of_words[at, k] for k in range(len(words))] for at in range(len(own))]
    scores = torch.tensor([[total for total, _ in row] for row in table], dtype=torch.float64)
    return scores, [{word: seen for word, (_, seen) in zip(words, row)} for row in table]


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
