"""A sweep file: which recipes and baselines are measured, as data; no torch.

schema: 1
models: [smollm2]
recipe: {calibration: {samples: 32}}       # over each model's own recipe, in every cell
grid:                                      # every combination is a cell; or a list of grids
  sparsity.pattern: ["2:4", "8:16"]
  sparsity.criterion: [act, wina]
cells:                                     # more cells, one by one
  - {sparsity.pattern: "8:16", sparsity.mitigations: [var]}
baselines: [activations 50%, weights 50%, weights 8:16, weights 2:4]
measure: accuracy                          # or build: all stages, speed as well
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from nmexport import strict_yaml
from nmexport.errors import RecipeError
from nmexport.recipe import Recipe, resolve, short_name
from nmexport.resources import resource_path
from nmexport.sparsity.pattern import NMPattern

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SCHEMA = 1
Measure = Literal["accuracy", "build"]
What = Literal["activations", "weights"]

_KEYS = ("schema", "models", "recipe", "grid", "cells", "baselines", "measure")
_BASELINE = re.compile(r"(activations|weights) +(?:([0-9.]+) ?%|(\d+:\d+))")
_BASELINE_FORMS = (
    "`activations 50%`, `weights 50%` (the smallest half is zero), `weights 8:16` (of each 16, "
    "the 8 largest stay)"
)
_ALL = 100.0
_SHIPPED = resource_path("recipes") / "sweeps"


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Something to compare activation sparsity with; nothing is calibrated for it."""

    what: What
    """The sparse operand: each token's inputs, or the weights once and for all."""
    pattern: NMPattern | None = None
    """Groups along the input features; None is unstructured."""
    zeros: float | None = None
    """Share of zeros, where there are no groups."""

    def __post_init__(self) -> None:
        """Refuse what names no baseline.

        Raises:
            RecipeError: unless it has either groups, of weights, or a share of zeros.
        """
        if (self.pattern is None) == (self.zeros is None):
            raise RecipeError("A baseline has either groups or a share.", allowed=_BASELINE_FORMS)
        if self.zeros is not None and not 0 < self.zeros < 1:
            raise RecipeError(
                f"A baseline cannot have {self.zeros:.0%} zeros.", allowed="above 0 %, below 100 %"
            )
        if self.what == "activations" and self.pattern is not None:
            raise RecipeError(
                f"activations {self.pattern} is no baseline.",
                allowed=_BASELINE_FORMS,
                fix="put the pattern into the grid",
            )

    @classmethod
    def parse(cls, text: object) -> Self:
        """Read `weights 2:4` or `activations 50%`.

        Raises:
            RecipeError: if it is neither.
            PatternError: if the pattern is malformed.
        """
        match = _BASELINE.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise RecipeError(f"There is no baseline {text!r}.", allowed=_BASELINE_FORMS)
        what: What = "weights" if match[1] == "weights" else "activations"
        if match[3]:
            return cls(what=what, pattern=NMPattern.parse(match[3]))
        return cls(what=what, zeros=float(match[2]) / _ALL)

    def __str__(self) -> str:
        """Write it as in the file."""
        if self.pattern is not None:
            return f"{self.what} {self.pattern}"
        return f"{self.what} {_ALL * (self.zeros or 0.0):g}%"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing to measure: a recipe, or a baseline on a recipe's model and text."""

    recipe: Recipe
    baseline: Baseline | None = None
    more: tuple[tuple[str, str], ...] = ()
    """Settings other than pattern, criterion, mitigations and grouping."""
    refused: str | None = None
    """Why this combination is none; its recipe is then the sweep's own."""

    @property
    def label(self) -> str:
        """Name that tells it from other cells of its model."""
        if self.baseline is not None:
            return str(self.baseline)
        if self.refused is not None:
            return ", ".join(f"{key} {value}" for key, value in self.more)
        section = self.recipe.sparsity
        parts = [section.criterion, "+".join(section.mitigations) or "none", section.grouping]
        if section.phases != "all":
            parts.append(f"{section.phases} only")
        return ", ".join([*parts, *(f"{key} {value}" for key, value in self.more)])


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep file, resolved."""

    name: str
    measure: Measure
    cells: Mapping[str, tuple[Cell, ...]]
    """By model, as the file names it, in the file's order."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All cells of one model; what one machine does at a time."""

    model: str
    folder: Path
    cells: tuple[Cell, ...]
    measure: Measure


def find(name: str) -> Path:
    """Find a sweep file: a path, or the name of one in the package.

    Raises:
        RecipeError: if it is neither.
    """
    for path in (Path(name), _SHIPPED / f"{name}.yaml"):
        if path.is_file():
            return path
    raise RecipeError(
        f"There is no sweep {name!r}.", allowed=f"a YAML file, or {', '.join(names())}"
    )


def names() -> list[str]:
    """List the sweeps in the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> Sweep:
    """Read a sweep file.

    Args:
        path: The file.
        overrides: Recipe keys on top of every cell, by dotted name.

    Raises:
        RecipeError: if it cannot be read, or something in it is wrong.
    """
    try:
        document = strict_yaml.read(path.read_text(encoding="utf-8"), str(path)).value
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The sweep {path} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise RecipeError(f"{path} is no sweep.", allowed=f"keys, among them schema: {SCHEMA}")
    unknown = sorted(set(document) - set(_KEYS))
    if unknown:
        raise RecipeError(
            f"{path}: {unknown[0]} is not a key of a sweep.", allowed=", ".join(_KEYS)
        )
    measure = document.get("measure", "accuracy")
    if measure not in get_args(Measure):
        raise RecipeError(f"{path}: measure cannot be {measure!r}.", allowed="accuracy, build")
    common = {**_flatten(_section(document, "recipe", path)), **(overrides or {})}
    baselines = [Baseline.parse(text) for text in _read_list(document, "baselines", path)]
    variants = [*_combinations(document, path), *_single_cells(document, path)]
    if not variants and not baselines:
        raise RecipeError(f"{path} asks for nothing.", allowed="grid, cells or baselines")
    return Sweep(
        name=path.stem,
        measure=measure,
        cells={
            model: tuple(_cells(model, common, variants, baselines))
            for model in _models(document, path)
        },
    )


def folders(sweep: Sweep) -> dict[str, str]:
    """Choose a different folder name for each model."""
    names: dict[str, str] = {}
    for model in sweep.cells:
        name = short_name(model)
        names[model] = name if name not in names.values() else f"{name}-{len(names)}"
    return names


def _models(document: Mapping[str, Any], path: Path) -> list[str]:
    models = _read_list(document, "models", path)
    if not models or not all(isinstance(model, str) for model in models):
        raise RecipeError(
            f"{path} names no models.", allowed="models: a list of recipe names, Hub ids or folders"
        )
    return list(dict.fromkeys(models))


def _cells(
    model: str,
    common: Mapping[str, Any],
    variants: Sequence[Mapping[str, Any]],
    baselines: Sequence[Baseline],
) -> Iterator[Cell]:
    """List the cells of one model, none twice."""
    base = resolve(model, common)
    seen: set[Recipe] = set()
    for variant in variants:
        try:
            recipe = resolve(model, {**common, **variant})
        except RecipeError as error:
            if len(variants) == 1 or _is_wrong_alone(model, common, variant):
                raise
            settings = tuple(
                (key.rpartition(".")[2], _format(value)) for key, value in variant.items()
            )
            yield Cell(recipe=base, more=settings, refused=error.problem)
            continue
        if recipe not in seen:
            seen.add(recipe)
            yield Cell(recipe=recipe, more=_more(variant))
    for baseline in dict.fromkeys(baselines):
        yield Cell(recipe=base, baseline=baseline)


def _is_wrong_alone(model: str, common: Mapping[str, Any], variant: Mapping[str, Any]) -> bool:
    """Tell a value that is wrong wherever it stands from values that do not go together."""
    for key, value in variant.items():
        try:
            resolve(model, {**common, key: value})
        except RecipeError:
            return True
    return False


def _more(variant: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    named = {"pattern", "criterion", "mitigations", "grouping", "phases"}
    return tuple(
        (key.rpartition(".")[2], _format(value))
        for key, value in variant.items()
        if key.removeprefix("sparsity.") not in named
    )


def _format(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _combinations(document: Mapping[str, Any], path: Path) -> Iterator[dict[str, object]]:
    """Yield every combination of the values of each grid."""
    grids = document.get("grid") or []
    for grid in grids if isinstance(grids, list) else [grids]:
        if not isinstance(grid, dict) or not all(isinstance(v, list) for v in grid.values()):
            raise RecipeError(
                f"{path}: grid cannot be {grid!r}.",
                allowed='recipe keys with lists of values, such as sparsity.pattern: ["8:16"]',
            )
        for values in itertools.product(*grid.values()):
            yield dict(zip(grid, values, strict=True))


def _single_cells(document: Mapping[str, Any], path: Path) -> Iterator[dict[str, object]]:
    for cell in _read_list(document, "cells", path):
        if not isinstance(cell, dict):
            raise RecipeError(f"{path}: a cell cannot be {cell!r}.", allowed="recipe keys")
        yield _flatten(cell)


def _section(document: Mapping[str, Any], key: str, path: Path) -> dict[str, object]:
    section = document.get(key) or {}
    if not isinstance(section, dict):
        raise RecipeError(f"{path}: {key} cannot be {section!r}.", allowed="a section of keys")
    return section


def _read_list(document: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    values = document.get(key) or []
    if not isinstance(values, list):
        raise RecipeError(f"{path}: {key} cannot be {values!r}.", allowed="a list")
    return values


def _flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Flatten nested keys to dotted names."""
    flat: dict[str, object] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
