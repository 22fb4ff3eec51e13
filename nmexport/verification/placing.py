"""Chooses where verification runs torch and function bodies: the engine's GPU, or the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nmexport.errors import ArtifactError, UserError
from nmexport.models.offload import free_memory
from nmexport.runtimes.onnxruntime_opening import provider_here
from nmexport.verification.memory import artifact_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from nmexport.progress import Progress
    from nmexport.runtimes.engine import Engine, Provider
    from nmexport.runtimes.onnxruntime_session import OrtSession

# Torch, function bodies and engine hold the weights once each, and widen them one by one.
_COPIES = 3.5


def parity_device(engine: Engine) -> Provider:
    """Choose the device of torch and function bodies: the engine's GPU if torch fits there."""
    import torch

    if provider_here(engine.provider) != "cuda" or not torch.cuda.is_available():
        return "cpu"
    needed = _COPIES * artifact_bytes(engine.model.parent)
    return "cuda" if needed <= free_memory().devices[0] else "cpu"


def open_where_it_runs(
    open_on: Callable[[Provider], OrtSession], provider: Provider, progress: Progress
) -> OrtSession:
    """Open an exported graph on a device, or on the CPU where it does not open or run there.

    Args:
        open_on: Opens it.
        provider: Where it is to run.
        progress: Told why it does not.

    Raises:
        UserError: if the CPU refuses it too.
    """
    try:
        return check_session(open_on(provider), provider)
    except UserError as error:
        if provider == "cpu":
            raise
        progress.note(f"on the CPU in place of the GPU: {error.problem.splitlines()[0]}")
        return open_on("cpu")


def check_session(session: OrtSession, provider: Provider) -> OrtSession:
    """Return the session if it can compute two tokens; a CPU is not asked.

    A runtime may have a kernel for a GPU and no code of it for this one.

    Raises:
        ArtifactError: if it does not compute; it is closed then.
    """
    if provider == "cpu":
        return session
    try:
        session.prefill(np.zeros((1, 2), np.int64))
    except Exception as error:  # the binding raises its own classes, outside any public module
        session.close()
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ArtifactError(
            f"The model opens on the GPU and does not run there: {reason}"
        ) from error
    return session
