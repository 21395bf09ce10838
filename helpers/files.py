"""Files that are never half there, whoever writes and whatever ends it; and the one kind of error that a learner is shown."""

import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from helpers.sql import printable


class CourseError(Exception):
    """Something the learner can mend: the message is one plain sentence that says what to do next.

    What strangers put into it (a file's name, a field's, SQLite's own words) can't steer a terminal: see `sql.printable`.
    """

    def __init__(self, message: object = ""):
        super().__init__(printable(str(message), keep="\n\t"))


ELSEWHERE = "set COURSE_CACHE (model, databases) and COURSE_RUNS (runs) to folders that you can write to"
REASONS = {  # of an OSError: what it means here, and what to do
    errno.ENOSPC: "the disk is full: free some space and run again",
    errno.EROFS: f"its disk is read-only: {ELSEWHERE}",
    errno.EACCES: f"you may not write there: {ELSEWHERE}",
    errno.ENOTDIR: f"a file stands where its folder should be: remove it, or {ELSEWHERE}",
}
REASONS |= {errno.EPERM: REASONS[errno.EACCES], errno.EEXIST: REASONS[errno.ENOTDIR], getattr(errno, "EDQUOT", errno.ENOSPC): REASONS[errno.ENOSPC], errno.EISDIR: REASONS[errno.ENOTDIR]}


@contextmanager
def told(what: str):
    """Within a `with`, an OSError that says that a disk or folder won't take what is written becomes a CourseError: "{what} was not written: …"."""
    try:
        yield
    except OSError as error:
        if error.errno not in REASONS:
            raise
        raise CourseError(f"{what} was not written, {REASONS[error.errno]}.") from None


def make_folder(folder: Path) -> Path:
    """The folder, made if it isn't there."""
    if not folder.is_dir():
        with told(f"The folder {folder.name}"):
            folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, and its folder if need be, by one rename: a kill leaves the old text or the new, and of two writers one wins."""
    part = path.with_name(f"{path.name}.part-{secrets.token_hex(4)}")
    with told(path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(text, encoding="utf-8", newline="\n")  # the same bytes, and hashes, on Windows
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def alone(path: Path):
    """Within a `with`, no other process is in one for the same file: to read it, change it and write it whole. Waits for its turn."""
    from filelock import FileLock

    with told(path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        lock.acquire()
    try:
        for left in path.parent.glob(f"{path.name}.part-*"):  # of a killed writer or build, or of one whose files Windows still held
            with suppress(OSError):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
    finally:
        lock.release()


def sha256(path: Path) -> str:
    """A file's sha256 in hexadecimal, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def building(target: Path, need_bytes: int = 0):
    """Builds a file or folder under a lock, so that a kill leaves either the whole thing or nothing of that name.

    Yields a scratch path to write to, or None when `target` is there already (perhaps made by another process while
    this one waited); then nothing is written, so that a folder which is only read will do. The scratch path becomes
    `target` by one rename at the end; leftovers of a killed build are removed by the next one. Raises CourseError when the
    disk has less than `need_bytes` free, or won't be written to.
    """
    if target.exists():
        yield None
        return
    with alone(target):
        if target.exists():
            yield None
            return
        free = shutil.disk_usage(target.parent).free
        if free < need_bytes:
            raise CourseError(
                f"No space to make {target.name}: {free / 1e6:,.0f} MB free, {need_bytes / 1e6:,.0f} MB needed. "
                "Free some disk, or set COURSE_CACHE to a folder on a larger one."
            )
        with told(target.name), tempfile.TemporaryDirectory(prefix=f"{target.name}.part-", dir=target.parent, ignore_cleanup_errors=True) as folder:
            yield Path(folder) / target.name
            os.replace(Path(folder) / target.name, target)


@contextmanager
def replacing(target: Path, need_bytes: int = 0):
    """As `building`, for a file or folder that may be there already: it stands until the new one is whole. Yields a scratch path."""
    fresh = target.with_name(f"{target.name}.new")
    with told(fresh.name):
        _remove(fresh)  # of a run that was killed at its very end
    with building(fresh, need_bytes) as scratch:
        yield scratch
    with told(target.name):
        if target.is_dir():
            _remove(target)  # a folder can't be put in another's place
        os.replace(fresh, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
