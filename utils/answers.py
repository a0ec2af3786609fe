"""What counts as an answer: the tokens of each known one, where an answer ends, what it spells; and the model's own.

Label words compete as whole answers. Where the tokens of one begin those of another (1 and 10, science and science
fiction) its own tokens do not say that it has ended, so there every answer ends in the end-of-sequence token, in
training and in scoring. Everywhere else the last token of a word is its end, as in the published code.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from functools import cached_property

import torch

from utils.cli import UserError, note_once
from utils.data import Example, collate, completion_ids, tokenize
from utils.forward import completion_logits
from utils.models import Loaded
from utils.splits import UNLEARNING_LABELS

Tokens = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class KnownAnswers:
    """The answers that data with certain label words knows. `ids`: {word: its tokens}, label words and those that
    unlearning teaches. `closed`: whether each ends in the end-of-sequence token."""

    tokenizer: object
    ids: Mapping[str, Tokens]
    closed: bool

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest; an answer that has as many without an end is none of them."""
        return max(map(len, self.ids.values()))

    @cached_property
    def _words(self) -> dict[Tokens, str]:
        return {tokens: word for word, tokens in self.ids.items()}

    @cached_property
    def _begun(self) -> set[Tokens]:
        """Every beginning of a known answer."""
        return {tokens[:n] for tokens in self.ids.values() for n in range(len(tokens) + 1)}

    def ended(self, tokens: Tokens) -> bool:
        """Whether nothing is to follow: a known answer, the model's end of text, or as many tokens as any has.

        Also a known word in other tokens than its own, where no end-of-sequence token is waited for.
        """
        if tokens in self._words or len(tokens) >= self.longest or tokens[-1:] == (self.tokenizer.eos_token_id,):
            return True
        return not self.closed and tokens not in self._begun and self.spelled(tokens) in self.ids

    def begins(self, word: str, tokens: Tokens) -> bool:
        """Whether `tokens` are the first ones of `word` and more of it follow."""
        return len(tokens) < len(self.ids[word]) and self.ids[word][: len(tokens)] == tokens

    def spelled(self, tokens: Tokens) -> str:
        """The text of an answer: the word whose tokens these are, else what they decode to without their end."""
        if tokens in self._words:
            return self._words[tokens]
        if len(tokens) > 1 and tokens[-1] == self.tokenizer.eos_token_id:
            tokens = tokens[:-1]
        return self.tokenizer.decode(list(tokens)).strip()


def known_answers(tokenizer, words: Iterable[str]) -> KnownAnswers:
    """The KnownAnswers of data with the label `words`; a note says once where they need an end-of-sequence token.

    Raises UserError on a word that has no tokens or those of another, and where the tokenizer lacks that token.
    """
    ids = {word: completion_ids(tokenizer, word) for word in [*words, *UNLEARNING_LABELS]}
    for word, tokens in ids.items():
        same = [other for other in ids if ids[other] == tokens and {word, other} - set(UNLEARNING_LABELS)]
        if not tokens or len(same) > 1:
            fault = f"{same[0]!r} and {same[1]!r} alike" if tokens else f"nothing for {word!r}"
            raise UserError(f"the tokenizer writes {fault}; give the data another label word")
    pairs = [(a, b) for a in ids for b in ids if len(ids[a]) < len(ids[b]) and ids[b][: len(ids[a])] == ids[a]]
    if not pairs:
        return KnownAnswers(tokenizer, ids, closed=False)
    (short, long), end = pairs[0], tokenizer.eos_token_id
    if end is None:
        raise UserError(
            f"the tokens of {short!r} begin those of {long!r} and the tokenizer has no end-of-sequence token to tell "
            "them apart; give the data other label words"
        )
    note_once(
        f"the tokens of {short!r} begin those of {long!r}, so every answer is trained and scored with the "
        "end-of-sequence token at its end"
    )
    return KnownAnswers(tokenizer, {word: (*tokens, end) for word, tokens in ids.items()}, closed=True)


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
