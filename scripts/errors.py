"""The errors that end a command, and the exit code that each means.

handler.errors.ServingError  1
├── ArchiveError             1  an archive or a pipeline cannot be used (of handler.errors)
├── ConfigError              1  a configuration is wrong (of handler.errors)
├── RegistryError            1  a registry refuses, is not reached, or answers wrongly
├── ServerError              1  TorchServe cannot be started, asked or stopped
└── UsageError               2  the command was called wrongly
"""

from __future__ import annotations

from handler.errors import ServingError

__all__ = ["RegistryError", "ServerError", "UsageError"]


class RegistryError(ServingError):
    """A registry refuses, is not reached, or answers what it should not.

    `status` is that of its reply, 0 where it is not about one.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ServerError(ServingError):
    """The server cannot be started, asked or stopped; the message says what to do.

    `log` holds the lines of the server's log that say why; they are shown below the message.
    """

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(f"{message}:\n{log}" if log else message)
        self.message = message
        self.log = log


class UsageError(ServingError):
    """The command was called wrongly; the message says how to call it."""
