"""Refuses at the start what no stage can read: adapters, unknown quantisation."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from nmexport.errors import ModelError
from nmexport.models.integrity import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Element types that weights may be stored in, as safetensors spells them."""

_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fp8": "FP8",
    "mxfp4": "MXFP4",
}
_SUFFIX = re.compile(
    r"[-_.](gptq|awq|fp8|bnb|nf4|nvfp4|mxfp4|int[48]|w[48]a(8|16)|[48]-?bit|quantized|dynamic|g\d+)\b.*",
    re.IGNORECASE,
)


class UnsupportedModelError(ModelError):
    """A model that is whole, and of a kind that is not taken."""


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder with a LoRA or another adapter: nobody says whether it is to be applied.

    Raises:
        UnsupportedModelError: if there is one.
    """
    path = next((folder / name for name in _ADAPTERS if (folder / name).is_file()), None)
    if path is None:
        return
    document = read_json(path) if path.suffix == ".json" else None
    base = document.get("base_model_name_or_path") if isinstance(document, dict) else None
    whole = (folder / "config.json").is_file()
    raise UnsupportedModelError(
        f"{folder} holds an adapter ({path.name}"
        + (f", of {base}" if base else "")
        + (") next to a whole model." if whole else ") and no whole model."),
        allowed="a whole model; adapters are not applied",
        fix="merge it into its base once, with peft's `merge_and_unload()` and `save_pretrained`"
        + (", or remove the adapter's files to build the model without it" if whole else ""),
    )


def quantised(
    folder: Path, section: Mapping[str, Any] | str, detail: str = ""
) -> UnsupportedModelError:
    """Build the error that says a checkpoint is quantised in a way that is not read.

    Args:
        folder: Where it lies.
        section: What its configuration says of it, or the method in words.
        detail: What of it is not read.
    """
    original = _original(folder)
    method = section if isinstance(section, str) else _method(section)
    return UnsupportedModelError(
        f"{folder} is quantised ({method}{', ' if detail else ''}{detail}), which is not read.",
        allowed="AWQ (GEMM layout), GPTQ, compressed-tensors with integers or 8-bit floats, FP8, a "
        ".gguf, or safetensors in float32, float16 or bfloat16",
        fix="use the checkpoint that it was quantised from" + (f": {original}" if original else ""),
    )


def _method(section: Mapping[str, Any]) -> str:
    """Return a quantisation's name from its section of the config."""
    name = section.get("quant_method")
    if name is None:
        by_bits = any(section.get(f"load_in_{bits}bit") for bits in (4, 8))
        name = "bitsandbytes" if by_bits else section.get("quant_algo") or section.get("format")
    if name is None:
        return "by a method that its config does not name"
    bits = section.get("bits") or section.get("w_bit")
    bits = bits or next((b for b in (4, 8) if section.get(f"load_in_{b}bit")), None)
    return _NAMES.get(str(name), str(name)) + (f", {bits} bits" if bits else "")


def _original(folder: Path) -> str | None:
    """Find what a checkpoint was quantised from, in its model card or its folder's name."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")[:20_000]
        named = re.search(r"^base_model:\s*(?:\n\s*-\s*)?([\w./-]+)\s*$", text, re.MULTILINE)
        if named:
            return named[1]
    plain = _SUFFIX.sub("", folder.name)
    return plain if plain and plain != folder.name else None
