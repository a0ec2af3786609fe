"""Bad input ends in one sentence on stderr and exit code 2, without a traceback and without a trace in the folder."""

import importlib
import json
import resource
import shutil
import sys
from unittest import mock

import pandas as pd
import pytest
import scripts
import torch
from safetensors.torch import load_file, save_file
from scripts import call, done, refused, start

from utils import cli

pytestmark = pytest.mark.slow

SCRIPTS = ("qlora", "spul", "inference_spul")


@pytest.fixture
def place(tiny_model, fine_tuned, small_data, tmp_path):
    """A folder with copies of model, adapter and data that a test may damage, to stand in."""
    for source in (tiny_model, fine_tuned, small_data):
        shutil.copytree(source, tmp_path / source.name)
    return tmp_path


@pytest.fixture
def old_output(place):
    """The scores of an earlier run at `out`."""
    (place / "out").mkdir()
    (place / "out" / "metrics.json").write_text('[{"method": "SPUL", "checkpoint": "a", "splits": {}}]')
    (place / "out" / "predictions.jsonl").write_text("")


def arguments(script, model=None, dataset="data"):
    """A short run of `script` in `place`; later flags override."""
    flags = {"qlora": scripts.QLORA, "spul": scripts.SPUL, "inference_spul": scripts.ROWS}[script]
    model = model or ("tiny-llama" if script == "qlora" else "fine-tuned")
    name = "--model_name" if script == "qlora" else "--model_checkpoints"
    return f"{name}={model}", f"--dataset={dataset}", *flags, "--output_path=out"


def check(place, script, sentence, *more, run=call, **options):
    return refused(place, sentence, script, *arguments(script, **options), *more, run=run)


def edit(place, split, change):
    file = place / "data" / f"{split}.csv"
    change(pd.read_csv(file)).to_csv(file, index=False)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("dataset", ["./none", "imdb"])
def test_an_unknown_dataset(place, script, dataset):
    check(
        place,
        script,
        f"dataset '{dataset}' is neither one of sst2, yelp, tofu, mmlu, sciq, wmdp, snippets, plays, "
        "plays-questions, plays-both nor an existing folder",
        dataset=dataset,
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_hub_dataset_without_a_network(place, script):
    check(place, script, "cannot fetch dataset karuna-bhaila/Unlearning_Yelp_Polarity", dataset="yelp")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_split(place, script):
    (place / "data" / "test_forget.csv").unlink()
    check(place, script, "data has no test_forget.csv, .jsonl or .parquet")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("split", "change", "sentence"),
    [
        ("train_retain", lambda f: f.drop(columns="label_text"), "train_retain of data has no column 'label_text'"),
        ("train_forget", lambda f: f.head(0), "train_forget of data has no rows"),
        (
            "test_retain",
            lambda f: f.assign(label=7, label_text="mixed"),
            "test_retain has the unknown label 7 ('mixed')",
        ),
        ("test_forget", lambda f: f.assign(text=None), "test_forget of data, row 1: text is empty or not text"),
        ("train_retain", lambda f: f.assign(label="x"), "train_retain of data, row 1: label is not a whole number"),
        (
            "train_forget",
            lambda f: f.assign(label_text="good"),
            "train_forget: label 0 and the word 'good' do not pair",
        ),
    ],
)
def test_rows_that_cannot_be_used(place, script, split, change, sentence):
    edit(place, split, change)
    check(place, script, sentence)


def test_cells_that_are_no_text(place):
    (place / "data" / "test_forget.csv").unlink()
    frame = pd.DataFrame({"text": [1.5], "label": [0], "label_text": ["negative"]})
    frame.to_parquet(place / "data" / "test_forget.parquet")
    check(place, "qlora", "test_forget of data, row 1: text is empty or not text")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_max_length_that_holds_no_text(place, script):
    check(place, script, "--max_length=12 cannot hold template and label; use at least", "--max_length=12")


def test_a_forget_size_without_a_row(place):
    check(place, "spul", "--forget_size=0.01 leaves no forget row", "--forget_size=0.01")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("./none", "./none does not exist; pass an existing folder"),
        ("a/b/c", "a/b/c does not exist; pass an existing folder"),
        (
            "nobody/no-such-model",
            "nobody/no-such-model is no existing folder or .gguf file and the hub does not give it",
        ),
        ("nobody/no such model", "nobody/no such model does not exist"),
        ("data/no-such-model", "data/no-such-model does not exist; pass an existing folder"),  # no hub is asked
        ("data", "data holds neither manifest.json nor config.json"),
        ("data/train_retain.csv", "data/train_retain.csv is a file but no .gguf model"),
    ],
)
def test_no_such_model(place, script, model, sentence):
    check(place, script, sentence, model=model)


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])


def replace_weights(folder):
    (folder / "model.safetensors").write_bytes(b"these are no weights")


def reshape_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = torch.zeros(7, 128)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def drop_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def break_config(folder):
    (folder / "config.json").write_text("{")


def unknown_architecture(folder):
    (folder / "config.json").write_text('{"model_type": "nonesuch"}')


def no_language_model(folder):
    (folder / "config.json").write_text('{"model_type": "vit"}')


def remove_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def break_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


def misshape_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')


def misshape_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "many"}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (misshape_tokenizer, "cannot load the tokenizer of tiny-llama"),
        (misshape_config, "tiny-llama"),
        (remove_weights, "cannot load a causal language model from tiny-llama"),
        (cut_weights, "cannot load a causal language model from tiny-llama"),
        (replace_weights, "cannot load a causal language model from tiny-llama"),
        (reshape_weights, "cannot load a causal language model from tiny-llama"),
        (drop_a_weight, "model.layers.2.mlp.up_proj.weight"),
        (break_config, "tiny-llama"),
        (unknown_architecture, "tiny-llama"),
        (no_language_model, "tiny-llama"),
        (remove_tokenizer, "tokenizer"),
        (break_tokenizer, "cannot load the tokenizer of tiny-llama"),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_broken_model(place, script, damage, sentence):
    damage(place / "tiny-llama")
    check(place, script, sentence, model="tiny-llama")


def test_rows_longer_than_the_model_reads(place):
    """Checked before anything is trained."""
    edit(place, "train_forget", lambda f: f.assign(text="the film was " * 300))
    check(place, "qlora", "the longest row has ", "--max_length=1024")
    check(place, "spul", "the model has 512 positions; use --max_length=508 or less", "--max_length=1024")


@pytest.mark.parametrize("script", SCRIPTS)
def test_test_rows_longer_than_the_model_reads(place, script):
    """Long rows only where they are evaluated: learned positions end at 512, and training must not be for nothing."""
    import tiny

    tiny.save(place / "gpt2", "gpt2")
    edit(place, "test_forget", lambda f: f.assign(text="the film was " * 300))
    result = check(place, script, "--max_length=", "--max_length=1024", model="gpt2")
    assert "training:" not in result.stderr


def test_new_text_longer_than_the_model_reads(place):
    import tiny

    tiny.save(place / "gpt2", "gpt2")
    flags = "--model_checkpoints=gpt2", "--dataset=data", "--max_length=1024", "--text=" + "the film was " * 300
    refused(place, "the model has 512 positions; use --max_length=", "inference_spul", *flags)


@pytest.mark.skipif(sys.platform == "darwin", reason="has MPS")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_device_that_is_not_there(place, script):
    check(place, script, "--device=mps is not available on this machine", "--device=mps")


@pytest.mark.parametrize("script", ["qlora", "spul"])
def test_compilation_elsewhere_than_on_cuda(place, script):
    check(place, script, "--compile is for CUDA, this model goes to cpu; leave it out", "--compile", "--device=cpu")


def test_a_mistyped_flag_that_is_required(tmp_path):
    sentence = "unknown argument --model_nam, did you mean --model_name?"
    refused(tmp_path, sentence, "qlora", "--dataset=snippets", "--model_nam=x")


def test_lora_on_layers_that_are_not_there(place):
    check(place, "qlora", "cannot place LoRA", "--lora_target_modules=nonesuch")


@pytest.mark.parametrize("script", ["spul", "inference_spul"])
def test_a_foreign_checkpoint(place, script):
    (place / "app").mkdir()
    (place / "app" / "manifest.json").write_text('{"short_name": "app", "icons": []}')
    check(place, script, "manifest.json is no manifest of this project or is damaged", model="app")


@pytest.mark.parametrize("script", ["spul", "inference_spul"])
def test_corrupt_adapter_bytes(place, script):
    file = place / "fine-tuned" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    check(place, script, "is not the file its manifest names (SHA-256 differs)")


@pytest.mark.parametrize("script", ["spul", "inference_spul"])
def test_a_half_deleted_checkpoint(place, script):
    (place / "fine-tuned" / "adapter_model.safetensors").unlink()
    check(place, script, "fine-tuned has lost its file adapter_model.safetensors")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--datasets=sst2"], "unknown argument --datasets, did you mean --dataset?"),
        (["--max_lenght=12"], "unknown argument --max_lenght, did you mean --max_length?"),
        (["--data=x"], "unknown argument --data"),
        (["stray"], "unknown argument stray"),
        (["--max_length=0"], "argument --max_length: '0' is not a whole number of at least 1"),
        (["--max_length=1e3"], "argument --max_length: '1e3' is not a whole number of at least 1"),
        (["--seed=-1"], "argument --seed: '-1' is not a whole number from 0 to 4294967295"),
        (["--seed=4294967296"], "argument --seed: '4294967296' is not a whole number from 0 to"),
        (["--dtype=int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--max_eval_samples"], "argument --max_eval_samples: expected one argument"),
        (["--overwrite=1"], "argument --overwrite: ignored explicit argument '1'"),
    ],
)
def test_flags_of_every_script(tmp_path, script, flags, sentence):
    refused(tmp_path, sentence, script, *arguments(script), *flags)


@pytest.mark.parametrize(
    ("script", "flags", "sentence"),
    [
        ("qlora", ["--lr=0"], "argument --lr: '0' is not a number above 0"),
        ("qlora", ["--lr=nan"], "argument --lr: 'nan' is not a number above 0"),
        ("qlora", ["--lr=inf"], "argument --lr: 'inf' is not a number above 0"),
        ("qlora", ["--weight_decay=-0.1"], "argument --weight_decay: '-0.1' is not a number of at least 0"),
        ("qlora", ["--lora_dropout=1"], "'1' is not a number of at least 0 and below 1"),
        ("qlora", ["--lora_bias=some"], "argument --lora_bias: invalid choice: 'some'"),
        ("spul", ["--forget_size=0"], "argument --forget_size: '0' is not a number above 0 and at most 1"),
        ("spul", ["--forget_size=1.5"], "argument --forget_size: '1.5' is not a number above 0 and at most 1"),
        ("spul", ["--alpha=-1"], "argument --alpha: '-1' is not a number of at least 0"),
        ("spul", ["--prompt_encoder=gru"], "argument --prompt_encoder: invalid choice: 'gru'"),
        ("spul", ["--forget_per_batch=8"], "--forget_per_batch must be smaller than --train_batch_size"),
        ("spul", ["--init_text=a", "--init_checkpoint=b"], "not allowed with argument --init_text"),
        ("inference_spul", ["--json"], "--json goes with --text or --input_file"),
        ("inference_spul", ["--max_eval_samples=0"], "--max_eval_samples=0 leaves nothing to evaluate"),
        ("inference_spul", ["--lr=1"], "unknown argument --lr"),
        ("inference_spul", ["--text=a"], "--output_path is of the evaluation, which --text and --input_file replace"),
    ],
)
def test_flags_of_one_script(tmp_path, script, flags, sentence):
    refused(tmp_path, sentence, script, *arguments(script), *flags)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_flag(tmp_path, script):
    name = "--model_name" if script == "qlora" else "--model_checkpoints"
    refused(tmp_path, f"the following arguments are required: {name}", script)


def test_a_misspelt_flag_in_a_process_of_its_own(tmp_path):
    refused(tmp_path, "did you mean --alpha?", "spul", "--model_checkpoints=x", "--alhpa=3", run=start)


def test_new_text_from_a_missing_file(place):
    flags = "--model_checkpoints=fine-tuned", "--dataset=data", "--input_file=texts.txt"
    refused(place, "texts.txt does not exist", "inference_spul", *flags)


@pytest.mark.parametrize("script", ["qlora", "spul"])
def test_a_loss_that_is_not_finite(place, script):
    more = "--lr=1e30", "--num_epochs=4", "--beta=0" if script == "spul" else "--lora_dropout=0"
    check(place, script, "lower --lr (now 1e+30)", *more)


@pytest.mark.parametrize("script", ["qlora", "spul"])
def test_a_last_step_that_makes_it_not_finite(place, script):
    """The second of two steps is the first with a rate above zero, so no later loss shows it."""
    more = "--lr=1e30", "--max_steps=2", "--beta=0" if script == "spul" else "--lora_dropout=0"
    check(place, script, "lower --lr", *more)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_output_below_a_file(place, script):
    (place / "file").write_text("mine")
    check(place, script, "cannot write to ", "--output_path=file/out")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_output_that_exists(place, script, kind):
    if kind == "file":
        (place / "out").write_text("mine")
    else:
        (place / "out").mkdir()
    check(place, script, "out exists; choose another --output_path or add --overwrite")


@pytest.mark.parametrize("script", ["qlora", "spul"])
def test_a_leftover_of_an_interrupted_run(place, script):
    (place / "out.training.safetensors").write_bytes(b"state")
    check(place, script, "an interrupted run left out.training.safetensors; continue it with --resume")


def test_overwrite_replaces_an_output(place, old_output):
    done(call(place, "qlora", *arguments("qlora"), "--overwrite", "--max_eval_samples=0"))
    assert not (place / "out" / "metrics.json").exists() and (place / "out" / "manifest.json").exists()


def test_overwrite_spares_what_is_not_ours(place):
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").write_text("mine")
    check(place, "qlora", "is no folder that this project wrote", "--overwrite")


def test_overwrite_spares_what_the_run_reads(place):
    """What the command names, and what that was trained on."""
    for output in ("data", "fine-tuned", "tiny-llama"):
        sentence = f"--output_path={output} would replace "
        check(place, "spul", sentence, f"--output_path={output}", "--overwrite")
        check(place, "inference_spul", sentence, f"--output_path={output}", "--overwrite")


def test_overwrite_spares_data_of_the_users_own(place):
    flags = "--output_path=data", "--overwrite"
    check(place, "spul", "is no folder that this project wrote", *flags, dataset="snippets")


def test_reference_logits_below_a_file(place):
    (place / "file").write_text("mine")
    check(place, "spul", "file", "--logits_path=file/reference")


FULL = "the disk is full or a file-size limit was hit"  # what a limit on the size of files is like for a program
HARD_LIMIT = resource.getrlimit(resource.RLIMIT_FSIZE)[1]


@pytest.fixture
def limit_files():
    """A function that limits the size of files for the rest of the test."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, HARD_LIMIT))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_while_writing(place, result):
    """The training is not lost, the old output is whole, and there is no part of a new one."""
    assert result.code == 2 and FULL in result.stderr.splitlines()[-1]
    left = {path.name for path in place.iterdir()} - {"tiny-llama", "fine-tuned", "data"}
    assert left == {"out", "out.training.safetensors"}
    assert {path.name for path in (place / "out").iterdir()} == {"predictions.jsonl", "metrics.json"}


# The largest file of an output is tokenizer.json (100 kB); the states of these runs are smaller (21 and 60 kB).


@pytest.mark.long
def test_a_full_disk_while_the_adapter_is_written(place, old_output):
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, HARD_LIMIT))}
    more = "--overwrite", "--max_steps=1", "--max_eval_samples=0", "--lora_rank=1"
    full_while_writing(place, start(place, "qlora", *arguments("qlora"), *more, **limit))


def test_a_full_disk_while_the_prompt_is_written(place, old_output, limit_files):
    more = "--overwrite", "--max_steps=1", "--max_eval_samples=0", "--beta=0"
    limit_files(80_000)
    full_while_writing(place, call(place, "spul", *arguments("spul"), *more))
    limit_files(HARD_LIMIT)
    done(call(place, "spul", *arguments("spul"), *more, "--resume"))
    assert (place / "out" / "manifest.json").exists() and not (place / "out.training.safetensors").exists()


def test_a_full_disk_while_the_reference_is_written(place, limit_files):
    (place / "saved_logits").mkdir()
    limit_files(5_000)  # of 8 kB
    check(place, "spul", FULL, "--max_steps=1", "--max_eval_samples=0")


def test_a_full_disk_while_the_state_is_saved(place, limit_files):
    limit_files(20_000)
    more = "--save_steps=1", "--max_eval_samples=0", "--beta=0", "--ptuning_hidden_size=128"
    check(place, "spul", FULL, *more)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_a_command_to_paste_and_describes_every_flag(script):
    result = done(call(".", script, "--help"))
    assert f"python {script}.py --dataset=sst2" in result.stdout
    assert [action.dest for action in parser_of(script)._actions if not action.help] == []


def parser_of(script):
    """The parser that the script builds."""
    seen = []

    def keep(parser, *_):
        seen.append(parser)
        raise SystemExit

    with mock.patch.object(cli.ArgumentParser, "parse_args", keep), pytest.raises(SystemExit):
        importlib.import_module(script).parse_args()
    return seen[0]
