import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
pytest.register_assert_rewrite("scripts")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # set before torch is loaded: sums in one order, so equal runs are equal bit by bit


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that no process is left alone with one of them at the end."""
    items.sort(key=lambda item: not hasattr(item.module, "pytestmark"))


@pytest.fixture(scope="module")
def tokenizer():
    """The tiny models' tokenizer, which pads with its end-of-sequence token."""
    import tiny

    tokenizer = tiny.build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny Llama with tokenizer."""
    import tiny

    return tiny.save(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def small_data(tiny_model):
    """Folder of four small splits, half positive and half negative, beside the model."""
    import tiny

    return tiny.save_splits(tiny_model.parent / "data")


@pytest.fixture(scope="session")
def fine_tuned(tiny_model, small_data):
    """What qlora.py wrote on the small splits, memorised: the parent of every prompt in the tests."""
    import scripts

    arguments = "--lr=2e-3", "--num_epochs=14", "--lora_target_modules=all-linear", "--output_path=fine-tuned"
    scripts.done(scripts.qlora(tiny_model.parent, tiny_model, small_data, *arguments))
    return tiny_model.parent / "fine-tuned"


@pytest.fixture(scope="session")
def prompt(fine_tuned, small_data):
    """What spul.py wrote on it after a few steps."""
    import scripts

    scripts.done(scripts.spul(fine_tuned.parent, fine_tuned, small_data, "--lr=1e-2", "--output_path=prompt"))
    return fine_tuned.parent / "prompt"
