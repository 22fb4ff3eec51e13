"""Which linears of a model are sparsified.

A pattern is one of
- a glob over the dotted module name (`model.layers.*.mlp.*`) or over its last part (`q_proj`);
- `type:CLASS`, the class of the module or one of its bases (`type:Linear`);
- `layer:A` or `layer:A-B`, decoder layers by index, both ends included, negative from the end
  (`layer:0-1`, `layer:-2--1`).
An exclude wins over an include, with one exception: `lm_head`, which recipes exclude by default, is
selected where it is included by that very name. It also names the output embedding of a model that
calls it otherwise.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from typing import TYPE_CHECKING

from torch import nn

from nmexport.errors import PatternError, TargetError
from nmexport.sparsity.pattern import MAX_GROUP, NMPattern

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


OUTPUT_EMBEDDING = "lm_head"
_FORMS = "a glob such as q_proj or model.layers.*.mlp.*, type:CLASS, layer:A or layer:A-B"
_LAYER_RANGE = re.compile(r"(-?\d+)(?:-(-?\d+))?")


def select_targets(
    model: nn.Module, pattern: NMPattern, *, include: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    """Names of the linears to sparsify.

    Args:
        model: A causal language model.
        pattern: N:M that every selected linear must fit.
        include: Patterns of names to sparsify.
        exclude: Patterns of names to leave dense.

    Returns:
        Dotted names of `nn.Linear` modules, in model order.

    Raises:
        TargetError: if a pattern matches no linear, or nothing is left to sparsify.
        PatternError: if a selected linear's in_features is not a multiple of M.
    """
    linears = linears_of(model)
    if not linears:
        raise TargetError(
            f"{type(model).__name__} has no torch.nn.Linear to sparsify.",
            allowed="a causal language model built of torch.nn.Linear",
        )
    included = _matching(model, linears, include, "include")
    named_head = OUTPUT_EMBEDDING in include
    left_out = [pattern for pattern in exclude if not (named_head and pattern == OUTPUT_EMBEDDING)]
    excluded = _matching(model, linears, left_out, "exclude")
    chosen = [name for name in linears if name in included and name not in excluded]
    if not chosen:
        raise TargetError(
            f"Nothing is left to sparsify: exclude {_listed(exclude)} takes away all that "
            f"include {_listed(include)} selects.",
            fix="include by name what is excluded, such as --targets lm_head, or exclude less",
        )
    _check_fits({name: linears[name] for name in chosen}, pattern)
    return chosen


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """All linears of a model by dotted name, in model order."""
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}


def fitting_patterns(in_features: Iterable[int], pattern: NMPattern) -> list[NMPattern]:
    """Patterns that fit all the widths, nearest density first, of equals the larger group first."""
    widths = list(in_features)
    sizes = [m for m in range(MAX_GROUP, 1, -1) if all(width % m == 0 for width in widths)]
    nearest = [NMPattern(max(1, round(pattern.density * m)), m) for m in sizes]
    return sorted(nearest, key=lambda candidate: abs(candidate.density - pattern.density))


def _matching(
    model: nn.Module, linears: dict[str, nn.Linear], patterns: Sequence[str], role: str
) -> set[str]:
    """Names that any of the patterns matches; each must match something."""
    matched: set[str] = set()
    for pattern in patterns:
        names = _matches(model, linears, pattern)
        if not names and pattern != OUTPUT_EMBEDDING:
            raise TargetError(
                f"The {role} pattern {pattern!r} matches no linear of this model.",
                allowed=_FORMS,
                fix=_near_matches(linears, pattern),
            )
        matched |= names
    return matched


def _matches(model: nn.Module, linears: dict[str, nn.Linear], pattern: str) -> set[str]:
    kind, colon, rest = pattern.partition(":")
    if colon and kind == "type":
        return {name for name, linear in linears.items() if rest in _class_names(linear)}
    if colon and kind == "layer":
        return _in_layers(model, linears, pattern, rest)
    names = {
        name
        for name in linears
        if fnmatch.fnmatchcase(name, pattern)
        or fnmatch.fnmatchcase(name.rpartition(".")[2], pattern)
    }
    return names | _output_embedding(model, linears) if pattern == OUTPUT_EMBEDDING else names


def _class_names(module: nn.Module) -> set[str]:
    return {base.__name__ for base in type(module).__mro__}


def _output_embedding(model: nn.Module, linears: dict[str, nn.Linear]) -> set[str]:
    """The linear that makes logits, whatever the family calls it."""
    getter = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    return {name for name, linear in linears.items() if linear is head}


def _in_layers(
    model: nn.Module, linears: dict[str, nn.Linear], pattern: str, text: str
) -> set[str]:
    bounds = _LAYER_RANGE.fullmatch(text)
    if bounds is None:
        raise TargetError(f"{pattern!r} is not a range of layers.", allowed=_FORMS)
    stack, depth = _decoder_layers(model)
    first = _from_end(int(bounds[1]), depth)
    last = first if bounds[2] is None else _from_end(int(bounds[2]), depth)
    if not 0 <= first <= last < depth:
        raise TargetError(
            f"{pattern!r} lies outside this model's {depth} decoder layers.",
            allowed=f"layer:A or layer:A-B with 0 <= A <= B <= {depth - 1}, "
            f"or negative from the end (layer:-2--1)",
        )
    prefixes = tuple(f"{stack}.{index}." for index in range(first, last + 1))
    return {name for name in linears if name.startswith(prefixes)}


def _from_end(index: int, depth: int) -> int:
    return index + depth if index < 0 else index


def _decoder_layers(model: nn.Module) -> tuple[str, int]:
    """Name and length of the stack of decoder layers: the longest list that is highest up."""
    stacks = [
        (name, len(part)) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)
    ]
    if not stacks:
        raise TargetError(
            "This model has no list of layers to count.", allowed="patterns by name or type"
        )
    # Experts of one layer can outnumber the layers: depth in the tree counts before length.
    return min(stacks, key=lambda stack: (stack[0].count("."), -stack[1]))


def _near_matches(linears: dict[str, nn.Linear], pattern: str) -> str:
    """Names like the pattern, for a person to pick from."""
    text = pattern.partition(":")[2] if pattern.startswith("type:") else pattern
    last_parts = sorted({name.rpartition(".")[2] for name in linears})
    classes = sorted({type(linear).__name__ for linear in linears.values()})
    vocabulary = [*last_parts, *linears, *(f"type:{name}" for name in classes)]
    near = difflib.get_close_matches(text, vocabulary, n=5, cutoff=0.4)
    return f"did you mean {', '.join(near or last_parts)}?"


def _check_fits(chosen: dict[str, nn.Linear], pattern: NMPattern) -> None:
    for name, linear in chosen.items():
        if linear.in_features % pattern.m:
            fitting = fitting_patterns((other.in_features for other in chosen.values()), pattern)
            words = ", ".join(str(candidate) for candidate in fitting[:6])
            raise PatternError(
                f"Pattern {pattern} does not fit {name}: its in_features, {linear.in_features}, "
                f"is not a multiple of {pattern.m}.",
                allowed=f"patterns that fit every selected linear: {words or 'none'}",
                fix="take one of these, or exclude the linears that do not fit",
            )


def _listed(patterns: Sequence[str]) -> str:
    return ", ".join(patterns) or "(nothing)"
