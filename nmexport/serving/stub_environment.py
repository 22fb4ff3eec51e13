"""Makes the environment that a server's Python models run in.

The `nvidia-pytriton` wheel's stub corrupts tensors of NumPy 2, so that it gets an environment of
its own: this one, with NumPy 1 in front.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from nmexport.errors import EnvironmentFault

if TYPE_CHECKING:
    from collections.abc import Sequence

NUMPY_1 = "numpy==1.26.4"


def python_environment(given: Path | None = None, *, old_stub: bool) -> Path:
    """Choose the environment whose `python3` the server's Python models run in.

    Args:
        given: A virtual environment to take; None takes this one where it fits.
        old_stub: The server's stub was built before NumPy 2.

    Returns:
        A folder with `bin/python3`.

    Raises:
        EnvironmentFault: if there is none, or one has to be made and cannot be.
    """
    if given is not None:
        if not (given / "bin" / "python3").exists():
            raise EnvironmentFault(f"{given} is no environment: it has no bin/python3.")
        return given
    import numpy as np

    if not old_stub or np.lib.NumpyVersion(np.__version__) < "2.0.0":
        return Path(sys.prefix)
    return _with_numpy_1()


def _with_numpy_1() -> Path:
    """Make this environment with NumPy 1 in front of its own, once; it is kept in the cache.

    Raises:
        EnvironmentFault: if NumPy 1 cannot be installed.
    """
    from filelock import FileLock

    seen = [path for path in sys.path if path and Path(path).is_dir()]
    identity = "\n".join([sys.version, sys.prefix, NUMPY_1, *seen])
    name = f"triton-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nmexport"
    folder, done = root / name, root / name / "complete"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{name}.lock"):
        if not done.is_file():
            logging.getLogger(__name__).warning(
                "making %s for this Triton's Python stub: %s in front of this environment",
                folder,
                NUMPY_1,
            )
            shutil.rmtree(folder, ignore_errors=True)
            make_environment(folder, seen, packages=(NUMPY_1,))
            done.touch()
    return folder


def make_environment(folder: Path, seen: Sequence[str], *, packages: Sequence[str]) -> None:
    """Make a virtual environment with packages of its own that also sees other folders.

    Raises:
        EnvironmentFault: if the packages cannot be installed.
    """
    import venv

    venv.create(folder, with_pip=False, symlinks=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if packages:
        done = subprocess.run(  # noqa: S603  fixed words
            [*command, "--no-deps", "--target", str(own), *packages],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise EnvironmentFault(
                f"{', '.join(packages)} cannot be installed for this Triton's Python stub: "
                f"{done.stderr.strip()}",
                fix="make a virtual environment with nmexport, onnxruntime, tokenizers, jinja2, "
                "psutil and NumPy 1, and name it with --env",
            )
    # A .pth line is how Python is told at its start; it appends, so that what is installed wins.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in seen]
    (own / "nmexport_parent.pth").write_text("".join(lines), encoding="utf-8")
