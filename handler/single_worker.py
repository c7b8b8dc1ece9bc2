"""Keeps a model's second worker process from starting while the first one lives.

With ``continuousBatching: true`` two workers of a model hang TorchServe: the idle one holds the
lock of the queue, and the requests of the busy one never come again. Its configuration cannot
rule the second one out: `PUT /models/NAME?min_worker=2` starts it whatever that says.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from handler.errors import ConfigError

__all__ = ["hold_model"]

# A worker that TorchServe has killed and replaces may take a moment to be gone.
_PATIENCE_S = 5.0
_POLL_S = 0.1
# Directories that this process holds, by device and inode; released by the system at its end.
_held: dict[tuple[int, int], int] = {}


def hold_model(model_dir: Path, patience_s: float = _PATIENCE_S) -> None:
    """Take the model for this process until it ends; a second call in one process does nothing.

    Args:
        model_dir: where TorchServe unpacked this model for all its workers.
        patience_s: how long to wait for another process to end.

    Raises:
        ConfigError: another process serves this model.
    """
    if sys.platform == "win32":
        return
    import fcntl

    # An archive that is a folder is linked, and several servers may serve it: the link's own
    # directory belongs to this one alone.
    directory = model_dir.parent if model_dir.is_symlink() else model_dir
    descriptor = os.open(directory, os.O_RDONLY)
    status = os.fstat(descriptor)
    key = (status.st_dev, status.st_ino)
    if key in _held:
        os.close(descriptor)
        return
    until_s = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until_s:
                os.close(descriptor)
                raise ConfigError(
                    "another worker serves it, and a second one would hang both; the first goes "
                    "on. With continuousBatching: true a model has one worker: set min_worker and "
                    "max_worker back to 1"
                ) from None
            time.sleep(_POLL_S)
        else:
            _held[key] = descriptor
            return
