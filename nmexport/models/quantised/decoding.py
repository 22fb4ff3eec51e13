"""From stored tensors to integers, scales and zero points: no rounding, no arithmetic on weights.

A value or zero point that is stored with an offset gets it here, so that `(value - zero point) *
scale` is the weight in every layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nmexport.errors import ModelError
from nmexport.sparsity.quantisation import QuantisedWeight
from nmexport.sparsity.weight_form import GROUP
from nmexport.store.kept import KeptWeights, stored_kinds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nmexport.models.quantised.packing import PackedWeight, Packing
    from nmexport.sparsity.weight_form import StoredType

_AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of a word hold its columns 0 to 7."""
_BYTE = 8
_HALF_BYTE = 4
_FLOAT8 = "F8_E4M3"
"""The 8-bit float type that the op has, as safetensors spells it."""


def decode(
    weight: PackedWeight, tensors: Mapping[str, torch.Tensor], *, keeps_float8: bool = False
) -> QuantisedWeight | torch.Tensor:
    """Read one weight.

    Args:
        weight: What is stored.
        tensors: The stored tensors by role.
        keeps_float8: Whether 8-bit floats stay so, for a device that multiplies them.

    Returns:
        Integers with scales; floats `[O, K]` where the op has no form for what is stored: see
        `reason_for_floats`.

    Raises:
        ModelError: if the tensors contradict each other.
    """
    if weight.layout == "float8":
        is_kept = reason_for_floats(weight, keeps_float8=keeps_float8) is None
        return _float8(weight, tensors) if is_kept else _float8_as_floats(weight, tensors)
    values, scale, zero_point = {
        "awq": _awq,
        "gptq": _gptq,
        "gptq_v2": _gptq,
        "packed": _decode_packed,
        "int8": _int8,
    }[weight.layout](weight, tensors)
    order = _channel_order(weight, tensors)
    if order is not None:
        values = values[order.long()]
    if reason_for_floats(weight) is not None:
        return _floats(values, scale, zero_point, order)
    return _fit_type(weight, values, scale, zero_point, order)


def reason_for_floats(weight: PackedWeight, *, keeps_float8: bool = False) -> str | None:
    """Say why a weight cannot stay as it is stored; None where it can."""
    outputs, channels = weight.shape
    size = channels // weight.groups
    if weight.layout == "float8":
        if not keeps_float8:
            return "a GPU alone multiplies 8-bit floats"
        if weight.parts["weight"].dtype != _FLOAT8:
            return f"8-bit floats of type {weight.parts['weight'].dtype}"
        if channels % weight.groups or (weight.block or weight.shape)[1] * weight.groups > channels:
            return "blocks of channels that do not divide them"
    if weight.groups > 1 and size % GROUP:
        return f"groups of {size} channels, not of a multiple of {GROUP}"
    if weight.bits <= _HALF_BYTE and outputs % 2:
        return "an odd number of outputs in 4 bits"
    return None


def kept_of(packing: Packing, *, keeps_float8: bool = False) -> KeptWeights:
    """Count what is kept of a checkpoint's weights, by its headers."""
    return KeptWeights(
        method=str(packing.method),
        kinds=stored_kinds(
            (
                _form(weight),
                reason_for_floats(weight, keeps_float8=keeps_float8),
                weight.shape[0] * weight.shape[1],
            )
            for weight in packing.weights.values()
        ),
        dropped=len(packing.dropped),
    )


def _form(weight: PackedWeight) -> str:
    size = weight.shape[1] // weight.groups
    scale = "a scale an output" if weight.groups == 1 else f"groups of {size}"
    return "8-bit floats" if weight.layout == "float8" else f"{weight.bits} bits, {scale}"


def unpack_bits(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack values of some bits along the last axis: lowest bits first, across words.

    Args:
        words: `[..., W]` int32.
        bits: Bits of a value.

    Returns:
        `[..., W * 32 // bits]` uint8.
    """
    octets = words.contiguous().view(torch.uint8)
    if bits == _BYTE:
        return octets
    if bits == _HALF_BYTE:
        return torch.stack((octets & 15, octets >> _HALF_BYTE), dim=-1).flatten(-2)
    single = (octets.unsqueeze(-1) >> torch.arange(_BYTE, dtype=torch.uint8)) & 1
    single = single.flatten(-2)
    single = single[..., : single.shape[-1] // bits * bits].reshape(*words.shape[:-1], -1, bits)
    places = 2 ** torch.arange(bits, dtype=torch.uint8)
    return (single * places).sum(dim=-1, dtype=torch.uint8)


Decoded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Values `[K, O]`, scales `[G, O]` float32, zero points `[G, O]` or None: int16, no offset."""


def _awq(weight: PackedWeight, tensors: Mapping[str, torch.Tensor]) -> Decoded:
    del weight

    def columns(words: torch.Tensor) -> torch.Tensor:
        by_word = unpack_bits(words, _HALF_BYTE).reshape(len(words), -1, _BYTE)
        return by_word[..., list(_AWQ_COLUMNS)].flatten(1).short()

    return columns(tensors["qweight"]), tensors["scales"].float(), columns(tensors["qzeros"])


def _gptq(weight: PackedWeight, tensors: Mapping[str, torch.Tensor]) -> Decoded:
    outputs, channels = weight.shape
    values = unpack_bits(tensors["qweight"].t(), weight.bits)[:, :channels].t().short()
    zeros = unpack_bits(tensors["qzeros"], weight.bits)[:, :outputs].short()
    if weight.layout == "gptq":  # a zero point of 0 is stored as the largest value
        zeros = (zeros + 1) & (2**weight.bits - 1)
    return values, tensors["scales"].float(), zeros


def _decode_packed(weight: PackedWeight, tensors: Mapping[str, torch.Tensor]) -> Decoded:
    outputs, channels = weight.shape
    said = tensors["weight_shape"].tolist()
    if said != [outputs, channels]:
        raise ModelError(
            f"The quantised weights of {weight.module} do not fit together: weight_shape says "
            f"{said}, and weight_packed holds {[outputs, channels]} values of {weight.bits} bits.",
            fix="download the folder again; config.json and weights must be of one checkpoint",
        )
    half = 2 ** (weight.bits - 1)
    values = unpack_bits(tensors["weight_packed"], weight.bits).short() - half
    zeros = tensors.get("weight_zero_point")
    if zeros is not None:
        zeros = unpack_bits(zeros.t(), weight.bits)[:, :outputs].short() - half
    return values.t(), tensors["weight_scale"].float().t(), zeros


def _int8(weight: PackedWeight, tensors: Mapping[str, torch.Tensor]) -> Decoded:
    def by_group(tensor: torch.Tensor) -> torch.Tensor:
        """`[O, G]`, `[O]` or one value -> `[G, O]`."""
        return tensor.reshape(-1, weight.groups).t().expand(-1, weight.shape[0])

    zeros = tensors.get("weight_zero_point")
    return (
        tensors["weight"].t().short(),
        by_group(tensors["weight_scale"].float()),
        None if zeros is None else by_group(zeros).short(),
    )


def _float8(weight: PackedWeight, tensors: Mapping[str, torch.Tensor]) -> QuantisedWeight:
    """8-bit floats `[K, O]`, a scale for each group of channels of each output."""
    outputs = weight.shape[0]
    rows = (weight.block or weight.shape)[0]
    role = next(role for role in tensors if role != "weight")
    scale = tensors[role].float().reshape(-(-outputs // rows), weight.groups)
    return QuantisedWeight(
        values=tensors["weight"].t().contiguous(),
        scale=scale.repeat_interleave(rows, dim=0)[:outputs].t().contiguous(),
        type="float8e4m3fn",
    )


def _float8_as_floats(weight: PackedWeight, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Floats `[O, K]` float32: a scale is of the tensor, an output, or a block."""
    outputs, channels = weight.shape
    rows, columns = weight.block or weight.shape
    role = next(role for role in tensors if role != "weight")
    scale = tensors[role].float().reshape(-(-outputs // rows), -(-channels // columns))
    wide = scale.repeat_interleave(rows, dim=0)[:outputs]
    return tensors["weight"].float() * wide.repeat_interleave(columns, dim=1)[:, :channels]


def _channel_order(
    weight: PackedWeight, tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """The channels sorted by scale group, `[K]` int32; None where they lie so.

    Raises:
        ModelError: if groups are not equally large, or there are others than the scales have.
    """
    group = tensors.get("g_idx", tensors.get("weight_g_idx"))
    if group is None or bool((group < 0).all()):  # compressed-tensors writes -1 for "no order"
        return None
    channels = weight.shape[1]
    size = channels // weight.groups
    counts = torch.bincount(group.clamp_min(0).long(), minlength=weight.groups)
    if bool((group < 0).any()) or counts.tolist() != [size] * weight.groups:
        raise ModelError(
            f"The activation order (g_idx) of {weight.module} does not fit its scales: it has to "
            f"name {weight.groups} groups of {size} channels, and names "
            f"{len(counts)} of {int(counts.min())} to {int(counts.max())}.",
            fix="quantise the model again, with a group size that divides its channels",
        )
    order = torch.argsort(group, stable=True).int()
    return None if bool((order == torch.arange(channels)).all()) else order


def _fit_type(
    weight: PackedWeight,
    values: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
) -> QuantisedWeight:
    """Bring values into the range of the op's types; both they and zero points move alike."""
    signed = weight.layout in {"packed", "int8"}
    half = 2 ** (weight.bits - 1)
    small = weight.bits <= _HALF_BYTE
    if not signed and zeros is not None and (not small or bool((zeros == half).all())):
        values, zeros, signed = values - half, zeros - half, True
    if zeros is not None and not bool(zeros.any()):
        zeros = None
    kind: StoredType = ("int4" if signed else "uint4") if small else "int8"
    return QuantisedWeight(
        values=values.to(torch.int8).contiguous(),
        scale=scale.contiguous(),
        type=kind,
        zero_point=None if zeros is None else zeros.to(torch.int8).contiguous(),
        channel_order=order,
    )


def _floats(
    values: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
) -> torch.Tensor:
    """Floats `[O, K]` float32 of what no type of the op holds."""
    grouped = values.float().reshape(len(scale), -1, values.shape[1])
    if zeros is not None:
        grouped = grouped - zeros.float().unsqueeze(1)
    weight = (grouped * scale.unsqueeze(1)).flatten(0, 1)
    if order is not None:
        weight = weight[torch.argsort(order)]
    return weight.t().contiguous()
