"""Memory of the host that the device sees: kept as long as an array is, and given back once."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nmexport.errors import EnvironmentFault
from nmexport.runtimes import native

INT64 = np.dtype(np.int64)


class Function:
    """A function of a library, which takes notes of its calls."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.calls: list[Any] = []

    def __call__(self, argument: Any) -> Any:
        self.calls.append(argument)
        return self.answer


class Library:
    """Memory of this process in place of the driver's."""

    def __init__(self, address: int) -> None:
        self.nmexport_cuda_host_memory = Function(address)
        self.nmexport_cuda_free_host_memory = Function(None)


def test_an_array_keeps_its_memory_and_then_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = (ctypes.c_int64 * 6)(*range(6))
    library = Library(ctypes.addressof(memory))
    monkeypatch.setattr(native, "_load", lambda path: library)
    array = native.device_visible(Path("x.so"), (3, 2), INT64)
    assert library.nmexport_cuda_host_memory.calls == [48]
    assert array.ctypes.data == ctypes.addressof(memory)
    assert (array.shape, array.tolist()) == ((3, 2), [[0, 0]] * 3)
    array[2, 1] = 7
    assert memory[5] == 7
    row = array[2]
    del array
    gc.collect()
    assert library.nmexport_cuda_free_host_memory.calls == [], "a view of it is still there"
    del row
    gc.collect()
    assert library.nmexport_cuda_free_host_memory.calls == [ctypes.addressof(memory)]


def test_without_memory_or_kernels_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda path: Library(0))
    with pytest.raises(EnvironmentFault, match="gives no 16 bytes"):
        native.device_visible(Path("x.so"), (2,), INT64)
    monkeypatch.setattr(native, "_load", lambda path: object())
    with pytest.raises(EnvironmentFault, match="no CUDA kernels"):
        native.device_visible(Path("x.so"), (2,), INT64)
