"""What the frozen model says is computed once: another run takes it from a file, and only where nothing differs."""

import contextlib
import dataclasses
import json
import time

import pandas as pd
import pytest
import tiny
import torch
from asking import Word
from scripts import baselines, call, done, metrics_of, names, spul

from utils import plan
from utils.evaluation import saved
from utils.evaluation.evaluate import CheckpointSettings, evaluate_checkpoints
from utils.evaluation.expected import FIRST, Meter
from utils.evaluation.frozen import Frozen
from utils.evaluation.run import EvaluationSettings, accuracies, evaluate_splits
from utils.evaluation.scores import score_rows
from utils.interventions.gates import Gate
from utils.interventions.prompt_encoders import Prompt
from utils.interventions.served import Served, load_served
from utils.models.base import ModelSettings
from utils.storage.checkpoints import Link
from utils.tasks.rows import Splits, load_splits

pytestmark = pytest.mark.slow

SETTINGS = EvaluationSettings(max_length=96, eval_batch_size=4)
EVAL = "--max_length=96", "--dtype=float32"


def inference(folder, *arguments):
    return done(call(folder, "inference_spul", "--model_checkpoints", *arguments[:-1], *EVAL, arguments[-1]))


def told(result):
    """The lines that say how much is evaluated."""
    return [line for line in result.stdout.splitlines() if "rows to score" in line]


def scores_in(folder):
    """metrics.json without times and places, and predictions.jsonl as they stand there."""
    records = metrics_of(folder)
    kept = [{k: v for k, v in one.items() if k not in ("seconds", "peak_memory_bytes", "training")} for one in records]
    rows = folder / "predictions.jsonl"
    return kept, rows.read_text() if rows.exists() else None


@pytest.fixture(scope="module")
def runs(fine_tuned, small_data, tmp_path_factory):
    """Two runs of spul.py and a gate, the second with what the first has left; and a folder where nothing is left."""
    folder = tmp_path_factory.mktemp("runs")
    flags = "--gate=tfidf", "--eco_max_fpr=0.5"
    first = done(spul(folder, fine_tuned, small_data, *flags, "--output_path=first"))
    again = done(spul(folder, fine_tuned, small_data, *flags, "--output_path=again"))
    gate = done(baselines(folder, fine_tuned, small_data, "gate", *flags[1:], "--output_path=gate"))
    return folder, first, again, gate


def test_another_run_does_not_compute_it_again(runs):
    folder, first, again, gate = runs
    assert told(first)[0].startswith("before SPUL: 34 rows to score") and "known" not in told(first)[0]
    assert told(again)[0] == "before SPUL: 0 rows to score, 0 tokens; 34 are known"
    assert told(again)[1] == told(first)[1]
    assert told(gate) == ["gate: 0 rows to score, 0 tokens; 34 are known"]  # which changes no answer
    (before, after), _ = scores_in(folder / "first")
    (same, behind), _ = scores_in(folder / "again")
    assert same == before and {**behind, "checkpoint": "first"} == {**after, "checkpoint": "first"}
    alone = metrics_of(folder / "gate")[0]["splits"]
    assert all(alone[split]["loss"] == scores["loss"] for split, scores in before["splits"].items())


def test_inference_takes_it_too(runs, fine_tuned, tmp_path):
    """With several checkpoints of one frozen model the rows that their gates let through are computed once at most."""
    folder, *_ = runs
    first, again = folder / "first", folder / "again"
    fresh = inference(tmp_path, fine_tuned, "--fresh_scores", "--output_path=fresh")
    reread = inference(folder, fine_tuned, "--output_path=reread")
    assert told(fresh)[0].startswith("fine-tuned: 34 rows to score")
    assert told(reread) == ["fine-tuned: 0 rows to score, 0 tokens; 34 are known"]
    assert scores_in(folder / "reread") == scores_in(tmp_path / "fresh")  # bit for bit
    (tmp_path / "empty").mkdir()
    both = told(inference(tmp_path / "empty", first, again, "--output_path=both"))
    assert both[0].startswith("SPUL behind a gate (first): 34 rows") and "known" in both[1]
    assert names(tmp_path / "empty") == {"both"}  # of rows behind a gate nothing is kept


@pytest.fixture(scope="module")
def case(tmp_path_factory, small_data):
    """A tiny model in a folder of its own, and rows."""
    folder = tiny.save(tmp_path_factory.mktemp("own") / "model")
    return folder, load_splits(str(small_data))


def loaded(folder, settings=tiny.ON_CPU):
    return load_served(str(folder), settings)


@pytest.fixture(scope="module")
def scored(case):
    """(folder, served, frames): a model whose scores have been kept in a file below the folder."""
    folder = case[0].parent
    with contextlib.chdir(folder):
        served, frames = loaded(case[0]), case[1]
        frozen = saved.find(served, frames, SETTINGS)
        assert not frozen.rows
        evaluate_splits(served, frames, frames.task, SETTINGS, "first", frozen)
        saved.keep(frozen, frames, SETTINGS)
    return folder, served, frames


@pytest.fixture
def kept(scored, monkeypatch):
    """(served, frames), in the folder of the file."""
    folder, served, frames = scored
    monkeypatch.chdir(folder)
    return served, frames


def found(served, frames, settings=SETTINGS):
    return saved.find(served, frames, settings).knows(frames)


def test_what_is_read_is_what_was_computed(kept):
    served, frames = kept
    frozen = saved.find(served, frames, SETTINGS)
    assert frozen.knows(frames)
    again, rows = evaluate_splits(served, frames, frames.task, SETTINGS, "again", frozen)
    anew, computed = evaluate_splits(served, frames, frames.task, SETTINGS, "anew")
    assert again == anew
    pd.testing.assert_frame_equal(rows, computed, check_exact=True)


@pytest.mark.parametrize("change", [
    {"max_length": 90}, {"eval_batch_size": 5}, {"attn_implementation": "eager"}, {"compile": True},
    {"max_eval_samples": 3}, {"fresh_scores": True}, {"probe": True},
])  # fmt: skip
def test_other_settings_are_computed_anew(kept, change):
    assert found(*kept)
    assert not found(*kept, dataclasses.replace(SETTINGS, **change))


def test_other_rows_are_computed_anew(kept):
    served, frames = kept
    for column, value in (("text", "another text"), ("label_text", "positive"), ("label", 7)):
        changed = frames["test_forget"].copy()
        changed.loc[changed.index[changed[column] != value][0], column] = value
        assert not found(served, Splits({**frames, "test_forget": changed}, frames.task))
    template = dataclasses.replace(frames.task, head="text: ")
    assert not found(served, Splits(dict(frames), template))


def test_another_model_is_computed_anew(kept, case, tmp_path):
    served, frames = kept
    assert not found(loaded(case[0], ModelSettings(device="cpu", dtype="bfloat16")), frames)
    other = tiny.build_model("llama", seed=9)
    other.save_pretrained(tmp_path / "other")
    tiny.build_tokenizer().save_pretrained(tmp_path / "other")
    chain = [Link(tmp_path / "other", "other")]
    assert not found(Served(served.model, served.tokenizer, chain), frames)


@pytest.mark.parametrize("part", ["libraries", "code", "device", "judge"])
def test_another_program_computes_anew(kept, monkeypatch, part):
    own = saved.key_of
    monkeypatch.setattr(saved, "key_of", lambda *how: own(*how) | {part: "another"})
    assert not found(*kept)


def test_a_damaged_file_is_said_and_replaced(kept, capsys):
    served, frames = kept
    (path,) = saved.Path(saved.FOLDER).iterdir()
    whole = path.read_text()
    contents = json.loads(whole)
    contents["rows"]["train_retain"][0]["loss"] += 1
    for text in ("{", json.dumps({**contents, "rows": {}}), json.dumps(contents)):
        path.write_text(text)
        saved.note_once.cache_clear()
        frozen = saved.find(served, frames, SETTINGS)
        assert not frozen.rows and "the scores are computed again" in capsys.readouterr().err
    evaluate_splits(served, frames, frames.task, SETTINGS, "again", frozen)
    saved.keep(frozen, frames, SETTINGS)
    assert path.read_text() == whole


def test_where_nothing_can_be_written(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / saved.FOLDER).write_text("in the way")
    served, frames = loaded(case[0]), case[1]
    evaluate_checkpoints(CheckpointSettings(model_checkpoints=[str(case[0])]), frames, tiny.ON_CPU, SETTINGS)
    assert "not kept for other runs" in capsys.readouterr().err
    assert (tmp_path / saved.FOLDER).read_text() == "in the way" and served


def test_a_set_of_rows_that_is_not_whole_is_not_kept(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    served, frames = loaded(case[0]), case[1]
    frozen = saved.find(served, frames, SETTINGS)
    known = frozen.of("train_forget", len(frames["train_forget"]))
    score_rows(served, frames["train_forget"], frames.task, 96, 4, frozen=known)
    saved.keep(frozen, frames, SETTINGS)
    assert not (tmp_path / saved.FOLDER).exists() and isinstance(frozen, Frozen)


def asked_of(model, work):
    """What `work()` returns, and in how many passes."""
    passes = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        return work(), len(passes)
    finally:
        handle.remove()


def test_a_curve_asks_the_frozen_model_once(kept):
    """Behind a gate; a model without one may be trained between two points of the curve."""
    served, frames = kept
    vectors = served.model.get_input_embeddings()(torch.arange(4)).detach()
    gated, known = served.using(Prompt(vectors=vectors, gate=Gate(Word("the"), 0.5))), Frozen()
    curve = lambda one, *known: asked_of(served.model, lambda: accuracies(one, frames, frames.task, SETTINGS, *known))  # noqa: E731
    (first, n), (again, fewer), (plain, _) = curve(gated, known), curve(gated, known), curve(gated)
    assert first == again == plain and 0 < fewer < n
    assert curve(served, Frozen())[1] == curve(served, known)[1] > 0


def test_a_plan_leaves_out_what_is_known(kept):
    served, frames = kept
    nobody = served.using(Prompt(vectors=torch.ones(1, 128), gate=Gate(Word("zzz"), 0.5)))
    how = nobody, pd.concat(frames.values(), ignore_index=True), frames.task, SETTINGS
    assert plan._evaluation_seconds(*how, known=True) == 0 < plan._evaluation_seconds(*how, known=False)


def test_keys_and_values_of_a_position():
    """Llama: 4 layers, 2 key heads of width 32, float32; GPT-2 names these numbers otherwise and shares no heads."""
    assert plan.position_bytes(tiny.CONFIGS["llama"], torch.float32) == 2 * 4 * 2 * 32 * 4
    assert plan.position_bytes(tiny.CONFIGS["gpt2"], torch.bfloat16) == 2 * 4 * 4 * 32 * 2


def test_the_expected_minutes_are_said_once(monkeypatch, capsys):
    """By tokens: the short half of the rows has a quarter of them, and took 40 seconds."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with Meter([[30] * 10 + [10] * 10], "test", generates=False) as meter:
        now[0] = FIRST - 1.0
        meter.update(5)
        assert "minutes" not in capsys.readouterr().out
        now[0] = 300.0
        meter.update(5)
        said = capsys.readouterr().out
        assert "this evaluation takes about 20 minutes; --max_eval_samples=2 would take about 2" in said
        meter.update(10)
        assert "minutes" not in capsys.readouterr().out
    with Meter([[10] * 4], "test", generates=False) as meter:
        now[0] += 70.0  # of 140 seconds
        meter.update(2)
        assert "minutes" not in capsys.readouterr().out
    with Meter([[10] * 4, [10] * 12], "test", generates=True) as meter:
        now[0] += 100.0
        meter.update(4)
        assert "minutes" not in capsys.readouterr().out  # answers are still to be generated
        meter.ended()
        assert "about 7 minutes" in capsys.readouterr().out
