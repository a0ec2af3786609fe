"""Lists of people and the whole-word search for them in a text: who is named, and thereby what is to be forgotten.

A name counts however Unicode spells it: composed or combining accents, curly or straight apostrophes, any hyphen.
Between its words may stand any space or line break, after an initial none, and inside it invisible characters.
List and text are both brought into one normal form; where a name was found is still told in the text as it stands.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from utils.errors import UserError, note_once
from utils.storage.reading import regular_file

APOSTROPHES, HYPHENS, MIDDLE_DOTS = "\u2018\u2019\u201b\u02bb\u02bc\u2032\u00b4\uff07`", "\u2212\uff0d", "•‧∙⋅・･"
ALIKE = {
    **dict.fromkeys(APOSTROPHES, "'"),
    **dict.fromkeys([*HYPHENS, *map(chr, range(0x2010, 0x2016))], "-"),
    **dict.fromkeys(MIDDLE_DOTS, "·"),
    "\uff0e": ".",
}
# Thai to Myanmar, Khmer, Korean, Chinese and Japanese: words stand or take endings without a space between.
UNSPACED = "\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = rf"[^\W{UNSPACED}]"  # a character that a name must not touch
UNUSUAL = re.compile(r"[^ -~]|  |(?<![^\W_])[^\W\d_]\. ")  # a text without any of this is its own normal form


@dataclass(frozen=True)
class Person:
    """One person of a list. `spellings` count as whole words, in exactly this case; not inside a phrase of `excluded`.

    `dataclasses.asdict` gives the parts for JSON, `Person(**parts)` makes the person again. Raises ValueError where
    there is no spelling, or one that has nothing visible and would be found everywhere.
    """

    name: str
    spellings: Sequence[str]
    excluded: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.spellings or not all(self._normal_spellings) or not all(_normal_forms(self.excluded)):
            raise ValueError(f"{self.name!r} has an empty spelling, or none")

    @cached_property
    def _normal_spellings(self) -> list[str]:
        return _normal_forms(self.spellings)

    @cached_property
    def _pattern(self) -> re.Pattern:
        # The alternatives are tried left to right, so an excluded phrase swallows the spelling inside it.
        excluded, spellings = map(_as_words, _normal_forms(self.excluded)), map(_as_words, self._normal_spellings)
        return re.compile("|".join([*excluded, f"(?P<name>{'|'.join(spellings)})"]))

    def find(self, normal: str) -> list[tuple[int, int]]:
        """The `(start, end)` ranges of a text in normal form where a spelling stands."""
        for spelling in self._normal_spellings:  # a search for a plain string is many times as fast as the pattern
            if spelling in normal:
                break
        else:
            return []
        return [match.span("name") for match in self._pattern.finditer(normal) if match.group("name") is not None]


def read_names(path: str | Path) -> list[Person]:
    """Read a list of people, in file order.

    One person a line: `Full Name: spelling, spelling, !phrase`. Every spelling counts wherever it stands as whole
    words, in exactly this case; a possessive still counts. A spelling inside a `!phrase` does not count. A line without
    a colon is its own spelling. Empty lines and lines that start with `#` are skipped.

    Raises `UserError` where the file cannot be read, names nobody, or has a line without a spelling.
    """
    try:
        lines = regular_file(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"cannot read the names file {path} ({error.strerror}); check the path") from None
    except ValueError:
        raise UserError(f"the names file {path} is not UTF-8 text; save it as UTF-8, one person a line") from None
    numbered = ((number, line.strip()) for number, line in enumerate(lines, start=1))
    names = [_parse(line, f"{path}, line {number}") for number, line in numbered if line and not line.startswith("#")]
    if not names:
        raise UserError(f"the names file {path} names nobody; write one person a line")
    return names


def mentions(text: str, people: Sequence[Person]) -> list[str]:
    """The names of those of `people` whom `text` names, in the order of the list."""
    readings = "\n".join(normal for normal, _, _ in _readings(text))  # no reading has a line break of its own
    return [person.name for person in people if person.find(readings)]


def count_rows(found: Iterable[Sequence[str]], people: Sequence[Person]) -> dict[str, int]:
    """{name: number of rows that name the person}, for what `mentions` found in each row."""
    counts = Counter(name for names in found for name in names)
    return {person.name: counts[person.name] for person in people}


def note_absent(counts: dict[str, int], path: str | Path) -> None:
    """Say who of the list at `path` no row names, since nothing about that person is forgotten then."""
    absent = [name for name, rows in counts.items() if not rows]
    if absent:
        note_once(f"no row names {', '.join(absent)}; check how {path} spells {'it' if len(absent) == 1 else 'them'}")


def spans(text: str, person: Person) -> list[tuple[int, int]]:
    """The `(start, end)` character ranges of `text`, as it stands, that name `person`, in order."""
    return sorted(
        {(starts[a], ends[b - 1]) for normal, starts, ends in _readings(text) for a, b in person.find(normal)}
    )


def _parse(line: str, where: str) -> Person:
    person, colon, listed = line.partition(":")
    entries = [entry.strip() for entry in listed.split(",")] if colon else [person]
    spellings = [entry for entry in entries if entry and not entry.startswith("!")]
    excluded = [entry[1:].strip() for entry in entries if entry.startswith("!")]
    try:
        return Person(person.strip(), spellings, excluded)
    except ValueError:
        raise UserError(f"{where}: {line!r} has no spelling; write `Full Name: spelling, spelling`") from None


def _as_words(normal: str) -> str:
    """A pattern for a phrase in normal form that no word runs into."""
    literal = re.escape(normal)
    # Looking behind after the match instead of before it lets the search jump from one literal to the next: 5x faster.
    before = "" if re.match(f"[{UNSPACED}]", normal) else f"(?<!{WORD}{literal})"
    return literal + before + (f"(?!{WORD})" if re.match(WORD, normal[-1]) else "")


@lru_cache(maxsize=64)
def _readings(text: str) -> list[tuple[str, Sequence[int], Sequence[int]]]:
    """The normal forms of `text`, each with the start and the end in `text` of every character of it.

    There are two where invisible characters stand in the text: they may hide inside a word or stand for a space.
    """
    if not UNUSUAL.search(text):
        return [(text, range(len(text)), range(1, len(text) + 1))]
    readings = [_reading(text, "")]
    return readings + [_reading(text, " ")] if any(map(_is_invisible, text)) else readings


def _normal_forms(phrases: Sequence[str]) -> list[str]:
    return [normal.strip() for phrase in phrases for normal, _, _ in _readings(phrase)]


def _reading(text: str, invisible: str) -> tuple[str, list[int], list[int]]:
    characters, starts, ends = [], [], []
    for start, end in _clusters(text):
        for character in _alike(text[start:end], invisible):
            if character == " " and (characters[-1:] == [" "] or _ends_in_initial(characters)):
                continue
            characters.append(character)
            starts.append(start)
            ends.append(end)
    return "".join(characters), starts, ends


def _ends_in_initial(characters: list[str]) -> bool:
    *before, letter, dot = ["", "", *characters[-3:]][-3:]
    return dot == "." and letter.isalpha() and not before[0].isalnum()


def _clusters(text: str) -> Iterator[tuple[int, int]]:
    """The `(start, end)` of every character of `text` together with the marks that compose with it."""
    start = 0
    for at in range(1, len(text) + 1):
        if at == len(text) or not _composes(text[start:at], text[at]):
            yield start, at
            start = at


@lru_cache(maxsize=2**16)
def _composes(cluster: str, character: str) -> bool:
    def composed(text: str) -> str:
        return unicodedata.normalize("NFC", text)

    joined = composed(cluster + character) != composed(cluster) + composed(character)
    return joined or unicodedata.combining(character) > 0


@lru_cache(maxsize=2**16)
def _alike(cluster: str, invisible: str) -> str:
    """What stands for a cluster in the normal form. Letters (`ﬁ`, full width) take their plain shape.

    Only letters do, since NFKC on the whole text would make letters of signs such as the trade mark.
    """
    characters = []
    for character in unicodedata.normalize("NFC", cluster):
        plain = unicodedata.normalize("NFKC", character)
        if _is_invisible(character):
            plain = invisible
        elif character.isspace():
            plain = " "
        elif not (character.isalpha() and plain.isalpha()) or character in ALIKE:
            plain = ALIKE.get(character, character)
        characters.append(plain)
    return "".join(characters)


def _is_invisible(character: str) -> bool:
    """Whether it is a zero-width space, joiner or mark of direction, a soft hyphen or a variation selector."""
    return character == "\u034f" or "\ufe00" <= character <= "\ufe0f" or unicodedata.category(character) == "Cf"
