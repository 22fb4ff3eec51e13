"""A model without weights, built from its configuration: what its files are held against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nmexport.models.guard import quiet, reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nmexport.models.source import ModelSource


def skeleton(
    source: ModelSource, *, trust_remote_code: bool = False, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Build the model without weights: parameters on the meta device, buffers real.

    Args:
        source: Where its configuration lies.
        trust_remote_code: Whether Python files of the model may run.
        dtype: Element type of the parameters.

    Raises:
        ModelError: if its configuration cannot be read.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet(), reading(source):
        config = AutoConfig.from_pretrained(
            source.weights_folder,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            **source.gguf_option,
        )
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    return model.eval().requires_grad_(False)
