"""baselines.py by its command line: the published commands, every method's checkpoint, and what is refused."""

import json
import re
import shlex
import shutil

import pandas as pd
import pytest
import scripts
import tiny
import torch
from marks import mostly_long
from safetensors.torch import load_file, save_file
from scripts import (
    ROWS,
    baselines,
    call,
    done,
    kill_after_a_state,
    manifest_of,
    metrics_of,
    names,
    refused,
    stop_at,
    tree,
)

from utils.data.splits import SPLITS
from utils.interventions import in_context
from utils.interventions.served import load_served
from utils.models.chain import resolve_chain
from utils.tasks.classification import TEMPLATE_TAIL, classification
from utils.tasks.rows import load_splits
from utils.training.state import read_state
from utils.unlearning.methods import IN_CONTEXT, METHODS

pytestmark = pytest.mark.slow

PUBLISHED = """--dataset=sst2 --model_checkpoints=[local path to checkpoints] \
    --max_length=1024 --set_pad_id --lr=1e-4 \
    --train_batch_size=32 --eval_batch_size=32 --num_epochs=10 --weight_decay=0.001 \
    --unlearn_method="""
PUBLISHED_METHODS = {  # with their retain loss
    "gradient_ascent": "none",
    "random_label": "none",
    "gradient_ascent_kl": "kl",
    "gradient_ascent_descent": "ce",
}
LORA_METHODS = "gradient_ascent_kl", "rmu"
FULL_FILES = {
    "config.json", "generation_config.json", "manifest.json", "metrics.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "training.jsonl", "training.png",
}  # fmt: skip
LORA_FILES = FULL_FILES - {"config.json", "generation_config.json", "model.safetensors"} | {
    "README.md", "adapter_config.json", "adapter_model.safetensors",
}  # fmt: skip
LONG = "--max_length=256"
UNEVALUATED = "--max_eval_samples=0", "--output_path=out"


@pytest.fixture(scope="module")
def trained(fine_tuned, small_data, tmp_path_factory):
    """The folder in which every method ran, each writing a folder of its own. icul's context needs the length."""
    cwd = tmp_path_factory.mktemp("methods")
    steps = LONG, "--num_epochs=2", "--max_steps=2"  # the first has learning rate 0
    for method in METHODS:
        done(baselines(cwd, fine_tuned, small_data, method, *steps, "--lr=1e-3", f"--output_path={method}"))
    for method in LORA_METHODS:
        more = "--lr=1e-2", "--tune=lora", f"--output_path={method}-lora"
        done(baselines(cwd, fine_tuned, small_data, method, *steps, *more))
    for method in IN_CONTEXT:
        instruction = ("--instruction=Answer unknown.",) if method == "prompting" else ()
        done(baselines(cwd, fine_tuned, small_data, method, LONG, *instruction, f"--output_path={method}"))
    return cwd


FOLDERS = *METHODS, *(f"{method}-lora" for method in LORA_METHODS), *IN_CONTEXT


@pytest.fixture(scope="module")
def evaluated(trained, small_data, fine_tuned):
    """What one run of inference_spul.py says about all of them: {folder: record}, {folder: predictions}."""
    cwd = trained
    flags = f"--dataset={small_data}", *ROWS, LONG, "--output_path=table"
    done(call(cwd, "inference_spul", "--model_checkpoints", *FOLDERS, fine_tuned, *flags))
    predictions = [json.loads(line) for line in (cwd / "table" / "predictions.jsonl").read_text().splitlines()]
    by_folder = {}
    for row in predictions:
        by_folder.setdefault(row["checkpoint"], []).append(row)
    return {record["checkpoint"]: record for record in metrics_of(cwd / "table")}, by_folder


@pytest.fixture(scope="module")
def parent(fine_tuned):
    """The weights that every method starts from: the fine-tuned model, merged."""
    return load_served(str(fine_tuned), tiny.ON_CPU).model.state_dict()


def changes(folder, parent):
    """Names of the tensors of a full checkpoint that are not those of the parent."""
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == parent.keys()
    return {name for name, value in weights.items() if not torch.equal(value, parent[name])}


@pytest.mark.parametrize("method", PUBLISHED_METHODS)
def test_the_published_command(method, fine_tuned, small_data, tmp_path):
    """Verbatim but for data, model and batch size; two flags more for the budget."""
    command = (PUBLISHED + method).replace("=sst2", f"={small_data}").replace("_batch_size=32", "_batch_size=8")
    command = command.replace("[local path to checkpoints]", str(fine_tuned))
    budget = "--max_steps=1", "--max_eval_samples=2"
    result = done(call(tmp_path, "baselines", *shlex.split(command), *budget))
    (folder,) = (tmp_path / "unlearn_checkpoints").iterdir()
    assert re.fullmatch(rf"{method}_tiny-llama_data-1\.0_\d{{4}}-\d\d-\d\d-\d\d-\d\d-\d\d", folder.name)
    assert f"wrote unlearn_checkpoints/{folder.name}" in result.stdout
    assert names(folder) == FULL_FILES
    arguments = manifest_of(folder)["arguments"]
    wanted = {"retain_loss": PUBLISHED_METHODS[method], "tune": "full", "num_epochs": 10, "lr": 1e-4}
    assert wanted.items() <= arguments.items()


@pytest.mark.parametrize("folder", FOLDERS)
def test_inference_finds_the_scores_that_training_reported(trained, evaluated, folder):
    cwd = trained
    (own,), record = metrics_of(cwd / folder), evaluated[0][folder]
    method = folder.removesuffix("-lora")
    assert own["method"] == method
    assert record["method"] == (folder if f"{method}-lora" not in FOLDERS else f"{method} ({folder})")
    for split in SPLITS:
        exact = "-lora" not in folder  # inference merges an adapter, which rounds
        assert record["splits"][split]["accuracy"] == own["splits"][split]["accuracy"]
        assert record["splits"][split]["loss"] == pytest.approx(own["splits"][split]["loss"], rel=0 if exact else 1e-4)
    assert manifest_of(cwd / folder)["metrics"] == [own]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(trained, parent, method):
    cwd = trained
    folder = cwd / method
    assert names(folder) == FULL_FILES
    manifest = manifest_of(folder)
    assert manifest["kind"] == "full"
    assert manifest["training"].keys() == {"steps", "seconds_per_step", "peak_memory_bytes"}
    assert manifest["training"]["steps"] == 2 and manifest["training"]["seconds_per_step"] > 0
    assert metrics_of(folder)[0]["training"] == manifest["training"]
    read = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(manifest["files"]) == read
    trained_names = set(parent)
    if method == "rmu":
        trained_names = {name for name in parent if re.search(r"layers\.[01]\.", name)}
    assert changes(folder, parent) == trained_names
    log = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    retain = {"none": set(), "ce": {"L_r"}, "kl": {"L_kl"}, "activations": {"L_r"}}[METHODS[method].retain_loss]
    more = {"retain_weight"} if METHODS[method].dual else set()
    assert all({"step", "lr", "loss", "gradient_norm", "L_f"} | retain | more == line.keys() for line in log)
    assert [line["step"] for line in log] == [1, 2]
    total = [
        line["L_f"] + line.get("retain_weight", METHODS[method].retain_weight) * sum(line[key] for key in retain)
        for line in log
    ]
    assert [line["loss"] for line in log] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("method", LORA_METHODS)
def test_lora_writes_an_adapter_on_the_untouched_model(trained, fine_tuned, method):
    folder = trained / f"{method}-lora"
    assert names(folder) == LORA_FILES
    assert manifest_of(folder)["kind"] == "lora"
    assert manifest_of(folder)["parent"]["sha256"] == resolve_chain(str(fine_tuned))[-1].sha256
    weights = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)
    moved = {name for name, value in weights.items() if "lora_B" in name and value.abs().max() > 0}
    layers = {int(re.search(r"layers\.(\d)", name)[1]) for name in moved}
    assert layers == ({0, 1} if method == "rmu" else {0, 1, 2, 3})


@pytest.mark.parametrize("tune", mostly_long(["full", "lora"], "full"))
def test_a_killed_run_resumes_bit_by_bit(fine_tuned, small_data, tmp_path, tune):
    """Full tuning is interrupted by Ctrl-C in this process, LoRA (with its dropout) by SIGKILL in its own."""
    flags = f"--model_checkpoints={fine_tuned}", f"--dataset={small_data}", *scripts.BASELINES, *UNEVALUATED
    method = "--unlearn_method=npo", "--retain_loss=kl", f"--tune={tune}", "--lr=1e-3"
    steps = "--num_epochs=100", "--max_steps=12" if tune == "lora" else "--max_steps=4", "--save_steps=2"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    done(call(whole, "baselines", *flags, *method, *steps))
    if tune == "lora":
        kill_after_a_state(killed, "baselines", *flags, *method, *steps)
    else:
        stop_at(killed, 4, "baselines", *flags, *method, *steps)
    assert not (killed / "out").exists()
    step = read_state(killed / "out.training.safetensors")["log"][-1]["step"]
    result = done(call(killed, "baselines", *flags, *method, *steps, "--resume"))
    assert f"after step {step}\n" in result.stdout
    for name in ("adapter_model.safetensors" if tune == "lora" else "model.safetensors", "training.jsonl"):
        assert (killed / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()


def test_stop_at_forget_accuracy(fine_tuned, small_data, tmp_path):
    """The fine-tuned model knows all; ascent is stopped at the first evaluation that finds half or less."""
    more = "--lr=1e-3", "--num_epochs=30", "--eval_steps=2", "--stop_at_forget_accuracy=0.5", *UNEVALUATED
    done(baselines(tmp_path, fine_tuned, small_data, "gradient_ascent", *more))
    log = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    measured = [line["accuracy"]["train_forget"] for line in log if "accuracy" in line]
    assert measured[-1] <= 0.5 and all(share > 0.5 for share in measured[:-1])
    steps = manifest_of(tmp_path / "out")["training"]["steps"]
    assert steps == 2 * len(measured) < 30
    assert log[-1]["step"] == steps


def test_a_reference_file_serves_again_with_the_same_result(fine_tuned, small_data, tmp_path):
    """Computing it must not draw random numbers that the dropout would miss."""
    more = "--tune=lora", "--max_steps=2", "--max_eval_samples=0"
    for name in ("first", "second"):
        done(baselines(tmp_path, fine_tuned, small_data, "npo", *more, f"--output_path={name}"))
        files = list((tmp_path / "saved_logits").iterdir())
        assert len(files) == 1
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    other = f"--logits_path={files[0]}", "--max_length=90", f"--model_checkpoints={fine_tuned}", *more
    flags = f"--dataset={small_data}", *scripts.BASELINES[1:], "--output_path=third"
    sentence = "was computed for another max_length; delete it or pass another --logits_path"
    refused(tmp_path, sentence, "baselines", *flags, "--unlearn_method=npo", *other)
    sentence = "was computed for another quantity"
    refused(tmp_path, sentence, "baselines", *flags, "--unlearn_method=dpo", *other, "--max_length=96")


def test_random_batches_may_lack_forget_rows(fine_tuned, small_data, tmp_path):
    """Batches of one row: it is one to forget or one to keep."""
    more = "--train_batch_size=1", "--max_steps=6", *UNEVALUATED
    done(baselines(tmp_path, fine_tuned, small_data, "dpo", *more))
    log = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    assert {(line["L_f"] == 0, line["L_r"] == 0) for line in log} == {(True, False), (False, True)}


# The two that train nothing


def test_their_checkpoint_is_a_template(trained):
    cwd = trained
    for method in IN_CONTEXT:
        folder = cwd / method
        assert names(folder) == {"manifest.json", "metrics.json", "template.json"}
        assert manifest_of(folder)["kind"] == "in-context"
        assert set(manifest_of(folder)["files"]) == {"template.json"}
        assert manifest_of(folder)["training"] is None
        assert "training" not in metrics_of(folder)[0]


def test_templates_change_what_the_model_says(evaluated, fine_tuned):
    _, predictions = evaluated
    plain = [row["loss"] for row in predictions[str(fine_tuned)]]
    for method in IN_CONTEXT:
        pairs = zip((row["loss"] for row in predictions[method]), plain, strict=True)
        unsure = [(own, loss) for own, loss in pairs if loss > 1e-3]  # below, float32 has few digits
        assert unsure and all(own != pytest.approx(loss, rel=1e-4) for own, loss in unsure)


def around(template, texts):
    """The queries about `texts` in the words of `template`."""
    task = classification(["negative", "positive"])
    return template.around(task, task.queries(pd.DataFrame({"text": texts})))


def test_the_instruction_stands_in_the_question(trained):
    template = in_context.load(resolve_chain(str(trained / "prompting"))[-1]).template
    (query,) = around(template, ["any text"])
    assert str(query) == (
        "### Text: any text\n\n### Question: Answer unknown. What is the sentiment of the given text?\n\n### Sentiment:"
    )


def test_the_instruction_names_the_people(tiny_model, small_data, tmp_path):
    (tmp_path / "people.txt").write_text("Ann Lee: Ann Lee, Lee\nBob Ray\n")
    done(baselines(tmp_path, tiny_model, small_data, "prompting", "--forget_names=people.txt", *UNEVALUATED))
    settings = json.loads((tmp_path / "out" / "template.json").read_text())
    assert settings["instruction"] == 'If the text names Ann Lee or Bob Ray, answer "unknown".'


def test_the_context_holds_the_forget_row_with_the_other_label(trained, small_data):
    """Every forget row is most like itself; behind it two rows to keep, with their own labels."""
    frames = load_splits(str(small_data))
    forget, retain = frames["train_forget"], frames["train_retain"]
    template = in_context.load(resolve_chain(str(trained / "icul"))[-1]).template
    other = {"positive": "negative", "negative": "positive"}
    kept = dict(zip(retain["text"], retain["label_text"]))
    for text, label, query in zip(forget["text"], forget["label_text"], around(template, list(forget["text"]))):
        *shown, last = query.head.split("### Text: ")[1:]
        assert last == "" and query.text == text and query.tail == TEMPLATE_TAIL
        assert shown[0] == f"{text}{TEMPLATE_TAIL} {other[label]}\n\n"
        answered = [part.removesuffix("\n\n").split(f"{TEMPLATE_TAIL} ") for part in shown[1:]]
        assert len(answered) == 2 and all(kept[own] == word for own, word in answered)


def test_many_texts_get_the_context_that_each_gets_alone(trained, small_data):
    template = in_context.load(resolve_chain(str(trained / "icul"))[-1]).template
    texts = list(load_splits("snippets")["test_retain"]["text"].head(130))
    together = around(template, texts)
    assert len(set(together)) > 2
    assert [around(template, [text])[0] for text in texts[::40]] == together[::40]


def test_icul_shows_as_many_rows_as_asked(fine_tuned, small_data, tmp_path):
    more = "--icul_flipped=3", "--icul_correct=0", *UNEVALUATED
    done(baselines(tmp_path, fine_tuned, small_data, "icul", *more))
    template = in_context.load(resolve_chain(str(tmp_path / "out"))[-1]).template
    (query,) = around(template, ["a film"])
    assert query.head.count("### Text: ") == 3 + 1


def test_changed_data_and_changed_templates_are_refused(fine_tuned, small_data, tmp_path):
    shutil.copytree(small_data, tmp_path / "data")
    done(baselines(tmp_path, fine_tuned, "data", "icul", *UNEVALUATED))
    evaluation = "--model_checkpoints=out", f"--dataset={small_data}", *ROWS, "--output_path=table"
    train = tmp_path / "data" / "train_retain.csv"
    before = train.read_text()
    train.write_text(before.replace("the", "a"))
    refused(tmp_path, "data has changed since out was made from it; make it again", "inference_spul", *evaluation)
    train.write_text(before)
    template = tmp_path / "out" / "template.json"
    template.write_text(template.read_text().replace("positive", "negative"))
    refused(tmp_path, "template.json is not the file its manifest names", "inference_spul", *evaluation)


# What their checkpoints serve for


def test_spul_trains_on_an_unlearnt_model(trained, small_data):
    cwd = trained
    done(scripts.spul(cwd, "npo", small_data, "--max_steps=1", "--max_eval_samples=0", "--output_path=spul"))
    chain = resolve_chain(str(cwd / "spul"))
    assert [link.kind for link in chain] == ["full", "prompt"]
    assert manifest_of(cwd / "spul")["base"] == manifest_of(cwd / "npo")["base"]
    damaged = cwd / "npo" / "model.safetensors"
    weights = load_file(damaged)
    kept = damaged.read_bytes()
    weights["model.norm.weight"][0] += 1
    save_file(weights, damaged, {"format": "pt"})
    evaluation = "--model_checkpoints=spul", f"--dataset={small_data}", *ROWS, "--output_path=nothing"
    refused(cwd, "model.safetensors is not the file its manifest names", "inference_spul", *evaluation)
    damaged.write_bytes(kept)


@pytest.mark.parametrize("kind", ["prompt", "icul"])
def test_a_prompt_is_no_model_to_train(trained, prompt, small_data, tmp_path, kind):
    folder = {"prompt": prompt, "icul": trained / "icul"}[kind]
    common = f"--model_checkpoints={folder}", f"--dataset={small_data}", "--output_path=out"
    for script, flags in [
        ("spul", scripts.SPUL),
        ("baselines", (*scripts.BASELINES, "--unlearn_method=npo")),
        ("baselines", (*scripts.BASELINES, "--unlearn_method=icul")),
    ]:
        sentence = "already is a prompt; --model_checkpoints takes what it was made on"
        refused(tmp_path, sentence, script, *common, *flags)


# Refusals


@pytest.mark.parametrize(
    "method, flags, sentence",
    [
        ("npo", "--forget_per_batch=8", "--forget_per_batch must be smaller than --train_batch_size"),
        ("npo", "--stop_at_forget_accuracy=0.5", "--stop_at_forget_accuracy needs --eval_steps"),
        ("npo", "--method_delta=0.1", "--method_delta is no constant of npo"),
        ("gradient_ascent", "--method_beta=0.1", "--method_beta is no constant of gradient_ascent"),
        ("wga", "--rmu_layer=1", "--rmu_layer is no constant of wga"),
        ("gradient_ascent_kl", "--retain_loss=ce", "the retain loss of gradient_ascent_kl is part of the method"),
        ("rmu", "--retain_loss=none", "the retain loss of rmu is part of the method"),
        ("gradient_ascent", "--retain_weight=2", "--retain_weight needs a --retain_loss"),
        ("npo", "--retain_loss=none --retain_weight=2", "--retain_weight needs a --retain_loss"),
        ("undial", "--forget_per_batch=2", "--forget_per_batch needs retain rows; undial has none"),
        ("icul", "--retain_loss=ce", "icul trains nothing; leave out --retain_loss"),
        ("icul", "--method_beta=1", "icul trains nothing; leave out --method_beta"),
        ("icul", "--tune=lora", "icul trains nothing; leave out --tune"),
        ("icul", "--max_steps=3", "icul trains nothing; leave out --max_steps"),
        ("npo", "--icul_correct=3", "--icul_correct goes with --unlearn_method=icul"),
        ("npo", "--lora_rank=3", "--lora_rank goes with --tune=lora"),
        ("prompting", "", "prompting needs --forget_names, --forget_only or --instruction"),
        ("prompting", "--instruction=x --forget_names=y", "leave out one of them"),
        ("prompting", "--forget_names=none.txt", "cannot read the names file none.txt"),
        ("icul", "--instruction=x", "--instruction and --forget_names go with --unlearn_method=prompting"),
        ("npo", "--forget_names=x", "--instruction and --forget_names go with --unlearn_method=prompting"),
        ("forget_all", "", "argument --unlearn_method: invalid choice: 'forget_all'"),
        ("npo", "--stop_at_forget_accuracy=1.5", "'1.5' is not a number from 0 to 1"),
        ("npo", "--method_beta=0", "'0' is not a number above 0"),
        ("npo", "--retain_weigth=2", "unknown argument --retain_weigth, did you mean --retain_weight?"),
    ],
)
def test_contradictions_are_refused(tiny_model, small_data, tmp_path, method, flags, sentence):
    common = f"--model_checkpoints={tiny_model}", f"--dataset={small_data}", *scripts.BASELINES
    refused(tmp_path, sentence, "baselines", *common, f"--unlearn_method={method}", *flags.split())


@pytest.mark.parametrize(
    "method, flags, sentence",
    [
        ("rmu", ["--rmu_layer=4"], "--rmu_layer=4 is beyond the model's last layer; use at most 3"),
        ("rmu", ["--tune=lora", "--lora_target_modules", "lm_head"], "LoRA has nothing on layer 1 or the two before"),
        ("npo", ["--tune=lora", "--lora_target_modules", "none"], "choose --lora_target_modules"),
        ("icul", ["--max_length=40"], "--max_length=40 cannot hold template and label"),
        ("npo", ["--resume"], "there is no interrupted run to continue"),
        ("npo", ["--output_path=taken"], "taken exists; choose another --output_path or add --overwrite"),
        ("gradient_ascent", ["--lr=1e30", "--num_epochs=4"], "lower --lr (now 1e+30) or use --dtype=float32"),
    ],
)
def test_bad_runs_are_refused(tiny_model, small_data, tmp_path, method, flags, sentence):
    (tmp_path / "taken").mkdir()
    common = f"--model_checkpoints={tiny_model}", f"--dataset={small_data}", *scripts.BASELINES, "--output_path=out"
    refused(tmp_path, sentence, "baselines", *common, f"--unlearn_method={method}", *flags)


def test_one_label_cannot_be_flipped(tiny_model, small_data, tmp_path):
    shutil.copytree(small_data, tmp_path / "data")
    for split in SPLITS:
        file = tmp_path / "data" / f"{split}.csv"
        frame = pd.read_csv(file)
        frame[frame["label"] == 1].to_csv(file, index=False)
    before = tree(tmp_path)
    result = baselines(tmp_path, tiny_model, "data", "icul", *UNEVALUATED)
    assert result.code == 2 and "icul needs at least two labels to flip between" in result.stderr
    assert tree(tmp_path) == before
