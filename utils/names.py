"""Lists of people and the whole-word search for them in a text: who is named, and thereby what is to be forgotten."""

import re
from pathlib import Path

from utils.cli import UserError


def read_names(path):
    """Read a list of people and return `[(person, pattern), ...]` in file order.

    One person a line: `Full Name: spelling, spelling, !phrase`. Every spelling counts wherever it stands as whole
    words, in exactly this case; a possessive still counts. A spelling inside a `!phrase` does not count. A line without
    a colon is its own spelling. Empty lines and lines that start with `#` are skipped.

    Raises `UserError` where the file cannot be read, names nobody, or has a line without a spelling.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the names file {path} ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"the names file {path} is not UTF-8 text; save it as UTF-8, one person a line") from None
    numbered = ((number, line.strip()) for number, line in enumerate(lines, start=1))
    names = [_parse(line, f"{path}, line {number}") for number, line in numbered if line and not line.startswith("#")]
    if not names:
        raise UserError(f"the names file {path} names nobody; write one person a line")
    return names


def mentions(text, names):
    """The people of `names` (from `read_names`) that `text` names, in the order of the list."""
    return [person for person, pattern in names if spans(text, pattern)]


def spans(text, pattern):
    """The `(start, end)` character ranges of `text` where a pattern of `read_names` finds a spelling."""
    return [match.span("name") for match in pattern.finditer(text) if match.group("name") is not None]


def _parse(line, where):
    person, colon, listed = line.partition(":")
    entries = [entry.strip() for entry in listed.split(",")] if colon else [person]
    spellings = [entry for entry in entries if entry and not entry.startswith("!")]
    excluded = [entry[1:].strip() for entry in entries if entry.startswith("!")]
    if not spellings or not all(excluded):
        raise UserError(f"{where}: {line!r} has no spelling; write `Full Name: spelling, spelling`")
    # The alternatives are tried left to right, so an excluded phrase swallows the spelling inside it.
    either = "|".join([*map(_starting_a_word, excluded), f"(?P<name>{'|'.join(map(_starting_a_word, spellings))})"])
    return person.strip(), re.compile(rf"(?:{either})(?!\w)")


def _starting_a_word(spelling):
    # Looking behind after the match instead of before it lets the search jump from one literal to the next: 5x faster.
    literal = re.escape(spelling)
    return rf"{literal}(?<!\w{literal})"
