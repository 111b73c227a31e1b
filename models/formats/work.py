"""Files that are being written: under names nobody else has, out of the way until they are whole, never left behind.

A single file is written beside its name (`new_file`). What must appear together, or be proved first, is written in a
work folder beside its names and moved in one step (`WorkFolder.commit`): the mover holds the lock of the folder, and so
does a reader who found halves that do not belong together (`whole`). A process that is killed leaves its work folder;
whoever next writes there removes it, since its lock is free then.
Locks are flock's. Where the file system has none, names and single renames still keep writers apart, and a work folder
counts as left behind after a day.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from moe_edge.models.errors import MissingFile, MoeEdgeError

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

PREFIX, PART = ".moe-edge-", ".part"
LOCK, NAMES, COMMITTING, REPLACED = "lock", "names", "committing", "replaced-"
LOCK_SECONDS = 10.0  # a commit takes microseconds; whoever holds a folder's lock longer is not one of us
ABANDONED_SECONDS = 24 * 3600.0  # without locks, and for single files

_WORK = re.compile(re.escape(PREFIX) + "([a-z]+-)?[0-9a-f]{16}" + re.escape(PART))
_live: set[Path] = set()  # work folders and part files of this process
_live_lock = threading.Lock()
_pid = os.getpid()


def part_path(folder: Path, label: str = "") -> Path:
    """A name in `folder` that nothing has, short whatever is written: names of 255 bytes must have parts too.

    label: a lower-case word to recognise it by.
    """
    return folder / f"{PREFIX}{label + '-' if label else ''}{secrets.token_hex(8)}{PART}"


def is_part(name: str) -> bool:
    """Whether a file or folder of this name is being written, or was left behind."""
    return _WORK.fullmatch(name) is not None


def create(path: Path) -> int:
    """A descriptor of a file that did not exist before. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets its name, in place of what has it, when the block ends; synced before.

    When the block raises nothing is left of it. Raises OSError.
    """
    part = part_path(path.parent)
    remember(part)
    try:
        with open(create(part), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        remove(part)


class WorkFolder:
    """A folder beside the files it is for; use as a context manager. At its end it is gone, with all that is in it.

    parent: where the files will be. names: theirs; `path / name` is where to write each of them. label: see part_path.
    Raises MissingFile when the folder cannot be made.
    """

    def __init__(self, parent: Path, names: Sequence[str] = (), label: str = "") -> None:
        self.parent, self.names = parent, tuple(names)
        self.path = part_path(parent, label)
        self._lock = -1

    def __enter__(self) -> WorkFolder:
        remember(self.path)
        try:
            with locked(self.parent) as is_locked:
                remove_abandoned(self.parent, is_locked)
                os.mkdir(self.path)
                self._lock = create(self.path / LOCK)
                _try_lock(self._lock)
                (self.path / NAMES).write_bytes(b"\0".join(os.fsencode(name) for name in self.names))
        except OSError as error:
            self._remove()
            raise MissingFile(f"{self.parent}: cannot write there: {error.strerror or error}") from error
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def commit(self, check: Callable[[], None] = lambda: None) -> None:
        """Move all files to their names, in the order of `names`: readers see all of them or none.

        check: called when nobody else can commit in this folder; what it raises comes out, and nothing is moved.
        Raises MissingFile when a file cannot be moved; those moved before are put back then.
        """
        with locked(self.parent):
            check()
            undo: list[tuple[Path, Path]] = []
            try:
                create_and_close(self.path / COMMITTING)
                for number, name in enumerate(self.names):
                    kept = self.path / f"{REPLACED}{number}"
                    _keep(self.parent / name, kept)
                    undo.append((self.parent / name, kept))
                    os.replace(self.path / name, self.parent / name)
            except BaseException as error:
                _put_back(self.path, undo)
                if isinstance(error, OSError):
                    where = self.parent / self.names[max(0, len(undo) - 1)]
                    raise MissingFile(f"{where}: cannot be written: {error.strerror or error}") from error
                raise
        sync_folder(self.parent)

    def _remove(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        remove(self.path)


def create_and_close(path: Path) -> None:
    os.close(create(path))


def _keep(path: Path, kept: Path) -> None:
    """Keep what has a name that is about to be given to another file: a second name, or where there are none a move."""
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    try:
        os.link(path, kept, follow_symlinks=False)
    except FileNotFoundError:
        pass
    except (OSError, NotImplementedError):
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, kept)


def _put_back(work: Path, moved: Sequence[tuple[Path, Path]]) -> None:
    """Undo a commit that failed: what was replaced gets its name again, what is new loses it."""
    with contextlib.suppress(OSError):
        (work / COMMITTING).unlink()
    for path, kept in reversed(moved):
        with contextlib.suppress(OSError):
            if kept.exists():
                os.replace(kept, path)
            elif not (work / path.name).exists():  # it was moved, and nothing had the name before
                path.unlink()


# ---- locks -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Inside, no other process of ours commits in `folder`, nor makes or removes a work folder; False without locks."""
    fd = -1
    try:
        try:
            fd = os.open(folder, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_DIRECTORY", 0))
        except OSError:  # a folder one may write to and not read
            yield False
            return
        deadline = time.monotonic() + LOCK_SECONDS
        while (taken := _try_lock(fd)) is False and time.monotonic() < deadline:
            time.sleep(0.002)
        yield bool(taken)
    finally:
        if fd >= 0:
            os.close(fd)


def _try_lock(fd: int) -> bool | None:
    """True: the lock is ours until `fd` is closed. False: somebody else's. None: there are no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def whole(folder: Path, read: Callable[[], None]) -> None:
    """Call `read` while nobody commits in `folder`, after finishing a commit that was killed half way."""
    with locked(folder) as is_locked:
        remove_abandoned(folder, is_locked)
        read()


# ---- what was left behind ----------------------------------------------------------------------------------


def remove_abandoned(folder: Path, is_locked: bool) -> None:
    """Remove what killed processes left in `folder`. is_locked: whether this process holds its lock."""
    try:
        with os.scandir(folder) as entries:
            found = [(Path(each.path), each.is_dir(follow_symlinks=False)) for each in entries if is_part(each.name)]
    except OSError:
        return
    for path, is_folder in found:
        with _live_lock:
            if path in _live:
                continue
        with contextlib.suppress(OSError):
            if not is_folder:
                if _age_seconds(path) > ABANDONED_SECONDS:
                    path.unlink()
            elif _is_abandoned(path, is_locked):
                _finish_commit(path)
                shutil.rmtree(path, ignore_errors=True)


def _age_seconds(path: Path) -> float:
    """Since a part, or anything in a work folder, was written to last."""
    times = [path.stat().st_mtime]
    if path.is_dir():
        with os.scandir(path) as entries:
            times += [each.stat(follow_symlinks=False).st_mtime for each in entries]
    return time.time() - max(times)


def _is_abandoned(work: Path, is_locked: bool) -> bool:
    """Whether the process that made a work folder has ended."""
    try:
        fd = os.open(work / LOCK, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:  # made under the folder's lock, which we hold: its maker was killed in between
        return is_locked or _age_seconds(work) > ABANDONED_SECONDS
    try:
        taken = _try_lock(fd) if is_locked else None
        return _age_seconds(work) > ABANDONED_SECONDS if taken is None else taken
    finally:
        os.close(fd)


def _finish_commit(work: Path) -> None:
    """Move the rest of a commit that had begun to move: all were proved before the first was moved."""
    if not (work / COMMITTING).exists():
        return
    names = [os.fsdecode(name) for name in (work / NAMES).read_bytes().split(b"\0")]
    if any(os.path.basename(name) != name for name in names):
        return
    left = [name for name in names if (work / name).exists()]
    if len(left) < len(names):
        for name in left:
            os.replace(work / name, work.parent / name)
        sync_folder(work.parent)


# ---- what an exception leaves behind -----------------------------------------------------------------------


def remember(path: Path) -> None:
    """Remove `path` when the process ends, unless remove() has done so before."""
    with _live_lock:
        _live.add(path)


def forget(path: Path) -> None:
    """It is not ours any more."""
    with _live_lock:
        _live.discard(path)


def remove(path: Path) -> None:
    """Remove a work folder or a part, if it is there, and forget it."""
    for _ in range(2):  # once more, should a single call of the file system have failed
        with contextlib.suppress(OSError):
            path.unlink() if not path.is_dir() else shutil.rmtree(path)
            break
    forget(path)


@atexit.register
def _remove_live() -> None:
    """A signal's handler may raise between any two instructions, also those that begin a clean-up."""
    if os.getpid() == _pid:  # else this is a fork, and they are its parent's
        for path in sorted(_live):
            remove(path)


def sync_folder(folder: Path) -> None:
    """Make renames durable; file systems that cannot sync a folder are left to themselves."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)


def renamed_in(error: MoeEdgeError, names: Sequence[tuple[Path, Path]]) -> MoeEdgeError:
    """The error with paths of a work folder replaced by the names the files would have got."""
    text = str(error)
    for written, final in names:
        text = text.replace(str(written), str(final))
    error.args = (text, *error.args[1:])
    return error
