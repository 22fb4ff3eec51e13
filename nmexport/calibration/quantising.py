"""Stores linears in integers: the sparse ones, those that stay dense, and the output head.

Eight bits are rounded to what is nearest, on scales that look at how strong each channel is; where
values are rounded too, both sides are balanced first. Four bits are rounded with compensation, a
sparse linear's by the second moments of what it keeps: errors are made good in what the sparse
linear sees, not in what it never will.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from nmexport.calibration.second_moments import Watched, gather_second_moments, split_by_bytes
from nmexport.calibration.sites import input_sites
from nmexport.calibration.sparse_constants import SparseConstants
from nmexport.environment import free_memory
from nmexport.sparsity.balance import balancing_factors
from nmexport.sparsity.fold import NOTHING_LEARNED, fold, selection, value_scale
from nmexport.sparsity.linear import (
    Behaviour,
    Constants,
    InputSite,
    SparseLinear,
    bias_of,
    kept_values,
)
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.quantisation import dequantised
from nmexport.sparsity.rounding import quantised
from nmexport.sparsity.weight_form import GROUP, activation_block
from nmexport.store.layers import LayerSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from nmexport.calibration.second_moments import Operand
    from nmexport.calibration.sites import Site
    from nmexport.calibration.sparse_constants import DenseModel
    from nmexport.choices import Phase
    from nmexport.sparsity.quantisation import QuantisedWeight
    from nmexport.sparsity.weight_form import WeightForm

_FLOAT_BYTES = 4
_SHARE_FOR_FLOATS = 0.25
"""Share of the free memory that dequantised weights of a whole model may take."""
_MOMENT_SAMPLES = 64
"""Calibration samples that second moments are taken from: thousands of tokens for each channel."""


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """Choices for weights in integers: the activations they meet, the type, the dense copies."""

    rounds_activations: bool
    """Round activations to 8 bits where the weights are integers."""
    dtype: torch.dtype
    """T, of everything that is not a stored weight."""
    keeps_dense: bool
    """Sparse linears are stored as dense ones too, to be compared with."""

    def spec(self, layer: LayerSpec, stored: QuantisedWeight) -> LayerSpec:
        """Make the record of a linear with a stored weight."""
        block = activation_block(layer.in_features, len(stored.scale))
        rounds = self.rounds_activations and block is not None
        return replace(
            layer,
            weight_type=stored.type,
            activation_bits=8 if rounds else 0,
            activation_block=block or layer.activation_block,
        )


@dataclass(frozen=True, kw_only=True)
class Storage(Keeping):
    """How weights are rounded to integers."""

    forms: Mapping[str, WeightForm]
    """The stored form of each linear, by name; linears without an entry stay float."""

    def is_balanced(self, name: str, channels: int) -> bool:
        """Tell whether a linear's operand and weight are both rounded with 8 bits and no groups.

        Four bits are rounded with compensation, which makes more of unbalanced channels.
        """
        form = self.forms.get(name)
        rounds = self.rounds_activations and activation_block(channels, 1) is not None
        return rounds and form is not None and form.type == "int8" and form.group is None

    def is_compensated(self, name: str) -> bool:
        """Tell whether the rounding of a linear looks at second moments of its input."""
        form = self.forms.get(name)
        return form is not None and form.type != "int8"

    def tensors(
        self,
        folded: Mapping[str, torch.Tensor],
        *,
        phase: Phase = "all",
        balance: torch.Tensor | None = None,
        importance: torch.Tensor | None = None,
        second_moment: torch.Tensor | None = None,
        name: str,
    ) -> tuple[dict[str, torch.Tensor], QuantisedWeight]:
        """Return the inputs of one linear's op, its weight stored.

        Args:
            folded: They, float32.
            phase: When the op is sparse.
            balance: `[K]`, what the operand is multiplied by; None is 1. In the input's own order,
                as `importance`.
            importance: `[K]`; see `rounding.quantised`.
            second_moment: `[K, K]`, in gathered order; see there.
            name: Of the linear.

        Raises:
            RecipeError: if the form's groups do not divide K.
        """
        weight, order = folded["W"], folded.get("channel_order")
        if order is not None and balance is not None:
            balance = balance[order.long()]
        if order is not None and importance is not None:
            importance = importance[order.long()]
        if balance is not None:
            weight = weight / balance.unsqueeze(1)
            importance = None if importance is None else importance * balance.square()
            if second_moment is not None:
                second_moment = second_moment * balance * balance.unsqueeze(1)
        stored = quantised(
            weight,
            self.forms[name],
            importance=importance,
            second_moment=second_moment,
            name=name,
        )
        in_type = {
            kind: folded[kind].to(self.dtype)
            for kind in ("bias", "dense_bias", "remainder_in", "remainder_out")
            if kind in folded
        }
        made = {**folded, **in_type, "W": stored.values, "weight_scale": stored.scale}
        if stored.zero_point is not None:
            made["weight_zero_point"] = stored.zero_point
        if balance is not None:
            made["value_scale"] = balance * folded.get("value_scale", 1.0)
            if phase != "all":
                made["dense_scale"] = balance.clone()
        return made, stored


class Stored(NamedTuple):
    """One linear as it is written."""

    spec: LayerSpec
    is_sparse: bool
    tensors: Mapping[str, torch.Tensor]
    as_dense: Mapping[str, torch.Tensor] | None
    """For a sparse linear, the tensors of its dense form in the same integers."""


def stored_linears(
    dense: DenseModel,
    constants: SparseConstants,
    linears: Mapping[str, nn.Linear],
    storage: Storage,
) -> Iterator[Stored]:
    """Store all linears that calibration reached: the sparse ones, and dense ones in integers.

    Args:
        dense: The dense model and what calibration knows.
        constants: Of the linears that become sparse.
        linears: All linears of the model, by name, in model order.
        storage: How they are stored.

    Yields:
        Each linear, its constants folded: in model order, and after these, in the order in which
        second moments are known, those that need them.

    Raises:
        RecipeError: if the form's groups do not divide a linear's channels.
    """
    reached = {name: linear for name, linear in linears.items() if name in dense.statistics}
    store = functools.partial(_store, _Given(dense, constants, storage))
    compensated = {name: reached[name] for name in reached if storage.is_compensated(name)}
    for name, linear in reached.items():
        if name not in compensated and (name in storage.forms or name in constants.derived):
            yield store(name, linear)
    if not compensated:
        return
    sites = input_sites(dense.model, compensated, dense.samples[0], layerwise=dense.layerwise)
    by_linear = {site.names[0]: site for site in sites}
    for chunk in split_by_bytes([_watch(site, constants, storage) for site in sites]):
        moments = gather_second_moments(
            dense.model,
            chunk,
            dense.samples[:_MOMENT_SAMPLES],
            progress=dense.progress,
            layerwise=dense.layerwise,
        )
        for watched in chunk:
            known = Moments(*(moments.pop(f"{watched.linear}/{kind}", None) for kind in _KINDS))
            for name in by_linear[watched.linear].names:
                yield store(name, compensated[name], known)


def balances(
    dense: DenseModel, linears: Mapping[str, nn.Linear], storages: Sequence[Storage]
) -> dict[str, torch.Tensor]:
    """Balance operands and weights that are both rounded to 8 bits; see `sparsity.balance`.

    Args:
        dense: The dense model and what calibration knows.
        linears: All linears of the model, by name.
        storages: How they may be stored.

    Returns:
        `[K]` by name, the same for linears of one input; none where either side is not rounded so.
    """
    chosen = {
        name: linear
        for name, linear in linears.items()
        if name in dense.statistics
        and any(storage.is_balanced(name, linear.in_features) for storage in storages)
    }
    if not chosen:
        return {}
    factors_of: dict[str, torch.Tensor] = {}
    for site in input_sites(dense.model, chosen, dense.samples[0], layerwise=dense.layerwise):
        squares = torch.zeros(site.in_features)
        for name in site.names:
            with dense.loaded(chosen[name]) as held:
                squares += held.weight.detach().float().square().sum(dim=0).cpu()
        factors = balancing_factors(dense.statistics[site.names[0]].rms, squares.sqrt())
        factors_of |= dict.fromkeys(site.names, factors)
    return factors_of


def dense_modules(
    dense: DenseModel, linears: Mapping[str, nn.Linear], storage: Storage
) -> dict[str, SparseLinear]:
    """Store linears as dense ones: modules that compute what quantisation alone leaves.

    Args:
        dense: The dense model and what calibration knows.
        linears: By name; those that stay float are left out.
        storage: How they are stored.
    """
    nothing = SparseConstants(derived={}, errors={}, distances={}, learned=None)
    size = sum(linear.weight.numel() * _FLOAT_BYTES for linear in linears.values())
    fits = size <= free_memory() * _SHARE_FOR_FLOATS
    made: dict[str, SparseLinear] = {}
    for stored in stored_linears(dense, nothing, linears, storage):
        on_gpu = linears[stored.spec.name].weight.is_cuda
        behaviour = Behaviour(
            pattern=stored.spec.pattern,
            activation_bits=stored.spec.activation_bits,
            activation_block=stored.spec.activation_block,
        )
        # A GPU dequantises in no time, and has less room than the host.
        tensors = _as_floats(stored.tensors) if fits and not on_gpu else stored.tensors
        made[stored.spec.name] = SparseLinear(behaviour, tensors).to("cuda" if on_gpu else "cpu")
    return made


def _as_floats(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dequantise a linear's weight once, in place of each time it is multiplied."""
    parts = ("W", "weight_scale", "weight_zero_point")
    rest = {kind: tensor for kind, tensor in tensors.items() if kind not in parts}
    return {**rest, "W": dequantised(tensors["W"], *(tensors.get(part) for part in parts[1:]))}


def head_name(model: nn.Module, linears: Mapping[str, nn.Linear]) -> str | None:
    """Return the name of the linear that makes logits; None where none does."""
    getter = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    return next((name for name, linear in linears.items() if linear is head), None)


class Moments(NamedTuple):
    """Second moments `[K, K]` of one site; None is not known, or not needed."""

    sparse: torch.Tensor | None = None
    """Second moments of the kept inputs, in gathered order."""
    dense: torch.Tensor | None = None
    """Second moments of the whole input."""


_KINDS = Moments._fields
_NOT_KNOWN = Moments()


class _Given(NamedTuple):
    """The inputs of storing linears."""

    dense: DenseModel
    constants: SparseConstants
    storage: Storage


def store_folded(
    dense: DenseModel,
    storage: Storage,
    name: str,
    folded: Mapping[str, torch.Tensor],
    *,
    phase: Phase = "all",
    second_moment: torch.Tensor | None = None,
) -> tuple[dict[str, torch.Tensor], QuantisedWeight]:
    """Store a folded linear by what calibration knows of its input; see `Storage.tensors`."""
    is_balanced = storage.is_balanced(name, len(folded["W"]))
    return storage.tensors(
        folded,
        phase=phase,
        balance=dense.balances.get(name) if is_balanced else None,
        importance=dense.statistics[name].rms.float().square(),
        second_moment=second_moment,
        name=name,
    )


def _store(given: _Given, name: str, linear: nn.Linear, moments: Moments = _NOT_KNOWN) -> Stored:
    """Fold and store one linear."""
    dense, constants, storage = given
    store = functools.partial(store_folded, dense, storage, name)

    def plain(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        with dense.loaded(linear) as held:
            return fold(held, ALL_KEPT, Constants(), NOTHING_LEARNED, dtype=dtype)

    def as_dense() -> tuple[dict[str, torch.Tensor], QuantisedWeight]:
        return store(plain(torch.float32), second_moment=moments.dense)

    if name not in constants.derived:
        tensors, stored = as_dense()
        return Stored(storage.spec(dense_spec(name, linear), stored), False, tensors, None)
    spec = constants.layer(name, linear)
    if name not in storage.forms:
        folded = constants.folded(dense, name, storage.dtype)
        return Stored(spec, True, folded, plain(storage.dtype) if storage.keeps_dense else None)
    folded = constants.folded(dense, name, torch.float32)
    phase = constants.derived[name].behaviour.phase
    tensors, stored = store(folded, phase=phase, second_moment=moments.sparse)
    spec = storage.spec(spec, stored)
    return Stored(spec, True, tensors, as_dense()[0] if storage.keeps_dense else None)


ALL_KEPT = Behaviour(pattern=NMPattern(GROUP, GROUP))
"""The behaviour of a linear that stays dense."""


def dense_spec(name: str, linear: nn.Linear) -> LayerSpec:
    """Make the record of a linear that keeps all of its input."""
    group = GROUP if linear.in_features % GROUP == 0 else 1
    return LayerSpec(
        name=name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        pattern=NMPattern(group, group),
        criterion="act",
        has_bias=bias_of(linear) is not None,
    )


def _watch(site: Site, constants: SparseConstants, storage: Storage) -> Watched:
    """Choose the second moments that a site's linears need; they keep the same channels."""
    first = site.names[0]
    operands: dict[str, Operand] = {}
    if first in constants.derived:
        operands[f"{first}/sparse"] = _keep_function(constants, first, site.in_features)
    if first not in constants.derived or storage.keeps_dense:
        operands[f"{first}/dense"] = _whole
    return Watched(linear=first, channels=site.in_features, operands=operands)


def _whole(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).float()


def _keep_function(constants: SparseConstants, name: str, channels: int) -> Operand:
    """Make the function from an input to what one linear keeps of it, variance corrected."""
    derived, learned = constants.derived[name], constants.learned
    corrections = NOTHING_LEARNED if learned is None else learned.corrections[name]
    selecting = selection(derived.constants, corrections)
    order = selecting.get("channel_order")
    own = Constants(shift=selecting.get("shift"), score_scale=selecting.get("score_scale"))
    everywhere = derived.behaviour.phase == "all"
    scale = None if everywhere else value_scale(channels, derived.constants, corrections)
    if scale is not None and order is not None:
        scale = scale[order.long()]

    def operand(x: torch.Tensor) -> torch.Tensor:
        site = InputSite(derived.behaviour, own, channels, device=x.device)
        gathered = x if order is None else x[..., order.long().to(x.device)]
        selected = site.select(gathered)
        kept = kept_values(selected)
        if selected.nu is not None:
            kept = selected.nu * kept
        if scale is not None:
            kept = kept * scale.to(kept.device)
        # Where a phase stays dense, the same weight meets whole inputs too.
        return kept if everywhere else torch.cat([kept, _whole(gathered)])

    return operand
