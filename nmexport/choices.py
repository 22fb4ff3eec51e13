"""Values that the keys of a recipe choose from; no imports, so that `--help` can show them."""

from __future__ import annotations

from typing import Literal, get_args

Criterion = Literal["act", "wina", "clact", "amber", "fisher"]
Mitigation = Literal[
    "d-pts", "s-pts", "l-pts", "var", "s-var", "ls", "gain", "bias", "low-rank", "r-sparse"
]
Grouping = Literal["consecutive", "random", "balanced"]
Effort = Literal["fast", "standard", "thorough"]
Offload = Literal["auto", "never", "layerwise"]
Phase = Literal["all", "prefill", "decode"]
Dtype = Literal["float32", "float16", "bfloat16"]
Target = Literal["auto", "onnxruntime", "tensorrt", "tensorrt-rtx"]
Activations = Literal["auto", "float", "int8"]
InPlaceCache = Literal["auto", "off"]
Trials = Literal["run", "gradient"]
Stage = Literal["calibrate", "fold", "export", "engine", "verify", "package"]

REMOVED_GROUPINGS = {
    "exchange": "use balanced: the search by exchange was removed, as it gains nothing once "
    "constants are learned"
}
"""Groupings that older recipes and scripts may name, and what to use in place of each."""

STAGE_NAMES: tuple[Stage, ...] = get_args(Stage)
"""In order of running."""
