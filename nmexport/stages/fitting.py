"""Check a recipe, its texts and the model against each other, before anything runs.

No weight is read: a model is known by its configuration and the headers of its files.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

from nmexport.errors import ModelError
from nmexport.models.weight_files import stored_tensors
from nmexport.sparsity.mitigation import MITIGATIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nmexport.choices import Dtype
    from nmexport.environment import Environment
    from nmexport.models.source import ModelSource
    from nmexport.recipe import Recipe
    from nmexport.sparsity.pattern import NMPattern

_NARROW: Mapping[str, Dtype] = {"BF16": "bfloat16", "F16": "float16"}
_MATRIX = 2  # dimensions


def with_own_type(recipe: Recipe, source: ModelSource, environment: Environment) -> Recipe:
    """Give a recipe that names no type the checkpoint's, where that has 16 bits and a GPU runs it.

    On a CPU the default stays float32, which its kernels are fastest in. On a GPU float32 would
    double what every token reads, and the provider's attention takes 16 bits alone, as do kernels
    for weights of integers: where those come without such a type, float16 is chosen.

    Args:
        recipe: What is to be built.
        source: The model.
        environment: This machine.
    """
    if "dtype" in recipe.model.model_fields_set or not gpu_runs(environment):
        return recipe
    own = stored_type(source)
    if own is None and _has_integers(recipe, source):
        own = "float16"
    if own is None:
        return recipe
    section = recipe.model.model_copy(update={"dtype": own})
    return recipe.model_copy(update={"model": section})


def with_own_phases(recipe: Recipe, environment: Environment) -> Recipe:
    """Give a recipe that names no phases `decode` where a GPU runs it, unless it asks for more.

    Products of many tokens read all of a weight on a GPU, so dropped channels win a prompt nothing:
    it would lose the time of ranking, and accuracy. On a CPU sparse prompts are faster.

    Args:
        recipe: What is to be built. Mitigations that change the weight, or phases to choose among
            under a budget, leave it as it is.
        environment: This machine.
    """
    section = recipe.sparsity
    named = {name: getattr(section, name) for name in section.model_fields_set}
    changes = any(MITIGATIONS[name].changes_weight for name in named.get("mitigations", ()))
    if "phases" in named or changes or recipe.allocation.phases or not gpu_runs(environment):
        return recipe
    return recipe.model_copy(update={"sparsity": type(section)(**named, phases="decode")})


def stored_type(source: ModelSource) -> Dtype | None:
    """The 16-bit type that all matrices of a checkpoint are stored in; None where it is another."""
    if source.gguf_file is not None:
        return None
    try:
        tensors = stored_tensors(source.weights_folder)
    except ModelError:
        return None  # loading says what is wrong with it
    kinds = {tensor.dtype for tensor in tensors.values() if len(tensor.shape) == _MATRIX}
    return _NARROW.get(kinds.pop()) if len(kinds) == 1 else None


def _has_integers(recipe: Recipe, source: ModelSource) -> bool:
    """Tell whether weights are rounded to integers, or came so and are kept."""
    return bool(recipe.forms.integers) or (
        recipe.forms.targets == ("auto",) and source.may_hold_integers
    )


def gpu_runs(environment: Environment) -> bool:
    """Tell whether ONNX Runtime computes on a GPU here."""
    if not environment.gpus:
        return False
    from nmexport.runtimes import native
    from nmexport.runtimes.onnxruntime_opening import choose_provider

    return choose_provider(native.find_library()) == "cuda"


def check_fit(recipe: Recipe, source: ModelSource, pattern: NMPattern | None = None) -> None:
    """Refuse targets, patterns and groups of scales that do not fit the model.

    Args:
        recipe: What is to be built.
        source: The model.
        pattern: In place of the recipe's.

    Raises:
        TargetError: if a pattern of the targets matches nothing, or nothing is left.
        PatternError: if the pattern does not fit a target.
        RecipeError: if the weights' groups do not fit a linear.
    """
    from nmexport.calibration.quantising import head_name
    from nmexport.models.skeleton import skeleton
    from nmexport.sparsity.targets import linears_of, select_targets

    try:
        model = skeleton(source)
    except (ModelError, KeyError, TypeError, AttributeError, ImportError) as error:
        # Loading the model says what is wrong with it, in its own terms.
        logging.getLogger(__name__).info("shapes are not checked beforehand: %s", error)
        return
    linears, targets = linears_of(model), recipe.sparsity.targets
    select_targets(
        model, pattern or recipe.sparsity.pattern, include=targets.include, exclude=targets.exclude
    )
    head = head_name(model, linears)
    for name, linear in linears.items():
        for form in recipe.forms.integers if name != head else ():
            form.groups(linear.in_features, name=name)


@functools.lru_cache(maxsize=2)  # several stages ask, and a trace on trial takes seconds
def check_model(source: ModelSource, dtype: Dtype) -> None:
    """Refuse a model whose files are not whole, or that export cannot take.

    Args:
        source: The model.
        dtype: Element type to export in.

    Raises:
        ModelError: see `models.weights` and `models.exportable`.
    """
    import torch

    from nmexport.models.exportable import check_exportable
    from nmexport.models.skeleton import skeleton
    from nmexport.models.weights import WeightTable

    check_exportable(source, dtype=getattr(torch, dtype))
    if not source.packed:
        WeightTable(skeleton(source), source.weights_folder)
