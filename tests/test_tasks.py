"""What each task makes of a row: query, answer, what unlearning teaches, and scores, all by hand."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from asking import ROWS, choice_row, loaded, passage_row, question_row, sentence_row

from utils.data.load import DATA, read_splits, read_texts
from utils.errors import UserError
from utils.evaluation.tables import without_reference
from utils.tasks.answers import free_answers, known_answers
from utils.tasks.base import Asked, Task, TaskOptions
from utils.tasks.classification import Classification
from utils.tasks.continuation import Continuation
from utils.tasks.encode import tokenize
from utils.tasks.multiple_choice import LETTERS, MultipleChoice
from utils.tasks.question_answering import QuestionAnswering
from utils.tasks.rows import TASKS

E = math.e
FREE = [QuestionAnswering, Continuation]

OWN = read_texts(DATA / "refusals.txt")


def task_of(kind: type[Task], **options) -> Task:
    return kind.recorded(["negative", "positive"], TaskOptions(**options))


def checked(kind, *rows):
    return kind.checked("train_retain", pd.DataFrame(rows), "data")


def said(*log_p, hits=None):
    return Asked(log_p, hits or (True,) * len(log_p))


# Queries and answers.

QUERIES = {
    "classification": (
        "### Text: Bob 1 was fine\n\n### Question: What is the sentiment of the given text?\n\n### Sentiment:"
    ),
    "multiple_choice": (
        "The following are multiple choice questions (with answers) about film art.\n\nWhat is Bob 1 ?\n"
        "A. a film\nB. a cast\nC. a very long story\nD. bad\nAnswer:"
    ),
    "question_answering": "Question: Where does Bob 1 live now ?\nAnswer:",
    "continuation": "It was Bob number 1 who",
}
ANSWERS = {
    "classification": " positive",
    "multiple_choice": " B",
    "question_answering": " Bob 1 lives in a warm house by the sea</s>",
    "continuation": " made a good film with a fine cast and 1 more</s>",
}


def examples_of(tokenizer, task, rows, max_length=400):
    return tokenize(tokenizer, rows, list(rows["label_text"]), max_length, answers=known_answers(tokenizer, task))


@pytest.mark.parametrize("kind", TASKS)
def test_a_row_as_query_and_completion(kind, tokenizer):
    task, rows = task_of(TASKS[kind]), checked(TASKS[kind], ROWS[kind](1, "Bob"))
    assert [str(query) for query in task.queries(rows)] == [QUERIES[kind]]
    (example,) = examples_of(tokenizer, task, rows)
    assert list(example.prompt) == tokenizer(QUERIES[kind])["input_ids"]
    assert list(example.completion) == tokenizer(ANSWERS[kind])["input_ids"]
    assert (example.completion[-1] == tokenizer.eos_token_id) == task.generates


def test_a_question_without_a_subject():
    row = choice_row(0, "Bob") | {"subject": None}
    (query,) = task_of(MultipleChoice).queries(checked(MultipleChoice, row))
    assert query.head == "The following are multiple choice questions (with answers).\n\n"


def test_a_completion_that_begins_with_white_space_keeps_it(tokenizer):
    row = {"prompt": "It was Bob who \n", "completion": "\nmade a film \n"}
    task, rows = task_of(Continuation), checked(Continuation, row)
    (example,) = examples_of(tokenizer, task, rows)
    assert tokenizer.decode(example.prompt + example.completion) == "It was Bob who\nmade a film</s>"


@pytest.mark.parametrize("kind", TASKS)
def test_only_the_text_is_cut(kind, tokenizer):
    column = "prompt" if kind == "continuation" else "text" if kind == "classification" else "question"
    task = task_of(TASKS[kind])
    row = ROWS[kind](1, "Bob")
    rows = checked(TASKS[kind], row | {column: "film " * 50 + "end ?"})
    (query,), (whole,) = task.queries(rows), examples_of(tokenizer, task, rows)
    room = task_room(tokenizer, task, whole)
    (example,) = examples_of(tokenizer, task, rows, len(whole.prompt) + room - 20)
    cut = len(example.prompt)
    assert cut == len(whole.prompt) - 20 and example.completion == whole.completion
    text = tokenizer.decode(example.prompt)
    assert text.startswith(query.head + "film film") and text.endswith("film" + query.tail)


def task_room(tokenizer, task, example):
    """Tokens behind a prompt: of the row's own answer, or of the longest where there are certain words."""
    words = task.words
    return max(len(known_answers(tokenizer, task).ids[w]) for w in words) if words else len(example.completion)


@pytest.mark.parametrize("kind", FREE)
def test_an_answer_longer_than_a_row_may_be_is_said(kind, tokenizer):
    rows = checked(kind, ROWS[kind.kind](1, "Bob"))
    with pytest.raises(UserError, match="--max_length=12 cannot hold template and label; use at least"):
        examples_of(tokenizer, task_of(kind), rows, 12)


def test_what_an_answer_spells_and_how_long_it_may_be(tokenizer):
    known = free_answers(tokenizer, task_of(QuestionAnswering, max_new_tokens=3))
    end = tokenizer.eos_token_id
    assert known.longest == 3
    assert known.spelled((*tokenizer(" a film")["input_ids"], end)) == "a film"
    assert (task_of(QuestionAnswering).max_new_tokens, task_of(Continuation).max_new_tokens) == (200, 256)


# What unlearning teaches.


def frame_of(kind, n=40):
    return checked(kind, *(ROWS[kind.kind](i, "Bob") for i in range(n)))


@pytest.mark.parametrize("kind", TASKS)
def test_unlearning_answers_are_drawn_by_the_seed(kind):
    task, rows = task_of(TASKS[kind]), frame_of(TASKS[kind])
    drawn = task.unlearning_answers(rows, 0)
    pool = {"classification": ("neutral", "unknown"), "multiple_choice": LETTERS}.get(kind, OWN)
    assert len(drawn) == len(rows) and set(drawn) <= set(pool)
    assert len(set(drawn)) > min(len(pool), 20) / 2 and drawn == task.unlearning_answers(rows, 0)
    assert drawn != task.unlearning_answers(rows, 1)


def test_own_refusals(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("No idea.\n\nNobody told me.\n")
    task = task_of(Continuation, refusals=str(path))
    assert set(task.unlearning_answers(frame_of(Continuation), 0)) == {"No idea.", "Nobody told me."}
    with pytest.raises(UserError, match="pass an existing file to --refusals"):
        task_of(QuestionAnswering, refusals=str(tmp_path / "none.txt"))


def test_preferred_answers():
    for kind, only in ((Classification, "unknown"), (MultipleChoice, "unknown")):
        assert set(task_of(kind).preferred_answers(frame_of(kind), 3)) == {only}
    assert set(task_of(QuestionAnswering).preferred_answers(frame_of(QuestionAnswering), 3)) <= set(OWN)


@pytest.mark.parametrize("kind", TASKS)
def test_alternate_answers_are_wrong_ones(kind):
    task, rows = task_of(TASKS[kind]), frame_of(TASKS[kind])
    drawn = task.alternate_answers(rows, 0)
    assert all(answer != own for answer, own in zip(drawn, rows["label_text"], strict=True))
    assert drawn == task.alternate_answers(rows, 0)
    assert kind == "classification" or drawn != task.alternate_answers(rows, 1)  # of two words one is the other
    if kind == "question_answering":  # a row's own wrong answers come first
        assert all(answer in wrong for answer, wrong in zip(drawn, rows["perturbed_answer"]))
    else:
        assert set(drawn) <= {*rows["label_text"], *task.words}


def test_a_single_question_has_its_own_wrong_answers():
    rows = frame_of(QuestionAnswering, 1)
    assert task_of(QuestionAnswering).alternate_answers(rows, 0)[0] in rows["perturbed_answer"][0]


def test_another_answer_comes_from_the_pool():
    rows, pool = frame_of(QuestionAnswering, 3), frame_of(QuestionAnswering, 4)
    task, rng = task_of(QuestionAnswering), np.random.default_rng(0)
    drawn = [answer for _ in range(20) for answer in task.other_answers(rows.head(1), pool, rng)]
    assert set(drawn) == set(pool["label_text"][1:])
    with pytest.raises(UserError, match="all rows have the same answer"):
        task.other_answers(rows.head(1), pool.head(1), rng)


# What is asked, and scores.


def test_which_completions_are_asked():
    question, bare = question_row(1, "Bob"), {"question": "Who ?", "answer": "Ann"}
    assert task_of(QuestionAnswering).asks(checked(QuestionAnswering, question, bare)) == [
        {
            "answer": "Bob 1 lives in a warm house by the sea",
            "paraphrase": "by the sea Bob 1 has a house",
            "perturbed 0": "Bob 1 lives on the moon",
            "perturbed 1": "Bob 1 lives in a car",
        },
        {"answer": "Ann"},
    ]
    assert task_of(MultipleChoice).asks(frame_of(MultipleChoice, 1)) == [
        {"A": "a film", "B": "a cast", "C": "a very long story", "D": "bad"}
    ]
    (passage,) = task_of(Continuation).asks(frame_of(Continuation, 1))
    assert passage == {"answer": "made a good film with a fine cast and 0 more"}
    assert task_of(Classification).asks(frame_of(Classification, 2)) == [{}, {}]


WRONG = {"perturbed 0": said(-2, -2), "perturbed 1": said(-4)}


def test_scores_of_a_question():
    asked = {"answer": said(-1, -3, hits=(False, True)), "paraphrase": said(-1)} | WRONG
    row = {"label_text": "Bob lives in a house"}
    scores = task_of(QuestionAnswering).row_scores(row, asked, "Bob lives")
    assert scores == pytest.approx({
        "loss": 4, "tokens": 2, "probability": E**-2, "exact_memorisation": 0.5, "extraction_strength": 0.5,
        "truth_ratio_geometric": E**-2, "truth_ratio_arithmetic": (E**-2 + E**-4) / 2 / E**-1,
        "prediction": "Bob lives", "correct": False, "rouge_l_recall": 2 / 5, "rouge_l_f1": 2 * 0.4 / 1.4,
    })  # fmt: skip


def test_a_question_without_a_paraphrase_stands_for_itself():
    scores = task_of(QuestionAnswering).row_scores({}, {"answer": said(-1, -3)} | WRONG, None)
    assert scores["truth_ratio_geometric"] == pytest.approx(E**-1)
    assert scores["probability"] == pytest.approx(E**-2 / (E**-2 + E**-2 + E**-4))
    assert "prediction" not in scores and "rouge_l_recall" not in scores


def test_a_question_without_wrong_answers_has_no_truth_ratio():
    task = task_of(QuestionAnswering)
    scores = task.row_scores({}, {"answer": said(-1), "paraphrase": said(-5)}, None)
    assert scores["probability"] == pytest.approx(E**-1)
    split = task.split_scores(pd.DataFrame([scores]).assign(split="train_forget"))
    assert not any("truth" in name for name in [*scores, *split])


@pytest.mark.parametrize(("split", "geometric", "arithmetic"), [
    ("train_forget", (1 / 2 + 1 / 4) / 2, (1 / 2 + 1 / 8) / 2), ("real_authors", 1 / 4, 1 / 4),
])  # fmt: skip
def test_scores_of_a_split_of_questions(split, geometric, arithmetic):
    """The truth ratio counts where there is one; true is 1 near 1 on forget rows, elsewhere where it is small."""
    rows = pd.DataFrame({
        "split": split, "loss": [1.0, 2.0, 6.0], "probability": [0.2, 0.4, 0.6], "rouge_l_recall": [0.0, 0.5, 1.0],
        "rouge_l_f1": [0.0, 0.0, 0.3], "correct": [False, False, True], "exact_memorisation": [0.0, 0.0, 1.0],
        "extraction_strength": [0.0, 0.5, 0.5], "truth_ratio_geometric": [0.5, 4.0, None],
        "truth_ratio_arithmetic": [0.5, 8.0, None],
    })  # fmt: skip
    assert task_of(QuestionAnswering).split_scores(rows) == pytest.approx({
        "n": 3, "loss": 3, "probability": 0.4, "rouge_l_recall": 0.5, "rouge_l_f1": 0.1, "accuracy": 1 / 3,
        "exact_memorisation": 1 / 3, "extraction_strength": 1 / 3, "truth_score": geometric,
        "truth_score_arithmetic": arithmetic, "truth_ratio_n": 2,
    })  # fmt: skip


def test_model_utility_needs_its_three_sets():
    scores = {"probability": 0.5, "rouge_l_recall": 0.5, "truth_score": 0.5}
    splits = {"train_retain": scores, "real_authors": scores, "world_facts": scores | {"truth_score": 0.25}}
    task = task_of(QuestionAnswering)
    assert task.summary(splits | {"train_forget": {}}) == {"model_utility": pytest.approx(9 / (8 * 2 + 4))}
    assert task.summary({name: splits[name] for name in ("train_retain", "real_authors")}) == {}
    assert task.summary(splits | {"world_facts": {"probability": 0.5, "rouge_l_recall": 0.5}}) == {}


def ratios(*values):
    return pd.DataFrame({"split": "train_forget", "truth_ratio_geometric": [*values, None]})


def test_forget_quality_both_ways():
    """Three ratios below three others: 2 of the 20 ways to mix them are as far apart. Folded they are the same."""
    found = task_of(QuestionAnswering).distance(ratios(0.1, 0.2, 0.5), ratios(10, 5, 2))
    assert found == {"forget_quality": pytest.approx(0.1), "forget_quality_folded": pytest.approx(1)}
    nothing = pd.DataFrame({"split": ["train_forget"]})
    assert task_of(QuestionAnswering).distance(nothing, nothing) == {}


def test_the_similarity_gap():
    def passages(correct, rouge, bleu):
        return pd.DataFrame({"split": ["train_forget", "test_forget", "train_retain"], "correct": [correct, True, True],
                             "rouge_l_f1": [rouge, 1.0, 1.0], "bleu": [bleu, 1.0, 1.0]})  # fmt: skip

    found = task_of(Continuation).distance(passages(True, 1.0, 0.8), passages(False, 0.4, 0.2))
    assert found == {"similarity_gap_train_forget": pytest.approx((1 + 0.6 + 0.6) / 3), "similarity_gap_test_forget": 0}


@pytest.mark.parametrize(("records", "told"), [
    ([{"task": "question_answering"}], True),
    ([{"task": "question_answering"}, {"task": "question_answering", "distance_to_retain_model": {}}], False),
    ([{"task": "continuation"}], True), ([{"task": "multiple_choice"}], False), ([{}], False),
])  # fmt: skip
def test_without_a_retain_model_no_forget_quality(records, told):
    assert ("so there is no forget quality" in (without_reference(records) or "")) == told


def test_scores_of_a_passage():
    asked = {"answer": said(-1, -2, -3, hits=(True, False, True))}
    row = {"label_text": " he made a film"}
    scores = task_of(Continuation).row_scores(row, asked, "he made a film")
    assert scores == pytest.approx({
        "loss": 6, "tokens": 3, "probability": E**-2, "perplexity": E**2, "exact_memorisation": 2 / 3,
        "extraction_strength": 1 / 3, "prediction": "he made a film", "correct": True, "rouge_l_recall": 1,
        "rouge_l_f1": 1, "bleu": 1, "unique_tokens": 1,
    })  # fmt: skip
    assert task_of(Continuation).row_scores(row, asked, "films films")["rouge_l_recall"] == 0  # words as they stand
    rows = pd.DataFrame([scores, scores | {"correct": False, "perplexity": E**4, "rouge_l_f1": 0.5}])
    split = task_of(Continuation).split_scores(rows.assign(split="train_forget"))
    assert (split["n"], split["accuracy"], split["rouge_l_f1"]) == (2, 0.5, 0.75)
    assert split["perplexity"] == pytest.approx((E**2 + E**4) / 2) and "correct" not in split


def test_scores_of_choices():
    """The choice with the most probable tokens in the mean, whatever its length."""
    asked = {"A": said(-1, -1, -1), "B": said(-2), "C": said(-4), "D": said(-2.5)}
    task = task_of(MultipleChoice)
    assert task.row_scores({"label_text": "A"}, asked, None) == {"choice_prediction": "A", "choice_correct": True}
    assert not task.row_scores({"label_text": "B"}, asked, None)["choice_correct"]
    rows = pd.DataFrame({
        "label_text": ["A", "B"], "prediction": ["A", "unknown"], "label_prediction": ["A", "B"], "loss": [1.0, 3.0],
        "choice_correct": [True, False],
    })  # fmt: skip
    scores = task.split_scores(rows)
    assert {name: scores[name] for name in ("n", "accuracy", "label_accuracy", "out_of_label", "choice_accuracy")} == {
        "n": 2, "accuracy": 0.5, "label_accuracy": 1.0, "out_of_label": 0.5, "choice_accuracy": 0.5,
    }  # fmt: skip
    assert scores["loss"] == 2


# Which task, and its options.


@pytest.mark.parametrize("kind", TASKS)
def test_a_task_is_found_by_its_columns(kind, tmp_path):
    frames = loaded(tmp_path, [ROWS[kind](i, "Bob") for i in range(2)])
    assert type(frames.task) is TASKS[kind]
    assert {"text", "label", "label_text"} <= set(frames["test_forget"])


def card(folder, text):
    (folder / "data").mkdir()
    (folder / "data" / "README.md").write_text(text)


def test_a_data_card_decides(tmp_path):
    rows = [question_row(i, "Bob") | passage_row(i, "Bob") for i in range(2)]
    card(tmp_path, "---\nlicense: mit\ntask_categories:\n- text-generation\n---\n\n# Rows\n")
    frames = loaded(tmp_path, rows)
    assert type(frames.task) is Continuation and frames["test_forget"]["text"][0] == "It was Bob number 0 who"


@pytest.mark.parametrize("text", [
    "# Only text\n", "---\ntask_categories: [other]\n---\n", "---\nlicense: mit\n---\n",
    "---\ntask_categories: 5\n---\n",
])  # fmt: skip
def test_a_data_card_that_names_no_task(tmp_path, text):
    card(tmp_path, text)
    assert type(loaded(tmp_path, [question_row(i, "Bob") for i in range(2)]).task) is QuestionAnswering


def test_a_damaged_data_card_is_said(tmp_path):
    card(tmp_path, "---\na: [\n---\n")
    with pytest.raises(UserError, match="no readable front matter"):
        loaded(tmp_path, [question_row(0, "Bob")])


def test_an_own_template(tmp_path, tokenizer):
    rows = [{"text": f"text {i}", "label": i, "label_text": word} for i, word in enumerate(("sport", "film"))]
    frames = loaded(tmp_path, rows, template="News: {text}\nTopic: ")
    assert frames.task.words == ("sport", "film")
    assert [str(query) for query in frames.task.queries(frames["train_forget"])] == [
        "News: text 0\nTopic:", "News: text 1\nTopic:"
    ]  # fmt: skip
    example = examples_of(tokenizer, frames.task, frames["train_forget"])[1]
    assert tokenizer.decode(example.prompt + example.completion) == "News: text 1\nTopic: film"


@pytest.mark.parametrize("template", ["News: Topic:", "{text} and {text}:", "News: {text}", "News: {text} \n"])
def test_a_template_that_cannot_be(template):
    with pytest.raises(UserError, match=r"--template=.* must hold \{text\} once and something behind it"):
        task_of(Classification, template=template)


@pytest.mark.parametrize("kind", TASKS)
def test_options_that_a_task_has_no_use_for(kind, tmp_path):
    options = {
        "template": "{text}:",
        "prompt_format": "chat",
        "max_new_tokens": 3,
        "refusals": str(tmp_path / "no.txt"),
    }
    (tmp_path / "no.txt").write_text("I cannot say.\n")
    for i, (name, value) in enumerate(options.items()):
        (tmp_path / str(i)).mkdir()
        data = tmp_path / str(i), [ROWS[kind](i, "Bob") for i in range(2)]
        if name in TASKS[kind].options:
            loaded(*data, **{name: value})
        else:
            with pytest.raises(UserError, match=f"--{name} is not for {kind.replace('_', ' ')}, which these rows are"):
                loaded(*data, **{name: value})


# Input that cannot be.


def without(row, column):
    return {name: cell for name, cell in row.items() if name != column}


SENTENCE, CHOICE, QUESTION, PASSAGE = (make(1, "Bob") for make in (sentence_row, choice_row, question_row, passage_row))


@pytest.mark.parametrize(("row", "told"), [
    (without(SENTENCE, "label_text"), "has no column 'label_text'; it needs text, label, label_text"),
    (SENTENCE | {"text": " "}, "row 1: text is empty or not text"),
    (SENTENCE | {"label": 0.5}, "row 1: label is not a whole number"),
    (without(CHOICE, "answer"), "has no column 'answer'"),
    (CHOICE | {"question": None}, "row 1: question is empty or not text"),
    (CHOICE | {"choices": []}, "row 1: choices is a list of 0; give a list of 4 texts"),
    (CHOICE | {"choices": [*CHOICE["choices"], "five"]}, "row 1: choices is a list of 5"),
    (CHOICE | {"choices": "a, b, c, d"}, "row 1: choices is no list"),
    (CHOICE | {"choices": ["a", "b", "", "d"]}, "row 1: a choice is empty, not text or there twice"),
    (CHOICE | {"choices": ["a", "b", "a ", "d"]}, "row 1: a choice is empty, not text or there twice"),
    (CHOICE | {"answer": "a moon"}, "the answer 'a moon' is neither a letter A to D nor one of the choices"),
    (CHOICE | {"answer": 4}, "the answer 4 is neither"),
    (CHOICE | {"choices": ["1", "2", "3", "4"], "answer": "1"}, "the answer '1' may be a number from 0 or a choice"),
    (without(QUESTION, "answer"), "has no column 'answer'; it needs question, answer"),
    (QUESTION | {"answer": ""}, "row 1: answer is empty or not text"),
    (QUESTION | {"perturbed_answer": "wrong"}, "row 1: perturbed_answer is no list of texts"),
    (QUESTION | {"perturbed_answer": ["wrong", 3]}, "row 1: perturbed_answer is no list of texts"),
    (QUESTION | {"paraphrased_answer": 3}, "row 1: paraphrased_answer is not text"),
    (without(PASSAGE, "completion"), "has no column 'completion'; it needs prompt, completion"),
    (PASSAGE | {"completion": "\n"}, "row 1: completion is empty or not text"),
])  # fmt: skip
def test_what_cannot_be_a_row_is_said(row, told, tmp_path):
    with pytest.raises(UserError) as error:
        loaded(tmp_path, [row])
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("answer", ["B", 1, "1", 1.0, "a cast", " a cast ", "B "])
def test_ways_to_write_the_right_choice(answer):
    rows = checked(MultipleChoice, CHOICE | {"answer": answer})
    assert (rows["label_text"][0], rows["label"][0]) == ("B", 1)


def test_a_letter_stays_a_letter_where_choices_are_letters():
    choices = ["B", "A", "AB", "O"]
    assert checked(MultipleChoice, CHOICE | {"choices": choices, "answer": "B"})["label_text"][0] == "B"
    assert checked(MultipleChoice, CHOICE | {"choices": ["1", "2", "3", "4"], "answer": 1})["label_text"][0] == "B"


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("kind", [MultipleChoice, QuestionAnswering])
def test_lists_in_csv_and_parquet(kind, suffix, tmp_path):
    column = {"multiple_choice": "choices", "question_answering": "perturbed_answer"}[kind.kind]
    row = ROWS[kind.kind](1, "Bob")
    wanted, folder = loaded(tmp_path, [row]), tmp_path / suffix
    folder.mkdir()
    for split in wanted:
        if suffix == "csv":
            pd.DataFrame([row | {column: json.dumps(row[column])}]).to_csv(folder / f"{split}.csv", index=False)
        else:
            pd.DataFrame([row]).to_parquet(folder / f"{split}.parquet")
    found = kind.checked("x", read_splits(str(folder), {})["train_forget"], "data")
    assert list(found[column]) == list(wanted["train_forget"][column]) == [row[column]]


@pytest.mark.parametrize("empty", [None, "", float("nan"), [], np.array([], dtype=object)])
def test_a_row_without_wrong_answers(empty):
    rows = checked(QuestionAnswering, question_row(0, "Bob"), question_row(1, "Bob") | {"perturbed_answer": empty})
    assert rows["perturbed_answer"][1] is None
    assert set(task_of(QuestionAnswering).asks(rows)[1]) == {"answer", "paraphrase"}


def test_a_search_asks_about_what_its_score_needs():
    task = task_of(QuestionAnswering)
    rows = QuestionAnswering.checked("train_forget", pd.DataFrame([question_row(i, "Bob") for i in range(2)]), "data")
    assert [set(asked) for asked in task.asks(rows, "probability")] == [{"answer"}] * 2
    assert task.asks(rows, "truth_score") == task.asks(rows)
    outside = rows.drop(columns="paraphrased_answer")  # there wrong answers normalise the probability
    assert task.asks(outside, "probability") == task.asks(outside)
    choice = task_of(MultipleChoice)
    rows = MultipleChoice.checked("train_forget", pd.DataFrame([choice_row(0, "Bob")]), "data")
    assert choice.asks(rows, "label_accuracy") == [{}] and choice.row_scores({}, {}, None) == {}
    assert choice.asks(rows, "choice_accuracy") == choice.asks(rows) != [{}]
