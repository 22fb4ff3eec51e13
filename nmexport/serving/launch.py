"""A local tritonserver: which one, with which flags and models; start, wait, stop.

The server is found on PATH, where NVIDIA's containers have it, or in the `nvidia-pytriton` wheel.
The wheel's is Triton 24.10: its backend has to be laid out first, and its Python models need an
environment of their own, see `stub_environment`.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from nmexport.errors import ArtifactError, EnvironmentFault
from nmexport.runtimes.tensorrt import library as tensorrt_library
from nmexport.serving.addresses import Addresses
from nmexport.serving.openai.opening import ADDRESS_VARIABLE
from nmexport.serving.repository import PLUGINS, REPOSITORY, VERSION
from nmexport.serving.server_output import ServerOutput
from nmexport.serving.stopping import DRAIN_VARIABLE, UNLOAD_SECONDS
from nmexport.serving.stub_environment import python_environment
from nmexport.serving.triton_config import PLAN

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

_CONTAINER = Path("/opt/tritonserver/bin/tritonserver")
_WHEEL = "pytriton"
_WHEEL_LIBRARIES = "nvidia_pytriton.libs"
_POLL_SECONDS = 0.05
_STDERR = 2
_KILL_SECONDS = 15.0
_INSTALL = "pip install --no-deps nvidia-pytriton==0.7.0 (Triton 24.10 without a GPU)"


@dataclass(frozen=True, kw_only=True)
class Installation:
    """A tritonserver on this machine."""

    server: Path
    wheel: Path | None = None
    """The folder of the wheel's package; None for a server that is installed whole."""
    backends: Path | None = None
    """Folder of its backends; None takes its own, which a wheel's are laid out for."""

    @property
    def libraries(self) -> Path | None:
        """Shared libraries that the wheel brings; None where the system has them."""
        return self.wheel.parent / _WHEEL_LIBRARIES if self.wheel else None


def find_server(given: Path | None = None) -> Installation:
    """Find the server to start.

    Args:
        given: A tritonserver to take; None looks for one.

    Raises:
        EnvironmentFault: if there is none.
    """
    if given is not None:
        if not given.is_file():
            raise EnvironmentFault(f"There is no tritonserver {given}.")
        return Installation(server=given, wheel=_wheel_of(given))
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        return Installation(server=Path(on_path))
    if _CONTAINER.is_file():
        return Installation(server=_CONTAINER)
    wheel = importlib.util.find_spec(_WHEEL)
    for folder in (wheel.submodule_search_locations or ()) if wheel else ():
        server = Path(folder) / "tritonserver" / "bin" / "tritonserver"
        if server.is_file():
            return Installation(server=server, wheel=Path(folder))
    raise EnvironmentFault(
        "There is no tritonserver on this machine.",
        allowed="on PATH, in /opt/tritonserver (NVIDIA's containers), in the nvidia-pytriton wheel",
        fix=f"{_INSTALL}, or serve the package in a container: docker/compose.yaml",
    )


def _wheel_of(server: Path) -> Path | None:
    """Return the wheel's package that a server belongs to."""
    folder = server.parent.parent.parent
    return folder if (folder.parent / _WHEEL_LIBRARIES).is_dir() else None


def package_folder(given: Path) -> Path:
    """Find the package in a folder: a work directory, a package, or a copy of one.

    Raises:
        ArtifactError: if there is none.
    """
    for folder in (given / "package" / "current", given):
        if (folder / REPOSITORY).is_dir():
            return folder.resolve()
    raise ArtifactError(
        f"{given} holds no {REPOSITORY}.",
        allowed="a work directory whose package stage is complete, or a package",
        fix="run `nmexport package`",
    )


def plugins_of(package: Path) -> list[Path]:
    """List the TensorRT plugin libraries of a package."""
    return sorted((package / PLUGINS).glob("*.so"))


def models_of(repository: Path) -> dict[str, bool]:
    """List the models of a repository; the value says if one is a TensorRT plan."""
    return {
        path.parent.name: (path.parent / VERSION / PLAN).is_file()
        for path in sorted(repository.glob("*/config.pbtxt"))
    }


def why_no_plans(installation: Installation) -> str | None:
    """Say why a server cannot run TensorRT plans on this machine; None where it can."""
    root = installation.server.resolve().parent.parent
    if not (root / "backends" / "tensorrt").is_dir():
        return "this tritonserver has no TensorRT backend"
    return None if tensorrt_library.gpu_is_usable() else "no NVIDIA GPU with its driver is here"


def backend_folder(installation: Installation, scratch: Path) -> Path | None:
    """Lay out the backends of a wheel's server as it wants them; None where it knows its own.

    Raises:
        EnvironmentFault: if the wheel has no stub for this Python.
    """
    if installation.backends is not None or installation.wheel is None:
        return installation.backends
    root = installation.wheel / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        has = sorted(path.name for path in (root / "python_backend_stubs").glob("*"))
        raise EnvironmentFault(
            f"The wheel's tritonserver has no stub for Python {version}.",
            allowed=", ".join(has),
        )
    folder = scratch / "backends" / "python"
    folder.mkdir(parents=True)
    backend = root / "backends" / "python"
    for path in (
        backend / "libtriton_python.so",
        backend / "triton_python_backend_utils.py",
        stub,
    ):
        shutil.copy(path, folder / path.name)
    return folder.parent


def server_command(
    installation: Installation,
    repository: Path,
    addresses: Addresses,
    *,
    backends: Path | None,
    drain_seconds: int,
    plugins: Sequence[Path] = (),
    models: Sequence[str] = (),
) -> list[str]:
    """Build the command line of a server that shows nothing to the network unless asked."""
    flags = [
        f"--model-repository={repository}",
        "--disable-auto-complete-config",
        f"--http-address={addresses.host}",
        f"--grpc-address={addresses.host}",
        f"--metrics-address={addresses.host}",
        f"--http-port={addresses.http_port}",
        f"--grpc-port={addresses.grpc_port}",
        f"--metrics-port={addresses.metrics_port}",
        f"--exit-timeout-secs={drain_seconds + UNLOAD_SECONDS}",
    ]
    if backends is not None:
        flags.append(f"--backend-directory={backends}")
    if plugins:
        flags.append(f"--backend-config=tensorrt,plugins={';'.join(map(str, plugins))}")
    if models:
        flags += ["--model-control-mode=explicit", *(f"--load-model={name}" for name in models)]
    return [str(installation.server), *flags]


def server_environment(installation: Installation, python: Path) -> dict[str, str]:
    """Set the server's environment variables, by which it finds `python3` and libraries."""
    variables = dict(os.environ)
    variables["PATH"] = f"{python / 'bin'}{os.pathsep}{variables.get('PATH', '')}"
    libraries = [sysconfig.get_config_var("LIBDIR") or ""]
    if installation.libraries is not None:
        libraries.insert(0, str(installation.libraries))
    known = variables.get("LD_LIBRARY_PATH", "")
    variables["LD_LIBRARY_PATH"] = os.pathsep.join(path for path in (*libraries, known) if path)
    for name in ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV"):
        variables.pop(name, None)  # they name another environment than the one on PATH
    return variables


@dataclass(kw_only=True)
class Server:
    """A running tritonserver; leaving its `with` block stops it."""

    process: subprocess.Popen[bytes]
    output: ServerOutput
    addresses: Addresses
    drain_seconds: int
    _cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @classmethod
    def start(
        cls,
        repository: Path,
        *,
        addresses: Addresses | None = None,
        installation: Installation | None = None,
        env: Path | None = None,
        drain_seconds: int = 30,
        plugins: Sequence[Path] = (),
        models: Sequence[str] = (),
        output: Any = None,
    ) -> Self:
        """Start a server on a model repository.

        Args:
            repository: The folder of models.
            addresses: Where to listen.
            installation: Which server; None looks for one.
            env: Environment of the Python models; None takes this one, or makes one.
            drain_seconds: How long requests in flight may take once it is told to stop.
            plugins: TensorRT plugin libraries.
            models: Names of those to load; none loads all.
            output: File that takes what the server prints; None is this process's stderr.

        Raises:
            EnvironmentFault: if there is no server, no environment for it, or a port is taken.
        """
        where = addresses or Addresses()
        chosen = installation or find_server()
        where.require_free()
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nmexport-")))
            command = server_command(
                chosen,
                repository,
                where,
                backends=backend_folder(chosen, scratch),
                drain_seconds=drain_seconds,
                plugins=plugins,
                models=models,
            )
            python = python_environment(env, old_stub=chosen.wheel is not None)
            variables = server_environment(chosen, python)
            variables[DRAIN_VARIABLE] = str(drain_seconds)
            variables[ADDRESS_VARIABLE] = where.openai_listener
            logging.getLogger(__name__).info("%s", " ".join(command))
            process = subprocess.Popen(  # noqa: S603  the server that was looked up
                command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to pass on, once
            )
            if process.stdout is None:
                raise RuntimeError("a pipe was asked for")
            return cls(
                process=process,
                output=ServerOutput(process.stdout, _STDERR if output is None else output.fileno()),
                addresses=where,
                drain_seconds=drain_seconds,
                _cleanup=stack.pop_all(),
            )

    def wait_ready(self, timeout: float = 600.0) -> float:
        """Wait until every model is ready.

        Returns:
            Seconds that it took.

        Raises:
            EnvironmentFault: if the server ends, or is not ready in time.
        """
        began = time.monotonic()
        while True:
            self.check("before it was ready")
            if is_ready(self.addresses.http):
                return time.monotonic() - began
            if time.monotonic() - began > timeout:
                raise EnvironmentFault(
                    f"tritonserver is not ready after {timeout:g} s. "
                    f"It said last:\n{self.output.last_lines()}",
                    fix="give a large model longer (--ready-seconds)",
                )
            time.sleep(_POLL_SECONDS)

    def check(self, when: str = "by itself") -> None:
        """Raise if the server has ended.

        Raises:
            EnvironmentFault: with what it said last.
        """
        if self.process.poll() is None:
            return
        self.output.finish()
        raise EnvironmentFault(
            f"tritonserver ended with code {self.process.returncode} {when}. "
            f"It said last:\n{self.output.last_lines()}",
            fix="often a model cannot be loaded, or a port was taken meanwhile",
        )

    def stop(self) -> int:
        """Let requests in flight end, stop the server, and return its exit code."""
        try:
            if self.process.poll() is None:
                # To its models, too: Triton itself tells them nothing, see `stopping`.
                os.killpg(self.process.pid, signal.SIGTERM)
            return self.process.wait(self.drain_seconds + UNLOAD_SECONDS + _KILL_SECONDS)
        except subprocess.TimeoutExpired:
            logging.getLogger(__name__).warning("tritonserver does not stop; killing it")
            self.process.kill()
            return self.process.wait()
        finally:
            self.output.finish()
            self._cleanup.close()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop."""
        self.stop()


def is_ready(url: str) -> bool:
    """Tell whether a server answers, with all its models ready."""
    return _answers(f"{url}/v2/health/ready")


def serves_openai(url: str) -> bool:
    """Tell whether OpenAI's API is served at a base URL."""
    return _answers(f"{url}/models")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310  our own server
            return bool(answer.status == 200)  # noqa: PLR2004  HTTP's OK
    except (OSError, http.client.HTTPException):  # nobody, or somebody who speaks no HTTP
        return False
