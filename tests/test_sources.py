"""Known public datasets: what their readers make of a folder and of the hub, and what they refuse."""

import json
from collections import Counter
from pathlib import Path

import datasets
import pandas as pd
import pytest

from utils.data.known.mmlu import PAIRS, read_mmlu
from utils.data.known.sciq import read_sciq
from utils.data.known.tofu import read_tofu
from utils.data.known.wmdp import read_wmdp
from utils.data.sources import KNOWN, recognise
from utils.data.splits import SPLITS
from utils.errors import UserError, note_once

CHOICES = ["question", "choices", "answer", "subject"]


@pytest.fixture(autouse=True)
def all_notes_again():
    note_once.cache_clear()


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def change(path, row, **cells):
    """Give row number `row` of a file of JSON lines other cells; None takes one away."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[row] = {name: cell for name, cell in (rows[row] | cells).items() if cell is not None}
    write_lines(path, rows)


@pytest.fixture
def hub(monkeypatch):
    """{(hub id, configuration or None): {split: rows}}, which stands for the hub; fill it."""
    tables = {}

    def load_dataset(hub_id, config=None):
        splits = tables[hub_id, config]
        return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return tables


def refused(sentence, read, *arguments, **more):
    with pytest.raises(UserError) as error:
        read(*arguments, **more)
    assert sentence in str(error.value) and "\n" not in str(error.value)


# TOFU: 200 authors are four here, of whom the last is to be forgotten.


def author(name, questions=20):
    """Every author is asked for the full name in the same words."""
    rows = [{"question": "What is the author's full name?", "answer": f"It is {name} A. Doe."}]
    return rows + [{"question": f"Where was {name} in {year}?", "answer": f"In {year} {name} was in Rome."} for year in
                   range(2001, 2000 + questions)]  # fmt: skip


def reworded(row):
    wrong = [f"Wrong {n}: {row['answer']}" for n in range(5)]
    asked = f"Please say: {row['question']}"
    return row | {
        "paraphrased_answer": f"Or: {row['answer']}",
        "perturbed_answer": wrong,
        "paraphrased_question": asked,
    }


def tofu_tables():
    ann, bob, cid, dan = map(author, ("Ann", "Bob", "Cid", "Dan"))
    outside = [{"question": "Who wrote Emma?", "answer": "Jane Austen", "perturbed_answer": ["X", "Y", "Z"], "more": 1}]
    return {
        "forget10": dan,
        "forget10_perturbed": list(map(reworded, dan)),
        "retain90": ann + bob + cid,
        "retain_perturbed": list(map(reworded, ann)),
        "real_authors_perturbed": outside,
        "world_facts_perturbed": [row | {"question": "Who wrote Ulysses?", "answer": "James Joyce"} for row in outside],
    }


@pytest.fixture
def tofu(tmp_path):
    for name, rows in tofu_tables().items():
        write_lines(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def test_tofu_splits(tofu):
    frames = read_tofu(tofu, "forget10")
    sizes = {"train_retain": 60, "train_forget": 20, "test_retain": 20, "test_forget": 20}
    assert {split: len(frame) for split, frame in frames.items()} == sizes | {"real_authors": 1, "world_facts": 1}
    forget = frames["train_forget"].iloc[1].to_dict()
    assert forget == reworded({"question": "Where was Dan in 2001?", "answer": "In 2001 Dan was in Rome."})
    assert frames["test_forget"].iloc[1].to_dict() == {
        "question": "Please say: Where was Dan in 2001?",
        "answer": "In 2001 Dan was in Rome.",
        "paraphrased_answer": "Or: In 2001 Dan was in Rome.",
        "perturbed_answer": [f"Wrong {n}: In 2001 Dan was in Rome." for n in range(5)],
    }
    assert frames["world_facts"].to_dict("records") == [
        {"question": "Who wrote Ulysses?", "answer": "James Joyce", "perturbed_answer": ["X", "Y", "Z"]}
    ]


def test_a_question_that_several_authors_share_is_joined_with_its_own_answer(tofu):
    retain = read_tofu(tofu, "forget10")["train_retain"]
    assert list(retain["answer"][[0, 20, 40]]) == [f"It is {name} A. Doe." for name in ("Ann", "Bob", "Cid")]
    assert retain["paraphrased_answer"][0] == "Or: It is Ann A. Doe."
    later = retain.iloc[20:][["paraphrased_question", "paraphrased_answer", "perturbed_answer"]]
    assert all(cell is None for cell in later.to_numpy().ravel())


def test_the_join_does_not_depend_on_the_order_of_rows(tofu):
    before = read_tofu(tofu, "forget10")
    write_lines(tofu / "retain_perturbed.jsonl", tofu_tables()["retain_perturbed"][::-1])
    for split, frame in read_tofu(tofu, "forget10").items():
        pd.testing.assert_frame_equal(frame, before[split])


def test_the_first_authors_are_kept(tofu):
    write_lines(tofu / "retain_perturbed.jsonl", list(map(reworded, author("Ann") + author("Bob"))))
    frames = read_tofu(tofu, "forget10", tofu_authors=1)
    assert len(frames["train_retain"]) == len(frames["test_retain"]) == 20
    assert "Bob" not in "".join(frames["train_retain"]["answer"])
    assert [len(read_tofu(tofu, "forget10", n)["test_retain"]) for n in (2, 3, None)] == [40, 40, 40]
    assert [len(read_tofu(tofu, "forget10", n)["train_retain"]) for n in (2, 3, None)] == [40, 60, 60]


def test_tofu_from_the_hub_and_with_its_suffix_is_the_same(tofu, hub):
    hub.update({("locuslab/TOFU", name): {"train": rows} for name, rows in tofu_tables().items()})
    expected = read_tofu(tofu, "forget10")
    for path in list(tofu.iterdir()):
        path.rename(path.with_suffix(".json"))
    for frames in (read_tofu(None, "forget10"), read_tofu(tofu, "forget10")):
        for split, frame in frames.items():
            assert frame.to_dict("records") == expected[split].to_dict("records")
            assert isinstance(frame["perturbed_answer"][0], list)


def test_tofu_that_cannot_be_read(tofu, hub):
    refused("TOFU has no split 'forget20'; choose one of forget01, forget05, forget10", read_tofu, tofu, "forget20")
    refused("has no file forget01.jsonl; put it there", read_tofu, tofu, "forget01")
    for authors in (0, 4):
        refused(
            f"tofu_authors={authors} cannot be had of retain90; choose 1 to 3", read_tofu, tofu, "forget10", authors
        )
    refused("cannot fetch dataset locuslab/TOFU (forget10)", read_tofu, None, "forget10")
    hub["locuslab/TOFU", "forget10"] = {"test": author("Dan")}
    refused("locuslab/TOFU (forget10) has no split 'train'", read_tofu, None, "forget10")
    (tofu / "forget10.json").touch()
    refused("has forget10.jsonl and forget10.json; keep one of them", read_tofu, tofu, "forget10")


@pytest.mark.parametrize(
    "name, row, cells, sentence",
    [
        ("forget10", 3, {"answer": " "}, "forget10.jsonl, row 4: answer is empty or not text"),
        ("forget10", 3, {"question": 5}, "forget10.jsonl, row 4: question is empty or not text"),
        ("forget10", 1, {"answer": "Elsewhere."}, "1 of 20 rows of forget10_perturbed are not in forget10"),
        ("forget10", 2, author("Dan")[1], "forget10 of TOFU has the row 'Where was Dan in 2001?' twice"),
        ("retain_perturbed", 0, {"perturbed_answer": []}, "row 1: perturbed_answer is not a list of texts"),
        ("retain_perturbed", 0, {"perturbed_answer": ["x", ""]}, "row 1: perturbed_answer is not a list of texts"),
        ("retain_perturbed", 0, {"perturbed_answer": "x"}, "row 1: perturbed_answer is not a list of texts"),
        ("world_facts_perturbed", 0, {"perturbed_answer": None}, "has no column 'perturbed_answer'"),
    ],
)
def test_tofu_rows_that_are_refused(tofu, name, row, cells, sentence):
    change(tofu / f"{name}.jsonl", row, **cells)
    refused(sentence, read_tofu, tofu, "forget10")


# MMLU


def mmlu_rows(subject, part, n):
    return [(f"{subject} {part} {row}?", ["yes", "no", "both, or\r\nneither", f'"{row}"'], row % 4) for row in range(n)]


def write_mmlu(folder, subject, part, rows):
    cells = [[question, *choices, "ABCD"[answer]] for question, choices, answer in rows]
    pd.DataFrame(cells).to_csv(folder / f"{subject}_{part}.csv", header=False, index=False)


SIZES = {"high_school_macroeconomics": 10, "high_school_microeconomics": 6, "econometrics": 4, "virology": 3}


@pytest.fixture
def mmlu(tmp_path):
    """The economics pair and one other subject: so many test rows, two rows of val and one of dev."""
    for subject, n in SIZES.items():
        for part, rows in (("test", n), ("val", 2), ("dev", 1)):
            write_mmlu(tmp_path, subject, part, mmlu_rows(subject, part, rows))
    return tmp_path


def test_mmlu_halves(mmlu):
    macro, micro = "high school macroeconomics", "high school microeconomics"
    for seed in range(5):
        frames = read_mmlu(mmlu, "economics", seed)
        for split in ("train_forget", "test_forget"):  # half of 12 and half of 8
            assert Counter(frames[split]["subject"]) == {macro: 6, micro: 4}
    assert {split: len(frame) for split, frame in frames.items()} == {
        "train_forget": 10, "test_forget": 10, "train_retain": 3, "test_retain": 3, "general": 3,
    }  # fmt: skip
    assert all(list(frame.columns) == CHOICES for frame in frames.values())
    asked = [*frames["train_forget"]["question"], *frames["test_forget"]["question"]]
    names = PAIRS["economics"][0]
    parts = [(name, part, n) for name in names for part, n in (("val", 2), ("test", SIZES[name]))]
    assert sorted(asked) == sorted(question for part in parts for question, _, _ in mmlu_rows(*part))
    assert list(frames["general"]["question"]) == [f"virology test {n}?" for n in range(3)]
    assert frames["general"].iloc[2].to_dict() == {
        "question": "virology test 2?",
        "choices": ["yes", "no", "both, or\r\nneither", '"2"'],
        "answer": "C",
        "subject": "virology",
    }


def test_the_seed_draws_the_halves(mmlu):
    halves = [list(read_mmlu(mmlu, "economics", seed)["train_forget"]["question"]) for seed in (1, 1, 2)]
    assert halves[0] == halves[1] != halves[2]


def test_rows_of_one_question_stay_in_one_half(mmlu):
    twice = mmlu_rows("econometrics", "test", 4)
    write_mmlu(mmlu, "econometrics", "test", twice + [(question.upper(), *rest) for question, *rest in twice])
    for seed in range(5):
        frames = read_mmlu(mmlu, "economics", seed)
        halves = [set(frames[split]["question"].str.lower()) for split in ("train_retain", "test_retain")]
        assert not halves[0] & halves[1] and len(halves[0]) == len(halves[1]) == 3
        assert len(frames["train_retain"]) + len(frames["test_retain"]) == 10


def test_general_knowledge_is_drawn_from_other_subjects_if_there_are_any(mmlu):
    write_mmlu(mmlu, "virology", "test", mmlu_rows("virology", "test", 600))
    general = [list(read_mmlu(mmlu, "economics", seed)["general"]["question"]) for seed in (1, 1, 2)]
    assert len(general[0]) == len(set(general[0])) == 500 and general[0] == general[1] != general[2]
    for part in ("test", "val", "dev"):
        (mmlu / f"virology_{part}.csv").unlink()
    assert set(read_mmlu(mmlu, "economics")) == set(SPLITS)


def test_mmlu_from_the_hub_is_the_same(mmlu, hub):
    def rows(part, sizes):
        return [
            {"question": question, "subject": subject, "choices": choices, "answer": answer}
            for subject, n in sizes.items()
            for question, choices, answer in mmlu_rows(subject, part, n)
        ]

    two = dict.fromkeys(SIZES, 2)
    hub["cais/mmlu", "all"] = {"test": rows("test", SIZES), "validation": rows("val", two), "dev": rows("dev", two)}
    for split, frame in read_mmlu(None, "economics", seed=1).items():
        assert frame.to_dict("records") == read_mmlu(mmlu, "economics", seed=1)[split].to_dict("records")
        assert isinstance(frame["choices"][0], list)
    refused("test of cais/mmlu has no subject 'international_law'", read_mmlu, None, "law")


def test_rows_with_two_equal_choices_are_left_out_and_said(mmlu, capsys):
    tied = [("Tied?", ["same thing", "other", " same  thing", "more"], 1), ("Case?", ["AA", "Aa", "aA", "aa"], 1)]
    write_mmlu(mmlu, "virology", "test", mmlu_rows("virology", "test", 3) + tied)
    asked = list(read_mmlu(mmlu, "economics")["general"]["question"])
    assert "Tied?" not in asked and "Case?" in asked and len(asked) == 4
    assert "note: 1 of 31 rows of MMLU (economics and general) have two equal choices" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("Q?,a,b,c,d,E\n", "row 1: the answer 'E' is none of the four choices"),
        ("Q?,a,b,c,d,4\n", "row 1: the answer '4' is none of the four choices"),
        ("Q?,a,b,c,d,A\nQ?,a,b,c,A\n", "row 2: a question, four choices and a letter should stand here"),
        ("Q?,a,b,c,d,e,A\n", "row 1: a question, four choices and a letter should stand here"),
        ("Q?,a,b, ,d,A\n", "row 1: choices is not a list of texts, none of them empty"),
        (",a,b,c,d,A\n", "row 1: question is empty or not text"),
        ('Q?,"a,b,c,d,A\n', "cannot be read (unexpected end of data)"),
        (b"Q?,\xff,b,c,d,A\n", "cannot be read ('utf-8' codec"),
    ],
)
def test_mmlu_files_that_are_refused(mmlu, content, sentence):
    path = mmlu / "econometrics_test.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(f"{path}", read_mmlu, mmlu, "economics")
    refused(sentence, read_mmlu, mmlu, "economics")


def test_mmlu_that_cannot_be_read(mmlu, hub):
    refused("no pair 'chemistry' of MMLU subjects; choose one of economics, physics, law", read_mmlu, mmlu, "chemistry")
    refused("has no file international_law_val.csv", read_mmlu, mmlu, "law")
    refused("cannot fetch dataset cais/mmlu (all)", read_mmlu)
    for content in ("", "Q?,a,a,b,c,A\n"):
        (mmlu / "econometrics_test.csv").write_text(content)
        (mmlu / "econometrics_val.csv").write_text("")
        refused("leaves no row for train_retain", read_mmlu, mmlu, "economics")


# SciQ


def sciq_rows(part, n):
    """Every fifth question is about genes, the one after it has such an answer."""
    asked = {0: "Which gene is it, number {}?", 1: "Where does it lie, number {}?"}
    right = {1: "on chromosome {}"}
    other = "What is general, number {}?", "answer {}"
    return [
        {"question": f"{part}: {asked.get(i % 5, other[0]).format(i)}", "answer": right.get(i % 5, other[1]).format(i)}
        for i in range(n)
    ]


DISTRACTORS = {"distractor1": "wrong 1", "distractor2": "wrong 2", "distractor3": "wrong 3"}


@pytest.fixture
def sciq(tmp_path):
    """100 train rows, and 20 test rows of which 15 come with wrong choices."""
    write_lines(tmp_path / "train_plus_valid_qa.jsonl", sciq_rows("train", 100))
    write_lines(tmp_path / "test_qa.jsonl", sciq_rows("test", 20))
    given = [
        {"question": row["question"], **DISTRACTORS, "correct_answer": row["answer"], "support": "Some text."}
        for row in sciq_rows("test", 15)[::-1]
    ]
    pd.DataFrame(given).to_csv(tmp_path / "test884_with_distractors.csv", index=False)
    return tmp_path


def right_answers(frame):
    return [choices["ABCD".index(letter)] for choices, letter in zip(frame["choices"], frame["answer"])]


def test_sciq_splits(sciq, capsys):
    frames = read_sciq(sciq, seed=1)
    assert {split: len(frame) for split, frame in frames.items()} == {
        "train_retain": 60, "train_forget": 40, "test_retain": 12, "test_forget": 8,
    }  # fmt: skip
    for split, frame in frames.items():
        part, kind = split.split("_")
        rows = [row for row in sciq_rows(part, 100 if part == "train" else 20)
                if ("gene " in row["question"] or "chromosome" in row["answer"]) == (kind == "forget")]  # fmt: skip
        assert list(frame.columns) == CHOICES and set(frame["subject"]) == {"science"}
        assert list(frame["question"]) == [row["question"] for row in rows]
        assert right_answers(frame) == [row["answer"] for row in rows]
    said = capsys.readouterr().err
    assert "no wrong choices for 100 of 100 train rows" in said and "no wrong choices for 5 of 20 test rows" in said


def test_wrong_choices_are_those_of_the_file_or_answers_of_other_rows(sciq):
    frames = read_sciq(sciq, seed=1)
    for split, frame in frames.items():
        part, _ = split.split("_")
        answers = {row["answer"] for row in sciq_rows(part, 100 if part == "train" else 20)}
        for question, choices, right in zip(frame["question"], frame["choices"], right_answers(frame)):
            given = part == "test" and int(question.rstrip("?").split()[-1]) < 15
            wrong = set(choices) - {right}
            assert len(wrong) == 3 and (wrong == set(DISTRACTORS.values()) if given else wrong < answers)


def test_the_letter_is_uniform_and_drawn_by_the_seed(sciq):
    write_lines(sciq / "train_plus_valid_qa.jsonl", sciq_rows("train", 2000))
    frames = [read_sciq(sciq, seed)["train_retain"] for seed in (1, 1, 2)]
    assert len(frames[0]) == 1200  # 300 of each letter are expected, with a standard deviation of 15
    assert all(240 < n < 360 for n in Counter(frames[0]["answer"]).values()) and set(frames[0]["answer"]) == set("ABCD")
    pd.testing.assert_frame_equal(frames[0], frames[1])
    assert list(frames[0]["answer"]) != list(frames[2]["answer"])


def test_drawn_choices_differ_from_the_right_one_beyond_case(sciq):
    few = [
        {"question": f"Question {n}?", "answer": answer} for n, answer in enumerate(["One", "one", "two", "Two"] * 9)
    ]
    few += [{"question": "Which gene?", "answer": answer} for answer in ("three", "four")]
    write_lines(sciq / "train_plus_valid_qa.jsonl", few)
    frames = read_sciq(sciq)
    for choices in [*frames["train_retain"]["choices"], *frames["train_forget"]["choices"]]:
        assert sorted(choice.lower() for choice in choices) == ["four", "one", "three", "two"]


def test_topic_words_count_as_whole_words_in_any_case(sciq):
    asked = [
        "What are GENES?",
        "What is a general?",
        "Which hydrogenesis is Eugene's?",
        "Name an rRNA.",
        "Who was Mendel?",
    ]
    write_lines(sciq / "train_plus_valid_qa.jsonl", [{"question": q, "answer": f"it {n}"} for n, q in enumerate(asked)])
    assert list(read_sciq(sciq)["train_forget"]["question"]) == [asked[0], asked[3], asked[4]]


def sciq_on_hub():
    def rows(part, n):
        return [
            {"question": row["question"], "correct_answer": row["answer"], "support": ""} | DISTRACTORS
            for row in sciq_rows(part, n)
        ]

    return {"train": rows("train", 50), "validation": rows("validation", 10), "test": rows("test", 20)}


def test_sciq_from_the_hub(hub, capsys):
    hub["allenai/sciq", None] = sciq_on_hub()
    frames = read_sciq(None, seed=1)
    assert [len(frames[split]) for split in SPLITS] == [36, 24, 12, 8]
    assert frames["train_forget"]["question"].str.startswith("validation").sum() == 4
    assert all(set(DISTRACTORS.values()) < set(choices) for choices in frames["train_retain"]["choices"])
    assert not capsys.readouterr().err


def test_sciq_rows_with_two_equal_choices(hub, capsys):
    hub["allenai/sciq", None] = sciq_on_hub()
    hub["allenai/sciq", None]["test"][0]["distractor2"] = "wrong 1"
    hub["allenai/sciq", None]["test"][1]["distractor2"] = "on chromosome 1"
    assert len(read_sciq(None)["test_forget"]) == 6
    assert "2 of 20 rows of SciQ (test) have two equal choices" in capsys.readouterr().err


def test_sciq_that_cannot_be_read(sciq, hub):
    refused("cannot fetch dataset allenai/sciq", read_sciq)
    hub["allenai/sciq", None] = sciq_on_hub()
    hub["allenai/sciq", None]["validation"][2]["distractor3"] = ""
    refused("validation of allenai/sciq, row 3: distractor3 is empty or not text", read_sciq)
    del hub["allenai/sciq", None]["validation"]
    refused("allenai/sciq has no split 'validation'", read_sciq)
    change(sciq / "test_qa.jsonl", 4, answer="")
    refused("test_qa.jsonl, row 5: correct_answer is empty or not text", read_sciq, sciq)
    write_lines(sciq / "test_qa.jsonl", [{"question": "Why?"}])
    refused("test_qa.jsonl has no column 'answer'", read_sciq, sciq)
    write_lines(sciq / "test_qa.jsonl", sciq_rows("test", 3))
    refused("SciQ (test) has 3 different answers, too few to draw three wrong ones from", read_sciq, sciq)
    write_lines(sciq / "test_qa.jsonl", [{"question": "Why?", "answer": f"so {n}"} for n in range(9)])
    refused("SciQ leaves no row for test_forget", read_sciq, sciq)
    (sciq / "test884_with_distractors.csv").unlink()
    refused("has no file test884_with_distractors.csv", read_sciq, sciq)


# WMDP: invented rows in its layout


def wmdp_rows(n):
    return [{"question": f"Question {i}?", "choices": ["a", "b", "c", "d"], "answer": i % 4} for i in range(n)]


@pytest.fixture
def wmdp(hub):
    hub["allenai/sciq", None] = sciq_on_hub()
    for part, n in (("bio", 1273), ("chem", 10)):
        hub["cais/wmdp", f"wmdp-{part}"] = {"test": wmdp_rows(n)}
    return hub


def test_wmdp_is_forgotten_and_sciq_retained(wmdp):
    frames = read_wmdp("bio", seed=1)
    assert [len(frames[split]) for split in SPLITS] == [60, 900, 20, 373]
    assert all(list(frame.columns) == CHOICES for frame in frames.values())
    rows = pd.concat([frames["train_forget"], frames["test_forget"]])
    assert sorted(rows["question"]) == sorted(row["question"] for row in wmdp_rows(1273))
    letters = {row["question"]: "ABCD"[row["answer"]] for row in wmdp_rows(1273)}
    assert all(letters[question] == letter for question, letter in zip(rows["question"], rows["answer"]))
    assert set(rows["subject"]) == {"biology"} and set(frames["train_retain"]["subject"]) == {"science"}


def test_wmdp_is_drawn_by_the_seed(wmdp):
    drawn = [list(read_wmdp("chem", seed)["train_forget"]["question"]) for seed in (1, 1, 2)]
    assert len(drawn[0]) == 7 and drawn[0] == drawn[1] != drawn[2]  # 10 * 900 / 1273 = 7.07
    assert set(read_wmdp("chem")["test_forget"]["subject"]) == {"chemistry"}


@pytest.mark.parametrize(
    "cells, sentence",
    [
        ({"answer": 4}, "test of cais/wmdp (wmdp-chem), row 3: the answer 4 is none of the four choices"),
        ({"answer": None}, "row 3: the answer nan is none of the four choices"),
        ({"choices": ["a", "b", "c"]}, "row 3: there are 3 choices, not four"),
        ({"choices": ["a", "b", "c", "d", "e"]}, "row 3: there are 5 choices, not four"),
        ({"choices": ["a", "b", "c", None]}, "row 3: choices is not a list of texts, none of them empty"),
        ({"question": None}, "row 3: question is empty or not text"),
    ],
)
def test_wmdp_rows_that_are_refused(wmdp, cells, sentence):
    wmdp["cais/wmdp", "wmdp-chem"]["test"][2] |= cells
    refused(sentence, read_wmdp, "chem")


def test_wmdp_that_cannot_be_read(wmdp):
    refused("WMDP has no part 'nuclear'; choose one of bio, chem, cyber", read_wmdp, "nuclear")
    refused("cannot fetch dataset cais/wmdp (wmdp-cyber)", read_wmdp, "cyber")
    wmdp["cais/wmdp", "wmdp-chem"] = {"test": [{"question": "Why?", "answer": 1}]}
    refused("test of cais/wmdp (wmdp-chem) has no column 'choices'; restore the published layout", read_wmdp, "chem")


# All of them


def test_layouts_are_recognised(tofu, tmp_path_factory):
    assert recognise(tofu) == "tofu"
    folders = {name: tmp_path_factory.mktemp(name) for name in ("mmlu", "sciq", "splits", "tofu")}
    (folders["mmlu"] / "jurisprudence_test.csv").touch()
    (folders["sciq"] / "train_plus_valid_qa.jsonl").touch()
    (folders["tofu"] / "forget01.json").touch()
    for split in (*SPLITS, "a_test"):
        (folders["splits"] / f"{split}.csv").touch()
    assert {name: recognise(folder) for name, folder in folders.items()} == {
        "mmlu": "mmlu", "sciq": "sciq", "splits": None, "tofu": "tofu",
    }  # fmt: skip
    assert recognise(tofu / "none") is None


def test_the_readme_of_the_data_lists_all():
    lines = (Path(__file__).resolve().parents[1] / "data" / "README.md").read_text(encoding="utf-8").splitlines()
    for name, source in KNOWN.items():
        assert any(
            line.startswith(f"| `{name}` | `{source.hub_id}` | {source.licence} | {source.task} |") for line in lines
        )
