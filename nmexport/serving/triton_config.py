"""`config.pbtxt`, through Triton's own protobuf messages: what is written is what Triton reads."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmexport.errors import ArtifactError, EnvironmentFault

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nmexport.runtimes.engine import EngineTensor, TensorRTEngine

CONFIG = "config.pbtxt"
PLAN = "model.plan"
_MESSAGES = "tritonclient.grpc.model_config_pb2"

# Inputs of the text model: Triton type, first and only dimension. The names are those that
# Triton's OpenAI front end and TensorRT-LLM's clients send; each stands for one option.
TEXT_INPUTS = (
    ("text_input", "TYPE_STRING", 1),
    ("messages", "TYPE_STRING", 1),
    ("chat", "TYPE_BOOL", 1),
    ("add_special_tokens", "TYPE_BOOL", 1),
    ("stream", "TYPE_BOOL", 1),
    ("max_tokens", "TYPE_INT32", 1),
    ("temperature", "TYPE_FP32", 1),
    ("top_p", "TYPE_FP32", 1),
    ("top_k", "TYPE_INT32", 1),
    ("repetition_penalty", "TYPE_FP32", 1),
    ("presence_penalty", "TYPE_FP32", 1),
    ("frequency_penalty", "TYPE_FP32", 1),
    ("seed", "TYPE_UINT64", 1),
    ("random_seed", "TYPE_UINT64", 1),
    ("stop_words", "TYPE_STRING", -1),
    ("return_num_input_tokens", "TYPE_BOOL", 1),
    ("return_num_output_tokens", "TYPE_BOOL", 1),
)
TEXT_OUTPUTS = (
    ("text_output", "TYPE_STRING"),
    ("finish_reason", "TYPE_STRING"),
    ("prompt_tokens", "TYPE_INT32"),
    ("completion_tokens", "TYPE_INT32"),
    # Only where they are asked for, as Triton's OpenAI front end does.
    ("num_input_tokens", "TYPE_UINT32"),
    ("num_output_tokens", "TYPE_UINT32"),
)
# ONNX element types, as their enumeration spells them, in Triton's words.
_TRITON_TYPES = {
    "FLOAT": "TYPE_FP32",
    "FLOAT16": "TYPE_FP16",
    "BFLOAT16": "TYPE_BF16",
    "INT64": "TYPE_INT64",
    "INT32": "TYPE_INT32",
    "BOOL": "TYPE_BOOL",
}


# TensorRT's names of element types where they are not ONNX's.
_ONNX_TYPES = {"HALF": "FLOAT16", "BF16": "BFLOAT16"}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a model."""

    name: str
    element: str
    """ONNX element type, such as `FLOAT16`."""
    shape: tuple[int | None, ...]
    """Batch first; None is a dynamic axis."""


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Inputs and outputs of a model."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def text_config(name: str, settings: Mapping[str, str]) -> Any:
    """Build the configuration of the model that takes and streams text.

    A request is one sequence (`max_batch_size` 1): the model itself runs many at a time, and lets
    each join and leave at any step, which a batch of Triton's cannot.

    Args:
        name: The model's.
        settings: `parameters`, see `service.SETTINGS`.
    """
    return _messages().ModelConfig(
        name=name,
        backend="python",
        max_batch_size=1,
        version_policy={"latest": {"num_versions": 1}},
        model_transaction_policy={"decoupled": True},
        input=[
            {"name": given, "data_type": kind, "dims": [size], "optional": True}
            for given, kind, size in TEXT_INPUTS
        ],
        output=[{"name": given, "data_type": kind, "dims": [1]} for given, kind in TEXT_OUTPUTS],
        instance_group=[{"name": name, "count": 1, "kind": "KIND_CPU"}],
        # Half of those that may wait do so in Triton's queue: only a queue of its own makes it
        # answer 503 when it is full. The others wait inside the model, which measures how long.
        dynamic_batching={
            "default_queue_policy": {"max_queue_size": max(1, int(settings.get("queue", 0)) // 2)}
        },
        parameters={key: {"string_value": value} for key, value in settings.items()},
    )


def engine_config(name: str, signature: Signature, *, max_batch_size: int, profiles: int) -> Any:
    """Build the configuration of the raw TensorRT engine.

    Args:
        name: The model's.
        signature: The engine's, batch axes first.
        max_batch_size: Of every profile the smallest largest batch; Triton prepends this axis.
        profiles: Optimization profiles of the engine; all are used.

    Raises:
        ArtifactError: if a tensor has no batch axis, or a type that Triton does not know.
    """
    return _messages().ModelConfig(
        name=name,
        platform="tensorrt_plan",
        backend="tensorrt",
        default_model_filename=PLAN,
        max_batch_size=max_batch_size,
        version_policy={"latest": {"num_versions": 1}},
        input=[_tensor(spec) for spec in signature.inputs],
        output=[_tensor(spec) for spec in signature.outputs],
        # No kind: the first GPU that Triton may use, whatever its number is in the container.
        instance_group=[
            {"name": name, "count": 1, "profile": [str(index) for index in range(profiles)]}
        ],
    )


def _tensor(spec: TensorSpec) -> dict[str, object]:
    kind = _TRITON_TYPES.get(spec.element)
    if kind is None or not spec.shape or spec.shape[0] is not None:
        raise ArtifactError(
            f"Triton cannot serve {spec.name}, {spec.element} {spec.shape}.",
            allowed=f"a dynamic batch axis first; {', '.join(_TRITON_TYPES)}",
        )
    dims = [-1 if size is None else size for size in spec.shape[1:]]
    return {"name": spec.name, "data_type": kind, "dims": dims}


def signature_of(model: Path) -> Signature:
    """Read inputs and outputs of an ONNX file, without its weights.

    Raises:
        ArtifactError: if it cannot be read.
    """
    import onnx

    try:
        graph = onnx.load(model, load_external_data=False).graph
    except Exception as error:  # protobuf's and onnx's own
        raise ArtifactError(f"{model} cannot be read: {error}") from error
    return Signature(
        inputs=tuple(_spec(value) for value in graph.input),
        outputs=tuple(_spec(value) for value in graph.output),
    )


def signature_of_engine(engine: TensorRTEngine) -> Signature:
    """Return inputs and outputs of a plan, as its builder recorded them.

    Raises:
        ArtifactError: if an older build recorded none.
    """
    if not engine.tensors:
        raise ArtifactError(
            "engine.json does not say what the plan takes and gives.",
            fix="run `nmexport engine --force`",
        )

    def specs(*, is_input: bool) -> tuple[TensorSpec, ...]:
        return tuple(_spec_of(tensor) for tensor in engine.tensors if tensor.is_input == is_input)

    return Signature(inputs=specs(is_input=True), outputs=specs(is_input=False))


def _spec_of(tensor: EngineTensor) -> TensorSpec:
    return TensorSpec(
        name=tensor.name,
        element=_ONNX_TYPES.get(tensor.element, tensor.element),
        shape=tuple(None if size < 0 else size for size in tensor.shape),
    )


def _spec(value: Any) -> TensorSpec:
    import onnx

    kind = value.type.tensor_type
    shape = tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in kind.shape.dim)
    element = onnx.TensorProto.DataType.Name(kind.elem_type)
    return TensorSpec(name=value.name, element=element, shape=shape)


def to_text(config: Any) -> str:
    """Write a configuration as `config.pbtxt`."""
    from google.protobuf import text_format

    text: str = text_format.MessageToString(config)
    return text


def from_text(text: str) -> Any:
    """Parse the configuration in a `config.pbtxt`.

    Raises:
        ArtifactError: if it is none.
    """
    from google.protobuf import text_format

    try:
        return text_format.Parse(text, _messages().ModelConfig())
    except text_format.ParseError as error:
        raise ArtifactError(f"This is no {CONFIG}: {error}") from error


def _messages() -> Any:
    """Load Triton's messages from their file: the package around them needs gRPC."""
    if _MESSAGES in sys.modules:
        return sys.modules[_MESSAGES]
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        raise EnvironmentFault(
            "The package tritonclient is missing: it knows what Triton's configuration looks like.",
            fix="pip install tritonclient",
        )
    folder = Path(next(iter(package.submodule_search_locations)))
    path = folder / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("nmexport_triton_model_config", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise EnvironmentFault(
            f"The package tritonclient in {folder} has no model_config_pb2.",
            fix="pip install --force-reinstall tritonclient",
        )
    known = sys.modules.get(spec.name)
    if known is not None:
        return known
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
