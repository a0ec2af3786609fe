"""The model's own answers: rows in the words that stand around them, batches of one intervention, greedy decoding."""

import dataclasses
import math
from collections.abc import Sequence

import pandas as pd
import torch

from utils import distributed
from utils.data.batch import Example
from utils.errors import UserError
from utils.interventions.served import Served
from utils.tasks.answers import Answers, FreeAnswers, KnownAnswers, known_answers
from utils.tasks.base import Task
from utils.tasks.encode import Tokens, tokenize

Acting = list[int | None]  # for each row the number of the intervention that acts on it, as Served.decide gives it


def tokenized(
    served: Served,
    frame: pd.DataFrame,
    words: Sequence[str],
    known: Answers,
    max_length: int,
    acting: Acting,
    rooms: Sequence[int] | None = None,
) -> list[Example]:
    """One Example a row of `frame`, in its order, with the answer `words[i]` and in the template of its intervention.

    max_length: most tokens of prompt and answer; the text is cut. rooms: for how many tokens there is room behind each
    text; None: for the longest of known answers, and for each free one. The tokens that the intervention changes are
    `marked`. Raises UserError where template and answer alone do not fit.
    """
    if rooms is None:
        sizes = [len(known.ids[word]) for word in words]  # of all rows, whatever acts on them
        rooms = sizes if known.task.generates else [max(sizes, default=0)] * len(sizes)
    examples: dict[int, Example] = {}
    for number in dict.fromkeys(acting):
        rows = [i for i, other in enumerate(acting) if other == number]
        chosen, intervention = frame.iloc[rows], served.acting(number)
        encoded = tokenize(
            served.tokenizer,
            chosen,
            [words[i] for i in rows],
            max_length,
            template=intervention.template,
            marks=intervention.spans(list(chosen["text"])),
            answers=known,
            rooms=[rooms[i] for i in rows],
        )
        examples |= zip(rows, encoded)
    return [examples[i] for i in range(len(frame))]


def by_length(examples: Sequence[Example], batch_size: int, acting: Acting) -> list[list[int]]:
    """The row numbers, each once, in batches of at most `batch_size` rows of similar length and one intervention.

    Similar length means least padding. Rows on which no intervention acts run as the plain model does. The caller puts
    results back by row number.
    """
    batches = []
    for number in sorted(set(acting), key=lambda number: (number is None, number)):
        order = sorted((i for i in range(len(examples)) if acting[i] == number), key=lambda i: len(examples[i]))
        batches += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches


@torch.inference_mode()
def answer_texts(
    served: Served, texts: Sequence[str], task: Task, max_length: int, batch_size: int
) -> list[tuple[str, float]]:
    """The model's greedy answer to each text, and its probability in [0, 1].

    task: decides where an answer has ended. Raises UserError as `greedy` does.
    """
    known = known_answers(served.tokenizer, task)
    acting, _ = served.decide(texts)
    cut_for = room_for(known)
    examples = tokenized(served, pd.DataFrame({"text": texts}), [cut_for] * len(texts), known, max_length, acting)
    if task.generates:
        found = generated(served, examples, acting, known, batch_size)
        return [(known.spelled(tokens), math.exp(log_p)) for tokens, log_p in found]
    found = greedy(served, examples, acting, known, batch_size, [()] * len(texts))
    return [(known.spelled(tokens), log_p.exp().item()) for tokens, log_p in found]


def room_for(known: Answers) -> str:
    """The answer behind which a text is cut that has none of its own: the longest known one, or none at all."""
    return "" if known.task.generates else max(known.task.words, key=lambda word: len(known.ids[word]))


@torch.inference_mode()
def generated(
    served: Served,
    examples: Sequence[Example],
    acting: Acting,
    known: FreeAnswers,
    batch_size: int,
) -> list[tuple[Tokens, float]]:
    """The greedy free answer to each example's prompt: (tokens, their log-probability in nats).

    Several processes each answer a part, and every one returns all.
    """
    found = {}
    for rows, _ in distributed.deal(by_length(examples, batch_size, acting)):
        if rows:
            answers = served.generate([examples[i] for i in rows], acting[rows[0]], known.end, known.longest)
            found |= zip(rows, answers)
    everybody = {i: answer for part in distributed.all_gather(found) for i, answer in part.items()}
    return [everybody[i] for i in range(len(examples))]


def greedy(
    served: Served,
    examples: Sequence[Example],
    acting: Acting,
    known: KnownAnswers,
    batch_size: int,
    begun: Sequence[Tokens],
) -> list[tuple[Tokens, torch.Tensor]]:
    """The greedy answer to each example's prompt: (tokens, log-probability of the new ones in nats, a scalar).

    begun: for each row the first tokens of its answer, which the new ones follow; () for none. A row leaves its batch
    when its answer has ended. Raises UserError where the model gives NaN or infinity.
    """
    answers, log_p = list(begun), [torch.zeros(())] * len(examples)
    for going in by_length(examples, batch_size, acting):
        number = acting[going[0]]
        if (fixed := served.acting(number).fixed_answer) is not None:
            for i in going:
                answers[i] = fixed
            continue
        while going := [i for i in going if not known.ended(answers[i])]:
            longer = [
                dataclasses.replace(examples[i], prompt=examples[i].prompt + answers[i], completion=(0,)) for i in going
            ]
            logits = torch.cat(served.logits(longer, number))
            tokens = logits.argmax(-1)
            gained = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].cpu()
            if not gained.isfinite().all():
                raise UserError("the model's answer is not finite; use --dtype=float32 or another checkpoint")
            for i, token, value in zip(going, tokens.tolist(), gained):
                answers[i], log_p[i] = (*answers[i], token), log_p[i] + value
    return list(zip(answers, log_p))
