"""The folded model in torch, run like a session: the reference for exported models."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

from nmexport.models.embedding import round_embedding
from nmexport.models.loader import load_model
from nmexport.models.swap import replace_linears
from nmexport.runtimes.session import Session
from nmexport.sparsity.linear import Behaviour, SparseLinear

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from nmexport.models.source import ModelSource
    from nmexport.recipe import ModelSection
    from nmexport.store.folded import FoldedModel
    from nmexport.store.layers import LayerSpec


PERTURBATION = 1e-7
"""Relative: about one unit in the last place of float32; of a smaller type it is half of one."""


class TorchSession(Session):
    """A causal LM in torch; its caches change in place and are not exposed."""

    def __init__(
        self, model: PreTrainedModel, vocabulary_size: int, *, perturbation: float = 0.0
    ) -> None:
        """Run a model in evaluation mode.

        Args:
            model: The model; may be shared by sessions that take turns.
            vocabulary_size: Width of its logits.
            perturbation: Relative size of a fixed disturbance of the embeddings in the latter half
                of each batch: how far a result moves by it is how far rounding may move it.
        """
        self._model: PreTrainedModel | None = model
        self._device = model.get_input_embeddings().weight.device
        self._perturbation = perturbation
        self._vocabulary_size = vocabulary_size
        self.on_gpu = self._device.type == "cuda"

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits."""
        return self._vocabulary_size

    def with_twins(self) -> TorchSession:
        """Open another session on the model, the latter half of each batch off in its last bits.

        Raises:
            RuntimeError: if this one is closed.
        """
        if self._model is None:
            raise RuntimeError("the session is closed")
        half_a_unit = torch.finfo(self._model.dtype).eps / 2
        size = max(PERTURBATION, half_a_unit)  # what is less, bfloat16 rounds away without a trace
        return TorchSession(self._model, self._vocabulary_size, perturbation=size)

    def linear(self, layer: LayerSpec, x: NDArray[Any]) -> NDArray[Any]:
        """Apply the op of one linear to an input: `[..., K] T` -> `[..., O] T`.

        Raises:
            RuntimeError: if the session is closed.
        """
        if self._model is None:
            raise RuntimeError("the session is closed")
        with torch.inference_mode():
            given = tensor_from(x).to(self._device)
            y = self._model.get_submodule(layer.name).op(given)
        return array_from(y.cpu())

    def close(self) -> None:
        """Free the model and its cache."""
        self._model = self.cache = None

    def extend(
        self, cache: Any | None, input_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], Any]:
        """See `Session`.

        Raises:
            RuntimeError: if the session is closed.
        """
        if self._model is None:
            raise RuntimeError("the session is closed")
        with torch.inference_mode(), self._disturb(self._model):
            ids = torch.from_numpy(np.ascontiguousarray(input_ids))
            output = self._model(
                input_ids=ids.to(self._device),
                past_key_values=cache,
                use_cache=True,
            )
        logits: NDArray[np.float32] = output.logits.float().cpu().numpy()
        return logits, output.past_key_values

    @contextlib.contextmanager
    def _disturb(self, model: PreTrainedModel) -> Iterator[None]:
        if not self._perturbation:
            yield
            return

        def disturb(_: nn.Module, __: Any, embedded: torch.Tensor) -> torch.Tensor:
            # In float32 whatever the type: a smaller one rounds it away or up to its last place.
            steps = torch.linspace(-1.0, 1.0, embedded.shape[-1], device=embedded.device)
            pattern = steps.cos()
            factor = 1.0 + self._perturbation * pattern
            exact, twins = embedded.chunk(2)
            return torch.cat([exact, (twins.float() * factor).to(embedded.dtype)])

        hook = model.get_input_embeddings().register_forward_hook(disturb)
        try:
            yield
        finally:
            hook.remove()


def open_dense(source: ModelSource, section: ModelSection, *, device: str = "cpu") -> TorchSession:
    """Open the dense model, in the recipe's type.

    Raises:
        ModelError: if the model cannot be loaded.
    """
    model = load_model(source, dtype=section.dtype, device=device)
    return TorchSession(model, model.config.get_text_config().vocab_size)


def open_folded(
    source: ModelSource, section: ModelSection, fold: FoldedModel, *, device: str = "cpu"
) -> TorchSession:
    """Open the model with its linears replaced by folded ones, as every executor computes them.

    Raises:
        ModelError: if the model cannot be loaded.
        ArtifactError: if the fold artifact is damaged.
    """
    model = load_model(source, dtype=section.dtype, device=device)
    for layer in fold.linears:  # one by one: the dense weight goes as the folded one comes
        replace_linears(model, {layer.name: folded_linear(layer, fold).to(device)})
    if fold.embedding_bits:
        round_embedding(model)
    return TorchSession(model, model.config.get_text_config().vocab_size)


def folded_linear(
    layer: LayerSpec, fold: FoldedModel, *, prompt: int | None = None
) -> SparseLinear:
    """Build one linear of a fold artifact.

    Args:
        layer: Its record.
        fold: The artifact.
        prompt: See `SparseLinear`.

    Raises:
        ArtifactError: if the artifact is damaged.
    """
    return SparseLinear(_behaviour(layer), fold.tensors(layer.name), prompt=prompt)


def tensor_from(array: NDArray[Any]) -> torch.Tensor:
    """Convert to torch; bfloat16 is ml_dtypes' in NumPy."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array_from(tensor: torch.Tensor) -> NDArray[Any]:
    """Convert to NumPy."""
    if tensor.dtype == torch.bfloat16:
        bits: NDArray[Any] = tensor.contiguous().view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    if tensor.dtype == torch.float8_e4m3fn:
        octets: NDArray[Any] = tensor.contiguous().view(torch.uint8).numpy()
        return octets.view(ml_dtypes.float8_e4m3fn)
    array: NDArray[Any] = tensor.numpy()
    return array


def _behaviour(layer: LayerSpec) -> Behaviour:
    return Behaviour(
        pattern=layer.pattern,
        dynamic_shift=layer.dynamic_shift,
        variance_correction=layer.variance_correction,
        phase=layer.phase,
        activation_bits=layer.activation_bits,
        activation_block=layer.activation_block,
    )


class DeviceProducts:
    """Computes the oracle's products (`oracle.Products`) in float64 on a GPU.

    For a large model they are nearly all of its time. Everything else stays NumPy's.
    """

    def __init__(self, device: str) -> None:
        """Compute there."""
        self._device = device

    def __call__(
        self, s: NDArray[np.float64], w: NDArray[Any]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Compute `s @ w` and `s^2 @ w^2`, `[..., O]`, of `[..., K]` and `[K, O]`."""
        with torch.inference_mode():
            kept = torch.from_numpy(s).to(self._device)
            weight = tensor_from(w).to(self._device).double()
            value, squares = kept @ weight, kept.square() @ weight.square()
        return value.cpu().numpy(), squares.cpu().numpy()
