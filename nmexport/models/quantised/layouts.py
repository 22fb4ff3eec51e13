"""Sorts a checkpoint's tensors: quantised weights, plain ones, and what is left out."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from nmexport.errors import ModelError
from nmexport.models.quantised.methods import (
    SIDE_FILES,
    Scheme,
    method_of,
    quantisation_section,
)
from nmexport.models.quantised.packing import WORD, Modules, PackedWeight, Packing
from nmexport.models.unsupported import FLOATS, quantised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from nmexport.models.integrity import StoredTensor
    from nmexport.models.quantised.methods import Method

    Roles = Mapping[str, StoredTensor]

FLOAT8 = ("F8_E4M3", "F8_E5M2")
_GPTQ_BITS = (2, 3, 4, 8)
_PACKED_BITS = range(2, 9)
# What another way of running the model needs: its activations or its cache in 8 bits.
_RUN_TIME = re.compile(
    r"(^|\.)(input_scale(_ub)?|input_zero_point|input_global_scale|output_scale|activation_scale"
    r"|[kvq]_scale|kv_scale|[kv]_zero_point|kv_cache_scaling_factor|prob_scale)$"
)
# Tensors that only a quantised layer has, and who writes them.
_TRACES = (
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (
        re.compile(r"\.(SCB|weight_format|absmax|quant_map|weight\.absmax|weight\.quant_.*)$"),
        "bitsandbytes",
    ),
    (re.compile(r"\.(weight_packed|weight_shape|weight_zero_point)$"), "compressed-tensors"),
    (re.compile(r"\.weight_scale(_inv|_2)?$"), "FP8 or INT8 with scales"),
)


def find_packing(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Packing:
    """Find every quantised weight of a checkpoint, by its configuration and headers.

    Args:
        folder: A model's folder, for side files and messages.
        config: Its configuration.
        tensors: All its stored tensors by name.

    Raises:
        UnsupportedModelError: if it is quantised in a way that is not read.
        ModelError: if tensors of a quantised weight are missing or do not fit each other.
    """
    section = quantisation_section(folder, config)
    if section is None:
        _refuse_traces(folder, tensors)
        return Packing(plain=tensors)
    method = method_of(folder, section)
    modules = Modules(folder, tensors)
    weights: dict[str, PackedWeight] = {}
    for find in _FINDERS[method.family]:
        weights |= {weight.name: weight for weight in find(modules, method)}
    taken = {weight.stored(role) for weight in weights.values() for role in weight.parts}
    left = {name: tensor for name, tensor in tensors.items() if name not in taken}
    dropped = tuple(name for name in left if _RUN_TIME.search(name))
    plain = {name: tensor for name, tensor in left.items() if name not in set(dropped)}
    _refuse_traces(folder, plain)
    if not weights:
        raise ModelError(
            f"{folder} says that it is quantised ({method.name}), and holds no weights that are.",
            fix="if its weights were dequantised, remove quantization_config from config.json; "
            "else download the folder again",
        )
    return Packing(method=method.name, weights=weights, plain=plain, dropped=dropped)


def _refuse_traces(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse remains of a quantised layer that nothing above reads.

    Raises:
        UnsupportedModelError: naming a tensor.
    """
    for name, tensor in tensors.items():
        method = next((method for trace, method in _TRACES if trace.search(name)), None)
        if tensor.dtype.startswith("F8") or tensor.dtype.startswith("F4"):
            method = "FP8" if tensor.dtype.startswith("F8") else "FP4"
        if method is not None:
            side_file = next((side for side in SIDE_FILES if (folder / side).is_file()), None)
            seen = f"{name} is stored as {tensor.dtype}" + (
                f"; see {side_file}" if side_file else ""
            )
            raise quantised(folder, f"{method}, as it seems: {seen}")


def _awq(modules: Modules, method: Method) -> Iterator[PackedWeight]:
    """Linears in AWQ's GEMM layout: `[K, O/8]`, eight columns a word."""
    for module, roles in modules.with_role("qweight").items():
        modules.require(module, roles, ("qweight", "qzeros", "scales"))
        channels, words = modules.matrix(module, roles, "qweight")
        groups, outputs = modules.matrix(module, roles, "scales")
        if method.bits not in (4, None) or words * (WORD // 4) != outputs:
            raise modules.wrong_shape(
                module,
                f"qweight is {[channels, words]} for {outputs} outputs, which is not 4 bits",
            )
        modules.check_shape(module, roles["qzeros"], "qzeros", (groups, words))
        modules.check_groups(module, channels, groups, method.group_size)
        yield PackedWeight(
            module=module,
            layout="awq",
            bits=4,
            shape=(outputs, channels),
            groups=groups,
            parts=_parts(roles, "qweight", "qzeros", "scales"),
        )


def _gptq(modules: Modules, method: Method) -> Iterator[PackedWeight]:
    """Linears in GPTQ's layout: `[K*bits/32, O]`, packed along K."""
    for module, roles in modules.with_role("qweight").items():
        modules.require(module, roles, ("qweight", "qzeros", "scales"))
        words, outputs = modules.matrix(module, roles, "qweight")
        groups, _ = modules.matrix(module, roles, "scales")
        order = roles.get("g_idx")
        bits = method.bits
        if bits is None and order is not None:
            bits = words * WORD // order.shape[0]
        if bits not in _GPTQ_BITS or words * WORD % bits:
            raise modules.wrong_shape(
                module, f"qweight is {[words, outputs]}, and values have {bits} bits"
            )
        channels = words * WORD // bits
        modules.check_shape(module, roles["scales"], "scales", (groups, outputs))
        columns = -(-outputs * bits // WORD)
        modules.check_shape(module, roles["qzeros"], "qzeros", (groups, columns))
        if order is not None:
            modules.check_shape(module, order, "g_idx", (channels,))
        modules.check_groups(module, channels, groups, method.group_size)
        yield PackedWeight(
            module=module,
            layout="gptq" if method.zero_points_less_one else "gptq_v2",
            bits=bits,
            shape=(outputs, channels),
            groups=groups,
            parts=_parts(roles, "qweight", "qzeros", "scales", "g_idx"),
        )


def _find_packed(modules: Modules, method: Method) -> Iterator[PackedWeight]:
    """Linears of compressed-tensors in 32-bit words: `[O, K*bits/32]`."""
    for module, roles in modules.with_role("weight_packed").items():
        modules.require(module, roles, ("weight_packed", "weight_scale", "weight_shape"))
        outputs, words = modules.matrix(module, roles, "weight_packed")
        _, groups = modules.matrix(module, roles, "weight_scale")
        scheme = _scheme_of(method, module)
        bits = scheme.bits
        if roles["weight_packed"].dtype != "I32" or bits is None or bits not in _PACKED_BITS:
            raise quantised(
                modules.folder,
                f"compressed-tensors: {module} is packed as {roles['weight_packed'].dtype}, "
                f"{bits} bits a value",
            )
        channels = words * WORD // bits
        modules.check_shape(module, roles["weight_scale"], "weight_scale", (outputs, groups))
        zero_point = roles.get("weight_zero_point")
        if zero_point is not None:
            rows = -(-outputs * bits // WORD)
            modules.check_shape(module, zero_point, "weight_zero_point", (rows, groups))
        order = roles.get("weight_g_idx")
        if order is not None:
            modules.check_shape(module, order, "weight_g_idx", (channels,))
        modules.check_groups(module, channels, groups, scheme.group)
        yield PackedWeight(
            module=module,
            layout="packed",
            bits=bits,
            shape=(outputs, channels),
            groups=groups,
            parts=_parts(
                roles,
                "weight_packed",
                "weight_scale",
                "weight_shape",
                "weight_zero_point",
                "weight_g_idx",
            ),
        )


def _int8(modules: Modules, method: Method) -> Iterator[PackedWeight]:
    """Linears whose weight is stored as int8, with scales next to it."""
    for module, roles in modules.with_role("weight").items():
        if roles["weight"].dtype != "I8":
            continue
        modules.require(module, roles, ("weight_scale",))
        outputs, channels = modules.matrix(module, roles, "weight")
        scale = roles["weight_scale"]
        groups = _groups_of(scale)
        for role in ("weight_scale", "weight_zero_point"):
            if role in roles:
                modules.check_shape(module, roles[role], role, *_scale_shapes(outputs, groups))
        scheme = _scheme_of(method, module)
        modules.check_groups(module, channels, groups, scheme.group)
        yield PackedWeight(
            module=module,
            layout="int8",
            bits=8,
            shape=(outputs, channels),
            groups=groups,
            parts=_parts(roles, "weight", "weight_scale", "weight_zero_point"),
        )


def _float8(modules: Modules, method: Method) -> Iterator[PackedWeight]:
    """Linears whose weight is stored as 8-bit floats, scaled by tensor, output or block."""
    for module, roles in modules.with_role("weight").items():
        if roles["weight"].dtype not in FLOAT8:
            continue
        role = "weight_scale_inv" if "weight_scale_inv" in roles else "weight_scale"
        modules.require(module, roles, (role,))
        scale = roles[role]
        if scale.dtype not in FLOATS:
            raise quantised(modules.folder, f"FP8: {module}.{role} is stored as {scale.dtype}")
        shape = modules.matrix(module, roles, "weight")
        named = method.block or _scheme_of(method, module).block
        block = _block(shape, scale.shape, named)
        if block is None:
            raise modules.wrong_shape(
                module,
                f"{role} is {list(scale.shape)} for a weight {list(shape)}"
                + (f" in blocks of {list(named)}" if named else ""),
            )
        yield PackedWeight(
            module=module,
            layout="float8",
            bits=8,
            shape=shape,
            groups=-(-shape[1] // block[1]),
            block=block,
            parts=_parts(roles, "weight", role),
        )


def _block(
    shape: tuple[int, int], scale: tuple[int, ...], named: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Rows and columns of a weight that share a scale; None where the scales do not fit it.

    Args:
        shape: `(O, K)`.
        scale: Shape of the scales.
        named: What the configuration says.
    """
    outputs, channels = shape
    if scale in {(), (1,), (1, 1)}:
        return shape
    if scale in {(outputs,), (outputs, 1)}:
        return 1, channels
    if len(scale) != 2 or named is None:  # noqa: PLR2004
        return None
    fits = scale == (-(-outputs // named[0]), -(-channels // named[1]))
    return named if fits else None


def _scheme_of(method: Method, module: str) -> Scheme:
    """The scheme of a linear in compressed-tensors' configuration; empty where it has none."""
    return next((scheme for scheme in method.schemes if scheme.covers(module)), Scheme())


def _groups_of(scale: StoredTensor) -> int:
    return scale.shape[1] if len(scale.shape) == 2 else 1  # noqa: PLR2004


def _scale_shapes(outputs: int, groups: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of a scale: by output and group, by output, or one for all."""
    return (outputs, groups), (outputs,), (1, 1), (1,), ()


def _parts(roles: Roles, *wanted: str) -> dict[str, StoredTensor]:
    return {role: roles[role] for role in wanted if role in roles}


_FINDERS: Mapping[str, tuple[Callable[[Modules, Method], Iterator[PackedWeight]], ...]] = {
    "awq": (_awq,),
    "gptq": (_gptq,),
    "compressed-tensors": (_find_packed, _int8, _float8),
    "fp8": (_float8,),
}
