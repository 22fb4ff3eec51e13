"""Linears whose weights came quantised: integers stay as they are, constants go around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nmexport.calibration.quantising import ALL_KEPT, Stored, dense_spec
from nmexport.errors import RecipeError
from nmexport.sparsity.fold import NOTHING_LEARNED, fold
from nmexport.sparsity.fold_stored import PARTS, fold_stored
from nmexport.sparsity.linear import Constants, bias_of
from nmexport.sparsity.mitigation import MITIGATIONS
from nmexport.store.folded import SHARED

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import nn

    from nmexport.calibration.quantising import Keeping
    from nmexport.calibration.sparse_constants import DenseModel, SparseConstants
    from nmexport.calibration.stored_orders import Integers
    from nmexport.recipe import SparsitySection
    from nmexport.sparsity.quantisation import QuantisedWeight


def method_around(section: SparsitySection) -> tuple[SparsitySection, tuple[str, ...]]:
    """Drop the mitigations that would change weights from a section.

    Returns:
        The section, and the names of what is left out of it.

    Raises:
        RecipeError: if it has a remainder, which takes a part out of the weights.
    """
    if "r-sparse" in section.mitigations:
        raise RecipeError(
            "Mitigation r-sparse takes a part out of the weights, and this checkpoint's weights "
            "are kept as they are stored.",
            allowed=", ".join(name for name in MITIGATIONS if name not in {"r-sparse", "low-rank"}),
            fix="drop r-sparse, or start from the model that the checkpoint was quantised from",
        )
    out = tuple(
        name
        for name in section.mitigations
        if MITIGATIONS[name].learns is not None and MITIGATIONS[name].learns not in PARTS
    )
    kept = tuple(name for name in section.mitigations if name not in out)
    return section.model_copy(update={"mitigations": kept}), out


def imported_linears(
    dense: DenseModel,
    constants: SparseConstants,
    linears: Mapping[str, nn.Linear],
    integers: Integers,
    keeping: Keeping,
) -> Iterator[Stored]:
    """Fold all linears that are nodes of ours: the sparse ones, and those that came quantised.

    Args:
        dense: The dense model.
        constants: Of the linears that become sparse.
        linears: All linears of the model, by name, in model order.
        integers: Their weights.
        keeping: What is written of them.
    """
    for name, linear in linears.items():
        weight = integers(name)
        if name in constants.derived:
            spec = constants.layer(name, linear)
            yield Stored(
                spec if weight is None else keeping.spec(spec, weight),
                True,
                folded_around(dense, constants, name, weight, keeping),
                _beside_sparse(dense, constants, name, weight, keeping),
            )
        elif weight is not None:
            spec = keeping.spec(dense_spec(name, linear), weight)
            yield Stored(spec, False, _as_dense(dense, linear, weight, keeping), None)


def folded_around(
    dense: DenseModel,
    constants: SparseConstants,
    name: str,
    weight: QuantisedWeight | None,
    keeping: Keeping,
) -> dict[str, torch.Tensor]:
    """Inputs of the op of a sparse linear; None as its weight is one that came as floats."""
    if weight is None:
        return constants.folded(dense, name, keeping.dtype)
    derived = constants.derived[name]
    learned = NOTHING_LEARNED if constants.learned is None else constants.learned.corrections[name]
    with dense.loaded(dense.linears[name]) as held:
        return fold_stored(
            weight,
            bias_of(held),
            derived.behaviour,
            derived.constants,
            learned,
            dtype=keeping.dtype,
        )


def _beside_sparse(
    dense: DenseModel,
    constants: SparseConstants,
    name: str,
    weight: QuantisedWeight | None,
    keeping: Keeping,
) -> dict[str, torch.Tensor] | None:
    """Describe a sparse linear as a dense one, in the same order, so that it shares integers."""
    if not keeping.keeps_dense:
        return None
    order = constants.derived[name].constants.channel_order
    made = _as_dense(dense, dense.linears[name], weight, keeping, order=order)
    if weight is None:
        return made
    return {kind: tensor.clone() for kind, tensor in made.items() if kind not in SHARED}


def _as_dense(
    dense: DenseModel,
    linear: nn.Linear,
    weight: QuantisedWeight | None,
    keeping: Keeping,
    *,
    order: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return the op's inputs of a linear that keeps all of its input."""
    constants = Constants(channel_order=order)
    with dense.loaded(linear) as held:
        if weight is None:
            return fold(held, ALL_KEPT, constants, NOTHING_LEARNED, dtype=keeping.dtype)
        return fold_stored(weight, bias_of(held), ALL_KEPT, constants, dtype=keeping.dtype)
