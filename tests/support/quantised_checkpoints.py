"""Quantised checkpoints of a tiny model, and the same weights as floats.

A matrix is rounded to integers here; the integers are written in a format, and beside it goes a
folder of the floats that they stand for. What reads the first must compute what the second does.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WHOLE = "model.safetensors"
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which column each four bits of a word hold, lowest first."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rounded:
    """A weight in integers: `(values - zeros) * scale` by group."""

    values: torch.Tensor
    """`[K, O]` int64, from 0 on."""
    zeros: torch.Tensor
    """`[G, O]` int64."""
    scale: torch.Tensor
    """`[G, O]` float16."""
    group: torch.Tensor
    """`[K]`: the group of each channel."""

    def floats(self) -> torch.Tensor:
        """The weight `[O, K]` float32."""
        grid = self.values - self.zeros[self.group]
        return (grid.float() * self.scale.float()[self.group]).t().contiguous()


def rounded(
    weight: torch.Tensor,
    bits: int = 4,
    size: int = 32,
    *,
    symmetric: bool = False,
    shuffled: bool = False,
) -> Rounded:
    """Round a weight `[O, K]` to the nearest integers.

    Args:
        weight: Floats.
        bits: Bits of a value.
        size: Channels of a group.
        symmetric: Zero points are the middle.
        shuffled: Channels of a group lie anywhere.
    """
    channels, top = weight.shape[1], 2**bits - 1
    group = torch.arange(channels) // size
    if shuffled:
        group = group[torch.randperm(channels, generator=torch.Generator().manual_seed(7))]
    low = torch.stack([weight[:, group == g].amin(1) for g in range(channels // size)])
    high = torch.stack([weight[:, group == g].amax(1) for g in range(channels // size)])
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / top).half()
    zeros = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round()
    zeros = zeros.clamp(0, top).long()
    grid = (weight.t() / scale.float()[group]).round() + zeros[group]
    return Rounded(grid.clamp(0, top).long(), zeros, scale, group)


def packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Values along the last axis in int32 words, lowest bits first, across words."""
    rows = []
    for row in values.tolist():
        stream = sum(value << (bits * place) for place, value in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append([stream >> (32 * word) & 0xFFFFFFFF for word in range(words)])
    return torch.tensor(rows).to(torch.uint32).view(torch.int32)


def awq_words(values: torch.Tensor) -> torch.Tensor:
    """`[R, O]` -> `[R, O/8]`: eight columns a word, in AWQ's order."""
    columns = values.reshape(len(values), -1, 8)[..., list(AWQ_COLUMNS)]
    return packed(columns.reshape(len(values), -1), 4)


def awq_tensors(weight: Rounded) -> Tensors:
    """Tensors of a linear as AutoAWQ stores them."""
    return {
        "qweight": awq_words(weight.values),
        "qzeros": awq_words(weight.zeros),
        "scales": weight.scale,
    }


def gptq_tensors(weight: Rounded, bits: int = 4, *, version: int = 1) -> Tensors:
    """Tensors of a linear as GPTQModel stores them."""
    zeros = weight.zeros - (1 if version == 1 else 0)
    return {
        "qweight": packed(weight.values.t(), bits).t().contiguous(),
        "qzeros": packed(zeros & (2**bits - 1), bits),
        "scales": weight.scale,
        "g_idx": weight.group.int(),
    }


def save_checkpoint(
    plain: Path,
    folder: Path,
    section: dict[str, Any],
    quantise: Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]],
    *,
    ignored: tuple[str, ...] = ("lm_head",),
) -> Path:
    """Write a quantised checkpoint of a model, and its floats to `<folder>-floats`.

    Args:
        plain: The model in float32.
        folder: To write.
        section: The configuration's `quantization_config`.
        quantise: Given a linear's name and weight `[O, K]`, returns its stored tensors by role and
            the floats `[O, K]` that they stand for.
        ignored: Last parts of the names of linears that stay as they are.

    Returns:
        The folder of floats.
    """
    floats = folder.with_name(f"{folder.name}-floats")
    for copy in (folder, floats):
        shutil.copytree(plain, copy)
    stored: Tensors = {}
    dense: Tensors = {}
    for name, tensor in load_file(plain / WHOLE).items():
        module, _, role = name.rpartition(".")
        is_linear = role == "weight" and tensor.ndim == 2 and "embed" not in name
        if not is_linear or module.rpartition(".")[2] in ignored:
            stored[name] = dense[name] = tensor
            continue
        parts, dense[name] = quantise(module, tensor)
        stored |= {f"{module}.{role}": part.contiguous() for role, part in parts.items()}
    save_file(stored, folder / WHOLE, metadata={"format": "pt"})
    save_file(dense, floats / WHOLE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = section
    (folder / "config.json").write_text(json.dumps(config))
    return floats


def save_awq(plain: Path, folder: Path, *, size: int = 32, **options: Any) -> Path:
    """Write a model as AutoAWQ does."""

    def quantise(_: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        integers = rounded(weight, size=size)
        return awq_tensors(integers), integers.floats()

    section = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm"}
    return save_checkpoint(plain, folder, {**section, "zero_point": True}, quantise, **options)


def save_gptq(
    plain: Path,
    folder: Path,
    *,
    bits: int = 4,
    size: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    version: int = 1,
) -> Path:
    """Write a model as GPTQModel does."""

    def quantise(_: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        integers = rounded(weight, bits, size, symmetric=symmetric, shuffled=act_order)
        return gptq_tensors(integers, bits, version=version), integers.floats()

    section = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "sym": symmetric,
        "desc_act": act_order,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return save_checkpoint(plain, folder, section, quantise)


def save_compressed_tensors(
    plain: Path, folder: Path, preset: str, *, size: int = 32
) -> torch.nn.Module:
    """Write a model with the library compressed-tensors; returns what it decompresses again.

    Args:
        plain: The model in float32.
        folder: To write.
        preset: One of the library's schemes, such as `W4A16_ASYM`.
        size: Channels of a group, or width of a block, where the scheme has them.
    """
    from compressed_tensors.compressors.model_compressors.model_compressor import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if scheme.weights.group_size:
        scheme.weights.group_size = size
    if scheme.weights.block_structure:
        scheme.weights.block_structure = [size, size]
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            _calibrate(module, scheme.weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    for path in plain.glob("tokenizer*"):
        shutil.copy(path, folder)
    compressor.decompress_model(model)
    decompressed: torch.nn.Module = model
    return decompressed


def _calibrate(module: Any, scheme: Any) -> None:
    """Set a linear's scales and zero points from the extremes of its weight."""
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = module.weight.detach()
    rows, columns = module.weight_scale.shape if module.weight_scale.ndim == 2 else (1, 1)
    height, width = len(weight) // rows, weight.shape[1] // columns
    parts = weight.reshape(rows, height, columns, width).transpose(1, 2).flatten(2)
    values = calculate_qparams(parts.amin(-1), parts.amax(-1), scheme)
    for name, value in zip(("weight_scale", "weight_zero_point"), values, strict=True):
        own = getattr(module, name, None)
        if own is not None:
            own.data = value.reshape(own.shape).to(own.dtype)


def save_fp8(plain: Path, folder: Path, *, block: int = 48) -> Path:
    """Write a model in fine-grained FP8: blocks need not divide a weight."""

    def quantise(_: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, columns = (-(-side // block) for side in weight.shape)
        scale = torch.arange(1, rows * columns + 1).reshape(rows, columns) / 256
        wide = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
        wide = wide[: weight.shape[0], : weight.shape[1]]
        values = (weight / wide).to(torch.float8_e4m3fn)
        return {"weight": values, "weight_scale_inv": scale}, values.float() * wide

    section = {"quant_method": "fp8", "weight_block_size": [block, block]}
    return save_checkpoint(plain, folder, section, quantise)
