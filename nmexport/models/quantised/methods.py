"""Which quantised checkpoints are read, and what their configuration says of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nmexport.models.integrity import read_json
from nmexport.models.unsupported import quantised

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Family = Literal["awq", "gptq", "compressed-tensors", "fp8"]

SIDE_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files in which older checkpoints say how they are quantised."""

_AWQ_VERSIONS = frozenset({"gemm", "exllama", "ipex"})  # these lie in the files in one way
_AUTO_ROUND = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
_FORMATS = frozenset(
    {"pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"}
)
_FP8_METHODS = frozenset({"fp8", "fbgemm_fp8", "modelopt"})


@dataclass(frozen=True, kw_only=True)
class Method:
    """The quantisation of a checkpoint's weights, from its configuration."""

    name: str
    """For messages and reports."""
    family: Family
    bits: int | None = None
    """Bits of a weight; None where the tensors or `groups` tell."""
    group_size: int | None = None
    """Channels that share a scale; -1 is all of them, None where linears differ."""
    zero_points_less_one: bool = True
    """GPTQ's first version stores zero points less one."""
    block: tuple[int, int] | None = None
    """Outputs and channels that share a scale of FP8 weights, where it is by block."""
    schemes: tuple[Scheme, ...] = ()
    """Of compressed-tensors: what it does to which linears."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How compressed-tensors stores the weights of some linears."""

    bits: int | None = None
    group: int | None = None
    """Channels that share a scale; -1 is all of them, None where it is not by group."""
    block: tuple[int, int] | None = None
    """Outputs and channels that share a scale, where it is by block."""
    targets: tuple[str, ...] = ()

    def covers(self, module: str) -> bool:
        """Tell whether it applies to a linear: by class, by name, or by `re:PATTERN`."""
        return any(
            re.match(target[3:], module)
            if target.startswith("re:")
            else target in {"Linear", module} or module.endswith(f".{target}")
            for target in self.targets
        )


def quantisation_section(folder: Path, config: Mapping[str, Any]) -> dict[str, object] | None:
    """Return the section on quantisation of a configuration; None without one.

    Raises:
        ModelError: if a file cannot be read.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        section = part.get("quantization_config") or part.get("compression_config")
        if section:
            return section if isinstance(section, dict) else {"quant_method": str(section)}
    for name in SIDE_FILES:
        path = folder / name
        if not path.is_file():
            continue
        document = read_json(path)
        if isinstance(document, dict):
            return _section_of_side_file(name, document)
    return None


def _section_of_side_file(name: str, document: Mapping[str, Any]) -> dict[str, object]:
    if name == "quantize_config.json":
        return {"quant_method": "gptq", **document}
    if name == "quant_config.json":
        return {"quant_method": "awq", **document}
    return {"quant_method": "modelopt", **document.get("quantization", {})}


def method_of(folder: Path, section: Mapping[str, Any]) -> Method:
    """Read a configuration's section.

    Raises:
        UnsupportedModelError: if it names a method, or a variant of one, that is not read.
    """
    named = str(section.get("quant_method") or "")
    if named == "auto-round":
        named = _AUTO_ROUND.get(str(section.get("packing_format")), "")
    if named == "awq":
        return _awq(folder, section)
    if named == "gptq":
        return _gptq(folder, section)
    if named == "compressed-tensors":
        return _compressed_tensors(folder, section)
    algorithm = str(section.get("quant_algo") or "FP8")
    if named in _FP8_METHODS and algorithm.startswith("FP8"):
        block = _pair(section.get("weight_block_size"))
        return Method(name="FP8", family="fp8", bits=8, block=block)
    raise quantised(folder, section)


def _awq(folder: Path, section: Mapping[str, Any]) -> Method:
    version = str(section.get("version") or section.get("checkpoint_format") or "gemm").lower()
    if version not in _AWQ_VERSIONS:
        raise quantised(folder, section, f"in AWQ's layout {version!r}")
    size = section.get("group_size", section.get("q_group_size"))
    return Method(
        name="AWQ",
        family="awq",
        bits=_integer(section.get("bits", section.get("w_bit"))),
        group_size=None if section.get("dynamic") else _integer(size),
    )


def _gptq(folder: Path, section: Mapping[str, Any]) -> Method:
    layout = str(section.get("checkpoint_format") or section.get("format") or "gptq").lower()
    if layout not in {"gptq", "gptq_v2"}:
        raise quantised(folder, section, f"in GPTQ's layout {layout!r}")
    varies = bool(section.get("dynamic"))  # some linears are quantised in another way
    return Method(
        name="GPTQ",
        family="gptq",
        bits=None if varies else _integer(section.get("bits")),
        group_size=None if varies else _integer(section.get("group_size")),
        zero_points_less_one=layout == "gptq",
    )


def _compressed_tensors(folder: Path, section: Mapping[str, Any]) -> Method:
    groups = section.get("config_groups")
    layouts = {str(section.get("format"))}
    schemes = []
    for part in groups.values() if isinstance(groups, dict) else ():
        weights = part.get("weights") or {}
        layouts |= {str(part["format"])} if part.get("format") else set()
        bits, targets = _integer(weights.get("num_bits")), part.get("targets")
        if bits is not None and isinstance(targets, list):
            scheme = Scheme(
                bits=bits,
                group=_integer(weights.get("group_size")),
                block=_pair(weights.get("block_structure")),
                targets=tuple(map(str, targets)),
            )
            schemes.append(scheme)
    unread = sorted(layouts - _FORMATS)
    if unread:
        raise quantised(folder, section, f"in the format {unread[0]!r}")
    if not schemes:
        raise quantised(folder, section, "and its config names no scheme of the weights")
    for part in ("transform_config", "sparsity_config"):
        if _says_something(section.get(part)):
            raise quantised(folder, section, f"with a {part}")
    return Method(name="compressed-tensors", family="compressed-tensors", schemes=tuple(schemes))


def _says_something(part: Any) -> bool:
    """Tell whether an optional part of the configuration changes what the weights mean."""
    if not isinstance(part, dict):
        return False
    if "format" in part:
        return bool(part["format"] != "dense")
    return any(bool(value) for value in part.values())


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _pair(value: Any) -> tuple[int, int] | None:
    """Two positive integers, as a list or as older files write them: `128x128`."""
    parts = value.split("x") if isinstance(value, str) else value
    try:
        first, second = (int(part) for part in parts)
    except (TypeError, ValueError):
        return None
    return (first, second) if first > 0 and second > 0 else None
