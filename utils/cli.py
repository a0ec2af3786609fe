"""Command-line conventions of every script: one clear sentence on bad input, exit code 2, no traceback."""

import argparse
import contextlib
import difflib
import errno
import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator


class UserError(Exception):
    """Bad input. The message is one sentence that says what is wrong and what to do."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Docstrings as they stand, and every flag's default behind its help."""

    def _get_help_string(self, action):
        """No `(default: None)`: where a flag has no default its help says what happens without it."""
        absent = action.default is None or action.default is False
        return action.help if absent else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose errors are one sentence and that names the closest flag on a typo."""

    def __init__(self, doc):
        super().__init__(
            description=doc,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def parse_args(self, args=None, namespace=None):
        words = self._with_texts(sys.argv[1:] if args is None else args)
        flags = [word.split("=")[0] for word in words if word.startswith("--") and word != "--"]
        # Before anything else, since what is mistyped may be required.
        self._refuse_unknown([flag for flag in flags if flag not in self._option_string_actions])
        parsed, unknown = self.parse_known_args(words, namespace)
        self._refuse_unknown(unknown)
        return parsed

    def _with_texts(self, words):
        """`words` with `--flag X` as `--flag=X` where the flag takes a `text`: that may begin with a dash, as long as
        it is no flag of ours (whose value was forgotten)."""
        joined = []
        for word in words:
            action = self._option_string_actions.get(joined[-1] if joined else "")
            if action is not None and action.type is text and word.split("=")[0] not in self._option_string_actions:
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return joined

    def _refuse_unknown(self, words):
        if words:
            flag = words[0].split("=")[0]
            close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            self.error(f"unknown argument {flag}{hint}")


def path(text: str) -> str:
    """A path or hub id, for argparse; a leading `~` is the home folder, which no shell expands behind `--flag=`."""
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text!r} begins with no user's home; a folder of that name is ./{text}")
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a path or leave the flag out")
    return expanded


def text(value: str) -> str:
    """A text with something to see in it, for argparse. It may begin with a dash (`ArgumentParser` takes care)."""
    from utils.splits import is_text

    if not is_text(value):
        raise argparse.ArgumentTypeError("it is empty or no UTF-8; give a text")
    return value


def positive_int(text):
    """An int of at least 1, for argparse."""
    return _number(int, text, lambda v: v >= 1, "a whole number of at least 1")


def non_negative_int(text):
    """An int of at least 0, for argparse."""
    return _number(int, text, lambda v: v >= 0, "a whole number of at least 0")


def seed(text):
    """An int that every library takes as a seed, for argparse."""
    return _number(int, text, lambda v: 0 <= v < 2**32, "a whole number from 0 to 4294967295")


def positive_float(text):
    """A finite float above 0, for argparse."""
    return _number(float, text, lambda v: 0 < v < float("inf"), "a number above 0")


def non_negative_float(text):
    """A finite float of at least 0, for argparse."""
    return _number(float, text, lambda v: 0 <= v < float("inf"), "a number of at least 0")


def fraction(text):
    """A float in (0, 1], for argparse."""
    return _number(float, text, lambda v: 0 < v <= 1, "a number above 0 and at most 1")


def share(text):
    """A float in [0, 1], for argparse."""
    return _number(float, text, lambda v: 0 <= v <= 1, "a number from 0 to 1")


def below_one(text):
    """A float in [0, 1), for argparse."""
    return _number(float, text, lambda v: 0 <= v < 1, "a number of at least 0 and below 1")


def _number(kind, text, accept, description):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accept(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
    return value


def run(parse_args: Callable[[], argparse.Namespace], main: Callable[[argparse.Namespace], None]) -> None:
    """Run a script's `main(parse_args())`; exit 2 with one sentence on a `UserError` or a full or unwritable disk.

    Exits 130 after Ctrl-C and 1 where whoever reads the output has had enough. Several processes of an
    `accelerate launch` say an error once and all exit 2. A script keeps its imports of libraries for `main`: they take
    seconds, and only in here a Ctrl-C ends without a traceback.
    """
    _open_streams()
    try:
        code = _run(parse_args, main)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 1
    finally:
        _empty_streams()
    if code:
        sys.exit(code)


def _run(parse_args: Callable[[], argparse.Namespace], main: Callable[[argparse.Namespace], None]) -> int:
    """The exit code; whatever is no mistake of the user's and no end of the output is raised."""
    with importing():
        from utils import processes

        _quiet_libraries()
    message, first = None, True
    try:
        processes.start()
        with processes.only_main_speaks():
            main(parse_args())
            sys.stdout.flush()  # here, where an error has its sentence
        processes.finish()
    except BrokenPipeError:  # whoever reads our output, `head` say, has had enough
        raise
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else _resource_message(error)
        first = processes.failed_first()
        if message is None and first:
            raise
    else:
        return 0
    if first:  # printed out here, where an interrupted progress bar has ended its line
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    return 2


def _open_streams() -> None:
    """Let printing never fail for want of a stream or of a character: what cannot be encoded is written as `\\u...`.

    Where a stream was closed (`>&-`), what is printed goes nowhere. Its number is taken at once, or the next file that
    is opened would get it, and whatever a library prints would go into that file.
    """
    opened = os.open(os.devnull, os.O_RDWR)
    while opened < 3:
        opened = os.dup(opened)
    os.close(opened)
    for name, number, mode in ("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _empty_streams() -> None:
    """Flush what was printed; where that fails it goes nowhere, since the interpreter tries again when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Libraries are imported, which takes seconds: Ctrl-C ends the process at once and quietly, exit code 130.

    An import may swallow the exception that Ctrl-C raises elsewhere, and nothing has begun that had to be undone.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def first_line(error):
    """What a library's error says first, for a sentence of one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__


@functools.cache
def note_once(sentence):
    """Print `note: <sentence>` on stderr (stdout may be JSON), once a process."""
    print(f"note: {sentence}", file=sys.stderr)


def _quiet_libraries():
    """Keep the libraries' own notices and progress bars out of what a script prints; errors still come through."""
    warnings.simplefilter("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


UNUSABLE = (  # what a system says of a place that is not for us, or that cannot be moved to make room
    errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EBUSY, errno.EXDEV, errno.ENOTEMPTY,
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is what torch, numpy, safetensors or Python raise where memory has run out, on a GPU or a CPU."""
    raised = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, not imported here
    text = str(error)
    return (
        raised
        or getattr(error, "errno", None) == errno.ENOMEM
        or any(said in text for said in ("DefaultCPUAllocator", "os error 12", "std::bad_alloc"))
    )


def _resource_message(error):
    """The sentence for a lack of disk, rights or GPU memory, else None (safetensors has its own error type)."""
    if is_out_of_memory(error):
        where = "GPU" if type(error).__name__ == "OutOfMemoryError" else "machine"
        return f"the {where} has too little memory; lower --micro_batch_size or --eval_batch_size, or ask --dry_run"
    number = getattr(error, "errno", None)
    text = str(error)
    if number == errno.ENAMETOOLONG:
        return f"a path is too long ({text}); choose a shorter --output_path"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "os error 28" in text or "os error 27" in text:
        return (
            f"the disk is full or a file-size limit was hit ({text}); free some space or choose another --output_path"
        )
    if number in UNUSABLE or "os error 13" in text:
        return f"cannot read or write there ({text}); check the permissions or choose another path"
    return None


# Argument groups. Defaults are the published ones where the paper or its code gives one.


def add_model_arguments(parser):
    """What every script needs to load models and rows, and to evaluate."""
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--dataset", type=path, default="sst2", help="sst2, yelp, snippets, or a folder with the four splits"
    )
    group.add_argument("--max_length", type=positive_int, default=1024, help="most tokens a row may have; text is cut")
    group.add_argument("--set_pad_id", action="store_true", help="pad with the end-of-sequence token")
    group.add_argument(
        "--device", choices=["auto", "cuda", "mps", "cpu", "balanced"], default="auto",
        help="where to compute (balanced: the layers of one model spread over all GPUs)",
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=["auto", "bfloat16", "float32", "float16"], default="auto", help="of the frozen weights"
    )
    group.add_argument(
        "--attn_implementation",
        choices=["auto", "eager", "sdpa", "flash_attention_2"],
        default="auto",
        help="auto: SDPA where the model has it, but for short rows on a CPU eager attention without copies",
    )
    group.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    group.add_argument("--eval_batch_size", type=positive_int, default=32, help="rows at a time in evaluation")
    group.add_argument(
        "--max_eval_samples", type=non_negative_int, help="rows a split of the final evaluation, at most (0: none)"
    )
    group.add_argument("--max_train_samples", type=positive_int, help="train rows to use, forget share kept")
    group.add_argument("--forget_share", type=fraction, help="share of forget rows among --max_train_samples")
    group.add_argument(
        "--forget_only", type=path, metavar="FILE",
        help="leave out forget rows that name nobody of this list (its form: data/snippets/forget_names.txt)",
    )  # fmt: skip
    group.add_argument(
        "--rows_seed", type=seed, default=42, help="which rows --max_train_samples and --max_eval_samples draw"
    )
    group.add_argument(
        "--validation_share", type=fraction, metavar="S",
        help="put this share of the train rows aside and evaluate on them instead of the test rows: to choose settings",
    )  # fmt: skip
    group.add_argument(
        "--final", action="store_true", help="with --validation_share: evaluate on the test rows, after all choices"
    )
    group.add_argument("--seed", type=seed, default=42, help="of batches, unlearning labels and initialisation")
    group.add_argument("--output_path", type=path, help="folder to write (default: the published name)")
    group.add_argument("--overwrite", action="store_true", help="replace an existing output folder of this project")


def add_training_arguments(parser, num_epochs):
    """What every training script needs. `num_epochs` is the published default of the script."""
    group = parser.add_argument_group("training")
    group.add_argument("--lr", type=positive_float, default=1e-4, help="peak learning rate")
    group.add_argument("--train_batch_size", type=positive_int, default=32, help="rows per optimisation step")
    group.add_argument(
        "--micro_batch_size", type=positive_int, help="rows per forward pass, to save memory (default: the whole batch)"
    )
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="compute each layer's inner values again in the backward pass: less memory, about a third more time",
    )
    group.add_argument(
        "--compile", action="store_true", help="compile the layers (CUDA): slow first steps, faster ones afterwards"
    )
    group.add_argument("--num_epochs", type=positive_int, default=num_epochs, help="passes over the training rows")
    group.add_argument("--max_steps", type=positive_int, help="stop after so many steps, schedule included")
    group.add_argument(
        "--max_rows", type=positive_int, help="stop before more rows than these are read, schedule included"
    )
    group.add_argument("--weight_decay", type=non_negative_float, default=0.001, help="of AdamW")
    group.add_argument("--max_grad_norm", type=positive_float, default=0.3, help="gradient norm is clipped to this")
    group.add_argument(
        "--length_pool", type=non_negative_int, metavar="K",
        help="sort rows by length within K batches to save padding; 0: not at all (default: as published, 50 batches "
        "or a quarter of the epoch, whichever is less)",
    )  # fmt: skip
    group.add_argument("--eval_steps", type=positive_int, help="accuracy on the four splits every so many steps")
    group.add_argument(
        "--curve_samples", type=positive_int, default=200, help="rows a split that --eval_steps evaluates"
    )
    group.add_argument("--save_steps", type=positive_int, default=100, help="save the resumable state this often")
    group.add_argument(
        "--dry_run",
        nargs="?",
        const="plan",
        choices=["plan", "probe"],
        help="only say what the run will take (plan: without loading weights; probe: load them and time some steps)",
    )
    group.add_argument("--resume", action="store_true", help="continue the interrupted run of this command")


def add_lora_arguments(parser, title):
    """The adapter that qlora.py trains, or baselines.py with --tune=lora."""
    group = parser.add_argument_group(title)
    group.add_argument("--lora_rank", type=positive_int, default=16, help="r")
    group.add_argument("--lora_alpha", type=positive_float, default=64, help="scale is lora_alpha / lora_rank")
    group.add_argument("--lora_dropout", "--lora_fropout", type=below_one, default=0.1, help="in front of the adapter")
    group.add_argument(
        "--lora_bias", choices=["none", "all", "lora_only"], default="none", help="biases to train, in --dtype"
    )
    group.add_argument(
        "--lora_target_modules",
        nargs="+",
        metavar="NAME",
        help="layers to adapt, or all-linear (default: PEFT's choice)",
    )


def add_retain_ratio(group):
    """For the scripts that unlearn: how many of the retain rows an epoch uses."""
    group.add_argument(
        "--retain_ratio",
        type=positive_float,
        metavar="R",
        help="each epoch uses R retain rows per forget row, drawn anew every epoch (default: all retain rows)",
    )
