"""A file of lines that grows by whole ones, belongs to one process, and survives its death."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

MAX_LINE_BYTES = 1 << 30
"""A file whose first gigabyte has no end of line is none of ours; more is never read at once."""


class Journal:
    """Lines that are there, and the end at which lines are added."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Takes a file that is open for reading and writing and locked; see `open_journal`."""
        self.path = path
        self._descriptor = descriptor
        self._num_bytes = os.fstat(descriptor).st_size

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._num_bytes

    def lines(self) -> Iterator[bytes]:
        """All lines from the first one on; the last one has no newline where it was torn.

        Raises:
            OSError: the file cannot be read, or a line has more than `MAX_LINE_BYTES`.
        """
        with self._read_afresh() as file:
            while line := file.readline(MAX_LINE_BYTES):
                if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    raise OSError(errno.EFBIG, "a line is too long to be ours", str(self.path))
                yield line

    @contextmanager
    def _read_afresh(self) -> Iterator[BufferedReader]:
        with self._naming_the_file(), open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            yield file

    def cut(self, num_bytes: int) -> None:
        """Drops everything behind the first bytes; lines are added there.

        Raises:
            OSError: the file cannot be written.
        """
        with self._naming_the_file():
            os.ftruncate(self._descriptor, num_bytes)
            os.lseek(self._descriptor, num_bytes, os.SEEK_SET)
        self._num_bytes = num_bytes

    def append(self, line: bytes) -> None:
        """Adds a line and hands it to the system, so that it outlives this process.

        Raises:
            OSError: it does not fit, or the file cannot be written; the file ends before the line.
        """
        rest = memoryview(line)
        try:
            with self._naming_the_file():
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            self.cut(self._num_bytes)
            raise
        self._num_bytes += len(line)

    def sync(self) -> None:
        """Waits until all lines are on the disk.

        Raises:
            OSError: they cannot be written.
        """
        with self._naming_the_file():
            os.fsync(self._descriptor)

    def remove(self) -> None:
        """Deletes the file; the lock is kept until it is closed."""
        self.path.unlink()

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Calls on descriptors fail without saying which file it was."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Opens or makes the file, for this process alone.

    Raises:
        OSError: it cannot be opened for writing.
        ValueError: it is no regular file, or another process has it.
    """
    descriptor = _open_locked(path)
    try:
        yield Journal(path, descriptor)
    finally:
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    while True:
        # Without waiting: a pipe would wait for someone at its other end.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
        try:
            _lock(path, descriptor)
            # Whoever had the lock before may have finished and removed the file.
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(descriptor)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(path: Path, descriptor: int) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise ValueError(f"output: {path} is not a regular file")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"output: {path} is being written by another process") from None
