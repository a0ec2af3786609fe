"""What counts as an answer: where it ends, which words it is compared with, and how new text is answered."""

import importlib
import json
import math
import re
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import scripts
import tiny
from scripted import BAD, FILM, WELL, score, scripted
from scripts import call, done, refused

from utils.data.splits import SPLITS
from utils.errors import UserError, note_once
from utils.evaluation import predict, tables
from utils.evaluation.answering import answer_texts
from utils.evaluation.record import with_distances
from utils.tasks.answers import known_answers
from utils.tasks.classification import classification
from utils.tasks.encode import completion_ids, tokenize
from utils.tasks.rows import load_splits
from utils.tasks.scores import label_scores
from utils.unlearning import objectives
from utils.unlearning.methods import METHODS, MethodSettings

STARS = ["1", "3", "10"]  # the tokens of 1 begin those of 10
TWO = ("--max_eval_samples=2", "--output_path=out")
VERDICTS = ["very good", "not bad", "not good"]  # two tokens each


@pytest.fixture(scope="module")
def stars(small_data):
    """The small splits with 1 and 10 as labels."""
    folder = small_data.parent / "stars"
    folder.mkdir()
    for split in SPLITS:
        frame = pd.read_csv(small_data / f"{split}.csv")
        frame.assign(label_text=frame["label"].map({0: 1, 1: 10})).to_csv(folder / f"{split}.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def rated(tiny_model, stars):
    """What qlora.py wrote on it, memorised, and what it said."""
    note_once.cache_clear()
    arguments = "--lr=2e-3", "--num_epochs=14", "--lora_target_modules=all-linear", "--output_path=rated"
    return stars.parent / "rated", done(scripts.qlora(stars.parent, tiny_model, stars, *arguments))


def passes(loaded):
    """A list that grows by the shape of the input with every pass of the model."""
    seen = []
    loaded.model.register_forward_hook(
        lambda _, args, kwargs, __: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    return seen


def test_an_answer_that_begins_another_has_to_end(tokenizer):
    """The model goes on to 10 behind ` film` and ends behind ` bad`; the first token of both is that of 1."""
    (one, *_), (_, zero), end = completion_ids(tokenizer, "1"), completion_ids(tokenizer, "10"), tokenizer.eos_token_id
    seen = {FILM: {one: 9.0, zero: 5.0}, BAD: {one: 9.0, end: 5.0}}
    loaded = scripted(tokenizer, {zero: {end: 20.0}}, seen)
    rows = score(loaded, ["a film", "a film", "a bad", "a bad"], ["1", "10", "1", "10"], STARS)
    # behind the first token what was seen argues for it once more: it is repeated, and that is no answer of ours
    assert list(rows["correct"]) == [False] * 4
    loaded = scripted(tokenizer, {zero: {end: 20.0}, one: {one: -9.0}}, seen)
    rows = score(loaded, ["a film", "a film", "a bad", "a bad"], ["1", "10", "1", "10"], STARS)
    assert list(rows["prediction"]) == ["10", "10", "1", "1"]
    assert list(rows["correct"]) == [False, True, True, False]
    assert list(rows["label_prediction"]) == ["10", "10", "1", "1"]
    assert [word for word, _ in answer_texts(loaded, ["a film", "a bad"], classification(STARS), 200, 2)] == ["10", "1"]
    assert (rows["label_mass"] <= 1).all()


def test_the_end_costs_nothing_where_no_word_begins_another(tokenizer):
    for words in (["negative", "positive"], VERDICTS, ["positive", "good enough"]):
        known = known_answers(tokenizer, classification(words))
        assert not known.closed
        assert all(known.ids[word] == completion_ids(tokenizer, word) for word in words)
        texts = ["a fine film"] * len(words)
        assert tokenize(tokenizer, texts, words, 96, answers=known) == tokenize(tokenizer, texts, words, 96)


@pytest.mark.parametrize("words", [STARS, ["good", "good film"], ["un", "positive"]])
def test_every_answer_ends_where_one_begins_another(tokenizer, words, capsys):
    """An unlearning word counts too: ` un` begins ` unknown`."""
    note_once.cache_clear()
    for _ in range(2):
        known = known_answers(tokenizer, classification(words))
        assert known.closed and list(known.ids) == [*words, "neutral", "unknown"]
        for word, ids in known.ids.items():
            assert ids == (*completion_ids(tokenizer, word), tokenizer.eos_token_id)
    said = capsys.readouterr().err
    assert said.count("begin those of") == 1 and "the end-of-sequence token at its end" in said


def test_words_that_cannot_be_told_apart():
    tokenizer = tiny.build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="'1' begin those of '10' and the tokenizer has no end-of-sequence token"):
        known_answers(tokenizer, classification(STARS))
    assert not known_answers(tokenizer, classification(VERDICTS)).closed


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["yes", "nay"], "'yes' and 'nay' alike"),
        (["seventh", "nay"], "'seventh' and 'neutral' alike"),
        (["nay", ""], "nothing for ''"),
    ],
)
def test_words_without_tokens_of_their_own(tokenizer, words, fault):
    """With a tokenizer that sees the length of a word alone."""
    by_length = mock.patch("utils.tasks.answers.completion_ids", lambda _, word, __: (7,) * len(word))
    with by_length, pytest.raises(UserError, match=fault):
        known_answers(tokenizer, classification(words))


class Captured(Exception):
    """The examples that a script was about to train on."""


@pytest.mark.parametrize("method", ["qlora", "spul", "random_label", "dpo"])
def test_every_script_trains_on_whole_answers(tiny_model, stars, tmp_path, method):
    def capture(**arguments):
        raise Captured(arguments["examples"])

    with mock.patch("utils.job.Training", capture), pytest.raises(Captured) as caught:
        if method in ("qlora", "spul"):
            getattr(scripts, method)(tmp_path, tiny_model, stars, "--max_eval_samples=0")
        else:
            scripts.baselines(tmp_path, tiny_model, stars, method, "--max_eval_samples=0", "--tune=lora")
    end = tiny.build_tokenizer().eos_token_id
    assert {example.completion[-1] for example in caught.value.args[0]} == {end}
    assert len(caught.value.args[0]) >= 8


def test_what_unlearns_counts_whole_answers(tokenizer, stars):
    frames = load_splits(str(stars))
    asked = MethodSettings(unlearn_method="dpo", max_length=96, retain_loss="ce")
    rows = objectives.Rows(tokenizer, frames, METHODS["dpo"], asked)
    of_spul = sum(objectives.prompt_rows(tokenizer, frames, 96, 42), [])
    assert all(example.completion[-1] == tokenizer.eos_token_id for example in [*rows.all, *of_spul])


def test_labels_that_begin_one_another_through_the_scripts(rated, stars, tmp_path):
    """Memorised, scored and answered as whole answers, the prompt's checkpoint included; the words come from the
    manifest. One note."""
    folder, said = rated
    assert said.stderr.count("the tokens of '1' begin those of '10'") == 1
    splits = json.loads((folder / "metrics.json").read_text())[0]["splits"]
    assert splits["train_forget"]["accuracy"] == splits["train_forget"]["label_accuracy"] == 1
    rows = pd.read_csv(stars / "train_forget.csv")
    flags = "--model_checkpoints", folder, "--json", *scripts.ROWS, *(f"--text={text}" for text in rows["text"])
    lines = [json.loads(line) for line in done(call(tmp_path, "inference_spul", *flags)).stdout.splitlines()]
    assert [line["answer"]["answer"] for line in lines] == [str(word) for word in rows["label_text"]]
    done(scripts.spul(tmp_path, folder, stars, "--max_steps=1", "--output_path=prompt"))
    other = "--dataset=snippets", "--model_checkpoints", "prompt", "--json", *scripts.ROWS, "--max_train_samples=40"
    (line,) = done(call(tmp_path, "inference_spul", *other, f"--text={rows['text'][0]}")).stdout.splitlines()
    assert json.loads(line)["without prompt"]["answer"] == str(rows["label_text"][0])


def test_the_prediction_is_the_greedy_answer_not_the_forced_one(tokenizer):
    """Labels of two tokens each: with ` very` given, the model goes on to ` good`, which it would never have said."""
    (very, _), (no, bad) = completion_ids(tokenizer, "very good"), completion_ids(tokenizer, "not bad")
    loaded = scripted(tokenizer, {very: {no: 20.0}, no: {bad: 20.0}}, {FILM: {no: 6.0}})
    rows = score(loaded, ["a film"] * 3, VERDICTS, VERDICTS)
    assert list(rows["prediction"]) == ["not bad"] * 3
    assert list(rows["correct"]) == [False, True, False]
    assert label_scores(rows.assign(label_text=VERDICTS), VERDICTS)["out_of_label"] == 0


def test_a_greedy_answer_that_is_a_label_costs_no_further_pass(tokenizer):
    no, bad = completion_ids(tokenizer, "not bad")
    loaded = scripted(tokenizer, {no: {bad: 20.0}}, {FILM: {no: 6.0}, WELL: {tokenizer.eos_token_id: 6.0}})
    seen = passes(loaded)
    rows = score(loaded, ["a film"] * 3 + ["it is well"], [*VERDICTS, "not bad"], VERDICTS)
    assert len(seen) == 1 + len(VERDICTS)  # the label's own, and one for every word
    assert rows["prediction"][3] == "</s>"


def test_rows_leave_the_batch_when_they_have_answered(tokenizer):
    """` positive` takes one pass. Only the row that says something else goes on, until the model ends it."""
    of, the = tokenizer(" of")["input_ids"][0], tokenizer(" the")["input_ids"][0]
    after = {of: {the: 20.0}, the: {tokenizer.eos_token_id: 40.0}}
    loaded = scripted(tokenizer, after, {FILM: {" positive": 7.0}, WELL: {of: 5.0}})
    seen = passes(loaded)
    words = ["negative", "positive"]
    assert [word for word, _ in answer_texts(loaded, ["a film"] * 3, classification(words), 200, 8)] == ["positive"] * 3
    assert [shape[0] for shape in seen] == [3]
    seen.clear()
    found = answer_texts(loaded, ["a film", "it is well", "a film"], classification(words), 200, 8)
    assert [word for word, _ in found] == ["positive", "of the", "positive"]
    assert [shape[0] for shape in seen] == [3, 1, 1]
    assert found[1][1] == pytest.approx(math.exp(5) / (math.exp(5) + len(tokenizer) - 1), rel=1e-3)


def test_a_tie_of_labels_is_broken_as_the_arg_max_breaks_it(tokenizer):
    """bfloat16 logits tie often. A row whose arg max is the label has it as the best label word, in any order."""
    rng = np.random.default_rng(0)
    texts = [" film" * a + " bad" * b + " well" * c for a, b, c in rng.integers(0, 3, (40, 3)) if a + b + c]
    seen = {
        FILM: {" positive": 2.0, " negative": 2.0},
        BAD: {" positive": 1.0, " negative": 2.0},
        WELL: {" positive": 2.0, " negative": 1.0, " of": 3.0},
    }
    loaded = scripted(tokenizer, {}, seen)
    for words in (["negative", "positive"], ["positive", "negative"]):
        rows = score(loaded, texts, list(rng.choice(words, len(texts))), words)
        said = rows["prediction"].isin(words)
        ties = rows["label_probabilities"].map(lambda shares: len(set(shares.values())) == 1)
        assert (ties & said).sum() > 2 and said.sum() < len(rows)
        assert list(rows["label_prediction"][said]) == list(rows["prediction"][said])


def test_label_accuracy_is_never_below_accuracy(fine_tuned):
    """Of words of one token each."""
    for record in json.loads((fine_tuned / "metrics.json").read_text()):
        assert all(split["label_accuracy"] >= split["accuracy"] for split in record["splits"].values())


def test_label_mass_is_what_the_words_have_together(tokenizer):
    loaded = scripted(tokenizer, {}, {FILM: {" positive": 6.0, " negative": 4.0, " of": 5.0}})
    row = score(loaded, ["a film"], ["positive"], ["negative", "positive"]).iloc[0]
    total = math.exp(6) + math.exp(4) + math.exp(5) + len(tokenizer) - 3
    assert row["label_mass"] == pytest.approx((math.exp(6) + math.exp(4)) / total, rel=1e-6)
    assert sum(row["label_probabilities"].values()) == pytest.approx(1)
    assert -math.log(row["label_mass"] * row["label_probabilities"]["positive"]) == pytest.approx(row["loss"], rel=1e-6)


def test_micro_precision_and_recall_are_the_accuracy():
    """Why the scores do not repeat what the published code records under these names."""
    import sklearn.metrics

    truth, said = ["a", "b", "a", "b", "a"], ["a", "a", "unknown", "b", "neutral"]
    precision, recall, _, _ = sklearn.metrics.precision_recall_fscore_support(
        truth, said, average="micro", zero_division=0
    )
    assert precision == recall == sklearn.metrics.accuracy_score(truth, said) == 0.4


def records_and_rows(**methods):
    """Records and predictions of methods given as (accuracies of the four splits, label mass on forget rows)."""
    records, predictions = [], []
    for method, (accuracies, mass) in methods.items():
        scores = {"f1": 0.5, "out_of_label": 0.25, "label_accuracy": 0.75, "n": 26}
        splits = {split: {"accuracy": accuracy, **scores} for split, accuracy in zip(SPLITS, accuracies)}
        names = {"fine_tuned": "fine-tuned", "retain_model": "retain model"}
        records.append({"method": names.get(method, method), "splits": splits})
        shares = [{"negative": 0.2, "positive": 0.8}] * 4
        predictions.append(pd.DataFrame({"split": SPLITS, "label_probabilities": shares, "label_mass": mass}))
    return records, predictions


def test_a_refuser_is_far_from_the_retrained_model():
    """With the label words' own proportions untouched it scored 0 bits; and the two sides stand apart: left as it was,
    a model has the distance of its forget side alone."""
    rows = records_and_rows(
        retain_model=([0.9, 0.6, 0.8, 0.7], 1.0),
        fine_tuned=([0.9, 1.0, 0.8, 0.9], 1.0),
        refuser=([0.9, 0, 0.8, 0], 0.0),
    )
    task = classification(["negative", "positive"])
    _, untouched, refuser = (record["distance_to_retain_model"] for record in with_distances(*rows, task))
    assert untouched == pytest.approx(
        {"accuracy_forget": 0.3, "accuracy_retain": 0, "js_train_forget": 0, "js_test_forget": 0}
    )
    assert (refuser["accuracy_forget"], refuser["js_train_forget"]) == pytest.approx((0.65, 1))
    with pytest.raises(UserError, match="remove them and evaluate again"):
        with_distances(rows[0], [frame.drop(columns="label_mass") for frame in rows[1]], task)


def test_tables_show_rows_and_what_a_refusal_still_tells():
    records = with_distances(
        *records_and_rows(
            fine_tuned=([0.9, 1.0, 0.8, 0.9], 1.0), SPUL=([0.9, 0, 0.8, 0.1], 0.1), retain_model=([1] * 4, 1)
        ),
        classification(["negative", "positive"]),
    )
    for table in (tables.table(records), tables.comparison_table(records)):
        head, _, *lines = (line.split("|") for line in table.splitlines())
        assert [cell.strip()[-4:] for cell in head[2:6]] == ["n=26"] * 4
        by_name = {cell.strip(): i for i, cell in enumerate(head)}
        label, gap = by_name["forget label acc. (train/test)"], by_name[tables.DISTANCES[0]]
        assert {line[label].strip() for line in lines} == {"75.0 / 75.0"}
        assert [line[gap].strip() for line in lines] == ["5.0 / 15.0", "95.0 / 15.0", "0.0 / 0.0"]
    records[0]["splits"]["test_forget"]["n"] = 610
    assert "test_forget (acc/F1) n=26/610" in tables.table(records)
    said = tables.meaning([{**records[0], "method": "fine-tuned"}, records[1]])
    assert "rank the label words instead still reads the label of 75.0 % of the rows to forget" in said


def ask(cwd, *flags):
    return call(cwd, "inference_spul", *scripts.ROWS, "--model_checkpoints", *flags)


def test_answers_are_written_as_they_come(prompt, tmp_path):
    """Killed in the third part, the first two are there, in order; the bar is on stderr."""
    texts = [f"text {n} of a film" + " that is long" * (n % 3) for n in range(11)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    real, started = predict._answer, []

    def interrupted(rows, *arguments):
        started.append(len(rows))
        if len(started) == 3:
            raise KeyboardInterrupt
        real(rows, *arguments)

    flags = "--input_file=texts.txt", "--eval_batch_size=1", "--json"
    with mock.patch.object(predict, "_answer", interrupted):
        killed = ask(tmp_path, prompt, *flags)
    assert killed.code == 130 and started == [4, 4, 3]
    lines = [json.loads(line) for line in killed.stdout.splitlines()]
    assert [line["text"] for line in lines] == texts[:8]
    assert "answering:" in killed.stderr and "11/11" not in killed.stderr
    whole = done(ask(tmp_path, prompt, *flags))
    assert [json.loads(line)["text"] for line in whole.stdout.splitlines()] == texts
    assert whole.stdout.startswith(killed.stdout) and "11/11" in whole.stderr


def test_several_checkpoints_are_written_with_the_last(prompt, fine_tuned, tmp_path):
    (tmp_path / "texts.txt").write_text("a film\nthe film\nit\nfilms\nof\n")
    result = done(ask(tmp_path, fine_tuned, prompt, "--input_file=texts.txt", "--eval_batch_size=1", "--json"))
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == 5
    assert all(len(line) == 4 and line["fine-tuned: answer"] == line["prompt: without prompt"] for line in lines)


@pytest.mark.parametrize("text", ["--- x", "--dash", "-x", "- a list item", "-1"])
def test_a_text_may_begin_with_a_dash(text):
    parsed = parse("inference_spul", "--model_checkpoints=x", "--text", text, "--json")
    assert parsed.text == [text] and parsed.json
    assert parse("spul", "--model_checkpoints=x", "--init_text", text).init_text == text


def parse(script, *arguments):
    with mock.patch("sys.argv", [f"{script}.py", *arguments]):
        return importlib.import_module(script).parse_args()


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("", "argument --text: it is empty or no UTF-8; give a text"),
        (" \t", "argument --text: it is empty"),
        ("a \udcff film", "argument --text: it is empty or no UTF-8"),
    ],
)
def test_a_text_that_is_none(value, sentence, tmp_path):
    refused(tmp_path, sentence, "inference_spul", "--model_checkpoints=x", "--text", value)
    refused(tmp_path, "expected one argument", "inference_spul", "--model_checkpoints=x", "--text", "--json")


def test_answers_of_a_broken_model_are_no_answers(tokenizer):
    loaded = scripted(tokenizer, {}, {FILM: {" positive": math.nan}})
    with pytest.raises(UserError, match="the model's answer is not finite; use --dtype=float32"):
        answer_texts(loaded, ["it is well", "a film"], classification(["negative", "positive"]), 200, 1)


def test_another_max_length_than_in_training_is_named(fine_tuned, small_data, tmp_path):
    """Only where it cuts texts elsewhere."""
    note_once.cache_clear()
    data_of_training, chosen = f"--dataset={small_data}", f"--model_checkpoints={fine_tuned}"
    scored = done(call(tmp_path, "inference_spul", chosen, data_of_training, *scripts.ROWS, *TWO, "--max_length=71"))
    assert re.search(r"fine-tuned was trained with --max_length=96 and this is 71: 1\d of 34 texts", scored.stderr)
    assert "give this command --max_length=96" in scored.stderr
    long = "--text=" + "the film was long " * 30
    said = done(ask(tmp_path, fine_tuned, "--max_length=400", long, "--text=a film"))
    assert "--max_length=96 and this is 400: 1 of 2 texts" in said.stderr
    assert "note:" not in done(ask(tmp_path, fine_tuned, "--max_length=401", "--text=a film")).stderr
    with mock.patch("utils.job.Training", side_effect=UserError("far enough")):
        said = scripts.spul(tmp_path, fine_tuned, small_data, "--max_length=72", "--max_eval_samples=0")
    assert "far enough" in said.stderr and "--max_length=96 and this is 72" in said.stderr
