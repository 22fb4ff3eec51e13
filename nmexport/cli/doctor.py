"""`nmexport doctor`: versions, devices, which targets work here, and how to fix the others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nmexport.cli.output import (
    console,
    emit_json,
    json_option,
    size,
    table,
    verbose_option,
    wants_json,
)
from nmexport.cli.verb import Verb

if TYPE_CHECKING:
    from nmexport.environment import Environment
    from nmexport.inspect.doctor import NativeLibrary


@click.command(
    "doctor", cls=Verb, short_help="Check what works on this machine, and how to fix the rest."
)
@json_option
@verbose_option
@click.pass_context
def doctor_command(ctx: click.Context) -> None:
    """Show versions, devices, and which targets work here.

    For each target that does not: what is missing, and the command that fixes it.
    """
    from nmexport.environment import probe
    from nmexport.inspect import doctor
    from nmexport.runtimes.rebuilding import compiler
    from nmexport.serving.openai import opening

    environment = probe()
    states = doctor.diagnose()
    library = doctor.native_library()
    free = shutil.disk_usage(Path.cwd()).free
    if wants_json(ctx):
        emit_json(
            {
                "environment": environment.as_dict(),
                "compiler": compiler(),
                "native_library": vars(library),
                "tritonserver": _tritonserver(),
                "openai_api": opening.is_installed(),
                "free_disk_bytes": free,
                "targets": [state.as_dict() for state in states],
            }
        )
        return
    out = console()
    rows = [
        *_machine(environment, free),
        ("C++ compiler", compiler() or "none"),
        ("native ops", _library_words(library)),
        ("tritonserver", _tritonserver() or "none: pip install --no-deps nvidia-pytriton==0.7.0"),
        ("OpenAI's API", _openai_words()),
        *environment.packages.items(),
    ]
    out.print(table(None, ("this machine", ""), rows, left=("",)))
    for state in states:
        out.print(f"target {state.target}: {'works' if state.works else 'does not work here'}")
        for missing in state.missing:
            verb = "needs" if missing.needed else "lacks, and works without,"
            out.print(f"  {verb} {missing.what}", soft_wrap=True, markup=False)
            out.print(f"    fix: {missing.fix}", soft_wrap=True, markup=False)


def _machine(environment: Environment, free: int) -> list[tuple[str, str]]:
    gpus = [
        f"{gpu.name}, {size(gpu.memory_bytes)}, compute capability {gpu.compute_capability}, "
        f"driver {gpu.driver}"
        for gpu in environment.gpus
    ]
    return [
        ("nmexport", environment.nmexport),
        ("Python", environment.python),
        ("system", environment.system),
        ("CPU", f"{environment.cpu}, {environment.cores} cores"),
        ("instructions", ", ".join(environment.isa) or "portable only"),
        ("memory", size(environment.memory_bytes)),
        ("free disk here", size(free)),
        ("GPU", "; ".join(gpus) or "none"),
    ]


def _library_words(library: NativeLibrary) -> str:
    if library.description is None:
        return "not built" if library.path is None else "cannot be loaded"
    return f"{library.path}, variant {library.description['variant']}"


def _openai_words() -> str:
    from nmexport.serving.openai import opening

    if opening.is_installed():
        return "served by `nmexport serve`"
    return f"not served: {opening.INSTALL}"


def _tritonserver() -> str | None:
    """Find the server that `nmexport serve` would start."""
    from nmexport.errors import EnvironmentFault
    from nmexport.serving.launch import find_server

    try:
        return str(find_server().server)
    except EnvironmentFault:
        return None
