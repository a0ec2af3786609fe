"""From a query and its answer to token ids; what is too long is cut inside the text."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import pandas as pd

from utils.data.batch import Example
from utils.errors import UserError
from utils.tasks.base import CHAT, Query, Task
from utils.tasks.chat import chat_template
from utils.tasks.classification import classification

Tokens = tuple[int, ...]
PUBLISHED = classification(())  # the template of the paper, whose answers are not known


def tokenize(
    tokenizer: Any,
    rows: pd.DataFrame | Iterable[str],
    words: Sequence[str],
    max_length: int,
    forget: bool = False,
    template: Any = None,
    marks: Sequence | None = None,
    answers: Any = None,
    rooms: Sequence[int] | None = None,
) -> list[Example]:
    """One Example a row. Text is cut so that prompt + completion fit `max_length`; what stands around it never is.

    rows: a frame as the task reads it, or the texts alone. words: their answers. template: None, or an object whose
    `around(task, queries)` changes what is asked. marks: None, or one item a text: the (start, end) character spans
    whose tokens become `marked`; where it is None, or none of them is left after cutting, all prompt tokens but the
    last do. answers: utils.tasks.answers.known_answers of the task; None: the published template, no word of which
    begins another. rooms: for how many tokens there is room behind each text; None: for the longest of `words`, or for
    each row's own where any text is an answer. Raises UserError when a row does not fit.
    """
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame({"text": list(rows)})
    if not len(frame):
        return []
    task = answers.task if answers else PUBLISHED
    queries = asked(tokenizer, task, frame, template)
    completions = answers.ids if answers else {word: completion_ids(tokenizer, word) for word in set(words)}
    if rooms is None:
        sizes = [len(completions[word]) for word in words]
        rooms = sizes if task.generates else [max(sizes)] * len(sizes)
    known, special = _prompts(tokenizer, task.prompt_format != CHAT, max_length), task.prompt_format != CHAT
    new = list(dict.fromkeys(key for key in zip(queries, rooms) if key not in known))
    if new:
        encoded = tokenizer([str(query) for query, _ in new], return_offsets_mapping=True, add_special_tokens=special)
        cut = [_cut(*row, max_length) for row in zip(new, encoded["input_ids"], encoded["offset_mapping"])]
        if (needed := max(least for _, least in cut)) > max_length:
            raise UserError(f"--max_length={max_length} cannot hold template and label; use at least {needed}")
        known.update(zip(new, (row for row, _ in cut)))
    examples = []
    for i, (query, room, word) in enumerate(zip(queries, rooms, words)):
        ids, offsets = known[query, room]
        marked = _marked(offsets, len(query.head), marks[i]) if marks else ()
        examples.append(Example(ids, completions[word], forget, marked))
    return examples


def asked(tokenizer: Any, task: Task, frame: pd.DataFrame, template: Any = None) -> list[Query]:
    """The queries of `frame` as the model reads them: in the words of `template`, in the model's chat template."""
    queries = task.queries(frame)
    if template:
        queries = template.around(task, queries)
    return list(map(chat_template(tokenizer).around, queries)) if task.prompt_format == CHAT else queries


@lru_cache(maxsize=4)
def _prompts(tokenizer: Any, special: bool, max_length: int) -> dict[tuple[Query, int], tuple]:
    """{(query, room behind it): token ids and offsets} of what was tokenised: evaluation asks for the same rows
    again."""
    return {}


def _cut(
    key: tuple[Query, int], ids: list[int], offsets: list[tuple[int, int]], max_length: int
) -> tuple[tuple | None, int]:
    """The token ids and character offsets of a query, cut inside its text so that its room of more tokens fits, None
    where nothing of the text would be left; and the least max_length with which something would.

    key: (query, the room behind it).
    """
    query, room = key
    while offsets[-1][1] == 0:  # an end-of-text token that the tokenizer appends must not precede the answer
        ids, offsets = ids[:-1], offsets[:-1]
    begin = len(query.head)
    end = begin + len(query.text)
    inside = [at for at, (start, stop) in enumerate(offsets) if begin <= start < stop <= end]
    excess, least = len(ids) + room - max_length, len(ids) - len(inside) + room + 1
    if excess <= 0:
        return (tuple(ids), tuple(offsets)), min(least, max_length)
    if excess >= len(inside):
        return None, least
    kept = slice(0, inside[-1] + 1 - excess), slice(inside[-1] + 1, None)
    return tuple(tuple(items[kept[0]]) + tuple(items[kept[1]]) for items in (ids, offsets)), least


def _marked(offsets: Sequence[tuple[int, int]], begin: int, spans: Sequence | None) -> tuple[int, ...]:
    """Positions of the tokens that overlap `spans` of the text, which starts at character `begin`; all but the last
    where there are no spans, or all of them were cut away."""
    shifted = [(begin + start, begin + end) for start, end in spans or ()]
    named = tuple(at for at, (start, stop) in enumerate(offsets) if any(start < b and stop > a for a, b in shifted))
    return named or tuple(range(len(offsets) - 1))


def completion_ids(tokenizer: Any, word: str, task: Task = PUBLISHED) -> Tokens:
    """Token ids of an answer as it continues a query (sentencepiece and byte-level BPE differ alone).

    That is ` word`, or `word` where it begins with white space itself; behind a chat template what that puts there.
    """
    if task.prompt_format == CHAT:
        chat = chat_template(tokenizer)
        anchor, text = chat.after, chat.lead + word
    else:
        anchor, text = (task.tail.split() or ["."])[-1], word if word[:1].isspace() else f" {word}"
    before = tokenizer(anchor, add_special_tokens=False)["input_ids"]
    after = tokenizer(anchor + text, add_special_tokens=False)["input_ids"]
    if after[: len(before)] != before or len(after) == len(before):
        after, before = tokenizer(text, add_special_tokens=False)["input_ids"], []
    return tuple(after[len(before) :])
