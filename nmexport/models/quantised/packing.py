"""How a quantised checkpoint is laid out: which stored tensors make which weight.

Everything here is read from the configuration and from the files' headers: no tensor is read, and
no torch is needed. `decoding` turns the tensors that a `PackedWeight` names into integers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from nmexport.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nmexport.models.integrity import StoredTensor

Layout = Literal["awq", "gptq", "gptq_v2", "packed", "int8", "float8"]
"""Names of the layouts.

| layout | values | zero points |
|---|---|---|
| awq | `qweight [K, O/8]`, eight columns a word in AWQ's order | `qzeros [G, O/8]` |
| gptq, gptq_v2 | `qweight [K*bits/32, O]`, along K | `qzeros [G, O*bits/32]`, less one in gptq |
| packed | `weight_packed [O, K*bits/32]`, offset by half | `[O*bits/32, G]`, or none |
| int8 | `weight [O, K]` | `weight_zero_point`, or none |
| float8 | `weight [O, K]` in an 8-bit float type | none |
"""

WORD = 32  # bits of the integers that values are packed into


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """One weight `[O, K]` that is stored in a quantised form."""

    module: str
    """Name of the linear in the files."""
    layout: Layout
    bits: int
    """Bits of a stored value."""
    shape: tuple[int, int]
    """`(O, K)`."""
    groups: int
    """Scales along K of an output; 1 where an output has one scale."""
    parts: Mapping[str, StoredTensor]
    """Stored tensors by their role: the last part of their names."""
    block: tuple[int, int] | None = None
    """Of 8-bit floats: rows and columns of the weight that share a scale."""

    @property
    def name(self) -> str:
        """Name of the weight that the tensors make."""
        return f"{self.module}.weight"

    def stored(self, role: str) -> str:
        """Return the stored name of the tensor with a role."""
        return f"{self.module}.{role}"


@dataclass(frozen=True, kw_only=True)
class Packing:
    """All tensors of a checkpoint, taken apart by what they are for."""

    method: str | None = None
    """Such as `AWQ`; None where nothing is quantised."""
    weights: Mapping[str, PackedWeight] = field(default_factory=dict)
    """Quantised weights by the name of the weight."""
    plain: Mapping[str, StoredTensor] = field(default_factory=dict)
    """Tensors that are stored as they are."""
    dropped: tuple[str, ...] = ()
    """Scales of activations and of the cache: they belong to another way to run the model."""


class Modules:
    """Stored tensors by the module they belong to."""

    def __init__(self, folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
        """Group the tensors of a folder."""
        self.folder = folder
        self._roles: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in tensors.items():
            module, _, role = name.rpartition(".")
            self._roles.setdefault(module, {})[role] = tensor

    def with_role(self, role: str) -> dict[str, dict[str, StoredTensor]]:
        """Modules that have a tensor of a role, with all of their tensors by role."""
        return {module: roles for module, roles in self._roles.items() if role in roles}

    def require(
        self, module: str, roles: Mapping[str, StoredTensor], needed: tuple[str, ...]
    ) -> None:
        """Refuse a module that lacks a tensor.

        Raises:
            ModelError: naming what is missing.
        """
        missing = [role for role in needed if role not in roles]
        if missing:
            raise ModelError(
                f"{module} of {self.folder} is stored without its {', '.join(missing)}: its "
                "weights cannot be read.",
                fix="complete the download, or copy the folder again",
            )

    def wrong_shape(self, module: str, problem: str) -> ModelError:
        """Build the error that says a module's tensors do not fit each other."""
        return ModelError(
            f"The quantised weights of {module} in {self.folder} do not fit together: {problem}.",
            fix="download the folder again; config.json and weights must be of one checkpoint",
        )

    def matrix(self, module: str, roles: Mapping[str, StoredTensor], role: str) -> tuple[int, int]:
        """Shape of a tensor that must be a matrix.

        Raises:
            ModelError: if it is none.
        """
        shape = roles[role].shape
        if len(shape) != 2:  # noqa: PLR2004
            raise self.wrong_shape(module, f"{role} is {list(shape)}, not a matrix")
        return shape[0], shape[1]

    def check_shape(self, module: str, tensor: StoredTensor, role: str, *allowed: object) -> None:
        """Refuse a tensor of another shape than one of those allowed.

        Raises:
            ModelError: naming both.
        """
        if tensor.shape not in allowed:
            wanted = " or ".join(str(list(shape)) for shape in allowed if isinstance(shape, tuple))
            raise self.wrong_shape(module, f"{role} is {list(tensor.shape)}, not {wanted}")

    def check_groups(self, module: str, channels: int, groups: int, size: int | None) -> None:
        """Check that scale groups divide the channels, and are as large as the config says.

        Args:
            module: Name of the linear.
            channels: K.
            groups: Groups that the scales have.
            size: Channels a group that the configuration names; -1 is all, None is not named.

        Raises:
            ModelError: if they do not.
        """
        if groups < 1 or channels % groups:
            raise self.wrong_shape(
                module, f"its {channels} channels do not divide into {groups} scale groups"
            )
        expected = channels if size == -1 else size
        if expected is not None and channels // groups != expected:
            raise self.wrong_shape(
                module,
                f"its scales are for groups of {channels // groups} channels, and the "
                f"configuration says group size {size}",
            )
