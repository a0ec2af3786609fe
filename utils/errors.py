"""What goes wrong, in one sentence: errors that a user can mend, notes, and what a lack of resources says."""

import errno
import functools
import sys


class UserError(Exception):
    """Bad input. The message is one sentence that says what is wrong and what to do."""


def first_line(error: BaseException) -> str:
    """What a library's error says first, for a sentence of one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__


@functools.cache
def note_once(sentence: str) -> None:
    """Print `note: <sentence>` on stderr (stdout may be JSON), once a process."""
    print(f"note: {sentence}", file=sys.stderr)


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


def resource_message(error: BaseException) -> str | None:
    """The sentence for a lack of disk, rights or GPU memory, else None (safetensors has its own error type)."""
    if is_out_of_memory(error):
        where = "GPU" if type(error).__name__ == "OutOfMemoryError" else "machine"
        return (
            f"the {where} has too little memory; lower --micro_batch_size or --eval_batch_size, add "
            "--gradient_checkpointing, or ask --dry_run"
        )
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
