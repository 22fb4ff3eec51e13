"""How weights are stored, in words: `auto`, `float`, `int8`, `int8:128`, `int4`, `int4:64`.

What `int8` and `int4` store in integers is one rule: every linear, those that stay dense too, as an
op that keeps all of its input; the output head and the input embedding, in 8 bits with a scale a
token whatever the linears have. Norms and biases stay float.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self, get_args

from nmexport.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterable

StoredType = Literal["int8", "int4", "uint4", "float8e4m3fn"]
"""Types of a stored weight, by the names that the op contract and ONNX give them."""
WeightType = Literal["float", "int8", "int4", "uint4", "float8e4m3fn"]
"""The same, and `float`: the type of the model."""
STORED_TYPES: tuple[StoredType, ...] = get_args(StoredType)

GROUP = 16
"""Channels that share a scale are a multiple of this: no N:M group of up to 16 straddles."""
BLOCKS = (32, 16)
"""Channels of a token that are rounded with one scale: the first of these that fits a linear whose
outputs have one scale each, and the last where scales are by group. Such weights are often exact:
then rounding values is all the error there is. With SmolLM2's Q4_1 perplexity is 1.0017 times
float's with 16, and 1.0057 with 32."""
_FOUR_BIT_GROUP = 32
_FORM = re.compile(r"(int8|int4)(?::(\d{1,6}))?")

FORMS = (
    "auto (as they came, in integers or floats), float, int8 (one scale for each output), "
    "int8:CHANNELS (one for that many channels of each output), int4 (of "
    f"{_FOUR_BIT_GROUP} channels) or int4:CHANNELS, CHANNELS a multiple of {GROUP}"
)


@dataclass(frozen=True)
class WeightForm:
    """A type of integers, and how many channels share a scale."""

    type: StoredType
    group: int | None
    """None: all of an output's."""

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read a form; None is `float` or `auto`.

        Raises:
            RecipeError: if it is none.
        """
        if text in {"auto", "float"}:
            return None
        match = _FORM.fullmatch(text)
        group = int(match[2]) if match and match[2] else None
        if match is None or (group is not None and (group < GROUP or group % GROUP)):
            raise RecipeError(f"weights cannot be {text!r}.", allowed=FORMS)
        if match[1] == "int8":
            return cls("int8", group)
        return cls("int4", group or _FOUR_BIT_GROUP)

    @property
    def bits(self) -> int:
        """Bits of a stored value."""
        return 8 if self.type == "int8" else 4

    def groups(self, channels: int, *, name: str) -> int:
        """How many scales each output of a linear has.

        Args:
            channels: K of the linear.
            name: Of the linear, for the message.

        Raises:
            RecipeError: if groups do not divide K.
        """
        group = self.group or channels
        if channels % group:
            raise RecipeError(
                f"Weights in {self} do not fit {name}: its {channels} channels are no multiple of "
                f"{group}.",
                allowed=FORMS,
                fix="choose CHANNELS that divide the in_features of every linear",
            )
        return channels // group

    def __str__(self) -> str:
        """The form as a recipe has it."""
        kind = "int8" if self.type == "int8" else "int4"
        return kind if self.group is None else f"{kind}:{self.group}"


HEAD = WeightForm("int8", None)
"""Of the output head and the input embedding."""


@dataclass(frozen=True)
class Forms:
    """Forms that targeted linears may have, and that of all else."""

    targets: tuple[str, ...]
    """In words, the finest first: one, or those that a budget chooses among for each linear."""
    others: WeightForm | None
    """That of linears that are no targets; None is float."""
    head: WeightForm | None
    """That of the output head and the input embedding; None is float."""

    @classmethod
    def of(cls, weights: str, among: Iterable[str] = ()) -> Self:
        """Read what a recipe says.

        Args:
            weights: How weights are stored where nothing else is said.
            among: What a budget chooses among; nothing is `weights` for all linears.
        """
        targets = finest_first(among) or (weights,)
        forms = [WeightForm.parse(text) for text in targets]
        others = forms[0] if weights == "auto" else WeightForm.parse(weights)
        # Nobody who wants integers wants the largest weight of a small model in floats.
        decisive = forms if weights == "auto" else [others]
        return cls(targets, others, HEAD if any(decisive) else None)

    @property
    def integers(self) -> tuple[WeightForm, ...]:
        """All that a linear other than the head may be rounded to."""
        forms = [*(WeightForm.parse(text) for text in self.targets), self.others]
        return tuple(dict.fromkeys(form for form in forms if form is not None))


def finest_first(texts: Iterable[str]) -> tuple[str, ...]:
    """Sort forms by bits, then by the channels of a scale; one that is there twice is left out."""
    by_form = {WeightForm.parse(text): text for text in texts}

    def coarseness(form: WeightForm | None) -> tuple[int, float]:
        if form is None:
            return -16, 0.0
        return -form.bits, float("inf") if form.group is None else form.group

    return tuple(by_form[form] for form in sorted(by_form, key=coarseness))


def activation_block(channels: int, groups: int) -> int | None:
    """Channels of a block of an operand in 8 bits; None where no block fits.

    Args:
        channels: K of the linear.
        groups: Scales of each of its outputs.
    """
    together = channels // groups
    blocks = BLOCKS if groups == 1 else BLOCKS[::-1]
    return next((block for block in blocks if together % block == 0), None)
