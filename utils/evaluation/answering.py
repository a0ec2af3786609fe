"""The model's own answers: batches behind a gate, greedy decoding."""

import contextlib
import dataclasses

import torch

from utils.data.batch import Example, collate
from utils.errors import UserError
from utils.interventions.served import Loaded
from utils.models.forward import completion_logits
from utils.tasks.answers import KnownAnswers, Tokens, known_answers
from utils.tasks.encode import tokenize


def tokenized(loaded: Loaded, texts, words, known: KnownAnswers, max_length: int, flags: list[bool]) -> list[Example]:
    """One Example a text with the answer `words[i]`, in the template of `loaded`, corrupted tokens marked."""
    marks = None
    if loaded.marks:  # found only where they count: finding names may take a model
        found = iter(loaded.marks.spans([text for text, flag in zip(texts, flags) if flag]))
        marks = [next(found) if flag else None for flag in flags]
    return tokenize(loaded.tokenizer, texts, words, max_length, template=loaded.template, marks=marks, answers=known)


def gated(loaded: Loaded, texts) -> tuple[list[bool], list[dict]]:
    """([flag, ...], [{"flagged", "gate_probability"} or {}, ...]) of the texts; without a gate all are flagged."""
    if loaded.gate is None:
        return [True] * len(texts), [{}] * len(texts)
    flags, probabilities = loaded.gate.decide(texts)
    return flags.tolist(), [
        {"flagged": bool(flag), "gate_probability": float(p)} for flag, p in zip(flags, probabilities)
    ]


@dataclasses.dataclass(frozen=True)
class Side:
    """How flagged rows are run, or the others: the model with its prompt and corruption, or the model alone."""

    loaded: Loaded
    prefix: object
    corruption: object

    def logits(self, examples: list[Example]) -> tuple[torch.Tensor, ...]:
        """Logits at each example's completion tokens: one (m, |V|) tensor a row."""
        model = self.loaded.model
        batch = collate(examples, self.loaded.pad_id, model.device)
        corrupted = self.corruption.applied(model, examples) if self.corruption else contextlib.nullcontext()
        with corrupted:
            return completion_logits(model, batch, self.prefix).split([len(e.completion) for e in examples])


def sides(loaded: Loaded) -> dict[bool, Side]:
    """{flag: Side}. A batch is all of one side, so that rows that are not flagged run as the plain model does."""
    return {True: Side(loaded, loaded.prefix, loaded.corruption), False: Side(loaded, None, None)}


def by_length(examples: list[Example], batch_size: int, flags: list[bool]) -> list[list[int]]:
    """Row numbers in batches of similar length and one flag: least padding; results are put back by row number."""
    batches = []
    for flag in (True, False):
        order = sorted((i for i in range(len(examples)) if flags[i] == flag), key=lambda i: len(examples[i]))
        batches += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches


@torch.inference_mode()
def answer_texts(loaded: Loaded, texts: list[str], words: list[str], max_length: int, batch_size: int):
    """The model's greedy answer to each text and its probability: a list of (str, float)."""
    known = known_answers(loaded.tokenizer, words)
    flags, _ = gated(loaded, texts)
    cut_for = max(words, key=lambda word: len(known.ids[word]))
    examples = tokenized(loaded, texts, [cut_for] * len(texts), known, max_length, flags)
    found = greedy(loaded, examples, flags, known, batch_size, [()] * len(texts))
    return [(known.spelled(tokens), log_p.exp().item()) for tokens, log_p in found]


def greedy(
    loaded: Loaded,
    examples: list[Example],
    flags: list[bool],
    known: KnownAnswers,
    batch_size: int,
    begun: list[Tokens],
) -> list[tuple[Tokens, torch.Tensor]]:
    """The greedy answer to each example's prompt, gone on from its tokens `begun`: (tokens, log f of the new ones).

    A row leaves its batch when its answer has ended. Raises UserError where the model gives NaN or infinity.
    """
    answers, log_p, run = list(begun), [torch.zeros(())] * len(examples), sides(loaded)
    for going in by_length(examples, batch_size, flags):
        side = run[flags[going[0]]]
        while going := [i for i in going if not known.ended(answers[i])]:
            longer = [
                dataclasses.replace(examples[i], prompt=examples[i].prompt + answers[i], completion=(0,)) for i in going
            ]
            logits = torch.cat(side.logits(longer))
            tokens = logits.argmax(-1)
            gained = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].cpu()
            if not gained.isfinite().all():
                raise UserError("the model's answer is not finite; use --dtype=float32 or another checkpoint")
            for i, token, value in zip(going, tokens.tolist(), gained):
                answers[i], log_p[i] = (*answers[i], token), log_p[i] + value
    return list(zip(answers, log_p))
