"""Options that set a key of the recipe, and which of them each verb takes.

`build` takes all of them, a stage's own verb those that change what the stage does; the rest of its
recipe is the work directory's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

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
)
from nmexport.cli.verb import OneOf, UserPath, Words

if TYPE_CHECKING:
    from collections.abc import Callable

    from nmexport.choices import Stage

_NONE = "none"
_NOT = "!"
_BUDGETS = {
    "ppl": "max_perplexity_ratio",
    "kl": "max_kl",
    "speedup": "min_speedup",
    "bytes": "max_bytes",
}


def _mitigations(values: tuple[str, ...]) -> list[str]:
    if _NONE in values and len(set(values)) > 1:
        raise click.BadParameter("none goes with no other.", param_hint="'--mitigation'")
    return [] if _NONE in values else list(dict.fromkeys(values))


def _tasks(values: tuple[str, ...]) -> list[str]:
    names = [name.strip() for text in values for name in text.split(",")]
    if not all(names):
        raise click.BadParameter(
            f"{','.join(values)!r} holds an empty name.", param_hint="'--tasks'"
        )
    return list(dict.fromkeys(names))


def _budget(values: tuple[str, ...]) -> dict[str, float]:
    """Read `NAME=VALUE`s, which replace the recipe's budget; `none` removes it."""
    hint = "'--budget'"
    if _NONE in values:
        if len(values) > 1:
            raise click.BadParameter("none goes with no other.", param_hint=hint)
        return {}
    budget: dict[str, float] = {}
    for text in values:
        name, _, number = text.partition("=")
        try:
            limit = float(number)
            key = _BUDGETS[name]
        except (KeyError, ValueError):
            raise click.BadParameter(
                f"{text!r} is not NAME=NUMBER with a NAME among {', '.join(_BUDGETS)}.",
                param_hint=hint,
            ) from None
        if key in budget:
            raise click.BadParameter(f"{name} is given twice.", param_hint=hint)
        budget[key] = limit
    return budget


def _include(values: tuple[str, ...]) -> list[str] | None:
    return [pattern for pattern in values if not pattern.startswith(_NOT)] or None


def excluded(values: tuple[str, ...]) -> list[str]:
    return [pattern.removeprefix(_NOT) for pattern in values if pattern.startswith(_NOT)]


@dataclass(frozen=True, kw_only=True)
class RecipeOption:
    """An option that sets one key of the recipe."""

    spelled: str
    key: str
    """Dotted key in the recipe."""
    help: str
    kind: click.ParamType[Any] | type = str
    metavar: str | None = None
    multiple: bool = False
    sets: bool | None = None
    """The value that a flag sets; None where the option takes a value."""
    read: Callable[[Any], Any] | None = None
    """Turns the option's value into the recipe's."""

    @property
    def parameter(self) -> str:
        """Name of the parameter that holds what was given."""
        return self.spelled.removeprefix("--").replace("-", "_")

    def declare(self, command: Any) -> Any:
        """Add the option to a command."""
        if self.sets is not None:
            option = click.option(self.spelled, self.parameter, is_flag=True, help=self.help)
        else:
            option = click.option(
                self.spelled,
                self.parameter,
                type=self.kind,
                metavar=self.metavar,
                multiple=self.multiple,
                help=self.help,
            )
        return option(command)

    def value(self, given: Any) -> Any:
        """Return the recipe's value; None where the option was not given."""
        if given is None or given is False or given == ():
            return None
        if self.sets is not None:
            return self.sets
        if self.read is not None:
            return self.read(given)
        return list(given) if self.multiple else given


PATTERN = RecipeOption(
    spelled="--pattern", key="sparsity.pattern", metavar="N:M", help="Keep N of every M channels."
)
TARGETS = RecipeOption(
    spelled="--targets",
    key="sparsity.targets.include",
    metavar="[!]PATTERN",
    multiple=True,
    read=_include,
    help="Linears to sparsify: a glob over module names, type:CLASS, or layer:A-B; with ! "
    "before it, linears to leave dense. Repeatable.",
)
_SEED = RecipeOption(spelled="--seed", key="seed", kind=int, metavar="NUMBER", help="Random seed.")
_DTYPE = RecipeOption(
    spelled="--dtype",
    key="model.dtype",
    kind=OneOf(Dtype),
    help="Element type of exported weights and activations. Default: float32; where a GPU runs "
    "them, the checkpoint's own 16 bits.",
)
_OFFLOAD = RecipeOption(
    spelled="--offload",
    key="calibration.offload",
    kind=OneOf(Offload),
    help="Calibrate layer by layer, weights mapped from disk: when memory is short, or always.",
)
_MODEL = (
    RecipeOption(
        spelled="--revision",
        key="model.revision",
        metavar="REV",
        help="Hub branch, tag or commit.",
    ),
    RecipeOption(
        spelled="--trust-remote-code",
        key="model.trust_remote_code",
        sets=True,
        help="Run the model author's Python code.",
    ),
)
_METHOD = (
    PATTERN,
    RecipeOption(
        spelled="--criterion",
        key="sparsity.criterion",
        kind=OneOf(Criterion),
        help="Score that ranks the channels of a group.",
    ),
    RecipeOption(
        spelled="--mitigation",
        key="sparsity.mitigations",
        kind=OneOf(Mitigation, _NONE),
        multiple=True,
        read=_mitigations,
        help="Correction of the error; repeat it for several. Learned: l-pts (shift), ls (scale), "
        "gain, bias, low-rank. Calibrated: s-pts, s-var, r-sparse. Per token: d-pts, var.",
    ),
    RecipeOption(
        spelled="--effort",
        key="sparsity.effort",
        kind=OneOf(Effort),
        help="How long to train learned corrections.",
    ),
    RecipeOption(
        spelled="--grouping",
        key="sparsity.grouping",
        kind=OneOf(Grouping, removed=REMOVED_GROUPINGS),
        help="Which channels compete: neighbours, or those of a permutation.",
    ),
    TARGETS,
    RecipeOption(
        spelled="--phases",
        key="sparsity.phases",
        kind=OneOf(Phase),
        help="When to sparsify.  [default: all; where a GPU runs the engine, decode]",
    ),
)
_BUDGET = (
    RecipeOption(
        spelled="--budget",
        key="allocation.budget",
        kind=Words(lambda: [*(f"{name}=" for name in _BUDGETS), _NONE]),
        metavar="ppl|kl|speedup|bytes=NUMBER",
        multiple=True,
        read=_budget,
        help="Choose for each linear within a limit: perplexity ratio or KL at most, decode "
        "speed-up at least, or share of weight bytes read at most. Repeatable.",
    ),
    RecipeOption(
        spelled="--budget-pattern",
        key="allocation.patterns",
        metavar="N:M",
        multiple=True,
        help="Pattern that --budget may choose, along with dense. Repeatable.  [default: 12, 10, "
        "8, 6 and 4 of 16]",
    ),
    RecipeOption(
        spelled="--budget-weights",
        key="allocation.weights",
        kind=Words(lambda: ["float", "int8", "int8:128", "int4", "int4:64"]),
        metavar="float|int8|int8:CHANNELS|int4|int4:CHANNELS",
        multiple=True,
        help="Form of weights that --budget may choose for a linear. Repeatable.  [default: "
        "--weights alone]",
    ),
    RecipeOption(
        spelled="--budget-criterion",
        key="allocation.criteria",
        kind=OneOf(Criterion),
        multiple=True,
        help="Criterion that --budget may choose. Repeatable.  [default: --criterion alone]",
    ),
    RecipeOption(
        spelled="--budget-phases",
        key="allocation.phases",
        kind=OneOf(Phase),
        multiple=True,
        help="Phases that --budget may choose. Repeatable.  [default: --phases alone]",
    ),
    RecipeOption(
        spelled="--budget-count-learned",
        key="allocation.count_learned",
        sets=True,
        help="Apply the limit on ppl or kl to the model as built, with its learned corrections: "
        "chooses and learns up to three times.",
    ),
)
_CALIBRATION = (
    RecipeOption(
        spelled="--calib",
        key="calibration.corpus",
        metavar="CORPUS",
        help="Calibration text: Hub data set, .txt, .jsonl, `self` (the model writes it) or "
        "`python` (the manual and source code that come with it).",
    ),
    RecipeOption(
        spelled="--calib-samples",
        key="calibration.samples",
        kind=int,
        metavar="COUNT",
        help="Number of samples.",
    ),
    RecipeOption(
        spelled="--calib-length",
        key="calibration.length",
        kind=int,
        metavar="TOKENS",
        help="Tokens in a sample.",
    ),
    RecipeOption(
        spelled="--calib-self-share",
        key="calibration.self_share",
        kind=float,
        metavar="SHARE",
        help="Share of the samples that the model writes itself, next to a named corpus.",
    ),
    _OFFLOAD,
)
_EVALUATION_TEXT = (
    RecipeOption(
        spelled="--eval-data",
        key="evaluation.corpus",
        metavar="CORPUS",
        help="Evaluation text, in the same forms as --calib.",
    ),
    RecipeOption(
        spelled="--eval-windows",
        key="evaluation.windows",
        kind=int,
        metavar="COUNT",
        help="Number of windows.",
    ),
    RecipeOption(
        spelled="--eval-length",
        key="evaluation.length",
        kind=int,
        metavar="TOKENS",
        help="Tokens in a window.",
    ),
)
_TASKS = (
    RecipeOption(
        spelled="--tasks",
        key="evaluation.tasks",
        metavar="NAME[,NAME...]",
        multiple=True,
        read=_tasks,
        help="Score tasks of lm-evaluation-harness, dense next to sparse. Repeatable.",
    ),
    RecipeOption(
        spelled="--tasks-path",
        key="evaluation.tasks_path",
        kind=UserPath(),
        metavar="DIR",
        help="Folder of local task files; alone, all of its tasks are scored.",
    ),
    RecipeOption(
        spelled="--task-limit",
        key="evaluation.task_limit",
        kind=int,
        metavar="COUNT",
        help="Number of documents.",
    ),
    RecipeOption(
        spelled="--task-fewshot",
        key="evaluation.task_fewshot",
        kind=int,
        metavar="COUNT",
        help="Examples before each question, where the task leaves it open.",
    ),
)
_WEIGHTS = RecipeOption(
    spelled="--weights",
    key="model.weights",
    kind=Words(lambda: ["auto", "float", "int8", "int8:128", "int4", "int4:64"]),
    metavar="auto|float|int8|int8:CHANNELS|int4|int4:CHANNELS",
    help="How to store weights. auto: as in the checkpoint. int8: one scale per output. int4: also "
    "one per 32 channels, or per CHANNELS. int8 and int4 hold for every linear, sparse or dense; "
    "output head and embedding take 8 bits.",
)
_ACTIVATIONS = RecipeOption(
    spelled="--activations",
    key="model.activations",
    kind=OneOf(Activations),
    help="Type that integer weights are multiplied with. int8 rounds activations, for integer "
    "products; auto does so on a CPU.",
)
_NO_DENSE_BASELINE = RecipeOption(
    spelled="--no-dense-baseline",
    key="model.dense_baseline",
    sets=False,
    help="Export no dense model: halves the disk space, but leaves nothing to verify against.",
)
_ENGINE = (
    RecipeOption(
        spelled="--target", key="target", kind=OneOf(Target), help="Runtime to build for."
    ),
    RecipeOption(
        spelled="--compute-capability",
        key="engine.compute_capabilities",
        metavar="X.Y",
        multiple=True,
        help="GPU to build a TensorRT engine for. Repeatable with tensorrt-rtx.  [default: this "
        "one]",
    ),
    RecipeOption(
        spelled="--embed-plugin",
        key="engine.embed_plugin",
        sets=True,
        help="Put the TensorRT plugin library into the plan.",
    ),
    RecipeOption(
        spelled="--in-place-cache",
        key="engine.in_place_cache",
        kind=OneOf(InPlaceCache),
        help="off: copy a TensorRT engine's cache each step, so that Triton can serve the engine.",
    ),
)
_ALLOW_FAILED = RecipeOption(
    spelled="--allow-failed",
    key="serving.allow_failed",
    sets=True,
    help="Package although a gate failed.",
)
BUILD: tuple[RecipeOption, ...] = (
    *_MODEL,
    *_METHOD,
    *_BUDGET,
    *_CALIBRATION,
    *_EVALUATION_TEXT,
    *_TASKS,
    _SEED,
    _DTYPE,
    _WEIGHTS,
    _ACTIVATIONS,
    _NO_DENSE_BASELINE,
    *_ENGINE,
    _ALLOW_FAILED,
)
"""All recipe options."""
OF_STAGE: dict[Stage, tuple[RecipeOption, ...]] = {
    # The method is checked against the model before the long part; text that both name is cut so
    # that evaluation gets its own.
    "calibrate": (*_MODEL, *_METHOD, *_CALIBRATION, *_EVALUATION_TEXT, _SEED),
    "fold": (*_METHOD, *_BUDGET, _OFFLOAD, _DTYPE, _WEIGHTS, _ACTIVATIONS),
    "export": (_NO_DENSE_BASELINE,),
    "engine": _ENGINE,
    "verify": (*_EVALUATION_TEXT, *_TASKS),
    "package": (_ALLOW_FAILED,),
}
"""The options that change a stage, and nothing before it."""
EVALUATION_TEXT = _EVALUATION_TEXT
