"""The schema of `report.json`, as dataclasses: JSON is written from them and read into them.

A figure that was not measured is None, and a `why` beside it or on its section says why. Every
field that a build may lack has a default, so that a report of an older build can be read.
"""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003  records are read by their annotations
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from nmexport.calibration.effort import LearningSettings  # noqa: TC001  read by annotations
from nmexport.environment import Environment  # noqa: TC001
from nmexport.errors import ArtifactError
from nmexport.json_reader import parse_json
from nmexport.runtimes.engine import BuildRecord
from nmexport.store.allocation import Allocation, as_dict
from nmexport.store.artifact import plain
from nmexport.store.kept import KeptWeights  # noqa: TC001
from nmexport.store.layers import ModelPhases  # noqa: TC001
from nmexport.store.records import json_from, record_from

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = 1
MIXED = "mixed patterns"
"""`pattern` of a report whose linears have patterns of their own: see its `allocation`."""

Verdict = Literal["pass", "fail", "none"]
PhaseName = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model that was built."""

    id: str | None = None
    revision: str | None = None
    parameters: int | None = None
    """Parameters of the dense model."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How each side stores the weights of the sparsified linears."""

    dense: str = ""
    sparse: str = ""


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """One threshold and the figure held against it."""

    name: str
    limit: float
    value: float | None
    """The report's figure; None where it was not measured, which fails the gate."""
    passed: bool
    why: str | None = None
    """Why it failed, in words."""


# -- sparsity -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LayerSparsity:
    """One sparsified linear: what met its weight, and what it lost."""

    name: str
    kept: int
    total: int
    achieved: float | None = None
    relative_error: float | None = None
    """Error of its output inside the running sparse model."""
    calibrated_error: float | None = None
    """Error of the linear alone, from calibration."""


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Zeros that the runtime counted."""

    linears: int | None = None
    sparsified: int | None = None
    """Linears whose pattern drops channels."""
    achieved: float | None = None
    layers: tuple[LayerSparsity, ...] = ()
    protocol: str | None = None


# -- accuracy -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """One model's likelihood of a text."""

    perplexity: float | None = None
    nll_mean: float | None = None
    window_nll_mean: tuple[float | None, ...] | None = None
    why: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Both models on the same tokens."""

    tokens: int | None = None
    windows: int | None = None
    dense: Likelihood = field(default_factory=Likelihood)
    sparse: Likelihood = field(default_factory=Likelihood)
    perplexity_ratio: float | None = None
    perplexity_ratio_stderr: float | None = None
    kl_mean: float | None = None
    top1_agreement: float | None = None
    protocol: str | None = None
    why: str | None = None


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """How alike the two models continue prompts."""

    prompts: int | None = None
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    free_running_agreement: float | None = None
    guided_agreement: float | None = None
    first_divergence: tuple[int | None, ...] | None = None
    median_first_divergence: float | None = None
    protocol: str | None = None
    why: str | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """The text that both models write after a prompt, greedily."""

    prompt: str
    sparse: str
    dense: str | None = None


@dataclass(frozen=True, kw_only=True)
class MetricScore:
    """Both models by one metric of a task."""

    dense: float
    sparse: float
    dense_stderr: float | None = None
    sparse_stderr: float | None = None
    difference_stderr: float | None = None


@dataclass(frozen=True, kw_only=True)
class TaskScore(MetricScore):
    """Both models on a task: the scores of its first metric, and of each."""

    stderr: float | None = None
    """The sparse model's."""
    n: int
    """Documents."""
    metric: str
    metrics: Mapping[str, MetricScore] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Accuracy(Scores):
    """The cost of sparsity: likelihood, divergence, continuations, tasks."""

    dataset: str | None = None
    second_half: Scores | None = None
    """The tokens that `decode_only` scores, with sparsity in all phases."""
    continuation: Continuation = field(default_factory=Continuation)
    examples: tuple[Example, ...] = ()
    decode_only: Scores | None = None
    """Figures of dense prompts and sparse decoding; None where they were not asked for."""
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)
    tasks_protocol: str | None = None


# -- parity ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ParityLeg:
    """Two executors in lock step."""

    max_abs: float | None = None
    median_abs: float | None = None
    top1_agreement: float | None = None
    greedy_identical: bool | None = None
    prompts_diverged: int | None = None
    prompts: int | None = None
    tokens: int | None = None
    why: str | None = None


@dataclass(frozen=True, kw_only=True)
class CacheError:
    """How far the keys or the values of one layer are apart."""

    layer: int
    tensor: str
    relative_error: float | None = None
    """None where a value is not a number."""


@dataclass(frozen=True, kw_only=True)
class CacheParity:
    """Two executors' caches, layer by layer."""

    layers: tuple[CacheError, ...] = ()
    first_diverging: CacheError | None = None
    tolerance: float | None = None
    why: str | None = None


@dataclass(frozen=True, kw_only=True)
class LinearParity:
    """One executor's linears against the oracle."""

    error_over_tolerance: float | None = None
    worst_layer: str | None = None
    within_contract: bool | None = None
    linears: int | None = None
    values: int | None = None
    why: str | None = None


@dataclass(frozen=True, kw_only=True)
class LinearsParity:
    """Each executor's linears against the oracle."""

    torch: LinearParity = field(default_factory=LinearParity)
    onnx: LinearParity = field(default_factory=LinearParity)
    engine: LinearParity = field(default_factory=LinearParity)
    protocol: str | None = None


@dataclass(frozen=True, kw_only=True)
class DenseParity:
    """How far the dense ONNX file is from torch."""

    error: float | None = None
    """Largest relative difference of an output."""
    worst: str | None = None
    """The output that differs most."""
    tolerance: float | None = None
    tokens: int | None = None
    outputs: int | None = None
    """Outputs that were compared."""
    protocol: str | None = None
    why: str | None = None


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Agreement of the executors."""

    noise_floor: ParityLeg | None = None
    torch_onnx: ParityLeg = field(default_factory=ParityLeg)
    torch_engine: ParityLeg = field(default_factory=ParityLeg)
    onnx_engine: ParityLeg = field(default_factory=ParityLeg)
    extent: str | None = None
    """Device of the executors, and how many prompts, steps and linears they ran."""
    protocol: str | None = None
    dense: DenseParity | None = None
    caches: CacheParity | None = None
    linears: LinearsParity = field(default_factory=LinearsParity)


# -- latency and memory ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PhaseTimes:
    """One model's runs of a phase."""

    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    tokens_per_s: float | None = None
    runs: int = 0
    samples_ms: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PrefillTimes(PhaseTimes):
    """Runs of a prompt."""

    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class DecodeTimes(PhaseTimes):
    """Runs of one token on a cache."""

    batch: int | None = None
    context: int | None = None
    device_ms: float | None = None
    """The GPU's time of a step, queued behind others; None where it was not measured."""
    host_us: float | None = None
    """Wall time of a step less the GPU's time."""


@dataclass(frozen=True, kw_only=True)
class SideTimes:
    """One model's times."""

    prefill: PrefillTimes = field(default_factory=PrefillTimes)
    decode: DecodeTimes = field(default_factory=DecodeTimes)


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """Ratios of the medians, dense over sparse, with 95 % intervals."""

    prefill: float | None = None
    decode: float | None = None
    prefill_interval: tuple[float, float] | None = None
    decode_interval: tuple[float, float] | None = None
    why: str | None = None


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Both models' times."""

    runtime: str | None = None
    device: str | None = None
    threads: int | None = None
    runs: int | None = None
    warmup: int | None = None
    dense: SideTimes = field(default_factory=SideTimes)
    sparse: SideTimes = field(default_factory=SideTimes)
    stored: SideTimes | None = None
    """The dense model in the sparse one's integers, where it was timed beside them."""
    speedup: Speedup = field(default_factory=Speedup)
    over_stored: Speedup | None = None
    """The same over the dense model in integers."""
    protocol: str | None = None
    why: str | None = None


@dataclass(frozen=True, kw_only=True)
class ContestantTimes(PhaseTimes):
    """One contestant's runs of one case."""

    name: str
    is_rival: bool
    is_dense: bool
    """Every channel is computed, with weights of 16 bits or more."""
    phase: PhaseName
    batch: int
    tokens: int
    """Tokens in the cache of a decode step, or of the prompt."""
    device_ms: float | None = None
    host_us: float | None = None
    """See `DecodeTimes`."""
    over_rival: float | None = None
    """How many times as fast as the fastest dense rival in this case."""
    why: str | None = None
    """Why there are no times."""


@dataclass(frozen=True, kw_only=True)
class Rivals:
    """Ours beside what else runs the same shapes on the same GPU."""

    engine: str
    """Folder name of the engine that was timed."""
    device: str
    runtime: str
    versions: Mapping[str, str] = field(default_factory=dict)
    runs: int
    together: bool
    """All were in memory at once and ran in turns; otherwise one after another."""
    times: tuple[ContestantTimes, ...] = ()
    protocol: str = ""


@dataclass(frozen=True, kw_only=True)
class StoredDense:
    """The dense model in the sparse one's integers, between the dense model and the sparse one."""

    scores: Scores = field(default_factory=Scores)
    """Its own are under `sparse`; the dense model in floats is `dense`."""
    latency: Latency = field(default_factory=Latency)
    """Its own is under `dense`; `speedup` is the sparse model's over it."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """What it writes after each prompt of the accuracy's examples."""
    dense_bytes: int | None = None
    stored_bytes: int | None = None
    sparse_bytes: int | None = None
    """Sizes of the files: graph and weights."""


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Memory of one model's process."""

    peak_rss_bytes: int | None = None
    why: str | None = None


@dataclass(frozen=True, kw_only=True)
class Memory(PeakMemory):
    """Memory of the models; the first figures are the sparse model's."""

    device_bytes: int | None = None
    why_no_device_bytes: str | None = None
    artifact_bytes: int | None = None
    sparse: PeakMemory = field(default_factory=PeakMemory)
    dense: PeakMemory = field(default_factory=PeakMemory)
    protocol: str | None = None


# -- calibration and engine -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """Divergence from the dense model in nats a token, while constants were learned."""

    learned: tuple[float, ...] = ()
    """Each step's, on the chunks it learned from."""
    block_steps: int = 0
    """Steps of each block, where constants were learned block by block."""
    held_out: tuple[tuple[int, float], ...] = ()
    """Steps done, and the divergence on held-out chunks."""


@dataclass(frozen=True, kw_only=True)
class LearnedConstants:
    """How the learned constants came about."""

    settings: LearningSettings
    curve: LossCurve


@dataclass(frozen=True, kw_only=True)
class GroupingGain:
    """Gain of a linear's calibrated channel order."""

    name: str
    gap_closed: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How calibration went."""

    learning: LearnedConstants | None = None
    grouping: tuple[GroupingGain, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EngineFacts(BuildRecord):
    """The engine that TensorRT made of the model."""

    runtime: str
    compute_capabilities: tuple[str, ...]
    attention: str
    cache: Literal["in place", "concatenated"]
    why_not_in_place: str | None = None


# -- the whole ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Report:
    """Every figure of a verification."""

    model: ModelFacts = field(default_factory=ModelFacts)
    pattern: str | None = None
    criterion: str | None = None
    mitigations: tuple[str, ...] = ()
    grouping: str | None = None
    phases: ModelPhases = "all"
    weights: Weights = field(default_factory=Weights)
    kept: KeptWeights | None = None
    """What is kept of a checkpoint that came quantised."""
    target: str | None = None
    verdict: Verdict
    gates: tuple[GateResult, ...] = ()
    sparsity: Sparsity = field(default_factory=Sparsity)
    allocation: Allocation | None = None
    calibration: Calibration = field(default_factory=Calibration)
    accuracy: Accuracy = field(default_factory=Accuracy)
    parity: Parity = field(default_factory=Parity)
    latency: Latency = field(default_factory=Latency)
    memory: Memory = field(default_factory=Memory)
    stored_dense: StoredDense | None = None
    """None where weights are float, or nothing dense was exported."""
    rivals: Rivals | None = None
    """None where `nmexport bench rivals` has not run on this engine."""
    engine: EngineFacts | None = None
    notes: tuple[str, ...] = ()
    environment: Environment | None = None
    recipe: Mapping[str, object] = field(default_factory=dict)
    command: str | None = None

    @property
    def failed_gates(self) -> list[str]:
        """Names of the gates that failed."""
        return [gate.name for gate in self.gates if not gate.passed]


def json_of(report: Report) -> dict[str, object]:
    """Convert a report to JSON values; what is not a finite number becomes null."""
    document: dict[str, object] = plain({"schema": SCHEMA, **json_from(report)})
    if report.allocation is not None:
        document["allocation"] = as_dict(report.allocation)
    return document


def report_from(document: Mapping[str, Any]) -> Report:
    """Make a report from JSON values; unknown keys are ignored.

    Raises:
        ValueError: naming the first field that is missing or of another type.
    """
    return record_from(Report, dict(document), lenient=True)


def read_report(path: Path) -> Report:
    """Read `report.json`.

    Raises:
        ArtifactError: if there is none, or it is no report of this schema.
    """
    return read_document(path)[1]


def read_document(path: Path) -> tuple[dict[str, object], Report]:
    """Read `report.json`: as it is written, and as a report.

    Raises:
        ArtifactError: if there is none, or it is no report of this schema.
    """
    fix = "make one with `nmexport build` or `nmexport verify`"
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"The report {path} cannot be read: {error.strerror}.", fix=fix
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{path} is no report: it is not JSON ({error}).", fix=fix) from error
    if not isinstance(document, dict) or not {"schema", "verdict"} <= document.keys():
        raise ArtifactError(
            f"{path} is no report: it is other JSON.", allowed="a report.json of nmexport", fix=fix
        )
    if document["schema"] != SCHEMA:
        raise ArtifactError(
            f"{path} has schema {document['schema']!r}; another version of nmexport wrote it.",
            allowed=f"schema {SCHEMA}",
            fix=fix,
        )
    try:
        return document, report_from(document)
    except ValueError as error:
        raise ArtifactError(f"{path} is no report that can be read: {error}.", fix=fix) from error
