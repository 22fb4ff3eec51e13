"""The linears that `fold` writes: in floats, rounded to integers, or in those that came."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from nmexport.errors import ModelError, RecipeError
from nmexport.progress import busy
from nmexport.sparsity.weight_form import WeightForm
from nmexport.stages.engine import resolve_target
from nmexport.stages.fitting import gpu_runs
from nmexport.store.folded import DENSE, INPUT_ORDER, write_kept
from nmexport.store.layers import Layers
from nmexport.store.tensors import ShardedWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch
    from torch import nn

    from nmexport.allocation.costs import Rounded
    from nmexport.calibration.quantising import Keeping, Stored
    from nmexport.calibration.sparse_constants import DenseModel, SparseConstants
    from nmexport.choices import Dtype
    from nmexport.models.imported import ImportedWeights
    from nmexport.sparsity.linear import SparseLinear
    from nmexport.sparsity.output_order import OutputOrders
    from nmexport.sparsity.weight_form import Forms
    from nmexport.stages.inputs import StageInputs
    from nmexport.store.layers import LayerSpec

_RECIPES_OWN: Mapping[str, str] = MappingProxyType({})
Device = Literal["cpu", "cuda", "tensorrt"]
"""The kind of device that an engine runs on."""


def imported(inputs: StageInputs) -> ImportedWeights | None:
    """Weights that came quantised; None where they are floats, or are to be rounded anew."""
    from nmexport.models.imported import imported_weights

    recipe, device = inputs.recipe, _device(inputs)
    # Imported integers are dequantised where no kernel multiplies them.
    if recipe.forms.targets != ("auto",) or not _takes_integers(device, recipe.model.dtype):
        return None
    return imported_weights(inputs.source, keeps_float8=device == "cuda")


def around_integers(inputs: StageInputs, imported: ImportedWeights) -> StageInputs:
    """The stage's inputs without what would change weights that are kept; writes down which are."""
    from nmexport.calibration.imported import method_around

    section, left_out = method_around(inputs.recipe.sparsity)
    kept = replace(imported.kept, left_out=left_out)
    write_kept(inputs.output, kept)
    inputs.progress.note(f"fold: {kept.sentence()}")
    recipe = inputs.recipe.model_copy(update={"sparsity": section})
    return replace(inputs, recipe=recipe)


def folding(
    inputs: StageInputs,
    dense: DenseModel,
    constants: SparseConstants,
    forms: Mapping[str, str],
) -> Callable[[str], dict[str, torch.Tensor]]:
    """Prepare to fold sparse linears as they will be written.

    Args:
        inputs: The stage's inputs.
        dense: The dense model and what calibration knows: as it is now, whatever stands in for its
            linears later.
        constants: Of the linears that become sparse.
        forms: Forms of weights that a budget chose, by linear.

    Returns:
        Makes the inputs of one linear's op, by its name; raises ModelError if one leaves the type.
    """
    import torch

    from nmexport.calibration.imported import folded_around
    from nmexport.calibration.quantising import Storage, store_folded, stored_linears

    storage, dtype = _storage(inputs, dense, forms), inputs.recipe.model.dtype
    compensated: dict[str, dict[str, torch.Tensor]] = {}
    if isinstance(storage, Storage):
        linears = {name: dense.linears[name] for name in constants.derived}
        linears = {name: one for name, one in linears.items() if storage.is_compensated(name)}
        alone = replace(storage, keeps_dense=False)
        for one in stored_linears(dense, constants, linears, alone):
            compensated[one.spec.name] = dict(one.tensors)

    def folded_linear(name: str) -> dict[str, torch.Tensor]:
        if name in compensated:
            return compensated[name]
        if storage is None or (isinstance(storage, Storage) and name not in storage.forms):
            folded = constants.folded(dense, name, getattr(torch, dtype))
            _check_finite(folded, name, dtype)
            return folded
        if isinstance(storage, Storage):
            folded = constants.folded(dense, name, torch.float32)
            phase = constants.derived[name].behaviour.phase
            return store_folded(dense, storage, name, folded, phase=phase)[0]
        weight = None if dense.integers is None else dense.integers(name)
        return folded_around(dense, constants, name, weight, storage)

    return folded_linear


def with_balances(inputs: StageInputs, dense: DenseModel) -> DenseModel:
    """Add what operands are multiplied by, where they and their weights are rounded."""
    from nmexport.calibration.quantising import Storage, balances
    from nmexport.sparsity.targets import linears_of

    storages = [
        storage
        for form in inputs.recipe.forms.targets
        if isinstance(storage := _all_alike(inputs, dense, form), Storage)
    ]
    return replace(dense, balances=balances(dense, linears_of(dense.model), storages))


def dense_in_integers(inputs: StageInputs, dense: DenseModel) -> Rounded | None:
    """Make every linear a dense one in the integers that it may be stored in.

    Returns:
        None where weights are floats, or came in integers that the dense model has too.
    """
    from nmexport.allocation.costs import Rounded
    from nmexport.calibration.quantising import Storage, dense_modules
    from nmexport.sparsity.targets import linears_of

    forms = inputs.recipe.forms
    modules: dict[str, dict[str, SparseLinear]] = {}
    others = {
        name: linear
        for name, linear in linears_of(dense.model).items()
        if name not in dense.linears
    }
    around: dict[str, SparseLinear] | None = None
    for form in forms.targets:
        storage = _all_alike(inputs, dense, form)
        if not isinstance(storage, Storage):
            return None
        with busy(inputs.progress, f"fold: the dense model in {form}"):
            if around is None:
                around = dense_modules(dense, others, storage)
            modules[form] = dense_modules(dense, dense.linears, storage)
    head = "float" if forms.head is None else str(forms.head)
    return Rounded(modules=modules, others=around or {}, head=head)


def _all_alike(inputs: StageInputs, dense: DenseModel, form: str) -> Keeping | None:
    """How weights are stored where all targets have one of the recipe's forms."""
    forms = inputs.recipe.forms
    chosen = dict.fromkeys(dense.linears, form) if len(forms.targets) > 1 else _RECIPES_OWN
    return _storage(inputs, dense, chosen)


def _check_finite(tensors: Mapping[str, torch.Tensor], name: str, dtype: str) -> None:
    import torch

    for kind, tensor in tensors.items():
        # 8-bit floats lack the test; they have no infinity.
        values = tensor.float() if tensor.dtype == torch.float8_e4m3fn else tensor
        if not bool(values.isfinite().all()):
            raise ModelError(
                f"{kind} of {name} is not finite in {dtype} once folded.",
                fix="use --dtype bfloat16 or float32"
                if dtype == "float16"
                else "check the weights",
            )


def _storage(
    inputs: StageInputs, dense: DenseModel, chosen: Mapping[str, str] = _RECIPES_OWN
) -> Keeping | None:
    """How weights are stored in integers: as they came, or rounded; None where they are floats.

    Args:
        inputs: The stage's inputs.
        dense: The dense model.
        chosen: Forms that a budget chose, by linear; without, a target has the recipe's own.
    """
    import torch

    from nmexport.calibration.quantising import Keeping, Storage

    section, forms = inputs.recipe.model, inputs.recipe.forms
    keeping = Keeping(
        rounds_activations=rounds_activations(inputs),
        dtype=getattr(torch, section.dtype),
        keeps_dense=section.dense_baseline,
    )
    if not forms.integers:
        return None if dense.integers is None else keeping
    return Storage(forms=_forms_by_linear(dense, forms, chosen), **vars(keeping))


def _forms_by_linear(
    dense: DenseModel, forms: Forms, chosen: Mapping[str, str]
) -> dict[str, WeightForm]:
    """Integers that each linear is stored in; those that stay float are left out."""
    from nmexport.calibration.quantising import head_name
    from nmexport.sparsity.targets import linears_of

    linears = linears_of(dense.model)
    head = head_name(dense.model, linears)
    found: dict[str, WeightForm] = {}
    for name in linears:
        own = WeightForm.parse(chosen.get(name, forms.targets[0]))
        form = own if name in dense.linears else forms.others
        if name == head and name not in chosen:
            form = forms.head
        if form is not None:
            found[name] = form
    return found


def rounds_activations(inputs: StageInputs) -> bool:
    """Tell whether what meets weights of integers is rounded too.

    Raises:
        RecipeError: if the recipe wants weights, or activations, that a GPU's kernels do not take.
    """
    section, device = inputs.recipe.model, _device(inputs)
    forms = inputs.recipe.forms.integers
    if device == "cuda" and section.activations == "int8":
        raise RecipeError(
            "Activations are rounded to 8 bits on a CPU alone, and a GPU runs the engine here.",
            fix="leave out --activations int8: weights in integers then meet 16-bit activations",
        )
    if device == "cuda" and forms and not _takes_integers(device, section.dtype):
        words = " and ".join(map(str, forms))
        raise RecipeError(
            f"On a GPU weights in {words} meet activations of 16 bits, and the type is "
            f"{section.dtype}.",
            fix="use --dtype float16 or bfloat16, or leave it out",
        )
    return section.activations == "int8" or (section.activations == "auto" and device == "cpu")


def _device(inputs: StageInputs) -> Device:
    """The device that the engine built here will run on."""
    if resolve_target(inputs.recipe.target) != "onnxruntime":
        return "tensorrt"
    return "cuda" if gpu_runs(inputs.environment) else "cpu"


def _takes_integers(device: Device, dtype: Dtype) -> bool:
    """Tell whether there are kernels for weights of integers and activations of a type."""
    return device == "cpu" or (device == "cuda" and dtype != "float32")


def write_linears(
    inputs: StageInputs,
    dense: DenseModel,
    constants: SparseConstants,
    forms: Mapping[str, str],
) -> Layers:
    """Write the sparse linears; with weights in integers, the dense ones too.

    Outputs lie in the order of what reads them, where `calibration.producers` finds that they can:
    what is written is the only place that knows; learning and measuring see natural orders.

    Args:
        inputs: The stage's inputs.
        dense: The dense model and what calibration knows.
        constants: Of the linears that become sparse.
        forms: Forms of weights that a budget chose, by linear.

    Raises:
        ModelError: if a constant leaves the type.
    """
    from nmexport.calibration.imported import imported_linears
    from nmexport.calibration.producers import output_orders
    from nmexport.calibration.quantising import Storage, stored_linears
    from nmexport.sparsity.targets import linears_of

    with busy(inputs.progress, "fold: what reads what"):
        orders = output_orders(dense, constants)
    inputs.progress.note(
        f"fold: {len(orders.orders)} of {len(constants.derived)} linears get their input in order"
    )
    storage = _storage(inputs, dense, forms)
    if storage is None:
        return _write_folded(inputs, dense, constants, orders)
    linears = linears_of(dense.model)
    if isinstance(storage, Storage):
        stored = stored_linears(dense, constants, linears, storage)
        bits: Literal[0, 8] = 0 if inputs.recipe.forms.head is None else 8
        return _write_stored(inputs, linears, stored, orders, embedding_bits=bits)
    assert dense.integers is not None  # noqa: S101 - else nothing is stored
    stored = imported_linears(dense, constants, linears, dense.integers, storage)
    stored = (one._replace(as_dense=_laid_out(one, orders)) for one in stored)
    return _write_stored(inputs, linears, stored, orders, embedding_bits=0)


def _write_folded(
    inputs: StageInputs, dense: DenseModel, constants: SparseConstants, orders: OutputOrders
) -> Layers:
    """Write the sparse linears, their weights float."""
    names, folded_linear = constants.derived, folding(inputs, dense, constants, _RECIPES_OWN)
    specs = []
    with ShardedWriter(inputs.output) as writer:
        for name in inputs.progress.track(names, label="fold: weights", total=len(names)):
            spec = constants.layer(name, dense.linears[name])
            specs.append(_add(writer, spec, folded_linear(name), orders))
    return Layers(layers=tuple(specs))


def _add(
    writer: ShardedWriter,
    spec: LayerSpec,
    folded: Mapping[str, torch.Tensor],
    orders: OutputOrders,
) -> LayerSpec:
    """Write one linear, laid out; return its record."""
    name = spec.name
    tensors = orders.applied(name, folded, outputs=spec.out_features)
    if name in orders.orders:
        tensors[INPUT_ORDER] = orders.orders[name].clone()
    writer.add({f"{name}.{kind}": tensor for kind, tensor in tensors.items()})
    return replace(spec, outputs_for=orders.readers.get(name))


def _laid_out(one: Stored, orders: OutputOrders) -> Mapping[str, torch.Tensor] | None:
    """A linear as a dense one that shares the sparse one's integers, and so its layout.

    Linears that are rounded for the dense model apart stay in natural order, all of them.
    """
    if one.as_dense is None:
        return None
    return orders.applied(one.spec.name, one.as_dense, outputs=one.spec.out_features)


def _write_stored(
    inputs: StageInputs,
    linears: Mapping[str, nn.Linear],
    stored: Iterator[Stored],
    orders: OutputOrders,
    *,
    embedding_bits: Literal[0, 8],
) -> Layers:
    """Write linears, most of their weights in integers."""
    specs: dict[bool, dict[str, LayerSpec]] = {True: {}, False: {}}
    with ShardedWriter(inputs.output) as writer:
        for one in inputs.progress.track(stored, label="fold: weights", total=len(linears)):
            name = one.spec.name
            _check_finite(one.tensors, name, inputs.recipe.model.dtype)
            spec = _add(writer, one.spec, one.tensors, orders)
            as_dense = one.as_dense or {}
            writer.add({f"{name}.{DENSE}.{kind}": tensor for kind, tensor in as_dense.items()})
            specs[one.is_sparse][name] = spec
    sparse, dense = (
        tuple(specs[kind][name] for name in linears if name in specs[kind])
        for kind in (True, False)
    )
    return Layers(layers=sparse, dense=dense, embedding_bits=embedding_bits)
