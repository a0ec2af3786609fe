"""Two processes that hold a part of every layer each end with what one process with the whole model gives."""

import json
from functools import partial
from types import SimpleNamespace

import asking
import pytest
import scripts
import several
import tiny
import torch
from marks import mostly_long
from safetensors.torch import load_file
from scripts import done, numbers, refused
from transformers import AutoConfig, BitsAndBytesConfig

from utils import distributed, sharding
from utils.errors import UserError
from utils.models.base import ModelSettings, refuse_shards
from utils.models.layers import decoder_layers
from utils.storage.outputs import state_path
from utils.training.loop import Training
from utils.training.state import read_state

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
BUDGET = "--output_path=out", "--max_steps=3", "--max_eval_samples=5"
FEW = "--train_batch_size=5", "--micro_batch_size=3", "--retain_ratio=1"  # one process makes fewer passes
CASES = {
    "spul": ("spul", *scripts.SPUL, "--lr=1e-2", "--forget_per_batch=1", "--logit_chunk=4"),
    "lora": ("qlora", *scripts.QLORA, "--lr=1e-3", "--lora_dropout=0", "--length_pool=1", "--eval_steps=2"),
    "full": ("baselines", *scripts.BASELINES, "--unlearn_method=gradient_ascent_descent", "--lr=1e-4", *FEW),
    "npo": ("baselines", *scripts.BASELINES, "--unlearn_method=npo", "--lr=1e-4", "--gradient_checkpointing"),
    "rmu": ("baselines", *scripts.BASELINES, "--unlearn_method=rmu", "--lr=1e-4", "--rmu_layer=2"),
}

FIRST = "spul", "full"  # the others take as long again


def command(case, tiny_model, small_data, *more):
    script, *arguments = CASES[case]
    model = f"--model_{'name' if script == 'qlora' else 'checkpoints'}={tiny_model}"
    return script, model, f"--dataset={small_data}", *arguments, *BUDGET, *more


def interrupted(cwd, *words):
    """The run ends before its third step, after it has saved its state."""
    accumulate, calls = Training.accumulate, []

    def failing(self, rows):
        calls.append(rows)
        if len(calls) == 3:
            raise UserError("enough")
        return accumulate(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "accumulate", failing)
        return scripts.call(cwd, *words)


@pytest.fixture(scope="module")
def runs(tiny_model, small_data, asked, tmp_path_factory):
    """{case: (the folder in which one process ran it, that of two with --shard)}; of "stopped" the folders of runs of
    "full" that were interrupted with shards and went on alone, and the other way round.

    One launch runs all that two processes do, since a launch takes seconds.
    """
    names = [*FIRST, "inference", "stopped"]
    folders = {name: tuple(tmp_path_factory.mktemp(f"{name}-{n}") for n in (1, 2)) for name in names}
    words = {case: command(case, tiny_model, small_data) for case in FIRST}
    saved = folders["spul"][0] / "out", folders["full"][0] / "out"
    few = "--max_new_tokens=6", "--eval_batch_size=2", "--max_eval_samples=3", "--output_path=out"
    words["inference"] = "inference_spul", *scripts.ROWS, f"--dataset={asked}", *few
    words["inference"] = *words["inference"], "--model_checkpoints", *map(str, saved)
    for name, command_line in words.items():
        done(scripts.call(folders[name][0], *command_line))
    stopped = *words["full"], "--save_steps=2"
    first, second = folders["stopped"]
    assert interrupted(second, *stopped).code == 2
    jobs = [partial(scripts.call, folders[name][1], *words[name], "--shard") for name in words]
    jobs.append(partial(scripts.call, second, *stopped, "--shard", "--resume"))
    jobs.append(partial(interrupted, first, *stopped, "--shard"))
    main, other = several.in_turn(2, jobs)
    for result, silent in zip(main[:-1], other[:-1]):
        assert "wrote out\n" in done(result).stdout
        assert (silent.code, silent.stdout, silent.stderr) == (0, "", "")
    assert (main[-1].code, other[-1].code) == (2, 2)
    assert read_state(state_path(first / "out"))["log"][-1]["step"] == 2
    resumed = done(scripts.call(first, *stopped, "--shard", "--resume"))  # alone, --shard changes nothing, and says so
    assert "there is only one" in resumed.stderr and "after step 2" in resumed.stdout
    return folders


@pytest.fixture(scope="module")
def more_runs(tiny_model, small_data, tmp_path_factory):
    """The same of the other cases and of "eco", in a launch of their own."""
    words = {case: command(case, tiny_model, small_data) for case in CASES if case not in FIRST}
    gate = "--eco_classifier=features", "--eco_max_fpr=0.3", "--eco_samples=7", "--eco_steps=1", "--eco_target=0.5"
    words["eco"] = "baselines", *scripts.ROWS, f"--model_checkpoints={tiny_model}", f"--dataset={small_data}", *gate
    words["eco"] = *words["eco"], "--unlearn_method=eco", "--output_path=out", "--max_eval_samples=3"
    folders = {name: tuple(tmp_path_factory.mktemp(f"{name}-{n}") for n in (1, 2)) for name in words}
    for name, command_line in words.items():
        done(scripts.call(folders[name][0], *command_line))
    jobs = [partial(scripts.call, folders[name][1], *words[name], "--shard") for name in words]
    for result in several.in_turn(2, jobs)[0]:
        done(result)
    return folders


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Rows with free answers: they are generated, and of different lengths."""
    return asking.save_task(tmp_path_factory.mktemp("data") / "asked", "question_answering")


def assert_same(folder, other):
    """The same log, trained weights and scores but for the order of float additions; returns the weights."""
    logs = [list(map(json.loads, (place / "out/training.jsonl").read_text().splitlines())) for place in (folder, other)]
    assert len(logs[0]) == len(logs[1]) >= 3
    for line, expected in zip(*logs):
        assert line.pop("accuracy", None) == expected.pop("accuracy", None)
        assert line == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    (file,) = (folder / "out").glob("*model.safetensors")
    weights, expected = load_file(file), load_file(other / "out" / file.name)
    assert weights.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=TOLERANCE)
    scores = [json.loads((place / "out/metrics.json").read_text())[-1]["splits"] for place in (folder, other)]
    assert scores[0].keys() == scores[1].keys()
    assert all(numbers(scores[0][s]) == pytest.approx(numbers(scores[1][s]), rel=1e-4) for s in scores[0])
    return expected


@pytest.mark.parametrize("case", mostly_long(CASES, *FIRST))
def test_shards_train_and_score_as_the_whole_model(case, request):
    alone, sharded = request.getfixturevalue("runs" if case in FIRST else "more_runs")[case]
    assert_same(sharded, alone)
    assert scripts.names(sharded / "out") == scripts.names(alone / "out")


def test_a_run_goes_on_with_or_without_shards(runs):
    for folder in runs["stopped"]:
        assert_same(folder, runs["full"][0])


@pytest.mark.parametrize("case", mostly_long(["inference", "eco"], "inference"))
def test_passes_that_only_some_processes_make(case, request):
    """Generation, multi-token answers, hidden states for a gate, ECO's search."""
    folders = request.getfixturevalue("more_runs" if case == "eco" else "runs")[case]
    alone, sharded = (json.loads((folder / "out/metrics.json").read_text()) for folder in folders)
    assert len(alone) == len(sharded)
    for expected, record in zip(alone, sharded):
        assert {**record, "splits": 0, "seconds": 0}.keys() == {**expected, "splits": 0, "seconds": 0}.keys()
        assert record["splits"].keys() == expected["splits"].keys()
        for split, scores in expected["splits"].items():
            assert numbers(record["splits"][split]) == pytest.approx(numbers(scores), rel=1e-4, abs=1e-6)


def test_what_a_process_holds():
    """A part of each layer, also after a change of dtype; together that is the model, which computes as before."""
    ids = torch.arange(24).view(2, 12)

    def work(rank):
        distributed.start()
        model = tiny.build_model()
        every = sum(p.numel() for layer in decoder_layers(model) for p in layer.parameters())
        expected, weights = model(ids).logits, {name: tensor.clone() for name, tensor in model.state_dict().items()}
        sharding.shard(model, decoder_layers(model), "cpu")
        held = [p.to_local().numel() for layer in decoder_layers(model) for p in layer.parameters()]
        with torch.inference_mode():
            alike = [torch.equal(model(ids).logits, expected)]
            for _ in range(rank):  # passes that the other process has not
                model(ids)
        distributed.all_gather(None)
        alike.append(sum(held) == every // 2)
        sharding.to_dtype(model, torch.bfloat16)
        with torch.no_grad():
            alike.append(torch.equal(model(ids).logits, tiny.build_model().bfloat16()(ids).logits))
        gathered = sharding.whole_weights(model, trained=False)
        alike.append(all(torch.equal(gathered[name], weights[name].bfloat16()) for name in gathered))
        alike.append(len(gathered) == (0 if rank else len(weights)))
        distributed.finish()
        return alike

    assert several.each(2, work) == [[True] * 5] * 2


@pytest.mark.parametrize(
    ("script", "sentence", "flags"),
    [
        ("qlora", "4-bit weights cannot be cut into shards; with --shard give --quantization=none", []),
        ("qlora", "leave out --device=balanced", ["--quantization=none", "--device=balanced"]),
        ("spul", "which --compile would fuse", ["--compile"]),
        ("inference_spul", "--shard does not go with --audit", ["--audit"]),
    ],
)
def test_what_shards_do_not_go_with(script, sentence, flags, tmp_path):
    model = "--model_name=x" if script == "qlora" else "--model_checkpoints=x"
    refused(tmp_path, sentence, script, model, "--shard", *flags)


def test_a_model_stored_in_4_bits_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    config, link = AutoConfig.from_pretrained(tiny_model), SimpleNamespace(name="packed")
    refuse_shards(ModelSettings(shard=True), link, config, "cpu")
    config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(UserError, match="the 4-bit weights of packed cannot be cut into shards"):
        refuse_shards(ModelSettings(shard=True), link, config, "cpu")
