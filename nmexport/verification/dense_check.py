"""Compares the exported dense model with the dense model in torch, linear by linear.

A dense model has no near ties: nothing is selected, so rounding moves its values by rounding and
by no more. A difference beyond that means that the file computes something else, and no figure
that is measured against it says anything. Torch computes in float32, with weights rounded to the
exported type; each linear's output is compared in graph order, so the first that differs says where
to look.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nmexport.environment import return_device_memory
from nmexport.errors import ModelError
from nmexport.graph.cpu import is_bfloat16
from nmexport.models.layerwise import LayerwiseModel
from nmexport.models.loader import load_model
from nmexport.models.offload import whole_device
from nmexport.report.model import DenseParity
from nmexport.runtimes import native
from nmexport.runtimes.onnxruntime_opening import (
    EXTERNAL_DATA_FOLDER,
    SESSION_CONFIG,
    choose_provider,
)
from nmexport.runtimes.onnxruntime_session import OrtSession
from nmexport.verification.instrument import add_layer_outputs, read_graph, sparse_linears
from nmexport.verification.placing import open_where_it_runs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from nmexport.choices import Offload
    from nmexport.models.source import ModelSource
    from nmexport.progress import Progress
    from nmexport.runtimes.engine import Provider

    Outputs = dict[str, NDArray[np.float32]]

_TOKENS = 24
_DECODED = 2
LOGITS = "logits"
_CACHED = "logits of decode on the cache"

TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.2}
"""Largest `||onnx - torch|| / ||torch||` of one output. Float32 rounds to 6e-8, a deep model's sums
to some 1e-5. Float16 and bfloat16 round each value between nodes to 5e-4 and 4e-3, and a model of
many layers adds that up; a wrong weight, norm or mask moves an output by about its own size."""

PROTOCOL = (
    "Dense ONNX against dense torch, before anything sparse is measured: every linear's output and "
    "the logits of one prompt, and the logits of decode on the cache, as ||onnx - torch|| / "
    "||torch||. Torch computes in float32 on weights rounded to the exported type."
)


@dataclass(frozen=True, kw_only=True)
class TorchModel:
    """How to run the dense model in torch."""

    source: ModelSource
    dtype: str
    offload: Offload
    folder: Path
    """On a disk with room for hidden states."""

    def outputs(self, ids: NDArray[np.int64], names: Sequence[str], progress: Progress) -> Outputs:
        """Outputs `[S, O]` of linears by name, and logits `[S, V]`, of a prompt `[S]`.

        Raises:
            ModelError: if the model cannot be loaded.
        """
        device = whole_device(self.source, offload=self.offload)
        if device is None:
            return self._layer_by_layer(ids, names, progress)
        return self._whole(ids, names, device)

    def _whole(self, ids: NDArray[np.int64], names: Sequence[str], device: str) -> Outputs:
        model: Any = load_model(self.source, dtype=self.dtype, device=device).float()
        outputs: Outputs = {}
        with torch.inference_mode(), _record_outputs(model, names, outputs):
            given = torch.from_numpy(ids)[None].to(device)
            logits = model(input_ids=given, use_cache=False).logits[0]
        outputs[LOGITS] = logits.cpu().numpy()
        return outputs

    def _layer_by_layer(
        self, ids: NDArray[np.int64], names: Sequence[str], progress: Progress
    ) -> Outputs:
        layered = LayerwiseModel(
            self.source,
            folder=self.folder,
            rounded=getattr(torch, self.dtype),
        )
        outputs: Outputs = {}

        def keep(_: int, logits: torch.Tensor) -> None:
            outputs[LOGITS] = logits.numpy().copy()

        with _record_outputs(layered.model, names, outputs):
            layered.run(
                torch.from_numpy(ids)[None],
                progress=progress,
                label="export: dense check",
                logits_kept=0,
                use_logits=keep,
            )
        return outputs


@contextlib.contextmanager
def _record_outputs(model: nn.Module, names: Sequence[str], outputs: Outputs) -> Iterator[None]:
    """Record the outputs of the named linears of a model."""

    def record(name: str) -> Any:
        def hook(_: nn.Module, __: Any, made: torch.Tensor) -> None:
            rows = made.detach().float().reshape(-1, made.shape[-1])
            outputs[name] = rows.cpu().numpy().copy()

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(record(name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check(
    dense: Path, sparse: Path, torch_model: TorchModel, *, vocabulary: int, progress: Progress
) -> DenseParity:
    """Compare the dense file with torch on one prompt, prompt and decode.

    Args:
        dense: The dense ONNX file.
        sparse: The sparse one next to it, whose nodes say where each linear's output is.
        torch_model: What to hold it against.
        vocabulary: Token ids are below this.
        progress: Told what is done.

    Raises:
        ModelError: if they differ by more than rounding; names the first output that does.
    """
    ids = np.random.default_rng(0).integers(0, vocabulary, _TOKENS)
    values = {name: linear.output for name, linear in sparse_linears(read_graph(sparse)).items()}
    expected = torch_model.outputs(ids, list(values), progress)
    expected[_CACHED] = expected[LOGITS][-_DECODED:]
    return_device_memory()  # the runtime needs what torch had
    actual = _onnx_outputs(dense, values, ids, progress)
    return compare(actual, expected, dtype=torch_model.dtype)


def _onnx_outputs(
    dense: Path, values: Mapping[str, str], ids: NDArray[np.int64], progress: Progress
) -> Outputs:
    graph = read_graph(dense)
    names = add_layer_outputs(graph, values)
    config = {
        **SESSION_CONFIG,
        EXTERNAL_DATA_FOLDER: str(dense.parent),
        # A few tokens do not repay a second copy of the weights.
        "session.disable_prepacking": "1",
    }
    bfloat16 = is_bfloat16(graph)
    library = native.find_library()

    def open_on(provider: Provider) -> OrtSession:
        return OrtSession(
            graph.SerializeToString(),
            # With our ops, a CPU reads weights in bfloat16 as they lie in the file: `graph.cpu`.
            library=library if bfloat16 and provider == "cpu" else None,
            config=config,
            provider=provider,
            bfloat16=bfloat16,
        )

    with open_where_it_runs(open_on, choose_provider(library), progress) as session:
        session.watch(names.values())
        logits = session.prefill(ids[None])[0]
        outputs = {
            name: session.watched[watched].reshape(len(ids), -1).copy()
            for name, watched in names.items()
        }
        session.watch(())
        session.prefill(ids[None, :-_DECODED])
        steps = [session.decode_step(token[None, None])[0] for token in ids[-_DECODED:]]
    return {**outputs, LOGITS: logits, _CACHED: np.concatenate(steps)}


def compare(onnx: Outputs, expected: Outputs, *, dtype: str) -> DenseParity:
    """Compare outputs in order.

    Raises:
        ModelError: if one differs by more than rounding in this type.
    """
    tolerance = TOLERANCE[dtype]
    errors = {name: _relative(value, expected[name]) for name, value in onnx.items()}
    wrong = next((name for name, error in errors.items() if not error <= tolerance), None)
    if wrong is not None:
        raise ModelError(
            f"The exported dense model does not compute what the model computes in torch: "
            f"{wrong} is the first output that differs, by {errors[wrong]:.3g} of its size. "
            f"Rounding in {dtype} explains {tolerance:g}. The file is not kept.",
            allowed="a model that the export writes faithfully, such as llama, mistral, qwen2, "
            "qwen3, gemma2, gemma3_text or phi3",
            fix="report this, with the model's config.json; nothing measured on such a file counts",
        )
    worst = max(errors, key=errors.__getitem__)
    return DenseParity(
        error=errors[worst],
        worst=worst,
        tolerance=tolerance,
        tokens=_TOKENS,
        outputs=len(errors),
        protocol=PROTOCOL,
    )


def _relative(value: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """`||value - expected|| / ||expected||`; NaN where either is not finite."""
    if value.shape != expected.shape:
        return float("inf")
    wide = expected.astype(np.float64)
    norm, difference = np.linalg.norm(wide), np.linalg.norm(value.astype(np.float64) - wide)
    return float(difference / norm) if norm else float("inf" if difference else 0.0)
