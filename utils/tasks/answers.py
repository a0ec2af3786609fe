"""What counts as an answer: the tokens of each known one, where an answer ends, and what it spells.

Label words compete as whole answers. Where the tokens of one begin those of another (1 and 10, science and science
fiction) its own tokens do not say that it has ended, so there every answer ends in the end-of-sequence token, in
training and in scoring. Everywhere else the last token of a word is its end, as in the published code.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from utils.data.splits import UNLEARNING_LABELS
from utils.errors import UserError, note_once
from utils.tasks.encode import completion_ids

Tokens = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class KnownAnswers:
    """The answers that data with certain label words knows. `ids`: {word: its tokens}, label words and those that
    unlearning teaches. `closed`: whether each ends in the end-of-sequence token."""

    tokenizer: Any
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


def known_answers(tokenizer: Any, words: Iterable[str]) -> KnownAnswers:
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
