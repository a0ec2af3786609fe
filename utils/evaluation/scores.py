"""Scores over the whole vocabulary, as in the paper (section 4.1)."""

import dataclasses
from collections.abc import Sequence

import pandas as pd
import torch
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from tqdm import tqdm

from utils import distributed
from utils.data.batch import Example
from utils.evaluation.answering import by_length, greedy, tokenized
from utils.interventions.served import Served
from utils.tasks.answers import KnownAnswers, Tokens, known_answers

SCORED = ["label_prediction", "label_probabilities", "label_mass", "loss", "prediction", "correct"]  # of every row


@torch.inference_mode()
def score_rows(
    served: Served,
    frame: pd.DataFrame,
    words: Sequence[str],
    max_length: int,
    batch_size: int,
    progress: tqdm | None = None,
    frozen: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """One row of results per row of `frame` (text, label_text): prediction, correct, label_prediction,
    label_probabilities, label_mass, loss.

    prediction: the greedy answer; where all words have one token, the arg max over the vocabulary, as published.
    correct: whether it is the label, in the label's own tokens. label_prediction: the most probable of `words`.
    label_probabilities: {word: f(word | text)}, scaled to sum to 1. label_mass: their sum before scaling. loss:
    - log f(label | text), nats. With a gate also flagged and gate_probability.

    max_length: most tokens of a row; its text is cut. batch_size: rows a pass. frozen: these results by the model
    without interventions, which are taken where none acts. The order is that of `frame`. Several processes each score a
    part, and every one returns all rows.
    """
    known = known_answers(served.tokenizer, words)
    texts = list(frame["text"])
    acting, said = served.decide(texts)
    labels = list(frame["label_text"])
    examples = tokenized(served, texts, labels, known, max_length, acting)
    results, answers = {}, {}
    batches = by_length(examples, batch_size, acting)
    if frozen is not None:
        kept = [i for i, number in enumerate(acting) if number is None]
        results = {i: {**row, **said[i]} for i, row in zip(kept, frozen.iloc[kept].to_dict("records"))}
        batches = [rows for rows in batches if acting[rows[0]] is not None]
        if progress is not None:
            progress.update(len(kept))
    for batch_rows, n_rows in distributed.deal(batches):
        if not batch_rows:
            continue
        number, chosen = acting[batch_rows[0]], [examples[i] for i in batch_rows]
        logits = served.logits(chosen, number)
        log_p, guesses = _label_scores(served, number, chosen, words, known, logits)
        for i, own, row_log_p, row_guesses in zip(batch_rows, logits, log_p, guesses):
            targets = torch.tensor(examples[i].completion, device=own.device)
            row_guesses.pop(labels[i], None)
            answers[i] = _followed(known, {labels[i]: own.argmax(-1).tolist(), **row_guesses})
            results[i] = {
                "label_prediction": _best(words, known, row_log_p),
                "label_probabilities": dict(zip(words, row_log_p.softmax(-1).tolist())),
                "label_mass": min(1.0, row_log_p.exp().sum().item()),
                "loss": torch.nn.functional.cross_entropy(own, targets, reduction="sum").item(),
                **said[i],
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
    everybody = {i: result for part in distributed.all_gather(results) for i, result in part.items()}
    return pd.DataFrame([everybody[i] for i in range(len(examples))])


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


def split_scores(frame: pd.DataFrame, words: Sequence[str]) -> dict[str, int | float]:
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
