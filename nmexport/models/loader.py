"""Loads a Hugging Face causal LM and its tokenizer, quietly, with one message if it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from nmexport.errors import ModelError
from nmexport.models import gguf_files
from nmexport.models.families import is_text_part
from nmexport.models.guard import quiet, reading
from nmexport.models.skeleton import give_generation_config, skeleton
from nmexport.models.text_files import (
    check_text_files,
    check_tokenizer_files,
    explain_unreadable,
)
from nmexport.models.weight_files import read_config, shorten
from nmexport.models.weights import WeightTable, is_finite, not_finite

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nmexport.models.source import ModelSource


def load_model(
    source: ModelSource,
    *,
    dtype: str | torch.dtype = "float32",
    attention: str = "sdpa",
    placing: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> PreTrainedModel:
    """Load a causal LM in eval mode, its parameters frozen.

    Args:
        source: Where it lies.
        dtype: Element type of the parameters, whatever they are stored in.
        attention: Attention implementation of transformers; `sdpa` becomes `eager` for models
            that cannot use it, such as Gemma 2, whose soft cap it knows nothing of.
        placing: How Accelerate spreads the weights, see `offload.device_map`; None puts them into
            one memory.
        device: That memory. On a GPU each tensor goes from its mapped file to the device, and the
            host never holds more than one.

    Raises:
        ModelError: if its architecture is unknown or its files cannot be read.
    """
    import torch

    element_type = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if source.packed:
        loaded = load_gguf(source, dtype=element_type, attention=attention, placing=placing)[0]
        return loaded if device == "cpu" else loaded.to(device)
    empty = skeleton(source)  # what is wrong with the files is said before anything is read
    table = WeightTable(empty, source.weights_folder)
    by_tensor = (
        table.is_dequantised
        or is_text_part(empty.config, source.weights_folder)
        or "quantization_config" in read_config(source.weights_folder)  # empty, or of no weight
    )
    if by_tensor or device != "cpu":
        return _tensor_by_tensor(
            source,
            table,
            dtype=element_type,
            attention=attention,
            placing=placing or {},
            device=device,
        )
    model, _, _ = _from_pretrained(source, element_type, attention, placing)
    _check_finite(source, model)
    return model


def load_gguf(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    attention: str = "sdpa",
    placing: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, Mapping[str, str]]:
    """Load a `.gguf`, dequantised; see `load_model`.

    Returns:
        The model, and the names of its parameters by the names of the file's tensors.

    Raises:
        ModelError: if its architecture is unknown or the file cannot be read.
    """
    skeleton(source)  # what is wrong with the metadata is said before anything is read
    model, loading_info, mappings = _from_pretrained(source, dtype, attention, placing)
    _forget_quantization(model)
    _check_gguf_complete(source, loading_info)
    _check_finite(source, model)
    _check_nothing_ignored(source, mappings)
    return model, mappings[-1] if mappings else {}


def _from_pretrained(
    source: ModelSource,
    dtype: torch.dtype,
    attention: str,
    placing: Mapping[str, Any] | None,
) -> tuple[PreTrainedModel, Mapping[str, Any], Sequence[Mapping[str, str]]]:
    """Let transformers load a model; return its loading report and its tables of GGUF names."""
    from transformers import AutoModelForCausalLM

    with quiet(), reading(source), _name_tables(source) as mappings:
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            source.weights_folder,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=source.trust_remote_code,
            # Asked for by name, sdpa is an error where it is not supported; by default it is not.
            attn_implementation=None if attention == "sdpa" else attention,
            use_safetensors=True,
            local_files_only=True,
            **source.gguf_option,
            **(placing or {}),
        )
    return model.eval().requires_grad_(False), loading_info, mappings


def _tensor_by_tensor(
    source: ModelSource,
    table: WeightTable,
    *,
    dtype: torch.dtype,
    attention: str,
    placing: Mapping[str, Any],
    device: str = "cpu",
) -> PreTrainedModel:
    """Load a model tensor by tensor, where transformers would go through host memory."""
    from accelerate import dispatch_model
    from accelerate.utils import set_module_tensor_to_device

    implementation = None if attention == "sdpa" else attention
    model = skeleton(source, dtype=dtype, attention=implementation)
    give_generation_config(model, source)
    table.fill_buffers(model)
    for name, _ in model.named_parameters():
        value = table.read(name, device=device).to(dtype)
        set_module_tensor_to_device(model, name, device, value=value)
        del value
    model.tie_weights()
    model.to(device)  # its buffers
    _check_finite(source, model)
    devices = placing.get("device_map")
    return model if devices is None else dispatch_model(model, device_map=devices)


def _check_finite(source: ModelSource, model: PreTrainedModel) -> None:
    """Check that every weight is finite.

    Raises:
        ModelError: if one is not.
    """
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not is_finite(parameter):
            raise not_finite(name, source.weights_folder, parameter.dtype)


def _check_gguf_complete(source: ModelSource, loading_info: Mapping[str, Any]) -> None:
    """Refuse a `.gguf` that lacks a weight or holds one too many."""
    missing = sorted(loading_info["missing_keys"]) + sorted(
        name for name, *_ in loading_info["mismatched_keys"]
    )
    if missing:
        raise ModelError(
            f"{source.folder / str(source.gguf_file)} holds no {shorten(missing)}: random values "
            "would take their place.",
            fix="download the file again, or use the model's safetensors",
        )
    if loading_info["unexpected_keys"]:
        raise _ignored_tensors(source, sorted(loading_info["unexpected_keys"]))


def _check_nothing_ignored(source: ModelSource, mappings: Sequence[Mapping[str, str]]) -> None:
    """Refuse a `.gguf` with tensors that transformers ignores, unless they are factors of one."""
    if not mappings:
        return
    known = mappings[-1]  # the outermost call returns last, and has all names
    passed_over = [
        name
        for name in gguf_files.tensor_names(source.gguf_files)
        if name not in known and name.removesuffix(".weight") not in known
    ]
    if not passed_over:
        return
    tensors = {tensor.name: tensor for tensor in gguf_files.open_merged(source.gguf_files).tensors}
    harmful = [name for name in passed_over if not (tensors[name].data == 1.0).all()]
    if harmful:
        raise _ignored_tensors(source, harmful)


def _ignored_tensors(source: ModelSource, names: list[str]) -> ModelError:
    return ModelError(
        f"{source.folder / str(source.gguf_file)} holds {shorten(names)}, which transformers "
        "does not read: the model would not be the one that the file describes.",
        fix="use the model's safetensors",
    )


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to the model.

    Raises:
        ModelError: if there is none, it cannot be read, or what belongs to it (chat template,
            sampling defaults, special tokens) makes no sense.
    """
    check_tokenizer_files(source)
    try:
        if source.gguf_file is None:
            tokenizer = _read_tokenizer(source)
        else:
            tokenizer = _gguf_tokenizer(dataclasses.replace(source, unpacked=None))
    except ModelError as error:
        raise (explain_unreadable(source) or error) from error
    check_text_files(source, tokenizer)
    return tokenizer


def _read_tokenizer(source: ModelSource, **form: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    part = None if source.gguf_file else "tokenizer"  # a GGUF is one file, whatever is wrong
    with quiet(), reading(source, part=part):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.folder,
            trust_remote_code=source.trust_remote_code,
            local_files_only=True,
            **form,
        )
    return tokenizer


@functools.lru_cache(maxsize=1)  # all stages ask, and it takes seconds to make
def _gguf_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    with gguf_files.read_once(source.gguf_files):
        return _read_tokenizer(source, gguf_file=str(source.gguf_file))


def _forget_quantization(model: PreTrainedModel) -> None:
    """Mark a dequantised model as an ordinary one, so that it can be saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    model.is_quantized = False


@contextlib.contextmanager
def _name_tables(source: ModelSource) -> Iterator[list[Mapping[str, str]]]:
    """Yield transformers' tables of a `.gguf`'s tensor names, as they are made while this lasts."""
    from transformers import modeling_gguf_pytorch_utils as loading

    mappings: list[Mapping[str, str]] = []
    original = loading.get_gguf_hf_weights_map

    def note_files(*arguments: Any, **options: Any) -> Mapping[str, str]:
        mappings.append(original(*arguments, **options))
        return mappings[-1]

    if not source.packed:
        yield mappings
        return
    with (
        gguf_files.read_once(source.gguf_files),
        gguf_files.replaced(loading, "get_gguf_hf_weights_map", note_files),
    ):
        yield mappings
