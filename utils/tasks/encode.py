"""From a text and its answer to token ids; what is too long is cut inside the text."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from utils.data.batch import Example
from utils.errors import UserError
from utils.tasks.classification import TEMPLATE_HEAD, TEMPLATE_TAIL


def tokenize(
    tokenizer: Any,
    texts: Iterable[str],
    words: Sequence[str],
    max_length: int,
    forget: bool = False,
    template: Any = None,
    marks: Sequence | None = None,
    answers: Any = None,
    longest: int | None = None,
) -> list[Example]:
    """One Example a row. Text is cut so that prompt + completion fit `max_length`; template and completion never are.

    template: None for the published one, else an object whose `around(texts)` gives what stands before and behind each
    text. marks: None, or one item a text: the (start, end) character spans whose tokens become `marked`; where it is
    None, or none of them is left after cutting, all prompt tokens but the last do. answers: the data's
    utils.tasks.answers.KnownAnswers, which say whether a word's tokens are all of its answer; None where no word begins
    another. longest: tokens of the longest answer, for which there is room behind every text; None: that of `words`.
    Raises UserError when template and completion alone do not fit.
    """
    texts = list(texts)
    if not texts:
        return []
    frames = template.around(texts) if template else [(TEMPLATE_HEAD, TEMPLATE_TAIL)] * len(texts)
    completions = answers.ids if answers else {word: completion_ids(tokenizer, word) for word in set(words)}
    longest = longest or max(len(completions[word]) for word in words)
    room = max_length - longest
    cut = _prompts(tokenizer, room)
    rows = [(head, text, tail) for text, (head, tail) in zip(texts, frames)]
    new = list(dict.fromkeys(row for row in rows if row not in cut))
    if new:
        encoded = tokenizer(["".join(row) for row in new], return_offsets_mapping=True)
        for row, ids, offsets in zip(new, encoded["input_ids"], encoded["offset_mapping"]):
            cut[row] = _cut(row, ids, offsets, max_length, longest)
    examples = []
    for i, (row, word) in enumerate(zip(rows, words)):
        ids, offsets = cut[row]
        marked = _marked(offsets, len(row[0]), marks[i]) if marks else ()
        examples.append(Example(ids, completions[word], forget, marked))
    return examples


@lru_cache(maxsize=4)
def _prompts(tokenizer: Any, room: int) -> dict[tuple[str, str, str], tuple]:
    """{(head, text, tail): token ids and offsets} of what was tokenised with at most `room` tokens: evaluation asks for
    the same rows again."""
    return {}


def _cut(
    row: tuple[str, str, str], ids: list[int], offsets: list[tuple[int, int]], max_length: int, longest: int
) -> tuple[tuple, tuple]:
    """Token ids and character offsets of head + text + tail, cut inside the text so that `longest` more tokens fit."""
    while offsets[-1][1] == 0:  # an end-of-text token that the tokenizer appends must not precede the answer
        ids, offsets = ids[:-1], offsets[:-1]
    excess = len(ids) + longest - max_length
    if excess > 0:
        begin = len(row[0])
        end = begin + len(row[1])
        inside = [at for at, (start, stop) in enumerate(offsets) if begin <= start < stop <= end]
        if excess >= len(inside):
            needed = len(ids) - len(inside) + longest + 1
            raise UserError(f"--max_length={max_length} cannot hold template and label; use at least {needed}")
        kept = slice(0, inside[-1] + 1 - excess), slice(inside[-1] + 1, None)
        ids, offsets = (list(items[kept[0]]) + list(items[kept[1]]) for items in (ids, offsets))
    return tuple(ids), tuple(offsets)


def _marked(offsets: Sequence[tuple[int, int]], begin: int, spans: Sequence | None) -> tuple[int, ...]:
    """Positions of the tokens that overlap `spans` of the text, which starts at character `begin`; all but the last
    where there are no spans, or all of them were cut away."""
    shifted = [(begin + start, begin + end) for start, end in spans or ()]
    named = tuple(at for at, (start, stop) in enumerate(offsets) if any(start < b and stop > a for a, b in shifted))
    return named or tuple(range(len(offsets) - 1))


def completion_ids(tokenizer: Any, word: str) -> tuple[int, ...]:
    """Token ids of ` word` as it continues the template's last word (sentencepiece and byte-level BPE differ alone)."""
    anchor = TEMPLATE_TAIL.split()[-1]
    before = tokenizer(anchor, add_special_tokens=False)["input_ids"]
    after = tokenizer(f"{anchor} {word}", add_special_tokens=False)["input_ids"]
    if after[: len(before)] != before or len(after) == len(before):
        after, before = tokenizer(f" {word}", add_special_tokens=False)["input_ids"], []
    return tuple(after[len(before) :])
