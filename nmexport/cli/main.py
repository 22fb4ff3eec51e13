"""The command `nmexport`: its verbs, loaded when used, and what every failure exits with."""

from __future__ import annotations

import errno
import importlib
import logging
import signal
import threading
import traceback
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from nmexport import __version__
from nmexport.choices import STAGE_NAMES
from nmexport.cli.output import emit_json, has_emitted, wants_json
from nmexport.errors import EnvironmentFault, ExitCode, NmexportError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import FrameType

VERBS: Mapping[str, str] = MappingProxyType(
    {
        "build": "nmexport.cli.build",
        "calibrate": "nmexport.cli.stage",
        "fold": "nmexport.cli.stage",
        "export": "nmexport.cli.stage",
        "engine": "nmexport.cli.stage",
        "verify": "nmexport.cli.stage",
        "package": "nmexport.cli.stage",
        "gate": "nmexport.cli.gate",
        "bench": "nmexport.cli.bench",
        "sweep": "nmexport.cli.sweep",
        "evaluate": "nmexport.cli.evaluate",
        "generate": "nmexport.cli.generate",
        "serve": "nmexport.cli.serve",
        "client": "nmexport.cli.client",
        "inspect": "nmexport.cli.inspect",
        "diff": "nmexport.cli.diff",
        "estimate": "nmexport.cli.estimate",
        "recipes": "nmexport.cli.recipes",
        "doctor": "nmexport.cli.doctor",
    }
)
"""Module of each verb, in the order of `--help`; a module has a command of the verb's name."""

# \b keeps click from joining the lines of a paragraph.
_HELP = """Turn a Hugging Face LLM into an N:M activation-sparse engine, with proof.

\b
nmexport build --model smollm2 --pattern 8:16    everything, resumable
nmexport doctor                                  what works on this machine

Exit codes: 0 ok, 1 your input or this machine (one message says what to do), 2 usage,
3 a gate failed, 70 a bug, 130 interrupted.
"""

_RESUMABLE = frozenset({"build", *STAGE_NAMES, "sweep"})
"""Verbs that go on where they stopped."""
_REFUSALS = frozenset(
    {
        *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS),
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EIO),
    }
)
"""Errors of the system that a user can mend: a path or a disk that cannot be used."""
_SHOWN_CHARACTERS = 200  # of a path
_REPORT_TO = "This is a bug in nmexport. Please report it with the text above and the command line."


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C: partial folders are removed on the way out."""


class VerbGroup(click.Group):
    """Loads a verb's module when the verb is used; ends every failure in one place."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the verbs, in order."""
        del ctx
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a verb."""
        del ctx
        module = VERBS.get(cmd_name)
        if module is None:
            return None
        command: click.Command = getattr(importlib.import_module(module), f"{cmd_name}_command")
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; exits with the code of what went wrong."""
        # Parsing takes the words away, and may fail before it has read them all.
        words = [*ctx._protected_args, *ctx.args]  # noqa: SLF001  click's public name warns
        try:
            with _sigterm_interrupts():
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except click.ClickException as error:
            if "--json" in words and not has_emitted(ctx):
                _emit_error(error, error.format_message(), code=error.exit_code)
            raise
        except KeyboardInterrupt as interrupt:
            ctx.exit(_say_interrupted(ctx, interrupt, words))
        except Exception as error:  # noqa: BLE001  the last place before the shell
            ctx.exit(_say_error(ctx, error))


def _say_interrupted(
    ctx: click.Context, interrupt: KeyboardInterrupt, words: list[str]
) -> ExitCode:
    """Say that the verb was interrupted, and what that means for its work."""
    by = "terminated" if isinstance(interrupt, Terminated) else "interrupted"
    fix = "the same command goes on from here" if words and words[0] in _RESUMABLE else None
    click.echo(f"nmexport: {by}" + (f"; {fix}" if fix else ""), err=True)
    if wants_json(ctx) and not has_emitted(ctx):
        _emit_error(interrupt, by, fix=fix, code=ExitCode.INTERRUPTED)
    return ExitCode.INTERRUPTED


def _say_error(ctx: click.Context, error: Exception) -> ExitCode:
    """Say what went wrong, on stderr, and as JSON on stdout where JSON was asked for."""
    error = _machines_fault(error) or error
    code = error.exit_code if isinstance(error, NmexportError) else ExitCode.INTERNAL
    if code is ExitCode.INTERNAL:
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
        click.echo(_REPORT_TO, err=True)
    else:
        click.echo(f"nmexport: {error}", err=True)
        logging.getLogger(__name__).debug("what raised it", exc_info=error)
    if wants_json(ctx) and not has_emitted(ctx):
        if isinstance(error, UserError):
            _emit_error(error, error.problem, allowed=error.allowed, fix=error.fix, code=code)
        else:
            _emit_error(error, str(error), code=code)
    return code


def _machines_fault(error: Exception) -> UserError | None:
    """Turn a system error into the user's error; None where it is our bug."""
    if not isinstance(error, OSError) or error.errno not in _REFUSALS:
        return None
    named = f"{str(error.filename)[:_SHOWN_CHARACTERS]} cannot be used: " if error.filename else ""
    fault = EnvironmentFault(
        f"{named}{error.strerror}.", fix="name another path, or change what stands in the way"
    )
    fault.__cause__ = error
    return fault


def _emit_error(
    error: BaseException,
    problem: str,
    *,
    allowed: str | None = None,
    fix: str | None = None,
    code: int,
) -> None:
    fields = {"type": type(error).__name__, "problem": problem, "allowed": allowed, "fix": fix}
    emit_json({"error": fields, "exit_code": int(code)})


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM unwind like Ctrl-C instead of killing mid-write."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@click.group(cls=VerbGroup, help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nmexport")
def cli() -> None:
    """Group the verbs; each is a module of its own."""
