"""The kernels' arguments as ctypes structures, and one linear with every option of the contract."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Selection(ctypes.Structure):
    """Mirror of nmexport::cuda::Selection."""

    _fields_ = [
        ("n", ctypes.c_int32),
        ("m", ctypes.c_int32),
        ("score_scale", ctypes.c_void_p),
        ("channel_order", ctypes.c_void_p),
        ("value_scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("shift_length", ctypes.c_int32),
        ("dynamic_shift", ctypes.c_bool),
        ("variance_correction", ctypes.c_bool),
    ]


class StoredWeights(ctypes.Structure):
    """Mirror of nmexport::cuda::StoredWeights; all zero for a W of T."""

    _fields_ = [
        ("type", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("scale", ctypes.c_void_p),
        ("scale_is_t", ctypes.c_bool),
        ("zero_point", ctypes.c_void_p),
        ("zero_point_is_float", ctypes.c_bool),
    ]


class LinearArgs(ctypes.Structure):
    """Mirror of nmexport::cuda::LinearArgs."""

    _fields_ = [
        ("type", ctypes.c_int32),
        ("tokens", ctypes.c_int64),
        ("channels", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("selection", Selection),
        ("x", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("shift_weight", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("is_pruned", ctypes.c_bool),
        ("stored", StoredWeights),
    ]


class MaskArgs(ctypes.Structure):
    """Mirror of nmexport::cuda::MaskArgs."""

    _fields_ = [
        ("type", ctypes.c_int32),
        ("tokens", ctypes.c_int64),
        ("channels", ctypes.c_int32),
        ("selection", Selection),
        ("x", ctypes.c_void_p),
        ("is_gathered", ctypes.c_bool),
        ("s", ctypes.c_void_p),
        ("keep", ctypes.c_void_p),
        ("eta", ctypes.c_void_p),
        ("nu", ctypes.c_void_p),
    ]


class Plan(ctypes.Structure):
    """Mirror of nmexport::cuda::DecodePlan."""

    _fields_ = [
        ("lanes", ctypes.c_int32),
        ("vectors", ctypes.c_int32),
        ("warps", ctypes.c_int32),
        ("unroll", ctypes.c_int32),
        ("overlap", ctypes.c_int32),
        ("resident", ctypes.c_int32),
        ("cluster", ctypes.c_int32),
        ("late", ctypes.c_int32),
    ]

    def label(self) -> str:
        return f"L{self.lanes} V{self.vectors} W{self.warps} U{self.unroll} O{self.overlap} R{self.resident} C{self.cluster} N{self.late}"

    def values(self) -> list[int]:
        return [int(getattr(self, field[0])) for field in self._fields_]

    def ctas(self, outputs: int) -> int:
        rows = int(self.lanes * self.vectors * 8)
        return -(-outputs // rows) * int(self.cluster)


def plan_of(label: str) -> Plan:
    """The plan of a label, such as `L32 V1 W8 U8 O1 R24 C4 N0`."""
    return Plan(*[int(part[1:]) for part in label.removeprefix("dense ").split()])


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@dataclass
class Layer:
    """One linear with every option of the contract; tensors live on the GPU.

    Everything of K elements but x lies by position: the place of a channel in the order.
    """

    x: torch.Tensor
    w: torch.Tensor
    n: int = 8
    m: int = 16
    bias: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    shift_weight: torch.Tensor | None = None
    score_scale: torch.Tensor | None = None
    channel_order: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None
    dynamic_shift: bool = False
    variance_correction: bool = False

    def selection(self) -> Selection:
        return Selection(
            self.n,
            self.m,
            pointer(self.score_scale),
            pointer(self.channel_order),
            pointer(self.value_scale),
            pointer(self.shift),
            0 if self.shift is None else self.shift.numel(),
            self.dynamic_shift,
            self.variance_correction,
        )

    def decode_args(self, y: torch.Tensor) -> LinearArgs:
        return LinearArgs(
            DTYPES[self.x.dtype],
            self.x.shape[0],
            self.x.shape[1],
            self.w.shape[1],
            self.selection(),
            self.x.data_ptr(),
            self.w.data_ptr(),
            pointer(self.bias),
            pointer(self.shift_weight),
            y.data_ptr(),
        )

    def reference(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """By sorting and a float64 product, by position: keep [T, K], s float32, nu [T, 1], y [T, O]."""
        x = self.x.float()
        if self.channel_order is not None:
            x = x[:, self.channel_order.long()]
        eta = torch.zeros_like(x[:, :1])
        if self.dynamic_shift:
            eta = self.x.double().mean(dim=1, keepdim=True).float()
        z = x - eta
        if self.shift is not None:
            z = x - self.shift
        score = z.abs() if self.score_scale is None else z.abs() * self.score_scale
        grouped = torch.nan_to_num(score, nan=math.inf).double().view(len(x), -1, self.m)
        grouped = torch.where(score.isnan().view_as(grouped), 2e300, grouped)  # NaN above infinity
        grouped = torch.where(grouped == math.inf, 1e300, grouped)
        best = torch.sort(grouped, dim=2, descending=True, stable=True).indices[:, :, : self.n]
        keep = torch.zeros_like(grouped, dtype=torch.bool).scatter_(2, best, True).view(len(x), -1)
        s = torch.where(keep, z, 0.0)
        nu = torch.ones_like(s[:, :1])
        if self.variance_correction:
            kept = s.double().var(1, correction=0).clamp_min(1e-12)
            nu = (z.double().var(1, correction=0) / kept).sqrt()[:, None]
        if self.value_scale is not None:
            s = torch.where(keep, s * self.value_scale, 0.0)
        y = nu * (s.double() @ self.w.double())
        if self.dynamic_shift and self.shift_weight is not None:
            y = y + eta.double() * self.shift_weight.double()
        if self.bias is not None:
            y = y + self.bias.double()
        return keep, s, nu, y
