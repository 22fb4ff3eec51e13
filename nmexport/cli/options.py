"""The options that builds share: each sets one key of the recipe."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nmexport.cli.output import json_option, progress, verbose_option

if TYPE_CHECKING:
    from collections.abc import Callable

    from nmexport.pipeline import Pipeline
    from nmexport.recipe import Recipe
    from nmexport.store.work_directory import WorkDirectory

F = TypeVar("F", bound="Callable[..., Any]")

WORK_ROOT = Path("nmexport-work")
_REQUEST = "nmexport.request"
_NONE = "none"
_NOT = "!"
_BUDGETS = {
    "ppl": "max_perplexity_ratio",
    "kl": "max_kl",
    "speedup": "min_speedup",
    "bytes": "max_bytes",
}


@dataclass
class Request:
    """What the options of one command line ask for; filled while they are parsed."""

    model: str | None = None
    file: Path | None = None
    work: Path | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    """Values by dotted recipe key."""
    spelled: dict[str, str] = field(default_factory=dict)
    """The option that set each."""
    excludes: list[str] = field(default_factory=list)
    """`--targets '!PATTERN'`: on top of what the recipe excludes."""

    def recipe(self) -> Recipe:
        """The recipe: `--recipe`, or the model's, or the work directory's; options on top.

        Raises:
            UserError: whatever is wrong with it.
        """
        from nmexport.recipe import resolve

        file = self.file
        if file is None and self.model is None and self.work is not None:
            from nmexport.store.work_directory import RESOLVED, WorkDirectory

            WorkDirectory(self.work).recipe()  # says what is wrong where there is none
            file = self.work / RESOLVED
        overrides = dict(self.overrides)
        if self.excludes:
            base = resolve(self.model, file=file).sparsity.targets.exclude
            overrides["sparsity.targets.exclude"] = [*base, *self.excludes]
        recipe = resolve(self.model, overrides, file=file, spelled=self.spelled)
        self._refuse_candidates_without_budget(recipe)
        return recipe

    def recipe_on(self, work: WorkDirectory) -> Recipe:
        """The recipe of an `existing_work`, scored on the text that the options say.

        Raises:
            UserError: whatever is wrong with them.
        """
        from nmexport.recipe import resolve
        from nmexport.store.work_directory import RESOLVED

        text = {
            key: value for key, value in self.overrides.items() if key.startswith("evaluation.")
        }
        return resolve(None, text, file=work.root / RESOLVED, spelled=self.spelled)

    def _refuse_candidates_without_budget(self, recipe: Recipe) -> None:
        from nmexport.errors import RecipeError

        idle = [spelled for spelled in self.spelled.values() if spelled.startswith("--budget-")]
        if idle and not recipe.allocation.budget.limits():
            raise RecipeError(
                f"{idle[0]} says what a budget may choose, and there is none.",
                allowed=f"{idle[0]} with --budget, or with a budget in the recipe",
                fix="add --budget bytes=0.6, say; for one pattern for all linears, --pattern",
            )

    def work_directory(self, recipe: Recipe) -> WorkDirectory:
        """`--work`, or a folder named after model and pattern."""
        from nmexport.store.work_directory import WorkDirectory

        return WorkDirectory(self.work or self._default_work(recipe))

    def _default_work(self, recipe: Recipe) -> Path:
        from nmexport.recipe import short_name

        pattern = recipe.sparsity.pattern
        name = short_name(self.model or recipe.model.id)
        return WORK_ROOT / f"{name}-{pattern.n}of{pattern.m}"

    def existing_work(self) -> WorkDirectory:
        """The work directory to read: `--work`, or the model's, or the one last built in.

        Raises:
            UserError: if there is none.
        """
        from nmexport.errors import WorkDirectoryError
        from nmexport.store.work_directory import RESOLVED, WorkDirectory

        if self.work is not None:
            work = WorkDirectory(self.work)
        elif self.model is not None or self.file is not None:
            recipe = self.recipe()
            work = self.work_directory(recipe)
            work.refuse_other_model(recipe)
        else:
            built = sorted(
                WORK_ROOT.glob(f"*/{RESOLVED}"), key=lambda path: path.stat().st_mtime_ns
            )
            if not built:
                raise WorkDirectoryError(
                    f"There is no work directory under {WORK_ROOT}.",
                    fix="name one with --work DIR, or make one with `nmexport build --model NAME`",
                )
            work = WorkDirectory(built[-1].parent)
        work.recipe()
        return work

    def pipeline(self) -> Pipeline:
        """Everything a build needs, the model found.

        Raises:
            UserError: whatever is wrong with recipe, model or work directory.
        """
        from nmexport.environment import probe
        from nmexport.models.source import resolve as find_model
        from nmexport.pipeline import Pipeline

        recipe = self.recipe()
        work = self.work_directory(recipe)
        work.refuse_other_model(recipe)
        return Pipeline(
            recipe=recipe,
            source=find_model(recipe.model),
            environment=probe(),
            work=work,
            progress=progress(),
            command=shlex.join(["nmexport", *sys.argv[1:]]),
        )


def request(ctx: click.Context) -> Request:
    """What the options of this command line ask for."""
    found: Request = ctx.meta.setdefault(_REQUEST, Request())
    return found


def _option(spelled: str, dotted: str, help_text: str, **attributes: Any) -> Callable[[F], F]:
    """An option that sets one recipe key."""

    def keep(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        del parameter
        if value is None or value == ():
            return
        request(ctx).overrides[dotted] = value
        request(ctx).spelled[dotted] = spelled

    return click.option(
        spelled,
        f"recipe_{dotted.replace('.', '_')}",
        expose_value=False,
        callback=keep,
        help=help_text,
        **attributes,
    )


def _keep_model(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    del parameter
    request(ctx).model = value


def _keep_file(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    del parameter
    request(ctx).file = value


def _keep_work(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    del parameter
    request(ctx).work = value


def _keep_mitigations(ctx: click.Context, parameter: click.Parameter, value: tuple[str]) -> None:
    """`none` among others is a contradiction that the recipe's validation names."""
    del parameter
    if value:
        request(ctx).overrides["sparsity.mitigations"] = [] if value == (_NONE,) else list(value)
        request(ctx).spelled["sparsity.mitigations"] = "--mitigation"


def _keep_tasks(ctx: click.Context, parameter: click.Parameter, value: tuple[str]) -> None:
    del parameter
    names = [name.strip() for text in value for name in text.split(",") if name.strip()]
    if names:
        request(ctx).overrides["evaluation.tasks"] = names
        request(ctx).spelled["evaluation.tasks"] = "--tasks"


def _keep_targets(ctx: click.Context, parameter: click.Parameter, value: tuple[str]) -> None:
    del parameter
    include = [pattern for pattern in value if not pattern.startswith(_NOT)]
    if include:
        request(ctx).overrides["sparsity.targets.include"] = include
        request(ctx).spelled["sparsity.targets.include"] = "--targets"
    request(ctx).excludes = [
        pattern.removeprefix(_NOT) for pattern in value if pattern.startswith(_NOT)
    ]


def _keep_budget(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> None:
    """`NAME=VALUE`s, together in place of the recipe's budget; `none` takes that away."""
    if not value:
        return
    budget: dict[str, float] = {}
    for text in () if value == (_NONE,) else value:
        name, _, number = text.partition("=")
        try:
            budget[_BUDGETS[name]] = float(number)
        except (KeyError, ValueError):
            raise click.BadParameter(
                f"{text!r} is not NAME=NUMBER with a NAME among {', '.join(_BUDGETS)}.",
                ctx,
                parameter,
            ) from None
    request(ctx).overrides["allocation.budget"] = budget
    request(ctx).spelled["allocation.budget"] = "--budget"


model_option = click.option(
    "--model",
    "-m",
    callback=_keep_model,
    expose_value=False,
    metavar="NAME|ID|DIR|FILE",
    help="Recipe name (see `nmexport recipes list`), Hub id, local folder, or .gguf file.",
)
work_option = click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    callback=_keep_work,
    expose_value=False,
    metavar="DIR",
    help="Work directory.  [default: nmexport-work/MODEL-NofM]",
)
recipe_option = click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    callback=_keep_file,
    expose_value=False,
    metavar="FILE",
    help="Recipe in YAML; options override its keys.",
)

_EVALUATION_TEXT = (
    _option("--eval-data", "evaluation.corpus", "Evaluation text, same forms.", metavar="CORPUS"),
    _option("--eval-windows", "evaluation.windows", "Windows.", type=int, metavar="COUNT"),
    _option("--eval-length", "evaluation.length", "Tokens a window.", type=int, metavar="TOKENS"),
)

_RECIPE_OPTIONS = (
    model_option,
    _option("--revision", "model.revision", "Hub branch, tag or commit.", metavar="REV"),
    _option("--pattern", "sparsity.pattern", "Keep N of every M channels.", metavar="N:M"),
    _option(
        "--criterion",
        "sparsity.criterion",
        "What ranks the channels of a group.",
        metavar="act|wina|clact|amber|fisher",
    ),
    click.option(
        "--mitigation",
        multiple=True,
        callback=_keep_mitigations,
        expose_value=False,
        metavar="none|d-pts|s-pts|l-pts|var|s-var|ls|gain|bias|low-rank|r-sparse",
        help="Correction of the error; repeat it for several. Learned: l-pts (shift), ls (scale), "
        "gain, bias, low-rank. Calibrated: s-pts, s-var, r-sparse. Per token: d-pts, var.",
    ),
    _option(
        "--effort",
        "sparsity.effort",
        "How long learned corrections learn.",
        metavar="fast|standard|thorough",
    ),
    _option(
        "--grouping",
        "sparsity.grouping",
        "Which channels compete: neighbours, or those of a permutation.",
        metavar="consecutive|random|balanced",
    ),
    click.option(
        "--targets",
        multiple=True,
        callback=_keep_targets,
        expose_value=False,
        metavar="[!]PATTERN",
        help="Linears to sparsify: a glob over module names, type:CLASS, or layer:A-B; with ! "
        "before it, linears to leave dense. Repeatable.",
    ),
    _option(
        "--phases",
        "sparsity.phases",
        "When to sparsify.",
        metavar="all|prefill|decode",
    ),
    click.option(
        "--budget",
        multiple=True,
        callback=_keep_budget,
        expose_value=False,
        metavar="ppl|kl|speedup|bytes=NUMBER",
        help="Choose for each linear within a limit: perplexity ratio or KL at most, decode "
        "speed-up at least, or share of weight bytes read at most. Repeatable.",
    ),
    _option(
        "--budget-pattern",
        "allocation.patterns",
        "Pattern that --budget may choose, beside dense. Repeatable.  [default: 12, 10, 8, 6 and 4 "
        "of 16]",
        multiple=True,
        metavar="N:M",
    ),
    _option(
        "--budget-criterion",
        "allocation.criteria",
        "Criterion that --budget may choose. Repeatable.  [default: --criterion alone]",
        multiple=True,
        metavar="act|wina|clact|amber|fisher",
    ),
    _option(
        "--budget-phases",
        "allocation.phases",
        "Phases that --budget may choose. Repeatable.  [default: --phases alone]",
        multiple=True,
        metavar="all|prefill|decode",
    ),
    _option(
        "--budget-count-learned",
        "allocation.count_learned",
        "Hold ppl or kl by the model as built, learned corrections and all: chooses and learns up "
        "to three times.",
        is_flag=True,
        flag_value=True,
        default=None,
    ),
    _option(
        "--calib",
        "calibration.corpus",
        "Calibration text: Hub data set, .txt, .jsonl, or `self` (the model writes it).",
        metavar="CORPUS",
    ),
    _option("--calib-samples", "calibration.samples", "Samples.", type=int, metavar="COUNT"),
    _option("--calib-length", "calibration.length", "Tokens a sample.", type=int, metavar="TOKENS"),
    _option(
        "--calib-self-share",
        "calibration.self_share",
        "Share of the samples that the model writes itself, beside a named corpus.",
        type=float,
        metavar="SHARE",
    ),
    _option(
        "--offload",
        "calibration.offload",
        "Calibrate layer by layer, weights mapped from disk: when memory is short, or always.",
        metavar="auto|never|layerwise",
    ),
    *_EVALUATION_TEXT,
    click.option(
        "--tasks",
        multiple=True,
        callback=_keep_tasks,
        expose_value=False,
        metavar="NAME[,NAME...]",
        help="Score tasks of lm-evaluation-harness, dense beside sparse. Repeatable.",
    ),
    _option(
        "--tasks-path",
        "evaluation.tasks_path",
        "Folder of local task files; alone, all of its tasks are scored.",
        metavar="DIR",
    ),
    _option("--task-limit", "evaluation.task_limit", "Documents.", type=int, metavar="COUNT"),
    _option(
        "--task-fewshot",
        "evaluation.task_fewshot",
        "Examples before each question, where the task leaves it open.",
        type=int,
        metavar="COUNT",
    ),
    _option("--seed", "seed", "Of everything drawn at random.", type=int, metavar="NUMBER"),
    _option(
        "--dtype",
        "model.dtype",
        "Element type of exported weights and activations.",
        metavar="float32|float16|bfloat16",
    ),
    _option(
        "--weights",
        "model.weights",
        "How sparsified weights are stored: int8 with a scale an output, or so many channels.",
        metavar="float|int8|int8:CHANNELS",
    ),
    _option(
        "--no-dense-baseline",
        "model.dense_baseline",
        "Export no dense model: half the disk, and nothing to verify against.",
        is_flag=True,
        flag_value=False,
        default=None,
    ),
    _option(
        "--target",
        "target",
        "Runtime to build for.",
        metavar="auto|onnxruntime|tensorrt|tensorrt-rtx",
    ),
    _option(
        "--allow-failed",
        "serving.allow_failed",
        "Package although a gate failed.",
        is_flag=True,
        flag_value=True,
        default=None,
    ),
    _option(
        "--compute-capability",
        "engine.compute_capabilities",
        "GPU to build a TensorRT engine for. Repeatable with tensorrt-rtx.  [default: this one]",
        multiple=True,
        metavar="X.Y",
    ),
    _option(
        "--embed-plugin",
        "engine.embed_plugin",
        "Put the TensorRT plugin library into the plan.",
        is_flag=True,
        flag_value=True,
        default=None,
    ),
    _option(
        "--in-place-cache",
        "engine.in_place_cache",
        "off: copy a TensorRT engine's cache each step, so that Triton can serve the engine.",
        metavar="auto|off",
    ),
    _option(
        "--trust-remote-code",
        "model.trust_remote_code",
        "Run Python code that the model's author wrote.",
        is_flag=True,
        flag_value=True,
        default=None,
    ),
    recipe_option,
    work_option,
    json_option,
    verbose_option,
)


def recipe_options(command: F) -> F:
    """All options that builds share; read them with `request`."""
    for option in reversed(_RECIPE_OPTIONS):
        command = option(command)
    return command


def reading_options(command: F) -> F:
    """Options of the verbs that read a work directory: which one, and how to answer."""
    for option in (verbose_option, json_option, work_option, recipe_option, _PATTERN, model_option):
        command = option(command)
    return command


def evaluation_text_options(command: F) -> F:
    """Options of the verbs that may score another text than what was built with."""
    for option in reversed(_EVALUATION_TEXT):
        command = option(command)
    return command


_PATTERN = _RECIPE_OPTIONS[2]
