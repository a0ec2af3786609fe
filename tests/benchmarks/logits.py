r"""Peak memory of a SPUL step over long answers, with and without --logit_chunk, by the size of the vocabulary.

python tests/benchmarks/logits.py
python tests/benchmarks/logits.py --vocabularies=49152 --chunks 0 256 --tokens=256

The model is a random Llama of two layers and width 64, so that logits are nearly all that there is. Each step runs in a
process of its own. `counted` is the planner's figure (--dry_run) for the step; a step that is counted above --limit is
not run. `measured` is by how much the process grew in it.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import cli  # noqa: E402  (found on the path set above)
from utils.errors import UserError  # noqa: E402  (found on the path set above)

PROMPT, P = 32, 10  # tokens of a row's prompt; virtual tokens


def parse_args():
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--vocabularies", type=cli.positive_int, nargs="+", default=[49152, 262144], help="|V|")
    parser.add_argument("--chunks", type=cli.non_negative_int, nargs="+", default=[0, 1024, 256], help="--logit_chunk")
    parser.add_argument("--rows", type=cli.positive_int, default=8, help="half of them to forget")
    parser.add_argument("--tokens", type=cli.positive_int, default=512, help="of an answer")
    parser.add_argument("--limit", type=cli.positive_float, default=4.0, help="GiB that a step may be counted at")
    parser.add_argument("--one", action="store_true", help="only the first vocabulary and chunk, here, as JSON")
    return parser.parse_args()


def main(args):
    if args.one:
        return print(json.dumps(measure(args.vocabularies[0], args.chunks[0], args.rows, args.tokens, args.limit)))
    print("| vocabulary | `--logit_chunk` | counted | measured | time |\n|---|---|---|---|---|")
    for size in args.vocabularies:
        for chunk in args.chunks:
            flags = [f"--vocabularies={size}", f"--chunks={chunk}", f"--rows={args.rows}", f"--tokens={args.tokens}"]
            command = [sys.executable, __file__, *flags, f"--limit={args.limit}", "--one"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"a step did not run ({(done.stderr.strip().splitlines() or ['no message'])[-1]})")
            found = json.loads(done.stdout.splitlines()[-1])
            cells = [f"{size:,}", f"{chunk:,}" if chunk else "all at once", f"{found['counted'] / 2**30:.2f} GiB"]
            if "measured" in found:
                cells += [f"{found['measured'] / 2**30:.2f} GiB", f"{found['seconds']:.0f} s"]
            else:
                cells += ["not run", ""]
            print(f"| {' | '.join(cells)} |", flush=True)


def measure(vocabulary, chunk, rows, tokens, limit):
    """{"counted": bytes} of one step, and where that is below `limit` GiB, {"measured": bytes, "seconds"}."""
    from torch._subclasses import FakeTensorMode

    from utils import plan
    from utils.distributed import peak_memory

    with FakeTensorMode():
        counted = plan._alive_at_most(step(vocabulary, chunk, rows, tokens))
    if counted > limit * 2**30:
        return {"counted": counted}
    work = step(vocabulary, chunk, rows, tokens)
    before, start = peak_memory(), time.perf_counter()
    work()
    return {"counted": counted, "measured": peak_memory() - before, "seconds": time.perf_counter() - start}


def step(vocabulary, chunk, rows, tokens):
    """A function that runs forward and backward pass of SPUL's whole loss."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from utils.data.batch import Example
    from utils.interventions.prompt_encoders import VirtualTokens
    from utils.unlearning.objectives import PromptTuning
    from utils.unlearning.reference import Reference

    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=128,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)
    examples = [
        Example((7 + row,) * PROMPT, tuple(range(9 + row, 9 + row + tokens)), forget=2 * row >= rows)
        for row in range(rows)
    ]
    kept = {row: tokens for row, example in enumerate(examples) if not example.forget}
    reference = Reference(torch.zeros(len(kept) * tokens, 64), kept)
    encoder = VirtualTokens("mlp", P, 64, 64)
    objective = PromptTuning(model, encoder, examples, 0, reference, 0.5, 0.5, logit_chunk=chunk)
    return lambda: objective(list(range(rows)), rows - len(kept), len(kept))[0].backward()


if __name__ == "__main__":
    cli.run(parse_args, main)
