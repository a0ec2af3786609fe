"""Files and folders that appear whole or not at all, and that one process writes at a time.

Whatever is written is prepared in a hidden folder beside it, its workplace. A lock on the mark inside is held while it
is in use and goes with the process, however that ends: a workplace without a lock is what a killed run left, and the
next start removes it. Its name is one that nobody else gives and the mark says whose it is, so that nothing of a user's
is taken for it.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError, note_once

PREFIX, MARK = ".spul-run-", "spul-run.json"
NEW, OLD, OLD_STATE = "new", "old", "state"  # in a workplace: what is written, and what it replaces
STATE = ".training.safetensors"  # ends the name of the file beside an output with which its run can be resumed
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without locks answer


class Taken(UserError):
    """Another process is writing there."""


def workplace_of(path: os.PathLike | str) -> Path:
    """The hidden folder in which `path` is prepared; all links to `path` lead to the same one."""
    target = Path(os.path.realpath(path))
    return target.parent / f"{PREFIX}{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}"


@contextlib.contextmanager
def workplace(path: os.PathLike | str, wait: bool = False) -> Iterator[Path]:
    """Holds the workplace of `path` while the block runs; afterwards nothing of it is left.

    What a killed run left there is undone first. wait: until another process is done, instead of raising Taken.
    Missing parents are made, and go again if nothing was put into them. Raises UserError where one cannot write.
    """
    target, place = Path(os.path.realpath(path)), workplace_of(path)
    missing = [folder for folder in place.parents if not folder.exists()]
    try:
        with _unwritable(place.parent):
            lock = _take(place, path, wait)
        try:
            _empty(place, target)
            _sign(lock, target)
            yield place
        finally:
            _clear(place, target, lock)
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # somebody put something into it
                folder.rmdir()


@contextlib.contextmanager
def new_file(path: os.PathLike | str, wait: bool = True) -> Iterator[Path]:
    """Yields a name for what becomes the file `path` when the block ends well, with the rights that umask gives."""
    with workplace(path, wait) as place:
        yield place / NEW
        publish(place, path)


def publish(place: Path, path: os.PathLike | str) -> None:
    """Let the file `new` of the workplace become `path`."""
    give_rights(place / NEW, place)
    os.replace(place / NEW, os.path.realpath(path))


def write_json(path: os.PathLike | str, value: object) -> None:
    """Write `value` as indented JSON, whole or not at all; NaN is refused with ValueError, since JSON has none."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with new_file(path) as file:
        file.write_text(text, encoding="utf-8")


def try_to_write(path: os.PathLike | str) -> None:
    """Raise UserError if `path` could not be written; nothing stays, and what killed runs left beside it goes."""
    with contextlib.suppress(Taken), workplace(path):
        sweep(path)


def sweep(path: os.PathLike | str) -> None:
    """Remove what killed runs left in the folder of `path`; what they had moved aside goes back to its place."""
    for place in workplace_of(path).parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            place.rmdir()  # which is nothing but a folder without a mark
        with contextlib.suppress(OSError):  # in use, or somebody else's
            lock = os.open(place / MARK, os.O_RDWR)
            _clear_if_dead(place, lock)


def recover(path: os.PathLike | str) -> None:
    """Put back the folder `path` if a run was killed halfway through replacing it."""
    if not os.path.lexists(path) and (workplace_of(path) / OLD).exists():
        with contextlib.suppress(OSError, UserError), workplace(path, wait=True):
            pass


def replace(place: Path, target: Path) -> None:
    """Let the folder `new` of the workplace become `target`; what was there, and the state of its run, vanish with the
    workplace. After a kill `new` tells whether this was done."""
    for there, aside in ((state_of(target), OLD_STATE), (target, OLD)):
        if there.exists():
            there.rename(place / aside)
    (place / NEW).rename(target)


def state_of(target: Path) -> Path:
    """The file that holds the resumable state of the run that writes `target`."""
    return target.with_name(f"{target.name}{STATE}")


def give_rights(path: Path, place: Path) -> None:
    """Give all files of `path` the rights of the workplace's mark, which are those of umask; libraries are stricter."""
    mode = (place / MARK).stat().st_mode & 0o777
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            with contextlib.suppress(PermissionError):  # some file systems know no rights
                file.chmod(mode)


def _take(place: Path, path: os.PathLike | str, wait: bool, attempts: int = 100) -> int:
    """The locked descriptor of the mark in `place`, both made where they are missing."""
    while True:
        try:
            place.mkdir(parents=True, exist_ok=True)
            if MARK not in (os.listdir(place) or [MARK]):
                raise UserError(f"{place} is in the way and not of this project; move it")
            lock = os.open(place / MARK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process has just removed it
            attempts -= 1
            if attempts:
                continue
            raise
        try:
            _lock(lock, path, wait)
            if _is_at(lock, place / MARK):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # of a mark that has been removed meanwhile


def _lock(lock: int, path: os.PathLike | str, wait: bool) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise Taken(f"another run ({_signature(lock)}) is writing {path}; wait for it or choose another path")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        note_once("the file system knows no locks, so see to it that no two runs write the same output")


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that lies at `path` now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _sign(lock: int, target: Path) -> None:
    """Say in the mark whose workplace it is."""
    text = json.dumps({"target": target.name, "process": os.getpid(), "host": socket.gethostname()})
    os.truncate(lock, 0)
    os.pwrite(lock, text.encode(), 0)


def _signature(lock: int) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        mark = json.loads(os.pread(lock, 4096, 0))
        return f"process {mark['process']} on {mark['host']}"
    return "a process that has just started"


def _clear(place: Path, target: Path, lock: int) -> None:
    """Remove the workplace, its mark last: without it nobody knows whose the rest is. Closes the descriptor."""
    try:
        _empty(place, target)
        (place / MARK).unlink()
    finally:
        os.close(lock)
    with contextlib.suppress(OSError):  # another process has made a mark meanwhile
        place.rmdir()


def _clear_if_dead(place: Path, lock: int) -> None:
    """Clear the workplace, unless another process holds its lock or it is not ours. Closes the descriptor."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mark = os.pread(lock, 4096, 0)
        target = place.parent / (json.loads(mark)["target"] if mark else "")
        ours = workplace_of(target) == place if mark else os.listdir(place) == [MARK]
        ours = ours and _is_at(lock, place / MARK)
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        return os.close(lock)
    with contextlib.suppress(UserError):
        _clear(place, target, lock)


def _empty(place: Path, target: Path) -> None:
    """Put back what `replace` had moved aside, unless it came to its end, and delete the rest but for the mark.

    Raises UserError, and deletes nothing, if something else lies there now.
    """
    for aside, there in ((place / OLD, target), (place / OLD_STATE, state_of(target))):
        if (place / NEW).exists() and aside.exists():
            if os.path.lexists(there):
                raise UserError(f"{aside} was {there} until a run was killed, and now that exists again; move one away")
            aside.rename(there)
    for child in place.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child.name != MARK:
            child.unlink()


@contextlib.contextmanager
def _unwritable(folder: Path) -> Iterator[None]:
    """Turns the system's refusal to write below `folder` into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        ancestor = next(path for path in (folder, *folder.parents) if path.exists())
        raise UserError(f"cannot write to {ancestor} ({os.strerror(error.errno)}); choose another place") from None
