"""The op contract as typed data, read once from `contract.json` next to the native code.

Exporter, function bodies and tests take names, ranges and defaults from here; the native code has
its own test against the same file. `check_node` holds an ONNX node against it.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import onnx

from nmexport.errors import ArtifactError, InternalError
from nmexport.resources import resource_path

if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEMA = 1


@dataclass(frozen=True)
class InputSpec:
    """One input or output of an op."""

    name: str
    type: str
    """`T`, `W` (that of the input W), or the name of a fixed element type."""
    shape: tuple[str, ...]
    """Symbols: `...` any leading axes, `K` in_features, `O` out_features, `1|K` either, `G` groups
    of channels that share a scale."""
    optional: bool = False
    alternatives: tuple[str, ...] = ()
    """Element types that the input may have as well."""


@dataclass(frozen=True)
class AttributeSpec:
    """One attribute of an op. An attribute without a default must be given."""

    name: str
    type: Literal["int", "string"]
    min: int | None = None
    max: int | None = None
    values: tuple[int | str, ...] | None = None
    default: int | str | None = None

    @property
    def is_required(self) -> bool:
        """Tell whether a node must carry it."""
        return self.default is None

    def complaint(self, value: object) -> str | None:
        """Say why `value` is not allowed; None if it is."""
        if self.type == "int":
            if not isinstance(value, int):
                return f"{self.name} is {value!r}; allowed: an integer"
            low, high = self.min, self.max
            if (low is not None and value < low) or (high is not None and value > high):
                return f"{self.name} is {value}; allowed: {low} to {high}"
        elif not isinstance(value, str):
            return f"{self.name} is {value!r}; allowed: a string"
        if self.values is not None and value not in self.values:
            return f"{self.name} is {value!r}; allowed: {', '.join(map(str, self.values))}"
        return None


@dataclass(frozen=True)
class OpSchema:
    """One op."""

    name: str
    doc: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[InputSpec, ...]
    attributes: tuple[AttributeSpec, ...]

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        """List the inputs that a node may leave empty, in order."""
        return tuple(spec.name for spec in self.inputs if spec.optional)

    def attribute(self, name: str) -> AttributeSpec | None:
        """Find the attribute of that name; None where there is none."""
        return next((spec for spec in self.attributes if spec.name == name), None)


@dataclass(frozen=True)
class Tolerance:
    """How far an executor may be from the oracle."""

    float32_rtol_per_sqrt_k: float
    half_ulps: int
    dynamic_shift_mask_rtol: float


@dataclass(frozen=True)
class OpContract:
    """Everything that executors agree on."""

    domain: str
    opset_version: int
    plugin_version: str
    plugin_namespace: str
    max_group: int
    types: tuple[str, ...]
    ops: Mapping[str, OpSchema]
    variance_floor: float
    scale_group: int
    """Channels that share a scale of the weight are a multiple of this, or all of them; those of an
    activation block are a multiple of it."""
    tolerance: Tolerance


@functools.cache
def op_contract() -> OpContract:
    """Read the contract of this package.

    Raises:
        InternalError: if the data file is missing or malformed: the installation is broken.
    """
    path = resource_path("contract.json")
    try:
        return contract_from_document(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InternalError(f"The op contract {path} cannot be read: {error}") from error


def contract_from_document(document: dict[str, Any]) -> OpContract:
    """Build the typed view of a parsed contract file.

    Raises:
        ValueError: if it is of another schema.
        KeyError: if something is missing.
        TypeError: if an entry has a key that is not known here.
    """
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {document['schema']}; this package reads {SCHEMA}")
    return OpContract(
        domain=document["domain"],
        opset_version=document["opset_version"],
        plugin_version=document["plugin_version"],
        plugin_namespace=document["plugin_namespace"],
        max_group=document["max_group"],
        types=tuple(document["types"]),
        ops={name: _op_schema(name, entry) for name, entry in document["ops"].items()},
        variance_floor=document["variance_floor"],
        scale_group=document["scale_group"],
        tolerance=Tolerance(**document["tolerance"]),
    )


def present_inputs(node: onnx.NodeProto) -> frozenset[str]:
    """List the contract names of the inputs that a node has.

    Raises:
        ArtifactError: if the node is of no op of the contract, or has too many inputs.
    """
    schema = _schema_of(node)
    if len(node.input) > len(schema.inputs):
        raise ArtifactError(
            f"{_title(node)} has {len(node.input)} inputs.",
            allowed=", ".join(spec.name for spec in schema.inputs),
        )
    pairs = zip(schema.inputs, node.input, strict=False)
    return frozenset(spec.name for spec, given in pairs if given)


def attribute_values(node: onnx.NodeProto) -> dict[str, int | str]:
    """Return a node's attributes by name, defaults filled in (unchecked)."""
    schema = _schema_of(node)
    values: dict[str, int | str] = {
        spec.name: spec.default for spec in schema.attributes if spec.default is not None
    }
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        values[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return values


def check_version(opsets: Mapping[str, int], name: str) -> None:
    """Refuse a model whose nodes are of another version of the contract.

    Args:
        opsets: Versions that the model imports, by domain; ours may be absent.
        name: What the message calls the model.

    Raises:
        ArtifactError: if the versions differ.
    """
    contract = op_contract()
    version = opsets.get(contract.domain, contract.opset_version)
    if version != contract.opset_version:
        raise ArtifactError(
            f"{name} holds {contract.domain} ops of version {version}.",
            allowed=f"version {contract.opset_version}",
            fix="export the model again with this version of nmexport",
        )


def check_node(node: onnx.NodeProto) -> None:
    """Check a node of domain `nmexport` against the contract.

    Raises:
        ArtifactError: if it breaks the contract; the message lists every way in which it does.
    """
    complaints = violations(node)
    if complaints:
        raise ArtifactError(
            f"{_title(node)} breaks the op contract: {'; '.join(complaints)}.",
            fix="export the model again with this version of nmexport",
        )


def violations(node: onnx.NodeProto) -> list[str]:
    """Describe every way in which a node breaks the contract; empty if it does not.

    Raises:
        ArtifactError: if the node is of no op of the contract, or has too many inputs.
    """
    schema = _schema_of(node)
    present = present_inputs(node)
    complaints = [
        f"input {spec.name} is missing"
        for spec in schema.inputs
        if not spec.optional and spec.name not in present
    ]
    if len(node.output) != len(schema.outputs) or not all(node.output):
        complaints.append(f"it has {len(node.output)} outputs; allowed: {len(schema.outputs)}")

    values = attribute_values(node)
    for name, value in values.items():
        attribute = schema.attribute(name)
        known = ", ".join(spec.name for spec in schema.attributes)
        if attribute is None:
            complaints.append(f"unknown attribute {name}; allowed: {known}")
        elif (complaint := attribute.complaint(value)) is not None:
            complaints.append(complaint)
    complaints += [
        f"attribute {spec.name} is missing"
        for spec in schema.attributes
        if spec.is_required and spec.name not in values
    ]
    return complaints + _broken_relations(values, present)


def _broken_relations(values: Mapping[str, int | str], present: frozenset[str]) -> list[str]:
    """Check the contract's relations between attributes and inputs."""
    broken = []
    n, m = values.get("n"), values.get("m")
    if isinstance(n, int) and isinstance(m, int) and n > m:
        broken.append(f"n is {n} of m = {m}; allowed: n up to m")
    if values.get("dynamic_shift"):
        if "shift" in present:
            broken.append("dynamic_shift and the input shift exclude each other")
        if "shift_weight" not in present:
            broken.append("dynamic_shift needs the input shift_weight")
    if "weight_scale" not in present:
        if values.get("activation_bits"):
            broken.append("activation_bits needs the input weight_scale: integers for W")
        if "weight_zero_point" in present:
            broken.append("the input weight_zero_point needs the input weight_scale")
    dense_only = sorted(present & {"dense_scale", "dense_bias"})
    if dense_only and values.get("phase") == "all":
        broken.append(
            f"the input {dense_only[0]} goes with phase decode or prefill: with all, no token is "
            "dense"
        )
    block, multiple = values.get("activation_block"), op_contract().scale_group
    if isinstance(block, int) and block % multiple:
        broken.append(f"activation_block is {block}; allowed: a multiple of {multiple}")
    return broken


def _schema_of(node: onnx.NodeProto) -> OpSchema:
    contract = op_contract()
    if node.domain != contract.domain or node.op_type not in contract.ops:
        raise ArtifactError(
            f"{_title(node)} is no op of the contract.",
            allowed=", ".join(f"{contract.domain}::{name}" for name in contract.ops),
        )
    return contract.ops[node.op_type]


def _title(node: onnx.NodeProto) -> str:
    return f"Node {node.name or '(unnamed)'} ({node.domain}::{node.op_type})"


def _op_schema(name: str, entry: dict[str, Any]) -> OpSchema:
    return OpSchema(
        name=name,
        doc=entry["doc"],
        inputs=tuple(_input_spec(row) for row in entry["inputs"]),
        outputs=tuple(_input_spec(row) for row in entry["outputs"]),
        attributes=tuple(_attribute_spec(row) for row in entry["attributes"]),
    )


def _input_spec(row: dict[str, Any]) -> InputSpec:
    tuples = {"shape": tuple(row["shape"]), "alternatives": tuple(row.get("alternatives", ()))}
    return InputSpec(**{**row, **tuples})


def _attribute_spec(row: dict[str, Any]) -> AttributeSpec:
    values = row.get("values")
    return AttributeSpec(**{**row, "values": tuple(values) if values else None})
