"""Loading a Hugging Face causal LM and its tokenizer, quietly and with one message if it fails."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import warnings
from typing import TYPE_CHECKING, Any

from nmexport.errors import ModelError
from nmexport.models.text_files import (
    check_text_files,
    check_tokenizer_files,
    explain_unreadable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from types import ModuleType

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nmexport.models.source import ModelSource


def load_model(
    source: ModelSource,
    *,
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
    attention: str = "sdpa",
    placing: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a causal LM in eval mode, its parameters frozen.

    Args:
        source: Where it lies.
        dtype: Element type of the parameters, whatever they are stored in.
        trust_remote_code: Whether Python files of the model may run.
        attention: Attention implementation of transformers; `sdpa` becomes `eager` for models
            that cannot use it, such as Gemma 2, whose soft cap it knows nothing of.
        placing: How Accelerate spreads the weights, see `offload.device_map`; None puts them into
            the host's memory.

    Raises:
        ModelError: if its architecture is unknown or its files cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    element_type = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with _quiet(), _one_message(source), _gguf_read_once():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=element_type,
            trust_remote_code=trust_remote_code,
            # Asked for by name, sdpa is an error where it is not supported; by default it is not.
            attn_implementation=None if attention == "sdpa" else attention,
            use_safetensors=True,
            **_format(source),
            **(placing or {}),
        )
    _forget_quantization(model)
    return model.eval().requires_grad_(False)


def load_tokenizer(
    source: ModelSource, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to the model.

    Raises:
        ModelError: if there is none, it cannot be read, or what belongs to it (chat template,
            sampling defaults, special tokens) makes no sense.
    """
    from transformers import AutoTokenizer

    check_tokenizer_files(source)
    try:
        with _quiet(), _one_message(source):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                source.folder, trust_remote_code=trust_remote_code, **_format(source)
            )
    except ModelError as error:
        raise (explain_unreadable(source) or error) from error
    check_text_files(source, tokenizer)
    return tokenizer


def _format(source: ModelSource) -> dict[str, Any]:
    local: dict[str, Any] = {"local_files_only": True}
    return local if source.gguf_file is None else {**local, "gguf_file": source.gguf_file}


def _forget_quantization(model: PreTrainedModel) -> None:
    """A dequantised model is an ordinary one: what says otherwise only stops it being saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    model.is_quantized = False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and remarks from the user's terminal, and leave it as it was."""
    from transformers.utils import logging as remarks

    verbosity, had_bars = remarks.get_verbosity(), remarks.is_progress_bar_enabled()
    remarks.set_verbosity(logging.CRITICAL)
    remarks.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        remarks.set_verbosity(verbosity)
        if had_bars:
            remarks.enable_progress_bar()


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Halve the time to load a `.gguf`.

    Transformers parses the file once for the config and once for the weights, and asks for the
    same table of tensor names once a module: both answers are remembered while this lasts.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loading

    with (
        _replaced(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        _replaced(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        _replaced(loading, "tqdm", functools.partial(loading.tqdm, disable=True)),
    ):
        yield


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, replacement: object) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextlib.contextmanager
def _one_message(source: ModelSource) -> Iterator[None]:
    """Say what went wrong in the model's terms.

    Transformers, tokenizers, safetensors and gguf raise what they please on a broken file, from
    OSError to bare Exception, so everything is caught here.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        where = source.folder / (source.gguf_file or "")
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ModelError(
            f"Model {source.id!r} cannot be loaded from {where}: "
            f"{_architecture(source.folder)}{type(error).__name__}: {reason[:300]}",
            allowed="a causal language model that this version of transformers knows",
            fix="check that the files are complete; for a model with Python files of its own, "
            "set trust_remote_code in the recipe if you trust them",
        ) from error


def _architecture(folder: Path) -> str:
    """`model_type 'x': `, where a config tells."""
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"model_type {model_type!r}: "
