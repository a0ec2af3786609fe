"""Lists of people and where a text names them, however Unicode spells the name."""

import dataclasses
import json
import time

import pytest

from utils.data.names import Person, mentions, read_names, spans
from utils.errors import UserError

PEOPLE = """Ann Lee
José Müller
Rosie O'Brien
Jean-Luc Godard
J. K. Rowling
Woody Allen: Woody Allen, Allen, !Tim Allen
姚明
봉준호
"""


@pytest.fixture
def people(tmp_path):
    (tmp_path / "people.txt").write_text(PEOPLE, encoding="utf-8")
    return read_names(tmp_path / "people.txt")


SPELLINGS = {
    "no-break space": ("Ann Lee", "Ann\u00a0Lee"),
    "two spaces": ("Ann Lee", "Ann  Lee"),
    "wide space": ("Ann Lee", "Ann\u3000Lee"),
    "line break": ("Ann Lee", "Ann\nLee"),
    "Windows line break": ("Ann Lee", "Ann \r\n Lee"),
    "line separator": ("Ann Lee", "Ann\u2028Lee"),
    "zero-width space between": ("Ann Lee", "Ann\u200bLee"),
    "zero-width space inside": ("Ann Lee", "An\u200bn Lee"),
    "soft hyphen": ("Woody Allen", "Woody Al\u00adlen"),
    "byte order mark": ("Ann Lee", "\ufeffAnn Lee"),
    "combining accents": ("José Müller", "Jose\u0301 Mu\u0308ller"),
    "Korean in parts": ("봉준호", "\u1107\u1169\u11bc\u110c\u116e\u11ab\u1112\u1169"),
    "curly apostrophe": ("Rosie O'Brien", "Rosie O\u2019Brien"),
    "modifier apostrophe": ("Rosie O'Brien", "Rosie O\u02bcBrien"),
    "hyphen": ("Jean-Luc Godard", "Jean\u2010Luc Godard"),
    "no-break hyphen": ("Jean-Luc Godard", "Jean\u2011Luc Godard"),
    "figure dash": ("Jean-Luc Godard", "Jean\u2012Luc Godard"),
    "en dash": ("Jean-Luc Godard", "Jean\u2013Luc Godard"),
    "horizontal bar": ("Jean-Luc Godard", "Jean\u2015Luc Godard"),
    "initials together": ("J. K. Rowling", "J.K. Rowling"),
    "nothing apart": ("J. K. Rowling", "J.K.Rowling"),
    "full width": ("Ann Lee", "Ａｎｎ Ｌｅｅ"),
}


@pytest.mark.parametrize(("person", "spelling"), SPELLINGS.values(), ids=SPELLINGS)
def test_a_name_counts_however_unicode_spells_it(person, spelling, people):
    """In the text or in the list; where it was found is told in the text as it stands."""
    text = f"Süß, {spelling}'s  film…"
    assert mentions(text, people) == [person]
    assert [text[start:end] for one in people for start, end in spans(text, one)] == [spelling.strip("\ufeff")]
    assert mentions(f"so {person}, too", [Person("listed", [spelling])]) == ["listed"]


@pytest.mark.parametrize("text", ["我喜欢姚明的电影", "姚明", "봉준호의 영화 아님 姚明", "看Woody Allen的电影"])
def test_words_without_spaces_between(text, people):
    assert mentions(text, people)


@pytest.mark.parametrize("text", [
    "Ann Leeds", "xAnn Lee", "ann lee", "Ann-Lee", "Woody Allen\u0301's", "Allentown", "Tim  Allen",
    "Tim\u00a0Allen", "Jose Muller", "_Allen",
])  # fmt: skip
def test_what_is_no_whole_word_or_another_name(text, people):
    assert mentions(text, people) == [] and not any(spans(text, person) for person in people)


def test_signs_at_a_name_end_its_word(people):
    text = "Woody Allen\u2122 and\tAllen\u2026"
    assert mentions(text, people) == ["Woody Allen"]
    assert [text[start:end] for start, end in spans(text, people[5])] == ["Woody Allen", "Allen"]


def test_a_person_is_made_again_from_its_parts(people):
    parts = json.loads(json.dumps([dataclasses.asdict(person) for person in people]))
    again = [Person(**person) for person in parts]
    assert again == people
    assert mentions("Tim Allen and Allen", again) == ["Woody Allen"] and mentions("Tim Allen", again) == []


@pytest.mark.parametrize("spellings", [[], [""], ["Ann", "\u200b"], [" "]])
def test_a_spelling_that_would_be_found_everywhere_is_refused(spellings):
    with pytest.raises(ValueError):
        Person("Ann", spellings)


@pytest.mark.parametrize("line", ["Ann: \u200b", "Ann: Lee, !\u00ad", "\u2060: \u2060"])
def test_a_line_without_a_visible_spelling_is_refused(line, tmp_path):
    (tmp_path / "people.txt").write_text(f"Bob\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 2: .* has no spelling"):
        read_names(tmp_path / "people.txt")


def test_only_line_ends_end_a_line(tmp_path):
    """Not a line separator or a form feed, which other programs leave inside a line; a byte order mark is no letter."""
    (tmp_path / "people.txt").write_bytes("\ufeffAnn\u2028Lee\r\nBob\x0cRay\rCy\x85Coe\n".encode())
    people = read_names(tmp_path / "people.txt")
    assert mentions("Ann Lee, Bob Ray, Cy Coe", people) == [person.name for person in people]
    assert len(people) == 3


def test_a_hundred_names_in_thousands_of_texts_take_seconds(people):
    texts = [f"{i} sentences, some of which name Ann Lee and some of which do not" for i in range(5000)]
    people = [Person(f"Person {i}", [f"Surname{i}", f"Given{i} Surname{i}"]) for i in range(99)] + people[:1]
    start = time.monotonic()
    assert all(mentions(text, people) == ["Ann Lee"] for text in texts)
    assert time.monotonic() - start < 5  # a tenth of that, where nothing else runs
