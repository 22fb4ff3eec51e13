"""Builds a model without weights from its configuration, to compare its files with."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from nmexport.errors import ModelError
from nmexport.models.families import text_config
from nmexport.models.gguf_files import read_once
from nmexport.models.gguf_metadata import check_metadata
from nmexport.models.guard import quiet, reading
from nmexport.models.source import ModelSource

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel


_CONFIG = "config.json"


class ModelSize(NamedTuple):
    """Size of a dense model; tied parameters count once."""

    parameters: int
    linears: int


def skeleton(
    source: ModelSource,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
) -> PreTrainedModel:
    """Build the model without weights: parameters on the meta device, buffers real.

    Of a multimodal model, that is its text part with its head.

    Args:
        source: Where its configuration lies.
        dtype: Element type of the parameters.
        attention: Attention implementation of transformers; None is its own choice.

    Raises:
        ModelError: if its configuration cannot be read, or is of no causal language model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(_gguf_config(source)) if source.packed else _stored_config(source)
    with quiet(), reading(source):
        plain = text_config(config)
        if hasattr(plain, "quantization_config"):  # weights are dequantised as they are read
            del plain.quantization_config
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                plain,
                dtype=dtype,
                trust_remote_code=source.trust_remote_code,
                attn_implementation=attention,
            )
    return model.eval().requires_grad_(False)


def model_size(source: ModelSource) -> ModelSize:
    """Count parameters and linears without loading a weight.

    Raises:
        ModelError: if the configuration cannot be read.
    """
    model = skeleton(source)
    model.tie_weights()  # the empty weights were made one by one
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linears=sum(isinstance(module, nn.Linear) for module in model.modules()),
    )


def _stored_config(source: ModelSource) -> PreTrainedConfig:
    from transformers import AutoConfig

    with quiet(), reading(source):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.weights_folder,
            trust_remote_code=source.trust_remote_code,
            local_files_only=True,
            **source.gguf_option,
        )
    return config


@functools.lru_cache(maxsize=2)  # all of a file's vocabulary is parsed for it
def _gguf_config(source: ModelSource) -> PreTrainedConfig:
    """Let transformers read a `.gguf`'s metadata, and check that it reads all of them."""
    with read_once(source.gguf_files):
        config = _stored_config(source)
    check_metadata(source.gguf_files[0], config)
    return config


def give_generation_config(model: PreTrainedModel, source: ModelSource) -> None:
    """Set what `from_pretrained` reads next to the weights."""
    from transformers import GenerationConfig

    if (source.weights_folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(
            source.weights_folder, local_files_only=True
        )


def tensors_of_config(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """List names and shapes of a model's parameters by its configuration; tied ones count once.

    Args:
        path: Its `config.json`, or the folder that holds it.

    Raises:
        ModelError: if there is none, or it is of no causal language model.
    """
    folder = path if path.is_dir() else path.parent
    if path.name != _CONFIG and not (path / _CONFIG).is_file():
        raise ModelError(
            f"There is no {_CONFIG} at {path}.",
            allowed=f"a model's {_CONFIG}, or a folder with it",
            fix="download that one file from the model's page; its weights are not needed",
        )
    source = ModelSource(
        id=str(folder), revision=None, folder=folder.absolute(), gguf_file=None, digest=""
    )
    model = skeleton(source)
    model.tie_weights()  # the empty weights were made one by one
    return [(name, tuple(value.shape)) for name, value in model.named_parameters()]
