"""What counts as an answer: its tokens, where it ends, and what it spells.

Label words compete as whole answers. Where the tokens of one begin those of another (1 and 10, science and science
fiction) its own tokens do not say that it has ended, so there every answer ends in the end-of-sequence token, in
training and in scoring. Everywhere else the last token of a word is its end, as in the published code. A free answer
always ends in the end-of-sequence token, or in the one by which a chat template ends a turn.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from utils.errors import UserError, note_once
from utils.tasks.base import CHAT, Task
from utils.tasks.chat import chat_template
from utils.tasks.encode import Tokens, completion_ids


@dataclasses.dataclass(frozen=True, eq=False)
class KnownAnswers:
    """The answers that a task with certain words knows. `ids`: {word: its tokens}, label words and those that
    unlearning teaches. `closed`: whether each ends in the end-of-sequence token."""

    tokenizer: Any
    task: Task
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


class _Completions(dict):
    """{answer: its tokens} of free answers, each made when it is first asked for."""

    def __init__(self, tokenizer: Any, task: Task, end: int) -> None:
        super().__init__()
        self._tokenizer, self._task, self._end = tokenizer, task, end

    def __missing__(self, answer: str) -> Tokens:
        self[answer] = (*completion_ids(self._tokenizer, answer, self._task), self._end)
        return self[answer]


@dataclasses.dataclass(frozen=True, eq=False)
class FreeAnswers:
    """Any text is an answer, and `end` its last token. ids: {text: its tokens, the end included}, made on demand."""

    tokenizer: Any
    task: Task
    end: int
    ids: Mapping[str, Tokens]

    @property
    def longest(self) -> int:
        """Tokens of the longest that is generated."""
        return self.task.max_new_tokens

    def rooms(self, asked: Sequence[Mapping[str, str]]) -> list[int]:
        """For every completion of every row, {name: text}, the tokens of the longest of its row."""
        return [max(len(self.ids[text]) for text in completions.values()) for completions in asked for _ in completions]

    def spelled(self, tokens: Tokens) -> str:
        """The text of an answer, without its end."""
        return self.tokenizer.decode([token for token in tokens if token != self.end], skip_special_tokens=True).strip()


Answers = KnownAnswers | FreeAnswers


def known_answers(tokenizer: Any, task: Task) -> Answers:
    """The answers of `task`; a note says once where known ones need an end-of-sequence token.

    Raises UserError on a word that has no tokens or those of another, and where the tokenizer lacks that token.
    """
    return free_answers(tokenizer, task) if task.generates else _known(tokenizer, task)


def free_answers(tokenizer: Any, task: Task) -> FreeAnswers:
    """Texts of any length behind the queries of `task`. Raises UserError where no token of the tokenizer ends them."""
    end = chat_template(tokenizer).end if task.prompt_format == CHAT else tokenizer.eos_token_id
    if end is None:
        raise UserError("the tokenizer has no end-of-sequence token to end an answer with; use another model")
    return FreeAnswers(tokenizer, task, end, _Completions(tokenizer, task, end))


def _known(tokenizer: Any, task: Task) -> KnownAnswers:
    ids = {word: completion_ids(tokenizer, word, task) for word in [*task.words, *task.taught]}
    for word, tokens in ids.items():
        same = [other for other in ids if ids[other] == tokens and {word, other} - set(task.taught)]
        if not tokens or len(same) > 1:
            fault = f"{same[0]!r} and {same[1]!r} alike" if tokens else f"nothing for {word!r}"
            raise UserError(f"the tokenizer writes {fault}; give the data another label word")
    pairs = [(a, b) for a in ids for b in ids if len(ids[a]) < len(ids[b]) and ids[b][: len(ids[a])] == ids[a]]
    if not pairs:
        return KnownAnswers(tokenizer, task, ids, closed=False)
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
    return KnownAnswers(tokenizer, task, {word: (*tokens, end) for word, tokens in ids.items()}, closed=True)
