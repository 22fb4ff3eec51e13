"""Get ONNX Runtime's C headers from Debian 13 with apt, into a private folder, without root.

Debian 12 has no package of them. The machine's own apt sources are copied with the suite
replaced, so mirrors, keys and proxies are the ones already trusted; nothing is installed.

Usage: python fetch_headers.py FOLDER      prints the folder that holds onnxruntime_c_api.h
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

SUITE = "trixie"
PACKAGE = "libonnxruntime-dev"
HEADER = "onnxruntime_c_api.h"
_INSIDE = Path("usr/include/onnxruntime")
_TIMEOUT_S = 300


class FetchError(Exception):
    """The headers cannot be had this way; the message says why."""


def fetch(folder: Path) -> Path:
    """Download and unpack the headers once.

    Args:
        folder: Where to keep them; made if missing.

    Returns:
        The folder that holds `onnxruntime_c_api.h`.

    Raises:
        FetchError: if this is no Debian machine, or apt fails.
    """
    include = folder / _INSIDE
    if (include / HEADER).is_file():
        return include
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise FetchError(f"{tool} is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    apt = _private_apt(folder.resolve())
    _run([*apt, "update"], folder)
    _run([*apt, "download", PACKAGE], folder)
    packages = sorted(folder.glob(f"{PACKAGE}_*.deb"))
    if not packages:
        raise FetchError(f"apt-get downloaded no {PACKAGE}")
    _run(["dpkg", "-x", str(packages[-1].resolve()), str(folder.resolve())], folder)
    if not (include / HEADER).is_file():
        raise FetchError(f"{packages[-1].name} holds no {_INSIDE / HEADER}")
    return include


def _private_apt(folder: Path) -> list[str]:
    """An apt-get that reads and writes nothing of the system but its sources' keys."""
    for part in ("sources", "lists/partial", "cache/archives/partial"):
        (folder / "apt" / part).mkdir(parents=True, exist_ok=True)
    copied = [_copy_source(path, folder / "apt/sources") for path in _system_sources()]
    if not any(copied):
        raise FetchError("no Debian source among /etc/apt/sources.list and sources.list.d")
    options = {
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": folder / "apt/sources",
        "Dir::State::Lists": folder / "apt/lists",
        "Dir::Cache": folder / "apt/cache",
        "APT::Sandbox::User": "",
    }
    return ["apt-get", "-q", *(f"-o{key}={value}" for key, value in options.items())]


def _system_sources() -> list[Path]:
    folder = Path("/etc/apt/sources.list.d")
    paths = [Path("/etc/apt/sources.list"), *sorted(folder.glob("*.list"))]
    return [path for path in [*paths, *sorted(folder.glob("*.sources"))] if path.is_file()]


def _copy_source(path: Path, folder: Path) -> bool:
    """Copy one source file with the suite replaced; False where it is none of Debian's."""
    codename = _codename()
    text = path.read_text(encoding="utf-8")
    if not re.search(rf"\b{codename}\b", text) or "debian" not in text:
        return False
    replaced = re.sub(rf"\b{codename}\b", SUITE, text)
    (folder / path.name).write_text(replaced, encoding="utf-8")
    return True


def _codename() -> str:
    release = Path("/etc/os-release")
    fields = dict(
        line.split("=", 1)
        for line in (release.read_text(encoding="utf-8") if release.is_file() else "").splitlines()
        if "=" in line
    )
    if fields.get("ID", "").strip('"') != "debian":
        raise FetchError("this is no Debian machine")
    return fields.get("VERSION_CODENAME", "").strip('"') or SUITE


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FetchError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise FetchError(f"{command[0]} failed: {' '.join(last)}")


def main() -> int:
    """Fetch into the folder named on the command line."""
    if len(sys.argv) != 2:  # noqa: PLR2004
        sys.stderr.write(f"{__doc__}\n")
        return 2
    try:
        sys.stdout.write(f"{fetch(Path(sys.argv[1]))}\n")
    except (FetchError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
