"""On a GPU: the CUDA kernels against their reference, the ops on ONNX Runtime's CUDA provider."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np
import onnx
import pytest
from nmexport import oracle
from nmexport.errors import ArtifactError
from nmexport.runtimes import native
from nmexport.runtimes.onnxruntime_opening import (
    choose_provider,
    open_inference_session,
    session_options,
)
from nmexport.runtimes.tensorrt import library as tensorrt_library

from tests.support.op_cases import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    STORED,
    linear_case,
    one_node_model,
    run_session,
    with_stored_weight,
)
from tests.support.plugin_build import ROOT, build_script

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    not tensorrt_library.gpu_is_usable(), reason="no NVIDIA GPU with its driver is here"
)
KERNELS = ROOT / "plugins" / "kernels" / "cuda"


def test_kernels_agree_with_their_reference(tmp_path: Path):
    script = build_script()
    cmake, ctest = (script.find_tool(name) for name in ("cmake", "ctest"))
    if cmake is None or ctest is None:
        pytest.skip("no cmake")

    def run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    toolkit = script.find_toolkit()
    options = (
        "-DNMEXPORT_CUDA_ARCHITECTURES=native",
        "-DBUILD_TESTING=ON",
        f"-DCMAKE_CUDA_COMPILER={toolkit.nvcc}",
        f"-DCUDAToolkit_ROOT={toolkit.root}",
    )
    run(cmake, "-S", str(KERNELS), "-B", str(tmp_path), *options)
    run(cmake, "--build", str(tmp_path), "--parallel")
    run(ctest, "--test-dir", str(tmp_path), "--output-on-failure")


def outputs(
    dtype: np.dtype[Any], tokens: int, arrays: dict[str, np.ndarray[Any, Any]], **attributes: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Y of one NMLinear on the CPU and on the GPU, the same library on both."""
    library = native.find_library()
    if choose_provider(library) != "cuda":
        pytest.skip("needs onnxruntime-gpu and NMEXPORT_CUDA in the build")
    x = np.random.default_rng(tokens).standard_normal((1, tokens, 128)).astype(dtype)
    names = ["X", "W", "bias", "shift", "shift_weight", "score_scale", "channel_order"]
    inputs = [name if name == "X" or name in arrays else "" for name in names]
    node = onnx.helper.make_node(
        "NMLinear", inputs, ["Y"], domain="nmexport", n=8, m=16, **attributes
    )
    model = one_node_model(node, x, arrays).SerializeToString()
    return {
        provider: run_session(
            open_inference_session(model, session_options(library=library, threads=1), provider), x
        )
        for provider in ("cpu", "cuda")
    }


@pytest.mark.parametrize("tokens", [1, 2, 4, 33])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
@pytest.mark.parametrize("variant", ["bare", "constants", "dynamic"])
def test_the_gpu_gives_what_the_cpu_gives(variant: str, dtype: np.dtype[Any], tokens: int):
    random = np.random.default_rng(3)
    arrays = {"W": (random.standard_normal((128, 64)) / 12).astype(dtype)}
    attributes = {}
    if variant == "constants":
        arrays |= {
            "bias": random.standard_normal(64).astype(dtype),
            "shift": random.standard_normal(128).astype(np.float32) / 4,
            "score_scale": random.random(128).astype(np.float32) + np.float32(0.1),
            "channel_order": random.permutation(128).astype(np.int32),
        }
    if variant == "dynamic":
        arrays["shift_weight"] = arrays["W"].astype(np.float32).sum(axis=0)
        attributes = {"dynamic_shift": 1, "variance_correction": 1}
    found = outputs(dtype, tokens, arrays, **attributes)
    tolerance = 4e-3 if dtype == FLOAT16 else 1e-4
    np.testing.assert_allclose(
        found["cuda"].astype(np.float64),
        found["cpu"].astype(np.float64),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("tokens", [1, 2, 4, 33])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize(
    ("stored", "groups", "zeros"),
    [
        (STORED[0], 1, False),
        (STORED[0], 8, True),
        (STORED[1], 8, False),
        (STORED[2], 8, True),
        (STORED[2], 32, "between"),
        (STORED[3], 8, False),
    ],
    ids=str,
)
def test_stored_weights_give_what_the_oracle_says(
    stored: np.dtype[Any],
    groups: int,
    zeros: bool | Literal["between"],
    dtype: np.dtype[Any],
    tokens: int,
):
    optional = ("bias", "shift", "channel_order", "value_scale")
    case = with_stored_weight(
        linear_case(shape=(1, tokens, 1024), out_features=160, dtype=dtype, optional=optional),
        stored,
        groups,
        zero_point=zeros,
    )
    library = native.find_library()
    if choose_provider(library) != "cuda":
        pytest.skip("needs onnxruntime-gpu and NMEXPORT_CUDA in the build")
    model = one_node_model(case.node(), case.x, case.arrays).SerializeToString()
    y = run_session(
        open_inference_session(model, session_options(library=library, threads=1), "cuda"), case.x
    )
    truth = oracle.reference(case.x, case.arrays["W"], **case.oracle_arguments())
    # A prompt's weights are rounded to the type of X first.
    rounding = 2 * float(ml_dtypes.finfo(dtype).eps) * truth.magnitude
    assert oracle.agrees(y, truth.value, truth.bound(dtype) + rounding).all()


def test_rounded_activations_are_refused_with_what_to_do():
    library = native.find_library()
    if choose_provider(library) != "cuda":
        pytest.skip("needs onnxruntime-gpu and NMEXPORT_CUDA in the build")
    case = linear_case(dtype=FLOAT16, scale_groups=1, activation_bits=8)
    model = one_node_model(case.node(), case.x, case.arrays).SerializeToString()
    with pytest.raises(ArtifactError, match="--activations float"):
        open_inference_session(model, session_options(library=library, threads=1), "cuda")


def test_an_order_that_is_no_constant_permutation_is_refused():
    arrays = {
        "W": np.ones((128, 64), np.float32),
        "channel_order": np.zeros(128, np.int32),
    }
    with pytest.raises(Exception, match=r"channel_order\[1\] = 0 occurs twice"):
        outputs(FLOAT32, 1, arrays)
