"""The folded model in torch, run like a session: what exported models are held against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from torch import nn

from nmexport.errors import ModelError
from nmexport.models.loader import load_model
from nmexport.models.swap import replace_linears
from nmexport.sparsity.linear import Behaviour, FoldedLinear

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

    from nmexport.layers import LayerSpec
    from nmexport.models.source import ModelSource
    from nmexport.recipe import ModelSection
    from nmexport.stages.fold import Artifact as FoldArtifact


class ModelSize(NamedTuple):
    """What a dense model consists of."""

    parameters: int
    linears: int


class TorchSession:
    """A causal LM with its KV cache; implements `runtimes.session.Session`."""

    def __init__(self, model: nn.Module, vocabulary_size: int) -> None:
        """Run a model in evaluation mode."""
        self._model: nn.Module | None = model
        self._vocabulary_size = vocabulary_size
        self._cache: Any = None

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits."""
        return self._vocabulary_size

    def prefill(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Drop the cache, run whole prompts `[B, S]`, and return logits `[B, S, V]`."""
        self._cache = None
        return self._run(input_ids)

    def decode_step(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run one more token a sequence, `[B, 1]`, on the cache, and return logits `[B, 1, V]`."""
        return self._run(input_ids)

    def close(self) -> None:
        """Free the model and its cache."""
        self._model = self._cache = None

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _run(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        if self._model is None:
            raise RuntimeError("the session is closed")
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.from_numpy(np.ascontiguousarray(input_ids)),
                past_key_values=self._cache,
                use_cache=True,
            )
        self._cache = output.past_key_values
        logits: NDArray[np.float32] = output.logits.float().numpy()
        return logits


def open_folded(source: ModelSource, section: ModelSection, fold: FoldArtifact) -> TorchSession:
    """The model with its target linears replaced by folded ones, as every executor computes them.

    Raises:
        ModelError: if the model cannot be loaded.
        ArtifactError: if the fold artifact is damaged.
    """
    model = load_model(source, dtype=section.dtype, trust_remote_code=section.trust_remote_code)
    replace_linears(
        model,
        {
            layer.name: FoldedLinear.from_tensors(_behaviour(layer), fold.tensors(layer.name))
            for layer in fold.layers
        },
    )
    return TorchSession(model, model.config.get_text_config().vocab_size)


def _behaviour(layer: LayerSpec) -> Behaviour:
    return Behaviour(
        pattern=layer.nm,
        dynamic_shift=layer.dynamic_shift,
        variance_correction=layer.variance_correction,
        phase=layer.phase,
    )


def model_size(source: ModelSource, *, trust_remote_code: bool = False) -> ModelSize:
    """Count without loading a weight; tied parameters count once.

    Raises:
        ModelError: if the configuration cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    form = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    try:
        config = AutoConfig.from_pretrained(
            source.folder, trust_remote_code=trust_remote_code, local_files_only=True, **form
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"The configuration of {source.id} cannot be read: {error}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linears=sum(isinstance(module, nn.Linear) for module in model.modules()),
    )
