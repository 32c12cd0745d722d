"""One writer for a directory of steps: a second one is refused, and one that was overtaken stops committing."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import weakref
from typing import Any

NAME = ".writer"


class WriterLock:
    """Held from the first save to `release`.

    On a local disk, and on network file systems with locks, the kernel holds it, so a killed writer's is free at once.
    Where there are no locks the file's content decides: who came last may write, and `check` tells
    the other.

    Raises:
      OSError: another process writes to the directory.
    """

    def __init__(self, directory: Any):
        self.path = directory / NAME
        me = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(),
        }
        self.mine = json.dumps(me | {"id": os.urandom(8).hex()})
        fd = _flock(os.fspath(self.path))
        self._close = None if fd is None else weakref.finalize(self, os.close, fd)
        self.path.write_text(self.mine)

    def check(self) -> None:
        """Raises OSError when another writer took over."""
        try:
            found = self.path.read_text()
        except OSError:
            found = None
        if found != self.mine:
            raise OSError(_message(self.path, found))

    def release(self) -> None:
        with contextlib.suppress(OSError):
            if self.path.read_text() == self.mine:
                self.path.unlink()
        if self._close is not None:
            self._close()


def _flock(path: str) -> int | None:
    """A descriptor that holds the lock; None where the file system has no locks."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.stat(path).st_ino == os.fstat(fd).st_ino:
                return fd
            os.close(fd)  # removed by its owner in between; try the new file
        except BlockingIOError:
            text = os.read(fd, 4096).decode(errors="replace")
            os.close(fd)
            raise OSError(_message(path, text)) from None
        except OSError:
            os.close(fd)
            return None


def _message(path: Any, text: str | None) -> str:
    try:
        owner = json.loads(text or "")
        who = f"process {owner['pid']} on {owner['host']} since {owner['since'][:19]} UTC"
    except (ValueError, KeyError):
        who = "another process"
    directory = os.path.dirname(os.fspath(path))
    return f"{who} writes checkpoints to {directory}; a directory has one writer: end that run or name another one"
