"""A run that was killed and resumed ends with the same bytes as one that was not."""

import json
import shutil

import pytest
import scripts
from marks import mostly_long
from safetensors.torch import load_file, safe_open, save_file
from scripts import call, done, kill_after_a_state, refused, stop_at, tree

from utils.evaluation import finish
from utils.evaluation.run import evaluate_splits
from utils.storage import files
from utils.storage.outputs import state_path
from utils.training.state import read_state

pytestmark = pytest.mark.slow

STEPS = 30
RESULTS = ("adapter_model.safetensors", "training.jsonl")


def commands(model, fine_tuned, data):
    """Enough steps for the kill to come in the middle; LoRA dropout is the published one, so random state counts."""
    budget = f"--dataset={data}", f"--max_steps={STEPS}", "--num_epochs=100", "--save_steps=2", "--max_eval_samples=0"
    return {
        "qlora": (f"--model_name={model}", *scripts.QLORA, *budget, "--lr=1e-3", "--eval_steps=3", "--curve_samples=2"),
        "spul": (f"--model_checkpoints={fine_tuned}", *scripts.SPUL, *budget, "--lr=1e-2"),
    }


@pytest.fixture(scope="module", params=mostly_long(["qlora", "spul"], "spul"))
def killed(request, tiny_model, fine_tuned, small_data, tmp_path_factory):
    """(script, its arguments, the folder in which it was killed)."""
    cwd = tmp_path_factory.mktemp(request.param)
    arguments = (*commands(tiny_model, fine_tuned, small_data)[request.param], "--output_path=out")
    kill_after_a_state(cwd, request.param, *arguments)
    return request.param, arguments, cwd


@pytest.fixture
def interrupted(killed, tmp_path):
    """A copy of it that the test may change."""
    script, arguments, cwd = killed
    shutil.copytree(cwd, tmp_path, dirs_exist_ok=True)
    files.sweep(tmp_path / "out")  # as any start does
    return script, arguments, tmp_path


def saved_step(cwd):
    return read_state(state_path(cwd / "out"))["log"][-1]["step"]


def test_a_kill_leaves_the_state_and_no_half_written_folder(killed):
    script, _, cwd = killed
    leftovers = {name for name in tree(cwd) if not name.startswith(("saved_logits", files.PREFIX))}
    assert leftovers == {"out.training.safetensors"}
    assert 2 <= saved_step(cwd) < STEPS


def test_a_resumed_run_ends_bit_by_bit_like_an_uninterrupted_one(interrupted, tmp_path_factory):
    """Even where the first try to resume fails, and the state is saved at other steps."""
    script, arguments, cwd = interrupted
    step = saved_step(cwd)
    (cwd / "out").mkdir()
    refused(cwd, "out exists", script, *arguments, "--resume")
    (cwd / "out").rmdir()
    resumed = done(call(cwd, script, *arguments, "--resume", "--save_steps=5"))
    assert f"continuing out.training.safetensors after step {step}" in resumed.stdout
    whole = tmp_path_factory.mktemp("whole")
    done(call(whole, script, *arguments))
    for name in RESULTS:
        assert (cwd / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()
    steps = [json.loads(line)["step"] for line in (cwd / "out" / "training.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    for folder in (cwd, whole):
        assert {path.name for path in folder.iterdir()} - {"saved_logits"} == {"out"}


@pytest.mark.parametrize("flag", ["--lr=0.5", "--seed=7", "--train_batch_size=4", "--num_epochs=99", "--max_length=80"])
def test_other_settings_are_refused(interrupted, flag):
    script, arguments, cwd = interrupted
    name, value = flag.removeprefix("--").split("=")
    refused(cwd, f"was saved with {name}=", script, *arguments, "--resume", flag)
    assert saved_step(cwd) >= 2


def test_other_data_are_refused(interrupted, small_data):
    script, arguments, cwd = interrupted
    shutil.copytree(small_data, cwd / "data")
    train = cwd / "data" / "train_retain.csv"
    train.write_text(train.read_text().replace("the", "a"))
    rename_dataset(state_path(cwd / "out"), str(small_data), "data")
    before = saved_step(cwd)
    result = call(cwd, script, *arguments, "--resume", "--dataset=data")
    assert result.code == 2 and "out.training.safetensors was saved with data=" in result.stderr
    assert not (cwd / "out").exists() and saved_step(cwd) == before


def rename_dataset(state, old, new):
    """Let the state say that it came from folder `new`: the same name, other contents."""
    with safe_open(state, "pt") as file:
        metadata = file.metadata()
    metadata["settings"] = metadata["settings"].replace(json.dumps(old), json.dumps(new))
    save_file(load_file(state), state, metadata)


def test_an_interrupted_run_is_not_started_over_by_accident(interrupted):
    script, arguments, cwd = interrupted
    refused(cwd, "an interrupted run left out.training.safetensors; continue it with --resume", script, *arguments)


def test_overwrite_starts_over(interrupted):
    script, arguments, cwd = interrupted
    result = done(call(cwd, script, *arguments, "--overwrite", "--max_steps=2"))
    assert "continuing" not in result.stdout
    assert not state_path(cwd / "out").exists()


def test_resume_without_a_state_is_refused(interrupted):
    script, arguments, cwd = interrupted
    state_path(cwd / "out").unlink()
    refused(cwd, "there is no interrupted run to continue at out.training.safetensors", script, *arguments, "--resume")


@pytest.mark.parametrize("damage", [lambda content: content[:1000], lambda content: b"", lambda content: b"\0" * 100])
def test_a_damaged_state_is_refused(interrupted, damage):
    script, arguments, cwd = interrupted
    state = state_path(cwd / "out")
    state.write_bytes(damage(state.read_bytes()))
    refused(cwd, "is no training state or is damaged", script, *arguments, "--resume")


def test_the_state_of_the_other_script_is_refused(interrupted, tiny_model, fine_tuned, small_data):
    script, _, cwd = interrupted
    other = {"qlora": "spul", "spul": "qlora"}[script]
    arguments = (*commands(tiny_model, fine_tuned, small_data)[other], "--output_path=out", "--resume")
    refused(cwd, "out.training.safetensors was saved with ", other, *arguments)


def test_resume_finds_the_interrupted_run_of_the_published_name(fine_tuned, small_data, tmp_path):
    """spul.py's default folder carries the time of the start."""
    arguments = (*commands(None, fine_tuned, small_data)["spul"], "--max_steps=4")
    done(call(tmp_path, "spul", *arguments, "--output_path=out"))
    whole = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    stop_at(tmp_path, 3, "spul", *arguments)
    (state,) = (tmp_path / "unlearn_checkpoints").iterdir()
    result = done(call(tmp_path, "spul", *arguments, "--resume"))
    folder = tmp_path / "unlearn_checkpoints" / state.name.removesuffix(".training.safetensors")
    assert "after step 2\n" in result.stdout
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "adapter_model.safetensors").read_bytes() == whole


SHORT = "--max_steps=3", "--save_steps=1", "--beta=0"


def test_resume_finds_the_run_of_these_settings(fine_tuned, small_data, tmp_path, monkeypatch):
    """Whichever was saved last, of a data set whose name is also a pattern, started in the same second or not."""
    monkeypatch.setattr("time.strftime", lambda *_: "2026")
    shutil.copytree(small_data, tmp_path / "reviews [v2]")
    arguments = (*commands(None, fine_tuned, "reviews [v2]")["spul"], *SHORT)
    for rate in ("1e-2", "1e-3"):
        stop_at(tmp_path, 2, "spul", *arguments, f"--lr={rate}")
    refused(tmp_path, "was saved with lr=0.001, this command has 0.1;", "spul", *arguments, "--lr=0.1", "--resume")
    for rate in ("1e-2", "1e-3"):
        result = done(call(tmp_path, "spul", *arguments, f"--lr={rate}", "--resume"))
        assert "after step 1\n" in result.stdout
        folder = tmp_path / result.stdout.splitlines()[-1].removeprefix("wrote ")
        assert json.loads((folder / "manifest.json").read_text())["arguments"]["lr"] == float(rate)
    stem = "spul_tiny-llama_reviews [v2]-1.0_2026"
    assert {path.name for path in (tmp_path / "unlearn_checkpoints").iterdir()} == {stem, f"{stem}_2"}


def test_resume_does_not_choose_among_equals(fine_tuned, small_data, tmp_path):
    arguments = (*commands(None, fine_tuned, small_data)["spul"], *SHORT)
    for _ in range(2):
        stop_at(tmp_path, 2, "spul", *arguments)
    sentence = "these interrupted runs all have these settings: unlearn_checkpoints/spul_"
    refused(tmp_path, sentence, "spul", *arguments, "--resume")


@pytest.mark.parametrize("output", [[], ["--output_path=out"]])
def test_resume_of_a_complete_run_says_so(fine_tuned, small_data, tmp_path, output):
    """And removes the state that a kill may have left beside it."""
    arguments = (*commands(None, fine_tuned, small_data)["spul"], *SHORT, *output)
    stop_at(tmp_path, 3, "spul", *arguments)
    (state,) = tmp_path.rglob("*.training.safetensors")
    saved = state.read_bytes()
    done(call(tmp_path, "spul", *arguments, "--resume"))
    before = tree(tmp_path)
    state.write_bytes(saved)
    for more in ([], ["--overwrite"]):
        result = done(call(tmp_path, "spul", *arguments, "--resume", *more))
        assert result.stdout.endswith(" is complete, there is nothing to continue\n") and tree(tmp_path) == before


def test_a_run_that_replaces_its_own_output_can_be_resumed(fine_tuned, small_data, tmp_path):
    """Its state is none of the run that wrote what is there."""
    arguments = (*commands(None, fine_tuned, small_data)["spul"], *SHORT, "--output_path=out")
    done(call(tmp_path, "spul", *arguments))
    log = tmp_path / "out" / "training.jsonl"
    log.write_text(log.read_text().replace('"loss": ', '"loss": 1'))  # as with another version of the model
    stop_at(tmp_path, 3, "spul", *arguments, "--overwrite")
    refused(tmp_path, "out exists", "spul", *arguments, "--resume")
    assert "after step 2" in done(call(tmp_path, "spul", *arguments, "--resume", "--overwrite")).stdout


def test_a_slash_behind_the_output_path_changes_nothing(fine_tuned, small_data, tmp_path):
    arguments = (*commands(None, fine_tuned, small_data)["spul"], "--max_steps=4")
    stop_at(tmp_path, 3, "spul", *arguments, "--output_path=out/")
    done(call(tmp_path, "spul", *arguments, "--output_path=out/", "--resume"))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "saved_logits"}


def test_a_run_interrupted_in_its_last_evaluation_does_not_train_again(fine_tuned, small_data, tmp_path):
    arguments = (*commands(None, fine_tuned, small_data)["spul"], "--max_steps=4", "--max_eval_samples=2")
    done(call(tmp_path, "spul", *arguments, "--output_path=whole"))
    evaluate = evaluate_splits

    def interrupt(loaded, frames, words, args, description, frozen=None):
        if description == "SPUL":
            raise KeyboardInterrupt
        return evaluate(loaded, frames, words, args, description, frozen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "evaluate_splits", interrupt)
        assert call(tmp_path, "spul", *arguments, "--output_path=out").code == 130
    result = done(call(tmp_path, "spul", *arguments, "--output_path=out", "--resume"))
    assert "after step 4\n" in result.stdout
    for name in RESULTS:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_model_that_changed_meanwhile_is_refused(tiny_model, small_data, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    arguments = (*commands("model", None, small_data)["qlora"], "--output_path=out")
    stop_at(tmp_path, 3, "qlora", *arguments)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    refused(tmp_path, "out.training.safetensors was saved with model=", "qlora", *arguments, "--resume")
