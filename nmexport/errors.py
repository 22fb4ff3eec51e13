"""All errors of the package, by who can fix them.

NmexportError
├── UserError               exit 1: one message, no traceback
│   ├── RecipeError         a recipe or an option has a wrong key, type or value
│   ├── PatternError        an N:M pattern is malformed or does not fit a layer
│   ├── TargetError         an include/exclude pattern selects nothing
│   ├── ModelError          a model cannot be found, read, or supported
│   ├── CorpusError         calibration or evaluation text is missing, empty or too short
│   ├── WorkDirectoryError  a work directory is locked, unwritable, full, or not ours
│   ├── ArtifactError       an artifact is missing, corrupt or of another schema
│   ├── EnvironmentFault    something this machine lacks: a library, a compiler, a device
│   └── RequestError        a request to the server is malformed, or over one of its limits
│       └── ServerBusyError the server takes no request now; the same one may be sent again
├── GateFailed              exit 3: everything ran, a threshold did not hold
└── InternalError           exit 70: a bug of ours: traceback, and where to report it
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit codes of the command line (2 is click's own usage error)."""

    OK = 0
    USER = 1
    GATE = 3
    INTERNAL = 70
    INTERRUPTED = 130


class NmexportError(Exception):
    """Root of everything this package raises on purpose."""

    exit_code: ExitCode = ExitCode.INTERNAL


class UserError(NmexportError):
    """The user's or the environment's fault.

    The message ends the search: what was given, what is allowed, what to do next.
    """

    exit_code = ExitCode.USER

    def __init__(self, problem: str, *, allowed: str | None = None, fix: str | None = None) -> None:
        """Join the three parts into one message.

        Args:
            problem: What was given and what is wrong with it.
            allowed: What would have been accepted.
            fix: What to do next, ideally a command.
        """
        self.problem = problem
        self.allowed = allowed
        self.fix = fix
        parts = [problem]
        if allowed:
            parts.append(f"Allowed: {allowed}")
        if fix:
            parts.append(f"Next: {fix}")
        super().__init__("\n".join(parts))


class RecipeError(UserError):
    """A recipe or an option has a wrong key, type or value."""


class PatternError(UserError):
    """An N:M pattern is malformed or does not fit a layer."""


class TargetError(UserError):
    """An include or exclude pattern selects nothing."""


class ModelError(UserError):
    """A model cannot be found, read, or supported."""


class CorpusError(UserError):
    """Calibration or evaluation text is missing, empty or too short."""


class WorkDirectoryError(UserError):
    """A work directory is locked, unwritable, full, or not ours."""


class ArtifactError(UserError):
    """An artifact is missing, corrupt or of another schema."""


class EnvironmentFault(UserError):
    """Something this machine lacks: a library, a compiler, a device."""


class RequestError(UserError):
    """A request to the server is malformed, or over one of its limits."""


class ServerBusyError(RequestError):
    """The server takes no request now; the same one may be sent again."""


class GateFailed(NmexportError):
    """Everything ran; a threshold did not hold."""

    exit_code = ExitCode.GATE


class InternalError(NmexportError):
    """A bug of ours."""
