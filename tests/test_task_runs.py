"""The scripts on questions, choices and passages, by their command lines: what they write and print."""

import json

import asking
import pytest
import scripts
import tiny
from marks import mostly_long
from scripts import call, done, metrics_of

from utils.audit.names import AUDIT_NAMES
from utils.data.splits import SPLITS
from utils.tasks.rows import TASKS

pytestmark = pytest.mark.slow

FLAGS = ("--max_length=160", "--max_eval_samples=2")
GATE = "--eco_threshold=0.5"
METHODS = {  # shared out, so that each is run once
    "question_answering": {
        "altpo": (),
        "idk": (),
        "eco": (GATE, "--eco_target=0.2", "--eco_steps=1", "--eco_bisect=1"),
    },
    "multiple_choice": {"npo": (), "refusal": (GATE,)},
    "continuation": {"dpo": (), "pdu": (), "refusal": (GATE,)},
}
DISTANCES = {
    "question_answering": {"forget_quality", "forget_quality_folded"},
    "multiple_choice": {"js_train_forget", "js_test_forget"},
    "continuation": {"similarity_gap_train_forget", "similarity_gap_test_forget"},
}


def flags_of(kind):
    return (*FLAGS, "--max_new_tokens=5") if TASKS[kind].generates else FLAGS


@pytest.fixture(scope="module", params=mostly_long(METHODS, "multiple_choice", "question_answering"))
def runs(request, tmp_path_factory, tiny_model):
    """(folder of all runs of a task, its kind, what was printed by the last one)."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    asking.save_task(folder / "data", kind)
    how, tuning = flags_of(kind), ("--lr=2e-3", "--num_epochs=3", "--lora_target_modules=all-linear")
    curve = "--eval_steps=2", "--curve_samples=2"
    done(scripts.qlora(folder, tiny_model, "data", *how, *tuning, *curve, "--output_path=tuned"))
    done(scripts.qlora(folder, tiny_model, "data", *how, *tuning, "--exclude_forget", "--max_eval_samples=0",
                       "--output_path=retain"))  # fmt: skip
    done(scripts.spul(folder, "tuned", "data", *how, "--output_path=prompt"))
    done(scripts.spul(folder, "tuned", "data", *how, "--gate=tfidf", GATE, "--output_path=gated"))
    for method, flags in METHODS[kind].items():
        done(scripts.baselines(folder, "tuned", "data", method, *how, *flags, f"--output_path={method}"))
    checkpoints = "--model_checkpoints", "tuned", "retain", "prompt", "gated", *METHODS[kind]
    result = done(call(folder, "inference_spul", "--dataset=data", *scripts.ROWS, *how, *checkpoints,
                       "--show_examples=1", "--output_path=results"))  # fmt: skip
    return folder, kind, result.stdout


def test_the_curve_has_the_name_of_its_score(runs):
    folder, kind, _ = runs
    log = [json.loads(line) for line in (folder / "tuned" / "training.jsonl").read_text().splitlines()]
    measured = [line for line in log if "loss" not in line]
    assert measured and all(set(line) == {"step", TASKS[kind].compared} for line in measured)
    assert TASKS[kind].compared != "accuracy" and (folder / "tuned" / "training.png").exists()


def names(kind):
    return ["fine-tuned", "retain model", "SPUL", "SPUL behind a gate", *METHODS[kind]]


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_records_say_the_task_and_the_distance(runs):
    folder, kind, _ = runs
    records, task = metrics_of(folder / "results"), TASKS[kind]
    assert [record["method"] for record in records] == names(kind)
    for record in records:
        assert (record["task"], record["headline"]) == (kind, task.headline)
        assert set(SPLITS) <= set(record["splits"]) and "summary" not in record  # TOFU's three sets are not there
        assert all(set(task.shown) <= set(record["splits"][split]) for split in SPLITS)
        assert set(record["distance_to_retain_model"]) == {"accuracy_forget", "accuracy_retain"} | DISTANCES[kind]
    own = dict(zip(names(kind), records))["retain model"]["distance_to_retain_model"]
    perfect = {name: 1 if name.startswith("forget_quality") else 0 for name in own}
    assert own == pytest.approx(perfect, abs=1e-6)


def test_each_checkpoint_records_its_own_scores(runs):
    folder, kind, _ = runs
    (alone,) = metrics_of(folder / "prompt")[-1:]
    (again,) = (record for record in metrics_of(folder / "results") if record["method"] == "SPUL")
    for split in SPLITS:
        assert alone["splits"][split]["loss"] == pytest.approx(again["splits"][split]["loss"], rel=1e-3)
    manifest = scripts.manifest_of(folder / "prompt")
    assert (manifest["task"], tuple(manifest["label_words"])) == (kind, TASKS[kind].words)


def test_a_prediction_for_every_checkpoint_and_row(runs):
    folder, kind, _ = runs
    rows = predictions(folder / "results")
    assert len(rows) == len(names(kind)) * len(SPLITS) * 2
    assert set(TASKS[kind].scored) <= set(rows[0]) and set(rows[0]) >= {"method", "split", "text", "label_text"}
    assert all(isinstance(row["prediction"], str) for row in rows)
    gated = [row for row in rows if row["method"] == "SPUL behind a gate"]
    plain = {(row["split"], row["text"]): row for row in rows if row["method"] == "fine-tuned"}
    let_through = [row for row in gated if not row["flagged"]]
    assert let_through and len(let_through) < len(gated)
    for row in let_through:
        assert row["prediction"] == plain[row["split"], row["text"]]["prediction"]


def test_the_table_shows_what_the_task_counts(runs):
    _, kind, printed = runs
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines] == ["method", "-" * len(lines[1].split("|")[1].strip()),
                                                              *names(kind)]  # fmt: skip
    assert all(f"{split} n=2" in lines[0] for split in SPLITS) and "flagged, %" in lines[0]
    assert all(name.replace("_", " ") in lines[0] for name in DISTANCES[kind])
    assert f"per split, in %: {' / '.join(TASKS[kind].shown.values())}" in printed
    assert "No retain model" not in printed and "[to forget, truly " in printed


def test_without_the_retain_model_there_is_no_distance(runs):
    folder, kind, _ = runs
    how = "--dataset=data", *scripts.ROWS, *flags_of(kind), "--output_path=alone"
    result = done(call(folder, "inference_spul", *how, "--model_checkpoints", "tuned", "gated"))
    assert ("so there is no forget quality" in result.stdout) == TASKS[kind].generates
    assert not any("distance_to_retain_model" in record for record in metrics_of(folder / "alone"))
    assert "forget quality  " not in result.stdout and "similarity gap train" not in result.stdout


def test_new_texts_side_by_side(runs):
    folder, kind, _ = runs
    asked = "--text=Where does Bob 1 live now ?", "--text=Where does the film 1 live now ?"

    def ask(*flags):
        return done(call(folder, "inference_spul", *scripts.ROWS, "--model_checkpoints=gated", *asked, *flags))

    lines = ask().stdout.splitlines()
    assert lines[0] == "Where does Bob 1 live now ?" and lines[3] == "Where does the film 1 live now ?"
    assert [line.split()[:2] for line in lines[1:3]] == [["without", "prompt"], ["with", "prompt"]]
    rows = [json.loads(line) for line in ask("--json").stdout.splitlines()]
    assert [row["with prompt"]["flagged"] for row in rows] == [True, False]
    assert rows[1]["with prompt"]["answer"] == rows[1]["without prompt"]["answer"]
    if TASKS[kind].generates:  # what the command says goes before what the checkpoint records
        (short, *_) = (json.loads(line) for line in ask("--json", "--max_new_tokens=1").stdout.splitlines())
        known = tiny.build_tokenizer()
        assert len(known(f" {short['without prompt']['answer']}")["input_ids"]) < len(
            known(f" {rows[0]['without prompt']['answer']}")["input_ids"]
        )


def test_every_audit_knows_every_task(runs):
    folder, kind, _ = runs
    asked = "--audit", "all", "--attack_steps=1", "--samples=2", "--output_path=audit"
    done(call(folder, "inference_spul", "--dataset=data", *scripts.ROWS, *flags_of(kind),
              "--model_checkpoints", "retain", "gated", *asked))  # fmt: skip
    found = json.loads((folder / "audit" / "audit.json").read_text())
    assert list(found["asks"]) == list(AUDIT_NAMES)
    said = {(entry["audit"], entry["method"], entry["wrapper"]) for entry in found["audits"]}
    about_all = set(AUDIT_NAMES) - {"inversion"}  # which needs people, whom these rows do not name
    assert said >= {(name, "SPUL behind a gate", wrapper) for name in about_all for wrapper in ("on", "off")}
