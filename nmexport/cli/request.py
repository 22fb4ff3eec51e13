"""The request of a command line: a recipe, and the work directory that belongs to it."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nmexport.cli.output import progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nmexport.pipeline import Pipeline
    from nmexport.recipe import Recipe
    from nmexport.store.work_directory import WorkDirectory

WORK_ROOT = Path("nmexport-work")
_PATTERN = "sparsity.pattern"
_SPELLED = {_PATTERN: "--pattern"}
_HEAD = "lm_head"


@dataclass(frozen=True, kw_only=True)
class Request:
    """Which build a command line is about, and what it changes of its recipe."""

    model: str | None = None
    file: Path | None = None
    work: Path | None = None
    pattern: str | None = None
    """Only helps to find the work directory."""
    continues: bool = False
    """The work directory's recipe comes before the model's own."""
    overrides: dict[str, object] = field(default_factory=dict)
    """Values by dotted recipe key."""
    spelled: dict[str, str] = field(default_factory=dict)
    """The option that set each."""
    excludes: Sequence[str] = ()
    """`--targets '!PATTERN'`: on top of what the recipe excludes."""

    def recipe(self) -> Recipe:
        """Resolve the recipe: `--recipe`, or the model's, or the work directory's; options on top.

        Raises:
            UserError: whatever is wrong with it.
        """
        from nmexport.recipe import resolve

        model, file = self._base()
        overrides = dict(self.overrides)
        if self.excludes:
            base = resolve(model, file=file).sparsity.targets.exclude
            self._refuse_both(overrides.get("sparsity.targets.include"))
            overrides["sparsity.targets.exclude"] = list(dict.fromkeys([*base, *self.excludes]))
        recipe = resolve(model, overrides, file=file, spelled=self.spelled)
        self._refuse_idle_options(recipe)
        return recipe

    def recipe_on(self, work: WorkDirectory) -> Recipe:
        """Return the recipe of an `existing_work`, scored on the text that the options say.

        Raises:
            UserError: whatever is wrong with them.
        """
        from nmexport.recipe import resolve
        from nmexport.store.work_directory import RESOLVED

        text = {
            key: value for key, value in self.overrides.items() if key.startswith("evaluation.")
        }
        return resolve(None, text, file=work.root / RESOLVED, spelled=self.spelled)

    def work_directory(self, recipe: Recipe) -> WorkDirectory:
        """Return `--work`, or a folder named after model and pattern."""
        from nmexport.store.work_directory import WorkDirectory

        return WorkDirectory(self.work or self._default_work(recipe))

    def existing_work(self) -> WorkDirectory:
        """Find the work directory to read: `--work`, or the model's, or the one last built in.

        Raises:
            UserError: if there is none.
        """
        from nmexport.errors import WorkDirectoryError
        from nmexport.recipe import resolve
        from nmexport.store.work_directory import RESOLVED, WorkDirectory

        named = self.model is not None or self.file is not None
        wanted = (
            resolve(self.model, self._locating(), file=self.file, spelled=_SPELLED)
            if named
            else None
        )
        if self.work is not None:
            work = WorkDirectory(self.work)
        elif wanted is not None:
            work = WorkDirectory(self._default_work(wanted))
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
        self._refuse_other_pattern(work)
        if wanted is not None:
            work.refuse_other_model(wanted)
        return work

    def pipeline(self) -> Pipeline:
        """Prepare everything a build needs, and find the model.

        Raises:
            UserError: whatever is wrong with recipe, model or work directory.
        """
        from nmexport.environment import probe
        from nmexport.models.source import resolve as find_model
        from nmexport.pipeline import Pipeline
        from nmexport.stages.fitting import with_own_phases, with_own_type

        recipe = self.recipe()
        work = self.work_directory(recipe)
        work.refuse_other_model(recipe)
        source, environment = find_model(recipe.model), probe()
        return Pipeline(
            recipe=with_own_phases(with_own_type(recipe, source, environment), environment),
            source=source,
            environment=environment,
            work=work,
            progress=progress(),
            command=shlex.join(["nmexport", *sys.argv[1:]]),
        )

    def _base(self) -> tuple[str | None, Path | None]:
        """Return the model and file that the recipe starts from."""
        from nmexport.recipe import resolve
        from nmexport.store.work_directory import RESOLVED, WorkDirectory

        if self.file is not None or (self.model is not None and not self.continues):
            return self.model, self.file
        if self.model is None:
            if self.work is None:
                return None, None
            self._refuse_other_pattern(WorkDirectory(self.work))
            return None, self.work / RESOLVED
        wanted = resolve(self.model, self._locating(), spelled=_SPELLED)
        work = self.work_directory(wanted)
        if not (work.root / RESOLVED).is_file():
            return self.model, None
        work.refuse_other_model(wanted)
        self._refuse_other_pattern(work)
        return None, work.root / RESOLVED

    def _locating(self) -> dict[str, object]:
        """Return the recipe keys that locate a model's work directory."""
        pattern = self.pattern or self.overrides.get(_PATTERN)
        return {} if pattern is None else {_PATTERN: pattern}

    def _default_work(self, recipe: Recipe) -> Path:
        from nmexport.recipe import short_name

        pattern = recipe.sparsity.pattern
        name = short_name(self.model or recipe.model.id)
        return WORK_ROOT / f"{name}-{pattern.n}of{pattern.m}"

    def _refuse_other_pattern(self, work: WorkDirectory) -> None:
        """Raise unless the directory is a work directory that fits `--pattern`."""
        from nmexport.errors import RecipeError
        from nmexport.sparsity.pattern import NMPattern

        held = work.recipe().sparsity.pattern
        if self.pattern is not None and NMPattern.parse(self.pattern) != held:
            raise RecipeError(
                f"{work.root} was built with the pattern {held}, not {self.pattern}.",
                fix="leave out --pattern, or name another work directory with --work DIR",
            )

    def _refuse_both(self, included: object) -> None:
        """Refuse the head as both included and excluded."""
        from nmexport.errors import RecipeError

        if _HEAD in self.excludes and isinstance(included, list | tuple) and _HEAD in included:
            raise RecipeError(
                f"--targets both includes and excludes {_HEAD}.", fix="keep one of them"
            )

    def _refuse_idle_options(self, recipe: Recipe) -> None:
        """Refuse options that the rest of the recipe makes meaningless."""
        from nmexport.errors import RecipeError

        given = [spelled for spelled in self.spelled.values() if spelled.startswith("--budget-")]
        budget = recipe.allocation.budget.limits()
        if given and not budget:
            raise RecipeError(
                f"{given[0]} says what a budget may choose, and there is none.",
                allowed=f"{given[0]} with --budget, or with a budget in the recipe",
                fix="add --budget bytes=0.6, say; for one pattern for all linears, --pattern",
            )
        if budget and "--pattern" in self.spelled.values():
            raise RecipeError(
                "--pattern gives all linears one pattern, and a budget chooses one for each.",
                allowed="--budget with --budget-pattern, or --pattern alone",
                fix="replace --pattern with --budget-pattern, or add --budget none where the "
                "recipe has one",
            )
