"""What is read from a file is checked then: one sentence for every damage, and no network for a local path."""

import json
import os
import shutil
import socket

import huggingface_hub
import numpy as np
import pytest
import scripts
import tiny
import torch
from safetensors.torch import load_file, safe_open, save_file
from scripts import call, done, refused, stop_at

from utils.errors import UserError
from utils.interventions import eco, gate_files, gates
from utils.interventions.served import load_served
from utils.models.adapters import lora_config
from utils.models.chain import resolve_chain
from utils.storage import checkpoints, schemas
from utils.storage.checkpoints import file_sha256, weights_sha256
from utils.storage.formats import Cost
from utils.storage.reading import is_finite, read_json

PROMPT, ADAPTER, BASE, GATE = "prompt", "fine-tuned", "tiny-llama", "eco"
GATED = ("--unlearn_method=eco", "--eco_threshold=0.4", "--eco_strength=3", "--max_eval_samples=0")


@pytest.fixture(scope="module")
def trees(fine_tuned, prompt, small_data, tmp_path_factory):
    """A folder with model, adapter, prompt, gate, the two in-context baselines and data."""
    folder = tmp_path_factory.mktemp("trees")
    for source in (fine_tuned.parent / BASE, fine_tuned, prompt, small_data):
        shutil.copytree(source, folder / source.name)
    for name, flags in {
        GATE: GATED,
        "prompting": ("--unlearn_method=prompting", "--instruction=Say unknown.", "--max_eval_samples=0"),
        "icul": ("--unlearn_method=icul", "--max_eval_samples=0", "--max_length=400"),
    }.items():
        command = f"--model_checkpoints={ADAPTER}", "--dataset=data", *scripts.ROWS, *flags, f"--output_path={name}"
        done(call(folder, "baselines", *command))
    return folder


@pytest.fixture
def forest(trees, tmp_path):
    """A copy of it that a test may damage."""
    shutil.copytree(trees, tmp_path / "forest", symlinks=True)
    return tmp_path / "forest"


def inference(name, *flags):
    return f"--model_checkpoints={name}", *scripts.ROWS, "--max_length=400", "--text=a film", *flags


def says(forest, sentence, name, *flags):
    return refused(forest, sentence, "inference_spul", *inference(name, *flags))


def sign(folder):
    """Let the manifests of `folder`, and of what was made from it, name the files as they are."""
    order = [BASE, ADAPTER, PROMPT, GATE, "prompting", "icul"]
    for name in order[order.index(folder.name) :]:
        file = folder.parent / name / "manifest.json"
        if file.exists():
            manifest = json.loads(file.read_text())
            manifest["files"] = {name: file_sha256(file.parent / name) for name in checkpoints.model_files(file.parent)}
            parent = BASE if name == ADAPTER else ADAPTER
            manifest["parent"]["sha256"] = weights_sha256(folder.parent / parent)
            file.write_text(json.dumps(manifest))


def edit_json(file, change):
    value = json.loads(file.read_text())
    value = change(value) or value
    file.write_text(json.dumps(value))


def edit_tensors(file, change):
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    changed = change(tensors)
    tensors = changed if isinstance(changed, dict) else tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)


# JSON by the letter.


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1, "a": 2}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a": ' * 100_000,
        '{"a": "é"}'.encode("latin-1"),
        '{"a": 1}'.encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b"",
        b"{} {}",
    ],
)
def test_json_by_the_letter(tmp_path, content):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(UserError, match="is no valid JSON or is damaged") as raised:
        read_json(tmp_path / "file.json")
    assert "\n" not in str(raised.value)


def test_json_of_another_project_may_hold_infinity_and_a_key_twice_but_no_nan(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"limit": [0, Infinity], "a": 1, "a": 2}')
    assert read_json(file, foreign=True) == {"limit": [0, float("inf")], "a": 2}
    file.write_text('{"a": NaN}')
    with pytest.raises(UserError, match="NaN is no JSON"):
        read_json(file, foreign=True)


def test_types_are_as_written():
    for value in ("1", True, 1.0, None):
        with pytest.raises(UserError, match=r"steps: "):
            schemas.check({"steps": value, "seconds_per_step": 1, "peak_memory_bytes": 0}, Cost, "file")


# Files that are none.


@pytest.mark.parametrize("special", ["/dev/zero", "pipe"])
def test_what_is_no_regular_file_is_not_read(forest, special):
    """A names list, a text file, a reference, a manifest, weights: reading one of them would never end."""
    os.mkfifo(forest / "pipe")
    special = special if special.startswith("/") else str(forest / "pipe")
    sentence = "is no regular file"
    says(forest, sentence, PROMPT, f"--input_file={special}")
    evaluation = "--model_checkpoints=prompt", *scripts.ROWS, "--dataset=data"
    refused(forest, sentence, "inference_spul", *evaluation, f"--forget_only={special}")
    unlearn = f"--model_checkpoints={ADAPTER}", "--dataset=data", *scripts.SPUL, "--max_eval_samples=0"
    refused(forest, sentence, "spul", *unlearn, f"--logits_path={special}")
    for file in (
        forest / PROMPT / "manifest.json",
        forest / BASE / "model.safetensors",
        forest / "data/test_forget.csv",
    ):
        file.unlink()
        file.symlink_to(special)
    for name in (PROMPT, BASE):
        with pytest.raises(UserError, match=sentence):
            resolve_chain(str(forest / name))
    result = call(forest, "inference_spul", *evaluation[1:], f"--model_checkpoints={ADAPTER}")
    assert result.code == 2 and result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["../data/train_retain.csv", "/etc/hostname", "", ".", "tokenizer.json/../../x"])
def test_a_manifest_names_files_of_its_folder_alone(forest, name):
    edit_json(forest / PROMPT / "manifest.json", lambda m: m["files"].update({name: "0" * 64}))
    says(forest, "prompt", PROMPT)


def test_a_link_that_leads_out_of_a_checkpoint(forest):
    file = forest / PROMPT / "tokenizer.json"
    file.rename(forest / "elsewhere.json")
    file.symlink_to(forest / "elsewhere.json")
    says(forest, "is a link that leads out of its folder", PROMPT)


def test_a_file_that_no_manifest_names(forest):
    (forest / ADAPTER / "added_tokens.json").write_text('{"the": 5}')
    says(forest, "holds added_tokens.json, which its manifest does not name", PROMPT)


# Manifests.

WRONG = {
    "kind": [None, 3, ["lora"], "steering"],
    "version": ["2", True, 3, 0, 1.5],
    "parent": [None, "..", {}, {"path": 3, "sha256": "0" * 64}, {"path": "", "sha256": "0" * 64}],
    "arguments": [None, [], {}, {"dataset": 3}, {"dataset": "data", "exclude_forget": "no"}],
    "data_fingerprint": [None, 3, "x"],
    "label_words": [None, [], "positive", [1, 2], [""]],
    "seed": [None, -1, 2**32, 1.5, True, "42"],
    "files": [None, [], {"adapter_model.safetensors": 3}],
    "metrics": [{}, [3], [{"method": "SPUL"}], [{"method": "SPUL", "splits": {"train_retain": 1}}]],
    "training": [3, {"steps": "5"}, {"steps": 5, "seconds_per_step": "1", "peak_memory_bytes": 1}],
}


@pytest.mark.parametrize("field", WRONG)
def test_a_field_of_another_type(forest, field):
    file = forest / PROMPT / "manifest.json"
    whole = file.read_text()
    for value in WRONG[field]:
        file.write_text(json.dumps(json.loads(whole) | {field: value}))
        with pytest.raises(UserError, match="manifest.json "):
            checkpoints.read_manifest(forest / PROMPT)


@pytest.mark.parametrize("path", [".", "../prompt", "../other"])
def test_parents_in_a_circle(forest, path):
    edit_json(forest / PROMPT / "manifest.json", lambda m: m["parent"].update(path=path))
    shutil.copytree(forest / PROMPT, forest / "other")
    edit_json(forest / "other" / "manifest.json", lambda m: m["parent"].update(path="../prompt"))
    for folder in ("prompt", "other"):  # a kind that may be a parent
        edit_json(forest / folder / "manifest.json", lambda m: m.update(kind="lora"))
    says(forest, "is its own parent, or that of its parent", PROMPT)


def test_a_prompt_is_nobodys_parent(forest):
    says(forest, "is a prompt, which is nobody's parent", PROMPT, "--parent_path=eco")


def test_manifests_of_earlier_versions_load_with_a_note(forest):
    """They recorded another hash of the parent, fewer files and fewer fields."""
    for name, parent in ((ADAPTER, BASE), (PROMPT, ADAPTER)):
        file = forest / name / "manifest.json"
        manifest = json.loads(file.read_text())
        for key in ("version", "base", "label_words", "training", "task"):
            manifest.pop(key, None)
        manifest["files"] = {
            key: value for key, value in manifest["files"].items() if key.endswith(("safetensors", "config.json"))
        }
        manifest["parent"]["sha256"] = checkpoints._earlier_sha256(forest / parent)
        file.write_text(json.dumps(manifest))
    checkpoints.note_once.cache_clear()
    result = done(call(forest, "inference_spul", *inference(PROMPT), "--dataset=data"))
    assert result.stderr.count("is of an earlier version, which took no notice of its parent's tokenizer") == 2
    edit_tensors(forest / BASE / "model.safetensors", lambda t: t["model.norm.weight"].add_(1e-3))
    with pytest.raises(UserError, match="is not the model that"):
        resolve_chain(str(forest / PROMPT))


# The hash of a model covers what loading reads.


def shard(folder, inner=""):
    """Cut the weights in `folder` in two, the second part in the folder `inner` of it."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / inner).mkdir(exist_ok=True)
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], f"{inner}/model-2.safetensors".lstrip("/"): names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / list(shards)[1], folder / "model.safetensors.index.json"


def test_the_hash_sees_shards_in_subfolders_the_index_and_the_tokenizer(forest):
    second, index = shard(forest / BASE, "inner")
    sign(forest / BASE)
    done(call(forest, "inference_spul", *inference(PROMPT)))
    for file in (second, index, forest / BASE / "tokenizer.json", forest / BASE / "generation_config.json"):
        content = file.read_bytes()
        file.write_bytes(content + b" ")
        with pytest.raises(UserError):
            resolve_chain(str(forest / ADAPTER))
        file.write_bytes(content)
    resolve_chain(str(forest / ADAPTER))


@pytest.mark.parametrize("place", ["../model-2.safetensors", "/model-2.safetensors", "model-3.safetensors"])
def test_weights_outside_of_the_folder(forest, place):
    second, index = shard(forest / BASE)
    shutil.copy(second, forest / "model-2.safetensors")
    if place.startswith("/"):
        place = f"{forest}{place}"
    index.write_text(index.read_text().replace('"model-2.safetensors"', json.dumps(place)))
    says(forest, "tiny-llama ", BASE, "--dataset=data")


# Tensors.


def half(tensors):
    return {name: tensors[name] for name in sorted(tensors)[::2]}


def with_value(value):
    def change(tensors):
        tensors[sorted(tensors)[0]].flatten()[0] = value

    return change


ADAPTERS = {
    "half of the tensors": half,
    "half precision": lambda tensors: {name: tensor.half() for name, tensor in tensors.items()},
    "complex": lambda tensors: {name: tensor.to(torch.complex64) for name, tensor in tensors.items()},
    "whole numbers": lambda tensors: {name: tensor.int() for name, tensor in tensors.items()},
    "transposed": lambda tensors: {name: tensor.T for name, tensor in tensors.items()},
    "not a number": with_value(float("nan")),
    "infinite": with_value(float("inf")),
    "one more": lambda tensors: tensors | {"more": torch.zeros(1)},
    "none": lambda tensors: {"more": torch.zeros(1)},
    "renamed": lambda tensors: {name.replace("q_proj", "q_prj"): tensor for name, tensor in tensors.items()},
}


@pytest.mark.parametrize("damage", ADAPTERS)
def test_an_adapter_is_whole(forest, damage):
    edit_tensors(forest / ADAPTER / "adapter_model.safetensors", ADAPTERS[damage])
    sign(forest / ADAPTER)
    says(forest, "adapter_model.safetensors holds no LoRA adapter of this model", ADAPTER)


SETTINGS = {
    "r": [0, "16", 16.5, True, None],
    "lora_alpha": [0, "16", -1, None],
    "bias": ["some"],
    "target_modules": [".*", ["(a+)+$"], ["q_proj|v_proj"], [], 3, None],
    "peft_type": ["IA3", "PROMPT_TUNING", None],
    "modules_to_save": [["lm_head"]],
    "use_dora": [True],
    "use_rslora": [True],
    "rank_pattern": [{"(a+)+$": 4}],
    "auto_mapping": [{"base_model_class": "x", "parent_library": "y"}],
    "layers_pattern": ["(a+)+$"],
    "from_a_later_peft": [1],
}


@pytest.mark.parametrize("field", SETTINGS)
def test_a_lora_configuration_is_what_this_project_writes(forest, field):
    file = forest / ADAPTER / "adapter_config.json"
    whole = json.loads(file.read_text())
    lora_config(file.parent)
    for value in SETTINGS[field]:
        file.write_text(json.dumps(whole | {field: value}))
        with pytest.raises(UserError, match="adapter_config.json "):
            lora_config(file.parent)


PROMPTS = {
    "no token": lambda p: p[:0],
    "narrow": lambda p: p[:, :64],
    "wide": lambda p: torch.cat([p, p], 1),
    "flat": lambda p: p.flatten(),
    "fewer tokens": lambda p: p[:2],
    "double": lambda p: p.double(),
    "complex": lambda p: p.to(torch.complex64),
    "not a number": lambda p: p * float("nan"),
}


@pytest.mark.parametrize("damage", PROMPTS)
def test_a_prompt_is_whole(forest, damage):
    change = lambda t: {"prompt_embeddings": PROMPTS[damage](t["prompt_embeddings"])}  # noqa: E731
    edit_tensors(forest / PROMPT / "adapter_model.safetensors", change)
    sign(forest / PROMPT)
    says(forest, "adapter_model.safetensors holds no prompt for this model", PROMPT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_are_finite(forest, value):
    edit_tensors(forest / BASE / "model.safetensors", lambda t: t["model.norm.weight"].fill_(value))
    says(forest, "holds numbers that are not finite", BASE, "--dataset=data")


def test_weights_are_no_whole_numbers(forest):
    """Loading would turn them into floats."""
    edit_tensors(forest / BASE / "model.safetensors", lambda t: {name: tensor.int() for name, tensor in t.items()})
    says(forest, "holds whole numbers for the weight", BASE, "--dataset=data")


def test_finite_without_a_copy():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        whole = torch.ones(7, 5, dtype=dtype)
        assert is_finite(whole) and is_finite(whole[:0])
        for value in (float("nan"), float("inf"), -float("inf")):
            bad = whole.clone()
            bad[3, 2] = value
            assert not is_finite(bad)
    assert is_finite(torch.ones(3, dtype=torch.int8))


# The gate.


@pytest.mark.parametrize("threshold", ["NaN", "true", "[0.5]", '"0.5"', "null", "1", "1.0000001", "-0.1", "Infinity"])
def test_a_gate_does_not_fail_open(forest, threshold):
    file = forest / GATE / "gate/gate.json"
    text = file.read_text()
    file.write_text(text.replace('"threshold": 0.4', f'"threshold": {threshold}'))
    assert file.read_text() != text
    sign(forest / GATE)
    says(forest, "gate.json is no", GATE)
    says(forest, "gate.json is no", PROMPT, "--router=eco", "--force")


ECO = {
    "corruption": [None, {}, {"family": "noise-first", "strength": "3", "dims": 1, "seed": 0}],
    "tokens": ["some", None],
    "names": [None, [3], [{"name": "A"}], [{"name": "A", "spellings": "A"}]],
    "token_classifier": [3],
    "curve": [3, [3]],
}
OF_A_GATE = {"classifier": [None, "word", 3], "rates": [3, {"train_forget": "1"}], "calibration": [{"auc": -1.0}]}


@pytest.mark.parametrize("field", [*ECO, *OF_A_GATE])
def test_a_gate_of_other_types(forest, field):
    name, schema = ("eco.json", eco.EcoFile) if field in ECO else ("gate/gate.json", gate_files.GateFile)
    file = forest / GATE / name
    whole = json.loads(file.read_text())
    for value in (ECO | OF_A_GATE)[field]:
        file.write_text(json.dumps(whole | {field: value}))
        with pytest.raises(UserError, match=f"{file.name} is no description of"):
            schemas.read(file, schema)


UNSEEN = {
    "a row too few": lambda t: {split: rows[:-1] for split, rows in t.items()},
    "not a number": lambda t: t["train_retain"].fill_(float("nan")),
    "above 1": lambda t: t["train_forget"].fill_(1.5),
    "another split": lambda t: {"train_retain": t["train_retain"], "test_forget": t["train_forget"]},
}


@pytest.mark.parametrize("damage", UNSEEN)
def test_scores_of_other_rows_train_no_prompt(forest, damage):
    """What a gate flagged of the train rows decides what a prompt is trained on."""
    edit_tensors(forest / GATE / "gate/unseen.safetensors", UNSEEN[damage])
    sign(forest / GATE)
    command = f"--model_checkpoints={ADAPTER}", "--dataset=data", *scripts.SPUL, f"--gate=./{GATE}", "--output_path=new"
    scripts.refused(forest, "unseen.safetensors holds no scores of these rows", "spul", *command)


def test_no_pattern_of_a_checkpoint_is_used(forest):
    """Earlier versions stored patterns; one that never ends could be among them."""
    file = forest / GATE / "eco.json"
    edit_json(file, lambda settings: settings.update(names=[["A", "(a+)+$"]]))
    sign(forest / GATE)
    done(call(forest, "inference_spul", *inference(GATE)))  # it corrupts all tokens, and needs no names
    edit_json(file, lambda settings: settings.update(tokens="entities"))
    sign(forest / GATE)
    says(forest, "an earlier version stored the people as patterns", GATE)


CLASSIFIERS = {
    "coefficients are no numbers": lambda t: t["coefficients"].fill_(float("nan")),
    "infinite idf": lambda t: t["idf.1"].fill_(float("inf")),
    "fewer coefficients": lambda t: t | {"coefficients": t["coefficients"][:-1]},
    "another type": lambda t: t | {"intercept": t["intercept"].float()},
    "no intercept": lambda t: {name: value for name, value in t.items() if name != "intercept"},
}


@pytest.mark.parametrize("damage", CLASSIFIERS)
def test_a_classifier_is_whole(forest, damage):
    edit_tensors(forest / GATE / "gate/classifier.safetensors", CLASSIFIERS[damage])
    sign(forest / GATE)
    says(forest, "classifier.safetensors holds no classifier of this gate", GATE)


def test_a_threshold_that_nothing_exceeds_is_not_learnt():
    certain = np.r_[np.full(5, 1.0), np.linspace(0, 0.5, 15)]
    with pytest.raises(UserError, match="the threshold for --eco_max_fpr=0.1 is 1 and nothing would be flagged"):
        gates.threshold_for_rate(certain, 0.1, "eco_max_fpr")
    assert gates.threshold_for_rate(certain, 0.5, "eco_max_fpr") < 1


# Templates of the in-context baselines.


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("prompting", {"instruction": 3}),
        ("prompting", {"method": "other"}),
        ("prompting", {"more": 1}),
        ("icul", {"flipped": 0}),
        ("icul", {"flipped_labels": ["positive"]}),
        ("icul", {"flipped_labels": [1] * 8}),
        ("icul", {"retain_rows": [99]}),
        ("icul", {"retain_rows": [-1]}),
    ],
)
def test_a_template_of_other_types(forest, name, change):
    edit_json(forest / name / "template.json", lambda settings: settings.update(change))
    sign(forest / name)
    says(forest, "template.json ", name)


# Training states and reference files.


@pytest.fixture(scope="module")
def stopped(trees, tmp_path_factory):
    """A folder with an interrupted run of spul.py, and its command."""

    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(trees, folder / "trees", symlinks=True)
    command = "--model_checkpoints=trees/fine-tuned", "--dataset=trees/data", *scripts.SPUL, "--max_eval_samples=0"
    command = "spul", *command, "--save_steps=1", "--output_path=out", "--logits_path=reference"
    stop_at(folder, 3, *command)
    return folder, command


STATES = {
    "no parameters": lambda t: {name: value for name, value in t.items() if not name.startswith("parameter.")},
    "no moments": lambda t: {name: value for name, value in t.items() if not name.startswith("optimizer.")},
    "no random state": lambda t: {name: value for name, value in t.items() if not name.startswith("rng.")},
    "another parameter": lambda t: t | {"parameter.more": torch.zeros(1)},
    "not a number": lambda t: next(value for name, value in t.items() if "parameter" in name).fill_(float("nan")),
    "another number": lambda t: next(value for name, value in t.items() if "exp_avg" in name).add_(1),
    "another type": lambda t: {name: v.double() if "parameter" in name else v for name, v in t.items()},
    "another shape": lambda t: {name: v.flatten() if "parameter" in name else v for name, v in t.items()},
}


@pytest.mark.parametrize("damage", STATES)
def test_a_state_is_whole(stopped, tmp_path, damage):
    shutil.copytree(stopped[0], tmp_path / "place", symlinks=True)
    edit_tensors(tmp_path / "place" / "out.training.safetensors", STATES[damage])
    refused(tmp_path / "place", "start over with --overwrite", *stopped[1], "--resume")


TEXTS = {
    "log": ["3", "[]", '[{"step": "1"}]', '[{"step": 9}]', "[[[", "NaN"],
    "schedule": ["3", "{}", '{"last_epoch": -1, "base_lrs": []}'],
    "settings": ["3", "null"],
    "sha256": ['"x"', "3"],
}


@pytest.mark.parametrize("field", TEXTS)
def test_the_text_of_a_state(stopped, tmp_path, field):
    shutil.copy(stopped[0] / "out.training.safetensors", tmp_path / "state")
    tensors = load_file(tmp_path / "state")
    with safe_open(tmp_path / "state", "pt") as file:
        metadata = file.metadata()
    from utils.training.state import read_state

    assert read_state(tmp_path / "state")["log"][-1]["step"] == 2
    for value in TEXTS[field]:
        save_file(tensors, tmp_path / "state", metadata | {field: value})
        with pytest.raises(UserError, match="state"):
            read_state(tmp_path / "state")


REFERENCES = {
    "fewer rows": lambda t: {"values": t["values"][:-1]},
    "other numbers": lambda t: {"values": t["values"] + 1},
    "not a number": lambda t: {"values": t["values"] * float("nan")},
    "narrow": lambda t: {"values": t["values"][:, :5]},
    "complex": lambda t: {"values": t["values"].to(torch.complex64)},
    "another name": lambda t: {"other": t["values"]},
}


@pytest.mark.parametrize("damage", REFERENCES)
def test_a_reference_is_whole(stopped, tmp_path, damage):
    shutil.copytree(stopped[0], tmp_path / "place", symlinks=True)
    (tmp_path / "place" / "out.training.safetensors").unlink()
    edit_tensors(tmp_path / "place" / "reference", REFERENCES[damage])
    refused(tmp_path / "place", "delete it or pass another --logits_path", *stopped[1])


# Local means local.


@pytest.fixture
def blocked(monkeypatch):
    """The addresses that somebody tried to reach, the hub being allowed and every socket refusing."""
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    return asked


def test_the_block_sees_who_asks_the_hub(forest, blocked):
    with pytest.raises(UserError, match="the hub does not give it"):
        resolve_chain("owner/name")
    assert blocked


def test_nothing_is_fetched_for_a_local_path(forest, blocked):
    for name in (BASE, ADAPTER, PROMPT, GATE, "prompting", "icul"):
        done(call(forest, "inference_spul", *inference(name, "--dataset=data")))
    arguments = "--dataset=data", *scripts.QLORA, "--max_eval_samples=0", "--max_steps=1", "--output_path=new"
    done(call(forest, "qlora", f"--model_name={BASE}", *arguments))
    assert blocked == []


def test_nothing_is_fetched_for_what_is_missing(forest, blocked):
    (forest / ADAPTER / "adapter_model.safetensors").unlink()
    sign(forest / ADAPTER)
    says(forest, "adapter_model.safetensors", ADAPTER)
    edit_json(forest / GATE / "eco.json", lambda s: s.update(tokens="entities", token_classifier="owner/name"))
    edit_json(forest / GATE / "manifest.json", lambda m: m.update(parent={"path": "../tiny-llama", "sha256": ""}))
    manifest = json.loads((forest / GATE / "manifest.json").read_text())
    manifest["parent"]["sha256"] = weights_sha256(forest / BASE)
    manifest["files"]["eco.json"] = file_sha256(forest / GATE / "eco.json")
    (forest / GATE / "manifest.json").write_text(json.dumps(manifest))
    says(forest, "token_classifier holds no config.json", GATE)
    assert blocked == []


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "kernels-community/flash-attn2"},
        {"_attn_implementation": "owner/name:function"},
        {"text_config": {"attn_implementation": "owner/name"}},
        {"_experts_implementation": "deepgemm"},
        {"transformers_weights": "other.safetensors"},
    ],
)
def test_nothing_is_fetched_for_what_a_configuration_asks(forest, blocked, change):
    edit_json(forest / BASE / "config.json", lambda config: config.update(change))
    says(forest, "tiny-llama/config.json ", BASE, "--dataset=data")
    assert blocked == []


def test_a_model_with_an_adapter_inside_is_refused(forest, blocked):
    shutil.copy(forest / ADAPTER / "adapter_config.json", forest / BASE)
    says(forest, "is a model with an adapter in it", BASE, "--dataset=data")
    assert blocked == []


def test_loading_an_adapter_is_what_peft_does(forest):
    """By the numbers: the reader of our own gives the merged weights that PEFT's own gives."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(forest / BASE, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(base, forest / ADAPTER).merge_and_unload().state_dict()
    found = load_served(str(forest / ADAPTER), tiny.ON_CPU).model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
