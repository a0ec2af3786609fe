r"""Where the time of a training step goes: CPU seconds of a step, peak memory, and the share of each operator.

OMP_NUM_THREADS=1 python tests/benchmarks/operators.py --work spul --rows 1 --tokens 1024

With one thread, CPU seconds hardly depend on what else runs. Prints; writes nothing.
"""

import contextlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import cli  # noqa: E402  (found on the path set above)


def parse_args():
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--model", type=cli.path, default="data/models/smollm2", help="a plain model: folder or hub id")
    parser.add_argument("--work", choices=["spul", "lora"], default="spul", help="a prompt, or qlora.py's adapter")
    parser.add_argument("--rows", type=cli.positive_int, default=4, help="of a step")
    parser.add_argument("--tokens", type=cli.positive_int, default=96, help="of the longest row")
    parser.add_argument("--shortest", type=cli.positive_int, help="tokens of the shortest row (default: all alike)")
    parser.add_argument("--micro_batch_size", type=cli.positive_int, help="as in scripts")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="as in scripts")
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none", help="of the frozen base")
    parser.add_argument(
        "--attn_implementation", choices=["auto", "eager", "sdpa"], default="auto", help="as in scripts"
    )
    parser.add_argument("--gradient_checkpointing", choices=["layers", "selective"], help="as in scripts")
    parser.add_argument("--inductor", action="store_true", help="compile norms and MLPs, and say what that takes")
    parser.add_argument("--steps", type=cli.positive_int, default=2, help="to time, after a first one")
    parser.add_argument("--shown", type=cli.non_negative_int, default=12, help="operators to show; 0: no profile")
    return parser.parse_args()


def main(args):
    import torch

    from utils import distributed
    from utils.models.base import ModelSettings, load_base
    from utils.models.chain import resolve_chain

    flags = ("dtype", "attn_implementation", "gradient_checkpointing")
    settings = ModelSettings(**{flag: getattr(args, flag) for flag in flags})
    model = load_base(resolve_chain(args.model)[0], settings, args.quantization)
    step = make_step(args, model)
    step()
    plain = seconds_of(step, args.steps)
    print(
        f"{plain:.2f} CPU seconds a step, {str(model.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"
    )
    if args.inductor:
        compile_small(model)
        start = time.perf_counter()
        step()
        print(f"compiling took {time.perf_counter() - start:.0f} seconds of wall time")
        print(f"compiled {seconds_of(step, args.steps):.2f} CPU seconds a step")
    print(f"peak {distributed.peak_memory() / 2**30:.2f} GiB")
    if args.shown:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        for event in events[: args.shown]:
            print(f"{event.key:45} {100 * event.self_cpu_time_total / total:5.1f} %  {event.count:5} calls")


def make_step(args, model):
    """Forward and backward pass of SPUL's L_r behind 30 virtual tokens, or of qlora.py's loss.

    The rows are random tokens, after which one more is predicted; their lengths lie evenly between the two given.
    """
    import torch

    from utils.data.batch import Example, micro_batches
    from utils.models.adapters import LoraSettings, add_lora
    from utils.unlearning.objectives import FineTuning, PromptTuning

    torch.manual_seed(42)
    lengths = torch.linspace(args.shortest or args.tokens, args.tokens, args.rows).int().tolist()
    tokens = torch.randint(5, model.config.vocab_size, (args.rows, args.tokens + 1)).tolist()
    rows = [Example(tuple(row[:n]), (row[-1],)) for row, n in zip(tokens, lengths)]
    parts = micro_batches(range(args.rows), rows, args.micro_batch_size, model.device.type)
    if args.work == "lora":
        objective = FineTuning(add_lora(model, LoraSettings()).train(), rows, 0)
    else:
        encoder = torch.nn.Embedding(30, model.config.hidden_size)
        objective = PromptTuning(model, lambda: encoder.weight, rows, 0, None, 1.0, 0.0)

    def step():
        with getattr(objective, "whole_step", contextlib.nullcontext)():
            for part in parts:
                objective(part, 0, args.rows)[0].backward()

    return step


def seconds_of(step, n):
    """The least CPU seconds of `n` steps."""
    found = []
    for _ in range(n):
        start = time.process_time()
        step()
        found.append(time.process_time() - start)
    return min(found)


def compile_small(model):
    """Compile what is neither attention nor a container: every layer's norms and MLP."""
    from utils.models.layers import decoder_layers

    for layer in decoder_layers(model):
        for name, part in layer.named_children():
            if "attn" not in name and "attention" not in name:
                part.compile(dynamic=True)


if __name__ == "__main__":
    cli.run(parse_args, main)
