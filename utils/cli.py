"""Command-line conventions of every script: one clear sentence on bad input, exit code 2, no traceback."""

import argparse
import contextlib
import dataclasses
import difflib
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, TypeVar

from utils.errors import UserError, first_line, resource_message

T = TypeVar("T")
SETTINGS = "--settings"


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Docstrings as they stand, and every flag's default behind its help."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        """No `(default: None)`: where a flag has no default its help says what happens without it."""
        absent = action.default is None or action.default is False
        return action.help if absent else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose errors are one sentence and that names the closest flag on a typo."""

    def __init__(self, doc: str) -> None:
        super().__init__(
            description=doc,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        self.add_argument(
            SETTINGS, type=path, action="append", metavar="FILE",
            help="read flags from this text file, in which # begins a comment; those of the command line win",
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As argparse does it, with `args` the words of the command line."""
        try:
            words = with_settings(sys.argv[1:] if args is None else args)
        except UserError as error:
            self.error(str(error))
        words = self._with_texts(words)
        flags = [word.split("=")[0] for word in words if word.startswith("--") and word != "--"]
        # Before anything else, since what is mistyped may be required.
        self._refuse_unknown([flag for flag in flags if flag not in self._option_string_actions])
        parsed, unknown = self.parse_known_args(words, namespace)
        self._refuse_unknown(unknown)
        vars(parsed).pop("settings")  # the flags themselves are recorded
        return parsed

    def _with_texts(self, words: Sequence[str]) -> list[str]:
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

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        if words:
            flag = words[0].split("=")[0]
            close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            self.error(f"unknown argument {flag}{hint}")


def with_settings(words: Sequence[str]) -> list[str]:
    """`words` of a command line with the flags of every `--settings` file in front, where the others override them.

    Raises UserError where such a file cannot be read, names another, or has a quotation mark without its partner.
    """
    found, rest, following = [], [], iter(words)
    for word in following:
        if word.split("=")[0] != SETTINGS:
            rest.append(word)
            continue
        name = word.partition("=")[2] if "=" in word else next(following, "")
        found += _flags_in(os.path.expanduser(name))
    return [*found, *rest]


def flags(text: str) -> list[str]:
    """Several flags in one text, for argparse; those of a `--settings` file among them are spelled out."""
    try:
        return with_settings(shlex.split(text))
    except (UserError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error))


def _flags_in(file: str) -> list[str]:
    if not os.path.isfile(file):
        raise UserError(f"{SETTINGS}={file} is no file; pass one that holds flags")
    try:
        with open(file, encoding="utf-8-sig") as lines:
            words = shlex.split(_without_comments(lines.read()))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read flags from {file} ({first_line(error)}); mend the file")
    if any(word.split("=")[0] == SETTINGS for word in words):
        raise UserError(f"{file} names another {SETTINGS} file; give both on the command line")
    return words


def _without_comments(text: str) -> str:
    """`text` without what stands behind a `#` that begins a word; within one, or in quotation marks, it is as any other
    character."""
    kept, quote, inside = [], None, False
    for before, character in zip(f" {text}", text):
        if inside:
            inside = character != "\n"
        elif quote:
            quote = None if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            inside = character == "#" and before.isspace()
        if not inside:
            kept.append(character)
    return "".join(kept)


def path(text: str) -> str:
    """A path or hub id, for argparse; a leading `~` is the home folder, which no shell expands behind `--flag=`."""
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text!r} begins with no user's home; a folder of that name is ./{text}")
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a path or leave the flag out")
    return expanded


def named_path(value: str) -> tuple[str, str]:
    """(NAME, PATH) of `NAME=PATH`, for argparse."""
    name, _, rest = value.partition("=")
    if not name or not rest:
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=PATH")
    return text(name), path(rest)


def template(value: str) -> str:
    """A text whose `\\n` stand for line ends, for argparse."""
    return text(value).replace("\\n", "\n")


def text(value: str) -> str:
    """A text with something to see in it, for argparse. It may begin with a dash (`ArgumentParser` takes care)."""
    from utils.data.splits import is_text

    if not is_text(value):
        raise argparse.ArgumentTypeError("it is empty or no UTF-8; give a text")
    return value


def positive_int(text: str) -> int:
    """An int of at least 1, for argparse."""
    return _number(int, text, lambda v: v >= 1, "a whole number of at least 1")


def non_negative_int(text: str) -> int:
    """An int of at least 0, for argparse."""
    return _number(int, text, lambda v: v >= 0, "a whole number of at least 0")


def seed(text: str) -> int:
    """An int that every library takes as a seed, for argparse."""
    return _number(int, text, lambda v: 0 <= v < 2**32, "a whole number from 0 to 4294967295")


def positive_float(text: str) -> float:
    """A finite float above 0, for argparse."""
    return _number(float, text, lambda v: 0 < v < float("inf"), "a number above 0")


def non_negative_float(text: str) -> float:
    """A finite float of at least 0, for argparse."""
    return _number(float, text, lambda v: 0 <= v < float("inf"), "a number of at least 0")


def fraction(text: str) -> float:
    """A float in (0, 1], for argparse."""
    return _number(float, text, lambda v: 0 < v <= 1, "a number above 0 and at most 1")


def share(text: str) -> float:
    """A float in [0, 1], for argparse."""
    return _number(float, text, lambda v: 0 <= v <= 1, "a number from 0 to 1")


def below_one(text: str) -> float:
    """A float in [0, 1), for argparse."""
    return _number(float, text, lambda v: 0 <= v < 1, "a number of at least 0 and below 1")


def _number(kind: Callable, text: str, accept: Callable[[float], bool], description: str) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accept(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
    return value


def take(kind: type[T], args: argparse.Namespace) -> T:
    """The dataclass `kind` with those of its fields that `args` holds; the others keep their defaults."""
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind) if field.name in args})


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


def run_script(parse_args: Callable[[], argparse.Namespace], main: Callable[[argparse.Namespace], None]) -> None:
    """`run` of a file that was started as a script. One of several processes then ends without the clean-up of the
    interpreter, in which a thread of the communication may abort a run that has ended well."""
    code = 0
    try:
        run(parse_args, main)
    except SystemExit as ended:
        code = ended.code
    if "WORLD_SIZE" in os.environ:
        os._exit(code)
    sys.exit(code)


def _run(parse_args: Callable[[], argparse.Namespace], main: Callable[[argparse.Namespace], None]) -> int:
    """The exit code; whatever is no mistake of the user's and no end of the output is raised."""
    with importing():
        from utils import distributed

        _quiet_libraries()
    message, first = None, True
    try:
        distributed.start()
        with distributed.only_main_speaks():
            main(parse_args())
            sys.stdout.flush()  # here, where an error has its sentence
        distributed.finish()
    except BrokenPipeError:  # whoever reads our output, `head` say, has had enough
        raise
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else resource_message(error)
        first = distributed.failed_first()
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


def _quiet_libraries() -> None:
    """Keep the libraries' own notices and progress bars out of what a script prints; errors still come through."""
    warnings.simplefilter("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
