"""How sure numbers are, the overall score and the export, against numbers worked out by hand."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import scripts
import tiny
from scripts import call, done, metrics_of, names, refused

from utils.data.splits import SPLITS
from utils.errors import UserError
from utils.evaluation import tables
from utils.evaluation.export import metrics_of as exported
from utils.evaluation.export import write_open_unlearning
from utils.evaluation.overall import forgotten, kept, membership_auc, privacy, with_overall
from utils.evaluation.record import with_mcnemar
from utils.evaluation.statistics import Sample, auc, clopper_pearson, difference, mcnemar
from utils.storage import schemas
from utils.storage.formats import Records
from utils.storage.outputs import exported_stems
from utils.tasks.base import TaskOptions
from utils.tasks.classification import classification
from utils.tasks.question_answering import QuestionAnswering

WORDS = classification(["negative", "positive"])
QUESTIONS = QuestionAnswering.recorded((), TaskOptions())

# Intervals and tests.


@pytest.mark.parametrize(
    ("hits", "low", "high"),
    [
        (0, 0, 1 - 0.025 ** (1 / 10)),  # no hit: (1 - p)^10 = 0.025
        (10, 0.025 ** (1 / 10), 1),
        (5, 0.18709, 0.81291),  # Clopper and Pearson's table
    ],
)
def test_clopper_pearson(hits, low, high):
    assert clopper_pearson(hits, 10) == pytest.approx((low, high), abs=1e-5)


def right(n_both, n_first, n_second, n_none):
    """Whether each of two models is right, on so many rows of each kind."""
    first = [True] * (n_both + n_first) + [False] * (n_second + n_none)
    second = [True] * n_both + [False] * n_first + [True] * n_second + [False] * n_none
    return first, second


@pytest.mark.parametrize(
    ("rows", "p"),
    [
        (right(5, 2, 8, 3), 2 * (1 + 10 + 45) / 2**10),  # 2 or fewer of 10, on both sides
        (right(50, 8, 2, 30), 2 * (1 + 10 + 45) / 2**10),  # rows that both get right have no say
        (right(0, 5, 0, 0), 2 / 2**5),
        (right(3, 4, 4, 3), 1),
        (right(9, 0, 0, 1), 1),
    ],
)
def test_mcnemar_is_the_binomial(rows, p):
    assert mcnemar(*rows) == pytest.approx(p)


def test_auc_counts_pairs():
    """Of six pairs the member is above in four, and level in two."""
    assert auc([0.9, 0.5, 0.5], [0.5, 0.1]) == pytest.approx((4 + 2 / 2) / 6)
    assert Sample(np.array([0.9, 0.5, 0.5]), np.array([0.5, 0.1])).value() == pytest.approx(5 / 6)
    rng = np.random.default_rng(0)
    own, others = rng.integers(0, 9, 40), rng.integers(0, 9, 30)
    pairs = [(a > b) + (a == b) / 2 for a in own for b in others]
    assert auc(own, others) == pytest.approx(np.mean(pairs))


def test_the_bootstrap_of_an_auc():
    """Without overlap it never moves; with some it holds the value, and has about Hanley and McNeil's width."""
    assert Sample(np.arange(5, 10), np.arange(5)).interval(0) == (1, 1)
    rng = np.random.default_rng(1)
    sample = Sample(rng.normal(1, 1, 150), rng.normal(0, 1, 150))
    low, high = sample.interval(0)
    a = sample.value()
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = math.sqrt((a * (1 - a) + 149 * (q1 - a * a) + 149 * (q2 - a * a)) / 150**2)
    assert low < a < high and high - low == pytest.approx(2 * 1.96 * error, rel=0.2)
    assert sample.interval(0) == (low, high)  # the seed says which rows are drawn


def test_the_bootstrap_of_a_mean_and_of_a_rate():
    values = np.random.default_rng(2).normal(3, 2, 400)
    low, high = Sample(values).interval(0)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15) and low < values.mean() < high
    assert Sample(np.array([1, 0] * 5)).interval(0) == clopper_pearson(5, 10)


@pytest.mark.parametrize("others", [None, np.array([0.3, 0.2, 0.9])])
def test_identical_samples_do_not_differ_at_all(others):
    sample = Sample(np.random.default_rng(3).random(20), others)
    assert difference(sample, sample, 0) == (0, (0, 0))


def test_a_difference_on_the_same_rows_is_surer_than_one_on_others():
    values = np.random.default_rng(4).normal(0, 5, 60)
    (found, (low, high)), unpaired = difference(Sample(values + 1), Sample(values), 0), Sample(values[:-1])
    assert found == pytest.approx(1) and (low, high) == pytest.approx((1, 1))
    _, (low, high) = difference(Sample(values + 1), unpaired, 0)
    assert high - low > 2


# Records.


def rows_of(correct, **columns):
    """Predictions of the four splits, each with these rows."""
    frame = pd.DataFrame({"correct": correct, **columns})
    return pd.concat([frame.assign(split=split) for split in SPLITS], ignore_index=True)


def record(method, accuracy=0.5, **more):
    scores = {"n": 10, "accuracy": accuracy, "f1": accuracy, "out_of_label": 0.0, "label_accuracy": accuracy}
    scores["accuracy_ci"] = list(clopper_pearson(round(10 * accuracy), 10))
    splits = {split: dict(scores) for split in SPLITS}
    return {"method": method, "checkpoint": method, "seed": 1, "task": "classification", "splits": splits, **more}


def test_records_are_tested_against_the_fine_tuned_one():
    first, second = right(0, 8, 2, 0)
    records = [record("base"), record("fine-tuned (a)"), record("fine-tuned (b)"), record("SPUL")]
    base, tuned, other, spul = with_mcnemar(records, [rows_of(r) for r in (second, first, first, second)])
    assert "mcnemar" not in base and "mcnemar" not in tuned
    assert other["mcnemar"] == {"against": "fine-tuned (a)", "p": dict.fromkeys(SPLITS, 1.0)}
    assert spul["mcnemar"]["p"] == dict.fromkeys(SPLITS, pytest.approx(0.109375))


def test_without_a_fine_tuned_one_the_first_is_what_others_are_tested_against():
    records = with_mcnemar([record("base"), record("npo")], [rows_of([True]), rows_of([False])])
    assert records[1]["mcnemar"]["against"] == "base" and "mcnemar" not in records[0]


def test_rows_that_do_not_say_whether_they_are_correct_are_not_tested():
    bare = rows_of([True]).drop(columns="correct")
    records = [record("fine-tuned"), record("SPUL")]
    assert with_mcnemar(records, [bare, rows_of([True])]) == records
    partly = rows_of([True])
    partly["correct"] = [True, True, True, None]
    assert set(with_mcnemar(records, [partly, rows_of([True])])[1]["mcnemar"]["p"]) == set(SPLITS[:3])


def test_an_interval_in_a_file_is_two_shares_or_absent():
    entry = record("SPUL")
    del entry["splits"]["test_retain"]["accuracy_ci"]  # as earlier versions wrote it
    assert schemas.check([entry], Records, "metrics.json") == [entry]
    for damaged in ([0.1], [0.1, 1.5], 0.5):
        entry["splits"]["test_retain"]["accuracy_ci"] = damaged
        with pytest.raises(UserError, match="splits.test_retain.accuracy_ci"):
            schemas.check([entry], Records, "metrics.json")


# Tables.

TABLE = """\
| method     | train_retain (acc/F1) n=10 | train_forget (acc/F1) n=10 | test_retain (acc/F1) n=10 | \
test_forget (acc/F1) n=10 | forget answers out of label (train/test) | forget label acc. (train/test) |
| ---------- | -------------------------- | -------------------------- | ------------------------- | \
------------------------- | ---------------------------------------- | ------------------------------ |
| fine-tuned | 50.0 / 50.0                | 50.0 / 50.0                | 50.0 / 50.0               | \
50.0 / 50.0               | 0.0 / 0.0                                | 50.0 / 50.0                    |
| SPUL       | 0.0 / 0.0                  | 0.0 / 0.0                  | 0.0 / 0.0                 | \
0.0 / 0.0                 | 0.0 / 0.0                                | 0.0 / 0.0                      |"""


def pair():
    first, second = right(0, 5, 0, 5)
    return with_mcnemar([record("fine-tuned"), record("SPUL", 0.0)], [rows_of(first), rows_of(second)])


def test_the_table_is_what_it_was():
    assert tables.table(pair()) == TABLE


def test_the_table_with_intervals():
    lines = tables.table(pair(), ci=True).splitlines()
    assert lines[2].count(" 50.0 [18.7, 81.3] / 50.0 ") == lines[3].count(" 0.0 [0.0, 30.8] / 0.0 ") == 4
    assert lines[4:] == ["SPUL against fine-tuned (McNemar): test_retain p = 0.0625, train_forget p = 0.0625"]
    older = pair()
    for entry in older:
        for scores in entry["splits"].values():
            del scores["accuracy_ci"]
    assert tables.table(older, ci=True).splitlines()[:4] == TABLE.splitlines()


def test_a_table_of_choices_shows_the_interval_of_the_accuracy_alone():
    entry = record("SPUL") | {"task": "multiple_choice", "headline": "label_accuracy"}
    plain, sure = tables.table([entry]), tables.table([entry], ci=True)
    assert plain.count(" 50.0 / 50.0 ") == sure.count(" 50.0 / 50.0 [18.7, 81.3] ") == 4


def test_a_comparison_says_how_many_seeds_it_has_and_medians_over_them():
    ps = {1: 0.5, 2: 0.01, 3: 0.04}
    distance = dict.fromkeys(("accuracy_forget", "accuracy_retain", "js_train_forget", "js_test_forget"), 0.0)
    overall = {"score": 0.5, "forgetting": 0.5, "privacy": 0.5, "utility": 0.5}
    records = [
        record("SPUL", distance_to_retain_model=distance, overall=overall | {"score": seed / 10})
        | {"seed": seed, "mcnemar": {"against": "fine-tuned", "p": dict.fromkeys(SPLITS, p)}}
        for seed, p in ps.items()
    ]
    table, below = tables.comparison(records).split("\n\n")
    assert table == tables.comparison_table(records)
    spread = "0.20 ± 0.10 (0.50 ± 0.00 / 0.50 ± 0.00 / 0.50 ± 0.00)"
    assert below.splitlines() == [
        "- mean ± standard deviation over 3 seeds",
        f"- SPUL, overall (forgetting/privacy/utility): {spread}",
        "- SPUL against fine-tuned (McNemar, median over 3 seeds): test_retain p = 0.04",
    ]
    (alone,) = tables.comparison([record("SPUL", distance_to_retain_model=distance)]).split("\n\n")
    assert "±" not in alone


# The overall score.


def harmonic(*values):
    return len(values) / sum(1 / value for value in values)


def labelled(train_loss, test_loss):
    """Predictions whose forget rows have these losses."""
    losses = {"train_forget": train_loss, "test_forget": test_loss}
    frames = [pd.DataFrame({"split": split, "loss": losses.get(split, [1.0])}) for split in SPLITS]
    return pd.concat(frames, ignore_index=True)


def test_the_overall_score_of_label_words():
    """AUCs: of six pairs the rows trained on have the lower loss in five; with the retain model in three."""
    retain, own = record("retain model", 0.8), record("SPUL", 0.6)
    retain["splits"]["train_forget"] |= {"accuracy": 0.5, "label_accuracy": 0.5}
    own["splits"]["train_forget"] |= {"accuracy": 0.2, "label_accuracy": 0.7}
    own["splits"]["train_retain"]["accuracy"] = 0.9  # better than the retain model, which counts as 1
    rows = labelled([0.1, 0.2, 0.8], [0.5, 0.9]), labelled([0.1, 0.7, 0.8], [0.2, 0.75])
    assert [membership_auc(one) for one in rows] == pytest.approx([5 / 6, 3 / 6])
    found, target = (entry["overall"] for entry in with_overall([own, retain], rows, WORDS))
    forgetting, private, utility = harmonic(0.8, 0.6), 1 - (5 / 6 - 1 / 2) / (1 / 2), harmonic(1, 0.75)
    assert found["parts"] == {
        "forgetting": pytest.approx({"accuracy": 0.8, "label_accuracy": 0.6}),
        "privacy": pytest.approx({"auc": 5 / 6, "auc_retain": 1 / 2}),
        "utility": pytest.approx({"train_retain": 1, "test_retain": 0.75}),
    }
    assert (found["forgetting"], found["privacy"], found["utility"]) == pytest.approx((forgetting, private, utility))
    assert found["score"] == pytest.approx(harmonic(forgetting, private, utility))
    assert (target["privacy"], target["utility"]) == (1, 1)


def test_a_part_of_nothing_gives_nothing():
    """What gives every label away has forgotten nothing, however private and useful it is; and nobody is below 0."""
    (found, _) = with_overall([record("SPUL", 1.0), record("retain model")], [labelled([1], [1])] * 2, WORDS)
    assert (found["overall"]["score"], found["overall"]["forgetting"], found["overall"]["privacy"]) == (0, 0, 1)
    assert privacy(0.0, 1.0) == privacy(1.0, 0.0) == 0 and privacy(1.0, 0.6) == pytest.approx(1 / 3)
    lost = {"train_forget": {"accuracy": 0.0, "label_accuracy": 0.1}}
    assert forgotten(lost["train_forget"], pd.DataFrame(), WORDS) == {"accuracy": 1, "label_accuracy": 1}


def test_without_one_retain_model_there_is_no_overall_score():
    for methods in (["SPUL", "npo"], ["retain model", "retain model"]):
        records = [record(method) for method in methods]
        assert with_overall(records, [labelled([1], [2])] * 2, WORDS) == records


def questions(split, loss=(2.0, 4.0), ratios=(1.0, 3.0)):
    """Two scored rows of questions, of two and of four tokens."""
    return pd.DataFrame({
        "split": split, "loss": loss, "tokens": [2, 4], "probability": [0.5, 0.25], "exact_memorisation": [0.5, 0.0],
        "extraction_strength": [0.5, 0.1], "rouge_l_recall": [1.0, 0.5], "rouge_l_f1": [0.5, 0.5],
        "correct": [False, False], "truth_ratio_geometric": ratios,
    })  # fmt: skip


def questioned(method, splits):
    """(record, predictions) of the question answering task."""
    rows = {split: questions(split) for split in splits}
    scores = {split: QUESTIONS.split_scores(frame) for split, frame in rows.items()}
    entry = {"method": method, "task": "question_answering", "splits": scores, "summary": QUESTIONS.summary(scores)}
    return entry, pd.concat(rows.values(), ignore_index=True).assign(method=method)


def test_forgetting_of_questions():
    """A truth ratio of 3 is wrong answers three times as likely: the right one has a quarter of the two."""
    rows = questions("train_forget")
    found = forgotten(QUESTIONS.split_scores(rows), rows, QUESTIONS)
    expected = {"extraction_strength": 0.7, "exact_memorisation": 0.75, "probability": 0.625}
    assert found == pytest.approx(expected | {"truth_ratio": 1 - (1 / 2 + 1 / 4) / 2})
    without = rows.drop(columns="truth_ratio_geometric")
    assert forgotten(QUESTIONS.split_scores(without), without, QUESTIONS) == pytest.approx(expected)


def test_membership_of_questions_is_by_the_loss_of_a_token():
    """Row by row the first is below both, token by token it is above one of them."""
    rows = [questions("train_forget", (2.0, 9.0)).head(1), questions("test_forget", (3.0, 2.4))]
    assert membership_auc(pd.concat(rows, ignore_index=True)) == 1 / 2


def test_the_utility_of_tofu_is_its_own():
    entry, _ = questioned("SPUL", [*SPLITS, "real_authors", "world_facts"])
    assert kept(entry, {}, "rouge_l_recall") == {"model_utility": entry["summary"]["model_utility"]}
    entry, _ = questioned("SPUL", SPLITS)
    share = kept(entry, {"train_retain": 0.0, "test_retain": 1.0}, "rouge_l_recall")
    assert share == {"train_retain": 1, "test_retain": 0.75}


# The export.


def test_an_export_of_questions_has_the_names_and_the_shape_of_open_unlearning(tmp_path):
    entry, rows = questioned("SPUL / a b", [*SPLITS, "real_authors", "world_facts"])
    entry["distance_to_retain_model"] = {"forget_quality": 0.25, "accuracy_forget": 0.1}
    write_open_unlearning(tmp_path, [entry], rows, QUESTIONS)
    assert names(tmp_path) == {"SPUL_a_b_EVAL.json", "SPUL_a_b_SUMMARY.json"}
    found, summary = (json.loads((tmp_path / f"SPUL_a_b_{part}.json").read_text()) for part in ("EVAL", "SUMMARY"))
    sets = {"retain": ["Prob", "ROUGE"], "ra": ["Prob", "Prob_normalised", "ROUGE"]}
    sets["wf"] = sets["ra"]
    assert list(found) == list(summary) == sorted([
        "forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_truth_ratio", "forget_quality", "model_utility",
        "extraction_strength", "exact_memorization", *(f"{s}_Truth_Ratio" for s in sets),
        *(f"{s}_Q_A_{name}" for s, those in sets.items() for name in those),
    ])  # fmt: skip
    assert summary == {name: metric["agg_value"] for name, metric in found.items()}
    e = math.exp(-1)
    assert found["forget_Q_A_Prob"] == {
        "agg_value": pytest.approx(e),
        "value_by_index": {str(i): {"prob": pytest.approx(e), "avg_loss": 1.0} for i in range(2)},
    }
    recalls = {"0": {"rougeL_recall": 1.0, "rougeL_f1": 0.5}, "1": {"rougeL_recall": 0.5, "rougeL_f1": 0.5}}
    assert found["forget_Q_A_ROUGE"] == {"agg_value": 0.75, "value_by_index": recalls}
    ratios = {"0": {"score": 1.0}, "1": {"score": 3.0}}
    assert found["forget_truth_ratio"] == {"agg_value": pytest.approx((1 + 1 / 3) / 2), "value_by_index": ratios}
    assert found["extraction_strength"]["value_by_index"] == {"0": {"score": 0.5}, "1": {"score": 0.1}}
    assert found["forget_quality"] == {"agg_value": 0.25}
    assert summary["ra_Q_A_Prob_normalised"] == 0.375


def test_what_has_no_number_is_exported_as_none():
    rows = questions("train_forget", ratios=(0.5, None)).drop(columns=["rouge_l_recall", "rouge_l_f1", "correct"])
    entry = {"splits": {"train_forget": QUESTIONS.split_scores(rows)}}
    found = exported(entry, rows, QUESTIONS)
    assert found["forget_truth_ratio"]["value_by_index"] == {"0": {"score": 0.5}, "1": {"score": None}}
    assert "forget_Q_A_ROUGE" not in found and "forget_Q_A_Prob" in found


def test_names_of_exported_files_are_safe_and_differ():
    stems = exported_stems(["SPUL", "fine-tuned (a/b)", "fine-tuned (a b)", "spul", "../x", "é", "n" * 999])
    assert stems == ["SPUL", "fine-tuned_a_b", "fine-tuned_a_b-2", "spul-2", "x", "model", "n" * 150]


# By the command line.


def table_lines(run):
    """What a run prints from the table on."""
    return "".join(done(run).stdout.partition("| method")[1:]).splitlines()


@pytest.mark.slow
def test_intervals_and_export_by_the_command_line(tiny_model, small_data, tmp_path):
    how = (f"--dataset={small_data}", *scripts.ROWS, "--output_path=out", "--overwrite")
    asked = "--model_checkpoints", tiny_model, tiny.save(tmp_path / "other")
    plain = table_lines(call(tmp_path, "inference_spul", *how, *asked))
    records = metrics_of(tmp_path / "out")
    schemas.check(records, Records, "metrics.json")
    for entry in records:
        for scores in entry["splits"].values():
            hits = round(scores["accuracy"] * scores["n"])
            assert scores["accuracy_ci"] == list(clopper_pearson(hits, scores["n"]))
    assert records[1]["mcnemar"]["against"] == "base (tiny-llama)" and "overall" not in records[1]
    assert plain[0] == tables.table(records).splitlines()[0] and "[" not in "".join(plain[:4])

    sure = table_lines(call(tmp_path, "inference_spul", *how, *asked, "--ci", "--export=open-unlearning"))
    assert sure[:5] == tables.table(metrics_of(tmp_path / "out"), ci=True).splitlines()
    assert sure[4] == "base (other) against base (tiny-llama) (McNemar): test_retain p = 1, train_forget p = 1"
    written = {f"base_{name}_{part}.json" for name in ("tiny-llama", "other") for part in ("EVAL", "SUMMARY")}
    assert names(tmp_path / "out") == {"metrics.json", "predictions.jsonl", "comparison.png"} | written
    found = json.loads((tmp_path / "out" / "base_other_EVAL.json").read_text())
    assert set(found) == {f"{split}_{score}" for split in SPLITS for score in ("accuracy", "loss")}
    values = [row["score"] for row in found["test_retain_accuracy"]["value_by_index"].values()]
    assert np.mean(values) == found["test_retain_accuracy"]["agg_value"]

    (tmp_path / "out" / "mine_EVAL.json").write_text("{}")  # of no record here
    sentence = "mine_EVAL.json is not of this project and --overwrite would delete it"
    refused(tmp_path, sentence, "inference_spul", *how, *asked)
    (tmp_path / "out" / "mine_EVAL.json").unlink()
    done(call(tmp_path, "inference_spul", *how, "--model_checkpoints", tiny_model))  # replaces what was exported
    assert names(tmp_path / "out") == {"metrics.json", "predictions.jsonl", "comparison.png"}


@pytest.mark.parametrize("flag", ["--ci", "--export=open-unlearning"])
@pytest.mark.parametrize(
    ("instead", "sentence"),
    [
        ("--text=a", "is of the evaluation, which --text and --input_file replace; leave it out"),
        ("--audit", "does not go with --audit"),
    ],
)
def test_flags_of_the_evaluation_go_with_it(tmp_path, flag, instead, sentence):
    said = f"{flag.split('=')[0]} {sentence}"
    refused(tmp_path, said, "inference_spul", "--model_checkpoints=a", flag, instead)
