"""Build the TensorRT plugin, or its unit tests, with what is here or what the package index has.

TensorRT's headers come from TENSORRT_ROOT, from the system, or from a small package that carries
them; nvcc and CUDA's headers from CUDA_HOME, PATH, /usr/local, or NVIDIA's packages. What is
fetched stays under `build/plugin`; nothing is installed.

Usage: python plugins/tensorrt/build.py [--architectures "80;89"] [--tests | --nvcc]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "plugins" / "tensorrt"
TOOLS = ROOT / "build" / "plugin"
DESTINATION = ROOT / "nmexport" / "_native"
LIBRARY = "libnmexport_tensorrt.so"
# Compute capabilities of every GPU that the kernels know; the last also as PTX, for later ones.
ARCHITECTURES = "75-real;80-real;86-real;89-real;90-real;100-real;120"

_TENSORRT_HEADER = "NvInferRuntime.h"
_SYSTEM_HEADERS = (
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/include",
    "/usr/local/tensorrt/include",
)
# Carries NVIDIA's 10.14 headers; nothing else of it is used.
_HEADER_PACKAGE = "kernel-lens==2.0.1"
_HEADER_FOLDER = "kernel_lens/include/tensorrt"
_CUDA_PACKAGES = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-culibos==13.0.85",
)
_CUDA_FOLDER = "nvidia/cu13"
_TIMEOUT_S = 3600
_STEP = re.compile(r"\[ *\d+(/\d+|%)\] ")  # as Ninja and Make count


class BuildError(Exception):
    """The plugin cannot be built here; the message says why and what would mend it."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: `bin/nvcc`, `include`, `lib`."""

    root: Path

    @property
    def nvcc(self) -> Path:
        """The compiler."""
        return self.root / "bin" / "nvcc"

    @property
    def include(self) -> Path:
        """Folder of cuda_runtime_api.h."""
        return self.root / "include"


def find_headers(*, fetch: bool = True) -> Path:
    """Folder of TensorRT's headers.

    Raises:
        BuildError: if they are nowhere to be had.
    """
    named = os.environ.get("TENSORRT_ROOT")
    if named:
        for folder in (Path(named) / "include", Path(named)):
            if (folder / _TENSORRT_HEADER).is_file():
                return folder
        raise BuildError(f"TENSORRT_ROOT={named} holds no include/{_TENSORRT_HEADER}")
    for name in _SYSTEM_HEADERS:
        if (Path(name) / _TENSORRT_HEADER).is_file():
            return Path(name)
    headers = TOOLS / "headers" / _HEADER_FOLDER
    if not (headers / _TENSORRT_HEADER).is_file():
        if not fetch:
            raise BuildError("no TensorRT headers are installed")
        _fetch_headers()
    return headers


def find_toolkit(*, fetch: bool = True) -> Toolkit:
    """The CUDA toolkit.

    Raises:
        BuildError: if there is none and none can be had.
    """
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates += [str(path) for path in sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.insert(0, str(Path(on_path).resolve().parents[1]))
    candidates.append(str(TOOLS / "cuda" / _CUDA_FOLDER))
    for name in filter(None, candidates):
        toolkit = Toolkit(Path(name))
        if toolkit.nvcc.is_file() and (toolkit.include / "cuda_runtime_api.h").is_file():
            return toolkit
    if not fetch:
        raise BuildError("no CUDA toolkit is installed")
    _pip("install", "--no-deps", "--target", str(TOOLS / "cuda"), *_CUDA_PACKAGES)
    return find_toolkit(fetch=False)


def build_library(
    destination: Path,
    *,
    architectures: str = ARCHITECTURES,
    jobs: int | None = None,
    folder: Path = TOOLS / "library",
    strict: bool = False,
) -> Path:
    """Build the plugin and install it with the library that helps TensorRT-RTX's parser.

    What the compilers said, registers and spills of every kernel among it, is in `build.log` of
    the build's folder.

    Args:
        destination: Where to install.
        architectures: Compute capabilities, as CMake names them.
        jobs: Compilers at a time; all processors where None.
        folder: Where to build; what an earlier build left there is used again.
        strict: Fail on a compiler warning; for our own tests.

    Raises:
        BuildError: if a tool or the headers are missing, or the build fails.
    """
    headers, toolkit = find_headers(), find_toolkit()
    _configure(
        folder,
        f"-DTENSORRT_INCLUDE_DIR={headers}",
        f"-DCMAKE_CUDA_COMPILER={toolkit.nvcc}",
        f"-DCUDAToolkit_ROOT={toolkit.root}",
        f"-DCUDA_INCLUDE_DIR={toolkit.include}",
        f"-DNMEXPORT_CUDA_ARCHITECTURES={architectures}",
        f"-DNMEXPORT_WARNINGS_AS_ERRORS={'ON' if strict else 'OFF'}",
    )
    parallel = str(jobs or os.cpu_count() or 1)
    log = _run_shown([_cmake(), "--build", str(folder), "--parallel", parallel])
    (folder / "build.log").write_text(log, encoding="utf-8")
    _run([_cmake(), "--install", str(folder), "--prefix", str(destination)])
    return destination / LIBRARY


def build_tests(folder: Path) -> Path:
    """Build the unit tests in Debug under the sanitizers; no nvcc and no GPU is needed.

    Raises:
        BuildError: if the headers are missing, or the build fails.
    """
    _configure(
        folder,
        f"-DTENSORRT_INCLUDE_DIR={find_headers()}",
        f"-DCUDA_INCLUDE_DIR={find_toolkit().include}",
        "-DNMEXPORT_PLUGIN_TESTS_ONLY=ON",
        "-DNMEXPORT_SANITIZE=ON",
        "-DNMEXPORT_WARNINGS_AS_ERRORS=ON",
        build_type="Debug",
    )
    _run([_cmake(), "--build", str(folder), "--target", "test_plugin", "--parallel", "2"])
    return folder / "test_plugin"


def build_recording_plugin(folder: Path) -> Path:
    """Build the plugin on kernels that only take notes, and the library beside it.

    TensorRT's builder takes it for the real one; no nvcc and no GPU is needed.

    Raises:
        BuildError: if the headers are missing, or the build fails.
    """
    _configure(
        folder,
        f"-DTENSORRT_INCLUDE_DIR={find_headers()}",
        f"-DCUDA_INCLUDE_DIR={find_toolkit().include}",
        "-DNMEXPORT_PLUGIN_TESTS_ONLY=ON",
    )
    targets = ["recording_plugin", "nmexport_rtx_name"]
    _run([_cmake(), "--build", str(folder), "--parallel", "2", "--target", *targets])
    shutil.copy(folder / "libnmexport_rtx_name.so", folder / "recording")
    return folder / "recording" / LIBRARY


def find_tool(name: str) -> str | None:
    """Path of a program: on PATH, or beside this Python."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _configure(folder: Path, *options: str, build_type: str = "Release") -> None:
    ninja = find_tool("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    _run(
        [
            _cmake(),
            "-S",
            str(SOURCE),
            "-B",
            str(folder),
            *generator,
            f"-DCMAKE_BUILD_TYPE={build_type}",
            f"-DNMEXPORT_VERSION={version['project']['version']}",
            *options,
        ]
    )


def _cmake() -> str:
    cmake = find_tool("cmake")
    if cmake is None:
        raise BuildError("cmake not found; install it (pip install cmake ninja)")
    return cmake


def _fetch_headers() -> None:
    folder = TOOLS / "headers"
    folder.mkdir(parents=True, exist_ok=True)
    _pip("download", "--no-deps", "--dest", str(folder), _HEADER_PACKAGE)
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise BuildError(f"pip downloaded no {_HEADER_PACKAGE}")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        wheel.extractall(
            folder, [name for name in wheel.namelist() if name.startswith(_HEADER_FOLDER)]
        )


def _pip(*arguments: str) -> None:
    try:
        _run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments])
    except BuildError as error:
        raise BuildError(
            f"{error}\nInstall CUDA and TensorRT's headers, or name them with CUDA_HOME and "
            "TENSORRT_ROOT."
        ) from error


def _run(command: list[str]) -> str:
    """What the command printed."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    return _checked(command, done.returncode, done.stdout + done.stderr)


def _run_shown(command: list[str]) -> str:
    """Like `_run`, for what takes minutes: the steps are counted on stderr."""
    lines = []
    try:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            for line in process.stdout or ():
                lines.append(line)
                if _STEP.match(line):
                    sys.stderr.write(line)
                    sys.stderr.flush()
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    return _checked(command, process.returncode, "".join(lines))


def _checked(command: list[str], code: int, told: str) -> str:
    if code != 0:
        lines = told.strip().splitlines()
        faults = [line for line in lines if "rror" in line] or lines
        raise BuildError("`" + " ".join(command) + "` failed:\n" + "\n".join(faults[-15:]))
    return told


def main() -> int:
    """Build what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", default=ARCHITECTURES, help="as CMake names them")
    parser.add_argument("--destination", type=Path, default=DESTINATION)
    parser.add_argument("--jobs", type=int, default=None)
    parser.add_argument("--tests", action="store_true", help="build and run the unit tests")
    parser.add_argument("--nvcc", action="store_true", help="print where the compiler is")
    options = parser.parse_args()
    try:
        if options.nvcc:
            sys.stdout.write(f"{find_toolkit().nvcc}\n")
            return 0
        if options.tests:
            program = build_tests(TOOLS / "tests")
            return subprocess.run([program], check=False).returncode
        library = build_library(
            options.destination, architectures=options.architectures, jobs=options.jobs
        )
    except (BuildError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{library}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
