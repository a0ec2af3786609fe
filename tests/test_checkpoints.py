"""Checkpoint folders: reloading in PEFT and here, the chain back to the base, moved trees, writing whole or not."""

import json
import shutil

import pytest
import scripts
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scripts import done, refused
from transformers import AutoModelForCausalLM

from utils.data.batch import collate
from utils.errors import UserError
from utils.interventions.served import load_served
from utils.models.chain import resolve_chain
from utils.models.forward import completion_logits, prompt_prefix
from utils.storage import checkpoints, files
from utils.tasks.encode import tokenize
from utils.tasks.rows import load_splits


@pytest.mark.parametrize("encoder", ["mlp", "lstm", "embedding"])
def test_plain_peft_loads_the_prompt_and_gives_the_same_logits(tiny_model, fine_tuned, small_data, tmp_path, encoder):
    arguments = "--lr=1e-2", f"--prompt_encoder={encoder}", "--max_eval_samples=0", "--output_path=out"
    done(scripts.spul(tmp_path, fine_tuned, small_data, *arguments))
    rows = load_splits(str(small_data))["test_retain"]
    loaded = load_served(str(tmp_path / "out"), tiny.ON_CPU)
    words = ["neutral" if i % 2 else word for i, word in enumerate(rows["label_text"])]  # of several tokens and of one
    batch = collate(tokenize(loaded.tokenizer, rows["text"], words, 96), loaded.pad_id, "cpu")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, fine_tuned).merge_and_unload()
    peft = PeftModel.from_pretrained(merged, tmp_path / "out").eval()
    with torch.no_grad():
        ours = completion_logits(loaded.model, batch, prompt_prefix(loaded.model, loaded.interventions[0].vectors))
        logits = peft(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        without = completion_logits(loaded.model, batch)
    assert logits.shape[1] == batch.input_ids.shape[1] + 4
    assert torch.allclose(ours, logits[batch.rows, batch.positions + 4], atol=1e-4)
    assert (ours - without).abs().max() > 1e-2


def test_the_merged_model_is_the_adapted_one(tiny_model, fine_tuned, small_data):
    rows = load_splits(str(small_data))["test_retain"]
    merged = load_served(str(fine_tuned), tiny.ON_CPU)
    batch = collate(tokenize(merged.tokenizer, rows["text"], rows["label_text"], 96), 0, "cpu")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        plain = completion_logits(base, batch)
        adapted = completion_logits(PeftModel.from_pretrained(base, fine_tuned).eval(), batch)
        assert torch.allclose(completion_logits(merged.model, batch), adapted, atol=1e-4)
    assert (plain - adapted).abs().max() > 0.1


@pytest.fixture
def forest(fine_tuned, prompt, small_data, tmp_path):
    """A copy of model, adapter, prompt and data that a test may damage."""
    for source in (fine_tuned.parent / "tiny-llama", fine_tuned, prompt, small_data):
        shutil.copytree(source, tmp_path / "forest" / source.name)
    return tmp_path / "forest"


def inference(checkpoint, *arguments):
    dataset = checkpoint.parent / "data"
    return f"--dataset={dataset}", f"--model_checkpoints={checkpoint}", *scripts.ROWS, "--text=a film", *arguments


def refused_prompt(forest, message, *arguments):
    refused(forest, message, "inference_spul", *inference(forest / "prompt", *arguments))


def retrain(forest):
    """Another adapter under the same name."""
    shutil.rmtree(forest / "fine-tuned")
    arguments = "--seed=1", "--max_eval_samples=0", "--output_path=fine-tuned", "--lora_target_modules=all-linear"
    done(scripts.qlora(forest, forest / "tiny-llama", forest / "data", *arguments))


def test_the_chain_is_base_adapter_prompt(forest):
    chain = resolve_chain(str(forest / "prompt"))
    assert [link.kind for link in chain] == ["model", "lora", "prompt"]
    assert [link.path.name for link in chain] == ["tiny-llama", "fine-tuned", "prompt"]


def test_a_moved_tree_still_loads(forest, prompt):
    """Parents are recorded relative to the checkpoint; nothing points back to where the tree was."""
    loaded = load_served(str(forest / "prompt"), tiny.ON_CPU)
    assert all(forest in link.path.parents for link in loaded.chain)
    (moved,), (original,) = loaded.interventions, load_served(str(prompt), tiny.ON_CPU).interventions
    assert torch.equal(moved.vectors, original.vectors)


def test_a_checkpoint_is_read_through_a_link(forest):
    """Its parent lies beside what the link points at, not beside the link; so does that of a link to its folder."""
    (forest / "links").mkdir()
    (forest / "links" / "current").symlink_to(forest / "prompt")
    (forest / "links" / "everything").symlink_to(forest)
    for path in ("links/current", "links/everything/prompt"):
        chain = resolve_chain(forest / path, False)
        assert [link.kind for link in chain] == ["model", "lora", "prompt"]


def test_a_parent_is_found_from_where_it_was_written_through_a_link(tmp_path):
    """As manifests of earlier versions count: from the path as it was given."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "parent").mkdir()
    (tmp_path / "here").symlink_to(tmp_path / "far" / "away")
    manifest = {"parent": {"path": "../../parent", "sha256": ""}}
    assert checkpoints.parent_path(tmp_path / "here" / "out", manifest) == str(tmp_path / "parent")


def test_a_moved_adapter_has_to_be_pointed_at(forest):
    (forest / "fine-tuned").rename(forest / "elsewhere")
    refused_prompt(forest, "fine-tuned does not exist; ")
    done(scripts.call(forest, "inference_spul", *inference(forest / "prompt", "--parent_path=elsewhere")))


def test_a_moved_base_has_to_be_pointed_at(forest):
    (forest / "tiny-llama").rename(forest / "elsewhere")
    arguments = f"--model_checkpoints={forest / 'fine-tuned'}", "--dataset=data", *scripts.SPUL, "--output_path=out"
    refused(forest, "tiny-llama does not exist; ", "spul", *arguments)
    done(scripts.call(forest, "spul", *arguments, "--parent_path=elsewhere", "--max_eval_samples=0"))
    assert json.loads((forest / "out" / "manifest.json").read_text())["parent"]["path"] == "../fine-tuned"


def test_a_prompt_on_a_retrained_adapter_is_refused(forest):
    retrain(forest)
    refused_prompt(forest, "fine-tuned is not the model that ")
    refused_prompt(forest, "fine-tuned is not the model that ", "--parent_path=fine-tuned")


def test_a_prompt_straight_on_the_base_is_refused(forest):
    """It would load and work, silently wrong."""
    refused_prompt(forest, "tiny-llama is not the model that ", "--parent_path=tiny-llama")


def test_an_adapter_on_another_base_is_refused(forest):
    weights = load_file(forest / "tiny-llama" / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, forest / "tiny-llama" / "model.safetensors", {"format": "pt"})
    refused_prompt(forest, "tiny-llama is not the model that ")


@pytest.mark.parametrize("name", ["fine-tuned", "prompt"])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "tokenizer.json"])
def test_altered_files_are_refused(forest, name, file):
    content = bytearray((forest / name / file).read_bytes())
    content[-1] ^= 1
    (forest / name / file).write_bytes(content)
    refused_prompt(forest, f"{file} is not the file its manifest names (SHA-256 differs)")


@pytest.mark.parametrize("name", ["fine-tuned", "prompt"])
def test_a_half_deleted_checkpoint_is_refused(forest, name):
    (forest / name / "adapter_model.safetensors").unlink()
    refused_prompt(forest, f"{name} has lost its file adapter_model.safetensors")
    (forest / name / "manifest.json").unlink()
    refused_prompt(forest, f"{name} holds neither manifest.json nor config.json")


def test_an_adapter_without_its_configuration_is_refused(forest):
    (forest / "fine-tuned" / "adapter_config.json").unlink()
    refused_prompt(forest, "fine-tuned has lost its file adapter_config.json")


FOREIGN = [
    "",
    "{",
    "[]",
    "null",
    '"lora"',
    "{}",
    '{"name": "an app", "version": 3, "files": ["index.html"]}',
    '{"kind": "lora", "files": {}, "parent": "../model"}',
    '{"kind": "lora", "files": ["a"], "parent": {"path": "..", "sha256": ""}}',
    '{"kind": "lora", "files": {}, "parent": {"path": 3, "sha256": ""}}',
    '{"kind": ["lora"], "files": {}, "parent": {"path": "..", "sha256": ""}}',
]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_manifest_is_refused(forest, content):
    (forest / "prompt" / "manifest.json").write_text(content)
    refused_prompt(forest, "manifest.json ")


def test_a_manifest_of_a_later_version_is_refused(forest):
    file = forest / "prompt" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"kind": "steering"}))
    refused_prompt(forest, "names the unknown kind 'steering'; this version reads lora, full, prompt, in-context")


def test_a_prompt_is_no_parent(forest):
    arguments = f"--model_checkpoints={forest / 'prompt'}", "--dataset=data", *scripts.SPUL
    refused(forest, "already is a prompt", "spul", *arguments)
    refused(forest, "already is a prompt", "spul", *arguments, "--dry_run")


@pytest.mark.parametrize("name", ["fine-tuned", "prompt"])
def test_qlora_takes_a_plain_model_only(forest, name):
    arguments = f"--model_name={forest / name}", "--dataset=data", *scripts.QLORA
    refused(forest, "is a checkpoint of this project; --model_name takes a plain model", "qlora", *arguments)


def refused_start(forest, message, *arguments):
    parent = f"--model_checkpoints={forest / 'fine-tuned'}", "--dataset=data", *scripts.SPUL, "--max_eval_samples=0"
    refused(forest, message, "spul", *parent, "--beta=0", *arguments)


def test_an_init_checkpoint_must_be_a_prompt(forest):
    refused_start(forest, "is no prompt; --init_checkpoint takes what spul.py wrote", "--init_checkpoint=fine-tuned")


@pytest.mark.parametrize("flag", ["--prompt_encoder=lstm", "--ptuning_num_tokens=5", "--ptuning_hidden_size=8"])
def test_an_init_checkpoint_must_have_the_same_shape(forest, flag):
    refused_start(
        forest, "encoder.safetensors holds no encoder of this --prompt_encoder", "--init_checkpoint=prompt", flag
    )


def test_an_init_checkpoint_of_another_parent_is_refused(forest):
    shutil.copytree(forest / "fine-tuned", forest / "first")
    prompt = forest / "prompt" / "manifest.json"
    prompt.write_text(prompt.read_text().replace("../fine-tuned", "../first"))
    retrain(forest)
    refused_start(forest, "is not the model that prompt was trained on", "--init_checkpoint=prompt")


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "file", {"loss": float("nan")})


def test_the_hash_of_a_model_sees_names_and_contents_of_its_weights_and_its_configuration(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"1")
    (tmp_path / "b.safetensors").write_bytes(b"2")
    (tmp_path / "config.json").write_text("{}")
    first = checkpoints.weights_sha256(tmp_path)
    (tmp_path / "README.md").write_text("no part of the model")
    (tmp_path / "training_args.bin").write_bytes(b"not loaded where there is safetensors")
    assert checkpoints.weights_sha256(tmp_path) == first
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert checkpoints.weights_sha256(tmp_path) != first
    (tmp_path / "config.json").write_text("{}")
    assert checkpoints.weights_sha256(tmp_path) == first
    (tmp_path / "b.safetensors").write_bytes(b"3")
    assert checkpoints.weights_sha256(tmp_path) != first
    (tmp_path / "b.safetensors").write_bytes(b"1")
    (tmp_path / "a.safetensors").write_bytes(b"2")
    assert checkpoints.weights_sha256(tmp_path) != first


@pytest.mark.parametrize(
    ("name", "expected"),
    [("meta-llama/Llama-2-7b-hf", True), ("gpt2", True), ("../model", False), ("/a/b", False), ("a/b/c", False)],
)
def test_hub_names(name, expected):
    assert checkpoints.is_hub_name(name) is expected


def test_a_folder_of_the_name_of_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not checkpoints.is_hub_name("owner/name")


def test_a_parent_from_the_hub_is_looked_up_there():
    manifest = {"parent": {"path": "owner/name", "sha256": ""}}
    assert checkpoints.parent_path("checkpoints/a", manifest) == "owner/name"
    assert checkpoints.parent_path("checkpoints/a", manifest, "mine") == "mine"
    with pytest.raises(UserError, match="owner/name is no existing folder or .gguf file and the hub does not give it"):
        resolve_chain("owner/name")


def test_a_link_keeps_the_hash_of_what_was_loaded(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"1")
    link = checkpoints.Link(tmp_path, "name")
    first = link.sha256
    (tmp_path / "a.safetensors").write_bytes(b"2")
    assert link.sha256 == first != checkpoints.weights_sha256(tmp_path)
