"""Where what verification runs beside the engine runs: on the engine's GPU, where it can."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nmexport.errors import UserError
from nmexport.models.offload import free_memory
from nmexport.runtimes.onnxruntime_session import provider_here
from nmexport.verification.memory import artifact_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from nmexport.progress import Progress
    from nmexport.runtimes.engine import Engine, Provider
    from nmexport.runtimes.onnxruntime_session import OrtSession

# Torch, function bodies and engine hold the weights once each, and widen them one by one.
_COPIES = 3.5


def parity_device(engine: Engine) -> Provider:
    """Where torch and function bodies run: the engine's GPU, where torch too finds room there."""
    import torch

    if provider_here(engine.provider) != "cuda" or not torch.cuda.is_available():
        return "cpu"
    needed = _COPIES * artifact_bytes(engine.model.parent)
    return "cuda" if needed <= free_memory().devices[0] else "cpu"


def open_where_it_runs(
    open_on: Callable[[Provider], OrtSession], provider: Provider, progress: Progress
) -> OrtSession:
    """Open an exported graph on a device, or on the CPU where the device's runtime refuses it.

    Args:
        open_on: Opens it.
        provider: Where it is to run.
        progress: Told why it does not.

    Raises:
        UserError: if the CPU refuses it too.
    """
    try:
        return open_on(provider)
    except UserError as error:
        if provider == "cpu":
            raise
        progress.note(f"on the CPU in place of the GPU: {error.problem.splitlines()[0]}")
        return open_on("cpu")
