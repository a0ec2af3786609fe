"""The three scripts from end to end with a tiny model: the published commands, what they write, what they train."""

import importlib.metadata
import json
import re
import shlex
import shutil
from pathlib import Path
from unittest import mock

import bitsandbytes
import pandas as pd
import pytest
import scripts
import tiny
import torch
from peft import PeftConfig
from safetensors.torch import load_file, safe_open, save_file
from scripts import call, done, manifest_of, metrics_of, names, numbers, refused, start, tree

from utils import job
from utils.data import batch
from utils.data.select import fingerprint, select_rows
from utils.data.splits import SPLITS, TRAIN_SPLITS
from utils.errors import note_once
from utils.interventions import prompt_encoders
from utils.interventions.prompt_encoders import EncoderSettings, build_encoder
from utils.interventions.served import load_served
from utils.models import forward
from utils.models.base import load_base
from utils.models.chain import resolve_chain
from utils.storage import checkpoints
from utils.tasks.classification import TEMPLATE_HEAD, TEMPLATE_TAIL, draw_unlearning_labels
from utils.tasks.encode import completion_ids
from utils.tasks.rows import load_splits

pytestmark = pytest.mark.slow

PUBLISHED = {
    "qlora": """--dataset=sst2 --model_name=meta-llama/Llama-2-7b-hf \
        --max_length=1024 --set_pad_id --lr=1e-4 \
        --train_batch_size=32 --eval_batch_size=32 --num_epochs=2 --weight_decay=0.001 \
        --lora_rank=16 --lora_alpha=64 --lora_fropout=0.1 --lora_bias=none""",
    "spul": """--dataset=sst2 --model_checkpoints=[local path to checkpoints] \
        --max_length=1024 --set_pad_id --lr=1e-4 \
        --train_batch_size=32 --eval_batch_size=32 --num_epochs=10 --weight_decay=0.001 \
        --forget_size=1.0 --ptuning_num_tokens=30 --ptuning_hidden_size=128 --alpha=0.5 --beta=0.5""",
    "inference_spul": "--dataset=sst2 --model_checkpoints=[local path to checkpoints] --forget_size=1.0",
}
ADAPTER_FILES = {
    "adapter_config.json", "adapter_model.safetensors", "manifest.json", "metrics.json", "tokenizer.json",
    "tokenizer_config.json", "training.jsonl", "training.png",
}  # fmt: skip


def published(cwd, script, model, *budget):
    """Run the published command in a process of its own, verbatim but for data, model, batch size and budget."""
    command = PUBLISHED[script].replace("=sst2", "=snippets").replace("--train_batch_size=32", "--train_batch_size=8")
    command = command.replace("meta-llama/Llama-2-7b-hf", str(model)).replace("[local path to checkpoints]", str(model))
    return done(start(cwd, script, *shlex.split(command), "--max_eval_samples=4", *budget))


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """The folder in which the three commands ran, and what they printed."""
    cwd = tmp_path_factory.mktemp("run")
    budget = "--max_train_samples=32", "--max_steps=2"
    said = {"qlora": published(cwd, "qlora", tiny_model, *budget)}
    said["spul"] = published(cwd, "spul", "qlora_checkpoints/tiny-llama-qlora-snippets", *budget)
    said["inference_spul"] = published(cwd, "inference_spul", prompt_folder(cwd).relative_to(cwd), budget[0])
    return cwd, said


def prompt_folder(cwd):
    (folder,) = (cwd / "unlearn_checkpoints").iterdir()
    return folder


def prompt_of(folder):
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


def test_published_commands_write_the_published_folders(run):
    cwd, _ = run
    assert names(cwd) == {"qlora_checkpoints", "unlearn_checkpoints", "saved_logits", "saved_results", "saved_scores"}
    assert names(cwd / "qlora_checkpoints") == {"tiny-llama-qlora-snippets"}
    prompt = prompt_folder(cwd).name
    assert re.fullmatch(r"spul_tiny-llama_snippets-1\.0_\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d", prompt)
    assert names(cwd / "saved_results") == {f"{prompt}-snippets"}
    (reference,) = names(cwd / "saved_logits")
    assert re.fullmatch(r"tiny-llama-qlora-snippets-snippets-[0-9a-f]{12}\.safetensors", reference)


def test_published_commands_write_these_files(run):
    cwd, _ = run
    assert names(cwd / "qlora_checkpoints" / "tiny-llama-qlora-snippets") == ADAPTER_FILES | {"README.md"}
    assert names(prompt_folder(cwd)) == ADAPTER_FILES | {"encoder.safetensors"}
    results = cwd / "saved_results" / f"{prompt_folder(cwd).name}-snippets"
    assert names(results) == {"metrics.json", "predictions.jsonl", "comparison.png"}


def test_each_command_ends_with_the_folder_it_wrote(run):
    cwd, said = run
    for result in said.values():
        last = result.stdout.splitlines()[-1]
        assert last.startswith("wrote ") and (cwd / last.removeprefix("wrote ")).is_dir()


def test_nothing_but_progress_goes_to_stderr(run):
    _, said = run
    for result in said.values():
        assert all(scripts.is_progress_bar(line) for line in re.split(r"[\r\n]+", result.stderr) if line)


def test_published_sizes(run):
    """p = 30 vectors of the model's width, h = 128; LoRA of rank 16 in float32."""
    cwd, _ = run
    assert prompt_of(prompt_folder(cwd)).shape == (30, 128)
    encoder = load_file(prompt_folder(cwd) / "encoder.safetensors")
    shapes = [tuple(encoder[f"encoder.mlp_head.{i}.weight"].shape) for i in (0, 2, 4)]
    assert shapes == [(128, 128), (128, 128), (128, 128)]
    adapter = load_file(cwd / "qlora_checkpoints" / "tiny-llama-qlora-snippets" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert {min(tensor.shape) for tensor in adapter.values()} == {16}
    config = json.loads((cwd / "qlora_checkpoints/tiny-llama-qlora-snippets/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"]) == (16, 64, 0.1, "none")


def test_manifests_say_what_from_what_and_how(run, tiny_model):
    cwd, _ = run
    adapter, prompt = cwd / "qlora_checkpoints" / "tiny-llama-qlora-snippets", prompt_folder(cwd)
    frames = select_rows(load_splits("snippets"), max_train_samples=32)
    expected = fingerprint({split: frames[split] for split in TRAIN_SPLITS})
    for folder, kind, parent in ((adapter, "lora", tiny_model), (prompt, "prompt", adapter)):
        manifest = manifest_of(folder)
        assert manifest["kind"] == kind
        assert not Path(manifest["parent"]["path"]).is_absolute()
        assert (folder / manifest["parent"]["path"]).resolve() == parent.resolve()
        assert manifest["parent"]["sha256"] == checkpoints.weights_sha256(parent)
        assert manifest["data_fingerprint"] == expected
        assert manifest["seed"] == 42
        assert manifest["libraries"]["torch"] == importlib.metadata.version("torch")
        assert manifest["git_commit"] is None or re.fullmatch("[0-9a-f]{40}", manifest["git_commit"])
        kept = {name for name in names(folder) if name.endswith(".safetensors") or name.startswith("tokenizer")}
        assert manifest["files"] == {name: tree(folder)[name] for name in kept | {"adapter_config.json"}}
        assert manifest["metrics"] == metrics_of(folder)
    assert manifest_of(adapter)["arguments"]["lora_dropout"] == 0.1  # from the misspelt --lora_fropout
    assert manifest_of(adapter)["arguments"]["quantization"] == "nf4"
    assert manifest_of(prompt)["arguments"]["beta"] == 0.5


def check_record(record, splits):
    """One record of metrics.json has exactly the shared keys, and values in range."""
    assert list(record) == [
        "method", "checkpoint", "model", "dataset", "seed", "task", "headline", "splits", "seconds",
        "peak_memory_bytes",
        *(["training"] if "training" in record else []),
    ]  # fmt: skip
    assert all(isinstance(record[key], str) and record[key] for key in ("method", "checkpoint", "model", "dataset"))
    assert set(splits) <= set(record["splits"])
    assert all(split.split(":")[0] in splits for split in record["splits"])
    for scores in record["splits"].values():
        shares = ["accuracy", "f1", "precision", "recall", "out_of_label", "label_accuracy"]
        assert list(scores) == ["n", "accuracy", "accuracy_ci", *shares[1:], "loss"]
        low, high = scores["accuracy_ci"]
        assert 0 <= low <= scores["accuracy"] <= high <= 1 and high - low < 1
        assert isinstance(scores["n"], int) and scores["n"] > 0
        assert all(0 <= scores[key] <= 1 for key in shares)
        assert 0 < scores["loss"] < 1e3
    assert record["seconds"] > 0
    assert record["peak_memory_bytes"] > 2**20
    if "training" in record:
        check_training(record["training"])


def check_training(cost):
    """What the training cost; a resumed run that had no step left has no time of one."""
    assert list(cost) == ["steps", "seconds_per_step", "peak_memory_bytes"]
    assert isinstance(cost["steps"], int) and cost["steps"] > 0
    assert cost["seconds_per_step"] is None or cost["seconds_per_step"] > 0
    assert cost["peak_memory_bytes"] > 2**20


def test_metrics_have_one_schema(run):
    cwd, _ = run
    folders = cwd / "qlora_checkpoints" / "tiny-llama-qlora-snippets", prompt_folder(cwd)
    written = [*folders, cwd / "saved_results" / f"{prompt_folder(cwd).name}-snippets"]
    forget = len(select_rows(load_splits("snippets"), max_train_samples=32)["train_forget"])
    methods = []
    for folder in written:
        for record in metrics_of(folder):
            check_record(record, SPLITS)
            assert (record["dataset"], record["seed"]) == ("snippets", 42)
            sizes = {split: record["splits"][split]["n"] for split in SPLITS}
            assert sizes == {"train_retain": 4, "train_forget": forget, "test_retain": 4, "test_forget": 4}
            assert ("training" in record) == (record["method"] != "merged")
            methods.append(record["method"])
    assert methods == ["fine-tuned", "merged", "SPUL", "SPUL"]


def test_inference_repeats_what_training_reported(run):
    cwd, _ = run
    trained = metrics_of(prompt_folder(cwd))[-1]["splits"]
    (results,) = (cwd / "saved_results").iterdir()
    again = metrics_of(results)[-1]["splits"]
    for split in SPLITS:
        assert numbers(again[split]) == pytest.approx(numbers(trained[split]), abs=1e-4)


def test_spul_reports_accuracy_before_and_after_the_merge(run):
    _, said = run
    methods = re.findall(r"^\| ([\w-]+) +\|", said["spul"].stdout, re.MULTILINE)
    assert [name for name in methods if name in ("fine-tuned", "merged", "SPUL")] == [
        "fine-tuned", "merged", "merged", "SPUL"
    ]  # fmt: skip


def test_the_log_has_a_line_per_step(run):
    cwd, _ = run
    log = [json.loads(line) for line in (prompt_folder(cwd) / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2]
    for line in log:
        assert line["loss"] == pytest.approx(line["L_f"] + 0.5 * line["L_r"] + 0.5 * line["L_kl"], rel=1e-5)
    assert (prompt_folder(cwd) / "training.png").read_bytes().startswith(b"\x89PNG")


def test_nf4_quantises_every_linear_layer_but_the_head(tiny_model):
    link = resolve_chain(str(tiny_model))[0]
    model = load_base(link, tiny.ON_CPU, "nf4")
    kinds = {type(module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {bitsandbytes.nn.Linear4bit, torch.nn.Linear}
    plain = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert plain == ["lm_head"]
    assert model.model.layers[0].mlp.up_proj.weight.quant_type == "nf4"
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gradient_checkpointing_changes_no_number(tiny_model, small_data, tmp_path, quantization):
    """Dropout in front of the adapters included: the recomputation draws the same random numbers."""
    budget = f"--quantization={quantization}", "--max_steps=2", "--max_eval_samples=0", "--lr=1e-2"
    done(scripts.qlora(tmp_path, tiny_model, small_data, *budget, "--output_path=plain"))
    for kind in ("layers", "selective"):
        flag = f"--gradient_checkpointing={kind}"
        done(scripts.qlora(tmp_path, tiny_model, small_data, *budget, f"--output_path={kind}", flag))
    plain, *less = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "layers", "selective")
    )
    assert all(torch.equal(each[name], value) for each in less for name, value in plain.items())
    assert any(value.abs().max() > 0 for name, value in plain.items() if "lora_B" in name)


def test_the_prompt_is_the_same_with_gradient_checkpointing(fine_tuned, small_data, tmp_path):
    budget = "--max_steps=2", "--max_eval_samples=0", "--lr=1e-2", "--micro_batch_size=3"
    done(scripts.spul(tmp_path, fine_tuned, small_data, *budget, "--output_path=plain"))
    done(scripts.spul(tmp_path, fine_tuned, small_data, *budget, "--output_path=less", "--gradient_checkpointing"))
    assert torch.equal(prompt_of(tmp_path / "less"), prompt_of(tmp_path / "plain"))


def test_qlora_memorises_its_training_set(fine_tuned):
    (record,) = metrics_of(fine_tuned)
    check_record(record, SPLITS)
    assert record["splits"]["train_retain"]["accuracy"] == record["splits"]["train_forget"]["accuracy"] == 1


def test_qlora_leaves_the_model_folder_alone(tiny_model, small_data, tmp_path):
    before = tree(tiny_model)
    done(scripts.qlora(tmp_path, tiny_model, small_data, "--max_eval_samples=0"))
    assert tree(tiny_model) == before
    folder = tmp_path / "qlora_checkpoints" / "tiny-llama-qlora-data"
    assert names(folder) == (ADAPTER_FILES | {"README.md"}) - {"metrics.json"}
    assert manifest_of(folder)["metrics"] is None


def test_the_seed_decides_the_adapter(tiny_model, small_data, tmp_path):
    runs = {"a": 1, "b": 1, "c": 2}
    for name, seed in runs.items():
        arguments = f"--seed={seed}", "--max_eval_samples=0", f"--output_path={name}"
        done(scripts.qlora(tmp_path, tiny_model, small_data, *arguments))
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in runs)
    assert a == b != c


def test_exclude_forget_trains_on_no_forget_row(tiny_model, small_data, tmp_path):
    """Other forget rows change nothing then, and do change the adapter otherwise."""
    other = copy_data(small_data, tmp_path / "other", train_forget=lambda f: f.assign(text="something else"))
    adapters = {}
    for name, folder in (("data", small_data), ("other", other)):
        for flags in ((), ("--exclude_forget",)):
            arguments = "--max_eval_samples=0", "--max_steps=2", f"--output_path={name}{len(flags)}", *flags
            result = done(scripts.qlora(tmp_path, tiny_model, folder, *arguments))
            assert f"on {16 if flags else 24} rows" in result.stdout
            adapters[name, len(flags)] = (tmp_path / f"{name}{len(flags)}" / "adapter_model.safetensors").read_bytes()
    assert adapters["data", 1] == adapters["other", 1]
    assert adapters["data", 0] != adapters["other", 0]


def test_the_retrained_reference_is_called_so(tiny_model, small_data, tmp_path):
    done(scripts.qlora(tmp_path, tiny_model, small_data, "--exclude_forget", "--max_steps=1"))
    folder = tmp_path / "qlora_checkpoints" / "tiny-llama-qlora-data-retain"
    assert [record["method"] for record in metrics_of(folder)] == ["retain model"]
    done(inference(tmp_path, small_data, folder, "--output_path=out"))
    assert [record["method"] for record in metrics_of(tmp_path / "out")] == ["retain model"]


def copy_data(source, target, **changes):
    """The splits of `source`, those named in `changes` passed through their function."""
    target.mkdir()
    for split in SPLITS:
        frame = pd.read_csv(source / f"{split}.csv")
        changes.get(split, lambda frame: frame)(frame).to_csv(target / f"{split}.csv", index=False)
    return target


def prompt_after(cwd, parent, dataset, name, *arguments):
    """The vectors that a short run of spul.py learns."""
    done(scripts.spul(cwd, parent, dataset, "--max_eval_samples=0", f"--output_path={name}", *arguments))
    return prompt_of(cwd / name)


def test_only_the_encoder_changes_and_all_of_it(fine_tuned, small_data, tmp_path):
    load, build, seen = load_served, prompt_encoders.build_encoder, {}

    def watched_load(*arguments):
        seen["loaded"] = load(*arguments)
        seen["model"] = copy_of(seen["loaded"].model)
        return seen["loaded"]

    def watched_build(*arguments):
        encoder = build(*arguments)
        seen["encoder"] = copy_of(encoder)
        return encoder

    before = tree(fine_tuned)
    with (
        mock.patch.object(job, "load_served", watched_load),
        mock.patch.object(prompt_encoders, "build_encoder", watched_build),
    ):
        prompt_after(tmp_path, fine_tuned, small_data, "out")
    after = load_file(tmp_path / "out" / "encoder.safetensors")
    assert set(after) == set(seen["encoder"])
    assert {name for name, value in after.items() if torch.equal(value, seen["encoder"][name])} == {"start"}
    model = seen["loaded"].model
    assert all(torch.equal(value, seen["model"][name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert tree(fine_tuned) == before


def copy_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_the_logged_losses_are_those_of_the_paper(fine_tuned, small_data, tmp_path):
    """Worked out row by row, without batches, padding, gathering or a file of reference states. The first step has a
    rate of zero, so the vectors that were saved are those it saw. Labels of several tokens."""
    words = {"positive": "rather good", "negative": "rather poor"}
    change = {split: lambda f: f.assign(label_text=f["label_text"].map(words)) for split in SPLITS}
    folder = copy_data(small_data, tmp_path / "words", **change)
    sizes = "--max_length=200", "--train_batch_size=24", "--micro_batch_size=5", "--eval_batch_size=3"
    arguments = "--alpha=0.75", "--beta=2", "--max_steps=1", *sizes
    prompt = prompt_after(tmp_path, fine_tuned, folder, "out", *arguments)
    (line,) = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    loaded, frames = load_served(str(fine_tuned), tiny.ON_CPU), load_splits(str(folder))
    retain, forget, kl = [], [], []
    for text, word in zip(frames["train_retain"]["text"], frames["train_retain"]["label_text"]):
        with_prompt, without = log_probabilities(loaded, text, word, prompt), log_probabilities(loaded, text, word)
        retain.append(-with_prompt.gather(1, completion(loaded, word)).sum())
        kl.append((without.exp() * (without - with_prompt)).sum())
    for text, word in zip(frames["train_forget"]["text"], draw_unlearning_labels(8, 42)):
        forget.append(-log_probabilities(loaded, text, word, prompt).gather(1, completion(loaded, word)).sum())
    expected = {"L_f": sum(forget) / 8, "L_r": sum(retain) / 16, "L_kl": sum(kl) / 16}
    assert {name: line[name] for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-4
    )
    assert line["loss"] == pytest.approx(line["L_f"] + 0.75 * line["L_r"] + 2 * line["L_kl"], rel=1e-5)
    assert len(completion_ids(loaded.tokenizer, "rather good")) > 1


def completion(loaded, word):
    return torch.tensor(completion_ids(loaded.tokenizer, word))[:, None]


@torch.no_grad()
def log_probabilities(loaded, text, word, prompt=None):
    """log f(. | prompt, text, earlier tokens) at each token of ` word`: (tokens, |V|)."""
    ids = loaded.tokenizer(f"{TEMPLATE_HEAD}{text}{TEMPLATE_TAIL} {word}")["input_ids"]
    embedded = loaded.model.get_input_embeddings()(torch.tensor([ids]))
    if prompt is not None:
        embedded = torch.cat([prompt[None], embedded], dim=1)
    n = len(completion(loaded, word))
    return loaded.model(inputs_embeds=embedded).logits[0, -n - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("size", [1, 3, None])
def test_accumulated_micro_batches_give_the_same_prompt(fine_tuned, small_data, tmp_path, monkeypatch, size):
    """size None: what a CPU does by itself, here with pieces of 60 tokens. The pass over the prompt is not repeated."""
    arguments, passes, kept = ("--lr=1e-3", "--alpha=1"), [], forward._kept
    monkeypatch.setattr(forward, "_kept", lambda *given: passes.append(given) or kept(*given))
    whole = prompt_after(tmp_path, fine_tuned, small_data, "whole", *arguments, "--micro_batch_size=8")
    monkeypatch.setattr(batch, "CPU_TOKENS", 60)
    sizes, once = [f"--micro_batch_size={size}"] if size else [], len(passes)
    parts = prompt_after(tmp_path, fine_tuned, small_data, "parts", *arguments, *sizes)
    assert len(passes) == 2 * once
    assert not torch.equal(parts, whole)  # otherwise nothing was cut
    start_of_it = prompt_after(tmp_path, fine_tuned, small_data, "start", *arguments, "--max_steps=1")  # its rate is 0
    assert (whole - start_of_it).abs().max() > 1e-4
    assert torch.allclose(parts, whole, rtol=0, atol=1e-6)


def test_the_true_labels_of_forget_rows_do_not_matter(fine_tuned, small_data, tmp_path):
    """They are replaced by words drawn from the seed alone."""
    swap = {"positive": "negative", "negative": "positive"}
    flipped = copy_data(
        small_data,
        tmp_path / "flipped",
        train_forget=lambda f: f.assign(label=1 - f["label"], label_text=f["label_text"].map(swap)),
    )
    expected = prompt_after(tmp_path, fine_tuned, small_data, "a")
    assert torch.equal(prompt_after(tmp_path, fine_tuned, flipped, "b"), expected)
    assert not torch.equal(prompt_after(tmp_path, fine_tuned, small_data, "c", "--seed=1"), expected)


@pytest.mark.parametrize("encoder", ["mlp", "lstm", "embedding"])
def test_init_text_starts_at_the_embeddings_of_the_text(fine_tuned, encoder):
    """Its tokens in turn, repeated to fill the virtual tokens."""
    loaded = load_served(str(fine_tuned), tiny.ON_CPU)
    ids = loaded.tokenizer("forget the film")["input_ids"]
    wanted = [*ids, *ids, *ids, *ids][: len(ids) + 2]
    settings = {"init_text": "forget the film", "prompt_encoder": encoder, "ptuning_hidden_size": 16}

    def build(n):
        return build_encoder(loaded, EncoderSettings(**settings, ptuning_num_tokens=n))

    vectors = build(len(wanted))()
    assert torch.equal(vectors, loaded.model.get_input_embeddings().weight[wanted])
    assert torch.equal(build(2)(), loaded.model.get_input_embeddings().weight[ids[:2]])


@pytest.mark.parametrize("encoder", ["mlp", "lstm", "embedding"])
def test_a_text_start_can_be_trained_away_from(fine_tuned, small_data, tmp_path, encoder):
    arguments = "--init_text=forget the film", f"--prompt_encoder={encoder}", "--lr=1e-2"
    start = prompt_after(tmp_path, fine_tuned, small_data, "start", *arguments, "--max_steps=1")
    moved = prompt_after(tmp_path, fine_tuned, small_data, "moved", *arguments)
    loaded = load_served(str(fine_tuned), tiny.ON_CPU)
    ids = (loaded.tokenizer("forget the film")["input_ids"] * 4)[:4]
    assert torch.equal(start, loaded.model.get_input_embeddings().weight[ids])
    assert (moved - start).abs().amax(1).min() > 1e-4  # every virtual token


def test_init_checkpoint_starts_where_the_earlier_run_ended(fine_tuned, small_data, prompt, tmp_path):
    arguments = f"--init_checkpoint={prompt}", "--max_steps=1"  # the rate of the first step is 0
    assert torch.equal(prompt_after(tmp_path, fine_tuned, small_data, "on", *arguments), prompt_of(prompt))


def test_spul_lowers_its_loss(fine_tuned, small_data, tmp_path):
    """All rows in each batch, so that steps compare."""
    arguments = "--lr=2e-2", "--num_epochs=15", "--train_batch_size=24", "--ptuning_num_tokens=10"
    prompt_after(tmp_path, fine_tuned, small_data, "out", *arguments)
    log = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]


def test_sampling_flags_and_the_curve(fine_tuned, small_data, tmp_path):
    """Two forget rows in each batch of eight: 16 retain rows make three batches."""
    arguments = "--forget_per_batch=2", "--length_pool=2", "--eval_steps=2", "--curve_samples=4", "--output_path=out"
    done(scripts.spul(tmp_path, fine_tuned, small_data, *arguments))
    log = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3]
    (curve,) = [line for line in log if "accuracy" in line]
    assert curve["step"] == 2 and list(curve["accuracy"]) == list(SPLITS)


def test_a_part_of_the_forget_set(fine_tuned, small_data, tmp_path):
    result = done(scripts.spul(tmp_path, fine_tuned, small_data, "--forget_size=0.5"))
    assert "on 20 rows" in result.stdout
    assert re.match(r"spul_tiny-llama_data-0\.5_", prompt_folder(tmp_path).name)
    before, after = metrics_of(prompt_folder(tmp_path))
    assert before["splits"]["train_forget"]["n"] == after["splits"]["train_forget"]["n"] == 4
    done(inference(tmp_path, small_data, prompt_folder(tmp_path), "--forget_size=0.5", "--output_path=out"))
    (again,) = metrics_of(tmp_path / "out")
    for split in SPLITS:
        assert numbers(again["splits"][split]) == pytest.approx(numbers(after["splits"][split]), abs=1e-4)


def test_spul_on_a_plain_model(tiny_model, small_data, tmp_path):
    done(scripts.spul(tmp_path, tiny_model, small_data, "--output_path=out"))
    assert [record["method"] for record in metrics_of(tmp_path / "out")] == ["base", "SPUL"]
    manifest = manifest_of(tmp_path / "out")
    assert (tmp_path / "out" / manifest["parent"]["path"]).resolve() == tiny_model.resolve()
    assert load_served(str(tmp_path / "out"), tiny.ON_CPU).interventions[0].vectors.shape == (4, 128)


def test_the_reference_is_computed_once(fine_tuned, small_data, tmp_path):
    first = prompt_after(tmp_path, fine_tuned, small_data, "a")
    (file,) = (tmp_path / "saved_logits").iterdir()
    written = file.stat().st_mtime_ns
    assert torch.equal(prompt_after(tmp_path, fine_tuned, small_data, "b"), first)
    assert file.stat().st_mtime_ns == written
    assert load_file(file)["values"].shape == (16, 128)  # one token in each retain label


def test_each_setting_has_its_own_reference(fine_tuned, small_data, tmp_path):
    prompt_after(tmp_path, fine_tuned, small_data, "a", "--max_steps=1")
    prompt_after(tmp_path, fine_tuned, small_data, "b", "--max_steps=1", "--max_length=64")
    prompt_after(tmp_path, fine_tuned, small_data, "c", "--max_steps=1", "--seed=7")  # depends on no seed
    assert len(names(tmp_path / "saved_logits")) == 2


def test_the_reference_lies_where_logits_path_says(fine_tuned, small_data, tmp_path):
    prompt_after(tmp_path, fine_tuned, small_data, "a", "--logits_path=my/reference")
    assert names(tmp_path) == {"a", "my"} and names(tmp_path / "my") == {"reference"}


@pytest.mark.parametrize("script, flags", [("spul", ["--beta=0"]), ("baselines", ["--unlearn_method=wga"])])
def test_a_logits_path_that_serves_nothing_is_named(script, flags, tiny_model, small_data, tmp_path):
    note_once.cache_clear()
    flags = f"--model_checkpoints={tiny_model}", f"--dataset={small_data}", "--max_length=96", *flags, "--max_steps=1"
    said = done(scripts.call(tmp_path, script, *flags, "--max_eval_samples=0", "--logits_path=r", "--output_path=a"))
    assert "--logits_path is not used" in said.stderr and names(tmp_path) == {"a"}


def test_a_reference_of_something_else_is_refused(fine_tuned, tiny_model, small_data, tmp_path):
    path = tmp_path / "reference"
    flags = f"--logits_path={path}", "--max_eval_samples=0", "--max_steps=1"
    done(scripts.spul(tmp_path, fine_tuned, small_data, *flags, "--output_path=a"))
    wrong = {
        "model": (tiny_model, small_data, ()),
        "data": (fine_tuned, copy_data(small_data, tmp_path / "other", train_retain=lambda f: f[::-1]), ()),
        "max_length": (fine_tuned, small_data, ("--max_length=64",)),
        "dtype": (fine_tuned, small_data, ("--dtype=bfloat16",)),
    }
    for name, (parent, dataset, more) in wrong.items():
        arguments = f"--model_checkpoints={parent}", f"--dataset={dataset}", *scripts.SPUL, *flags, *more
        refused(tmp_path, f"{path} was computed for another {name}; delete it", "spul", *arguments)


def test_a_damaged_reference_is_refused(fine_tuned, small_data, tmp_path):
    arguments = f"--model_checkpoints={fine_tuned}", f"--dataset={small_data}", *scripts.SPUL, "--max_eval_samples=0"
    path = tmp_path / "reference"
    for content in (b"", b"not safetensors", b"\0" * 64):
        path.write_bytes(content)
        refused(tmp_path, "is no file of reference logits or is damaged", "spul", *arguments, f"--logits_path={path}")
    save_file({"hidden": torch.zeros(2, 2)}, path)
    refused(tmp_path, "is no file of reference logits or is damaged", "spul", *arguments, f"--logits_path={path}")
    refused(tmp_path, "is no regular file", "spul", *arguments, f"--logits_path={tmp_path}")


def test_without_the_kl_term_there_is_no_reference(fine_tuned, small_data, tmp_path):
    prompt_after(tmp_path, fine_tuned, small_data, "out", "--beta=0")
    assert names(tmp_path) == {"out"}
    line = json.loads((tmp_path / "out" / "training.jsonl").read_text().splitlines()[0])
    assert "L_kl" not in line and line["loss"] == pytest.approx(line["L_f"] + 0.5 * line["L_r"], rel=1e-5)


def test_the_reference_file_names_its_key(fine_tuned, small_data, tmp_path):
    prompt_after(tmp_path, fine_tuned, small_data, "out", "--logits_path=reference")
    with safe_open(tmp_path / "reference", "pt") as file:
        key = json.loads(file.metadata()["key"])
    assert key["model"] == [checkpoints.weights_sha256(path) for path in (fine_tuned.parent / "tiny-llama", fine_tuned)]
    assert key["max_length"] == 96 and key["dtype"] == "torch.float32"


def inference(cwd, dataset, *arguments):
    paths = [argument for argument in arguments if not str(argument).startswith("--")]
    flags = [argument for argument in arguments if str(argument).startswith("--")]
    return call(cwd, "inference_spul", f"--dataset={dataset}", *scripts.ROWS, "--model_checkpoints", *paths, *flags)


def test_settings_are_chosen_on_train_rows_alone(tiny_model, small_data, tmp_path):
    """Training and inference with --validation_share; icul reads its rows again by what its manifest recorded."""
    rows = "--validation_share=0.25", "--rows_seed=7", "--max_length=400"
    made = *rows, "--max_eval_samples=0", "--output_path=icul"
    done(scripts.baselines(tmp_path, tiny_model, small_data, "icul", *made))
    note_once.cache_clear()
    flags = "--model_checkpoints=icul", f"--dataset={small_data}", "--dtype=float32", *rows
    said = done(call(tmp_path, "inference_spul", *flags, "--output_path=chosen"))
    assert "the train rows that --validation_share put aside" in said.stderr and "other rows" not in said.stderr
    (record,) = metrics_of(tmp_path / "chosen")
    assert record["validation_share"] == 0.25
    texts = pd.read_json(tmp_path / "chosen" / "predictions.jsonl", lines=True).groupby("split")["text"].agg(set)
    for kind, n in (("retain", 4), ("forget", 2)):
        whole = set(pd.read_csv(small_data / f"train_{kind}.csv")["text"])
        assert texts[f"test_{kind}"] == whole - texts[f"train_{kind}"] and len(texts[f"test_{kind}"]) == n
    done(call(tmp_path, "inference_spul", *flags, "--final", "--max_eval_samples=2", "--output_path=final"))
    texts = pd.read_json(tmp_path / "final" / "predictions.jsonl", lines=True).groupby("split")["text"].agg(set)
    assert texts["test_forget"] < set(pd.read_csv(small_data / "test_forget.csv")["text"])
    assert "validation_share" not in metrics_of(tmp_path / "final")[0]
    refused(tmp_path, "--final goes with --validation_share", "inference_spul", *flags[:3], "--final")


def test_many_checkpoints_have_a_short_name_and_the_data_of_any_of_them(tiny_model, fine_tuned, small_data, tmp_path):
    """The plain model comes first and records no data set."""
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    base = shutil.copytree(tiny_model, tmp_path / ("x" * 200))
    command = "--model_checkpoints", base, fine_tuned, *scripts.ROWS, "--max_eval_samples=2"
    said = done(call(place, "inference_spul", *command))
    (folder,) = (place / "saved_results").iterdir()
    assert len(folder.name) < 200 and folder.name.endswith("-data")
    assert "was trained on other rows" not in said.stderr
    more = *command, "--max_train_samples=12", "--overwrite"
    assert (
        "fine-tuned was trained on other rows than the train columns show"
        in done(call(place, "inference_spul", *more)).stderr
    )


def test_several_checkpoints_give_one_table(tiny_model, fine_tuned, prompt, small_data, tmp_path):
    result = done(inference(tmp_path, small_data, tiny_model, fine_tuned, prompt))
    rows = [line.split("|")[1].strip() for line in result.stdout.splitlines() if line.startswith("|")]
    assert rows[0] == "method" and rows[2:] == ["base", "fine-tuned", "SPUL"]
    folder = tmp_path / "saved_results" / "tiny-llama+fine-tuned+prompt-data"
    records = metrics_of(folder)
    assert [record.pop("mcnemar", {}).get("against") for record in records] == [None, None, "fine-tuned"]
    for record in records:
        check_record(record, SPLITS)
    assert [record["checkpoint"] for record in records] == [str(tiny_model), str(fine_tuned), str(prompt)]
    assert {record["model"] for record in records} == {records[0]["model"]}  # all stand on the same base
    assert records[1]["splits"]["train_forget"]["accuracy"] == 1 > records[0]["splits"]["train_forget"]["accuracy"]


def test_two_checkpoints_of_a_kind_carry_their_folder(prompt, fine_tuned, small_data, tmp_path):
    done(scripts.spul(tmp_path, fine_tuned, small_data, "--max_eval_samples=0", "--output_path=second"))
    done(inference(tmp_path, small_data, prompt, tmp_path / "second", "--output_path=out", "--max_eval_samples=2"))
    assert [record["method"] for record in metrics_of(tmp_path / "out")] == ["SPUL (prompt)", "SPUL (second)"]


def test_predictions_are_one_line_per_checkpoint_and_row(fine_tuned, prompt, small_data, tmp_path):
    done(inference(tmp_path, small_data, fine_tuned, prompt, "--output_path=out"))
    rows = pd.read_json(tmp_path / "out" / "predictions.jsonl", lines=True)
    frames = load_splits(str(small_data))
    assert len(rows) == 2 * sum(map(len, frames.values()))
    for i, record in enumerate(metrics_of(tmp_path / "out")):
        part = rows.iloc[i * len(rows) // 2 : (i + 1) * len(rows) // 2]
        assert set(part["method"]) == {record["method"]} and set(part["checkpoint"]) == {record["checkpoint"]}
        for split, frame in frames.items():
            of_split = part[part["split"] == split]
            assert list(of_split["text"]) == list(frame["text"])
            assert list(of_split["label_text"]) == list(frame["label_text"])
            assert (of_split["correct"] == (of_split["prediction"] == of_split["label_text"])).all()
            assert of_split["correct"].mean() == record["splits"][split]["accuracy"]
            assert of_split["loss"].mean() == pytest.approx(record["splits"][split]["loss"], rel=1e-5)
            right = of_split["label_prediction"] == of_split["label_text"]
            assert right.mean() == record["splits"][split]["label_accuracy"]


@pytest.mark.parametrize("flags", [[], ["--output_path=out"]])
def test_results_are_replaced_only_on_request(fine_tuned, small_data, tmp_path, flags):
    """Under the default name too, which checkpoints in folders of one name share."""
    done(inference(tmp_path, small_data, fine_tuned, "--max_eval_samples=2", *flags))
    arguments = f"--dataset={small_data}", f"--model_checkpoints={fine_tuned}", "--max_eval_samples=2", *flags
    name = "out" if flags else "saved_results/fine-tuned-data"
    sentence = f"{name} exists; choose another --output_path or add --overwrite"
    refused(tmp_path, sentence, "inference_spul", *arguments)
    done(call(tmp_path, "inference_spul", *arguments, "--overwrite"))


def test_new_text_is_answered_with_and_without_the_prompt(prompt, fine_tuned, small_data, tmp_path):
    texts = [
        *load_splits(str(small_data))["train_retain"]["text"][:2],
        "it",
        "a 1999 sequel",
        "why , oh why ?",
        "B",
    ]
    flags = [f"--text={text}" for text in texts]
    lines = done(inference(tmp_path, small_data, prompt, "--json", *flags)).stdout.splitlines()
    alone = done(inference(tmp_path, small_data, fine_tuned, "--json", *flags)).stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [line["text"] for line in answers] == texts
    assert [line["without prompt"] for line in answers] == [json.loads(line)["answer"] for line in alone]
    assert all(line["without prompt"]["answer"] in ("positive", "negative") for line in answers[:2])  # memorised
    assert [line["with prompt"] for line in answers] != [line["without prompt"] for line in answers]
    for line in answers:
        assert list(line) == ["text", "without prompt", "with prompt"]
        found = [line[key]["probability"] for key in ("without prompt", "with prompt")]
        assert all(0 < probability <= 1 for probability in found), found
    assert names(tmp_path) == set()


def test_new_text_needs_no_data(tiny_model, small_data, tmp_path):
    """The checkpoint knows its label words."""
    place = shutil.copytree(small_data, tmp_path / "place")
    flags = "--max_train_samples=8", "--max_steps=1", "--max_eval_samples=0", "--output_path=tuned"
    done(scripts.qlora(tmp_path, tiny_model, place, *flags))
    shutil.rmtree(place)
    command = "--model_checkpoints=tuned", "--json", *scripts.ROWS
    said = done(call(tmp_path, "inference_spul", *command, "--text=a fine film")).stdout
    assert json.loads(said)["answer"]["answer"]
    refused(tmp_path, "place", "inference_spul", *command[::2])


def test_answers_as_text(prompt, fine_tuned, small_data, tmp_path):
    result = done(inference(tmp_path, small_data, fine_tuned, prompt, "--text=a fine , warm film"))
    lines = result.stdout.splitlines()
    assert lines[0] == "a fine , warm film"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["fine-tuned", "prompt", "prompt"]
    assert all(re.search(r" \(\d+\.\d %\)$", line) for line in lines[1:])


def test_texts_from_a_file(fine_tuned, small_data, tmp_path):
    (tmp_path / "texts.txt").write_text("a fine film\nan awful film\n")
    result = done(inference(tmp_path, small_data, fine_tuned, "--text=first", "--input_file=texts.txt", "--json"))
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == [
        "first",
        "a fine film",
        "an awful film",
    ]


def test_the_adapter_config_is_pefts(prompt, fine_tuned):
    assert PeftConfig.from_pretrained(str(fine_tuned)).peft_type == "LORA"
    assert PeftConfig.from_pretrained(str(prompt)).peft_type == "P_TUNING"


@pytest.mark.long
def test_a_gguf_file_through_all_scripts(small_data, tmp_path):
    """Fine-tuned, unlearnt by a prompt and by a baseline whose own folder is a plain model again."""
    file = tiny.save_gguf(tmp_path / "tiny.gguf")
    refused(tmp_path, "add --quantization=none", "qlora", f"--model_name={file}", f"--dataset={small_data}")
    assert "dry run" in done(scripts.qlora(tmp_path, file, small_data, "--dry_run")).stdout
    done(scripts.qlora(tmp_path, file, small_data, "--lr=2e-3", "--num_epochs=8", "--output_path=tuned"))
    done(scripts.spul(tmp_path, "tuned", small_data, "--max_eval_samples=0", "--output_path=prompt"))
    done(scripts.baselines(tmp_path, "tuned", small_data, "wga", "--max_eval_samples=0", "--output_path=baseline"))
    chosen = "--model_checkpoints", file, "tuned", "prompt", "baseline", f"--dataset={small_data}", *scripts.ROWS
    done(call(tmp_path, "inference_spul", *chosen, "--output_path=scores"))
    records = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    base, tuned, *others = (record["splits"]["train_retain"]["accuracy"] for record in records)
    assert base == 0 and tuned > 0.5 and len(others) == 2
    assert not {"quantization_config"} & json.loads((tmp_path / "baseline" / "config.json").read_text()).keys()
    file.write_bytes(file.read_bytes()[:-4] + b"1234")
    refused(tmp_path, "tiny.gguf is not the model that tuned was trained on", "inference_spul", *chosen)
