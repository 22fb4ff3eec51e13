"""Configurations, bundles, the service on one, and the shell that Triton calls."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import types
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from nmexport.environment import free_memory
from nmexport.errors import ArtifactError, EnvironmentFault, RequestError, ServerBusyError
from nmexport.generation.context import context_length
from nmexport.generation.defaults import generation_defaults
from nmexport.generation.options import NAMES, GenerationOptions, options_from
from nmexport.runtimes.engine import EngineTensor, PluginRecord, TensorRTEngine, write_engine
from nmexport.serving import bundle as bundles
from nmexport.serving import repository, triton_config
from nmexport.serving.metrics import METRICS
from nmexport.serving.service import SETTINGS, TextRequest, TextService, numbers_from
from nmexport.serving.triton_config import Signature, TensorSpec, from_text, to_text
from nmexport.serving.triton_model import TritonPythonModel, require_whole_tensors
from nmexport.stages import package as package_stage
from nmexport.store.artifact import file_digest
from nmexport.store.exported import GENAI_CONFIG
from nmexport.store.records import json_from

from tests.serving.test_scheduler import ListSink
from tests.support.served import NAME, engine_of, save_export, save_package
from tests.support.served import SETTINGS as PACKAGED_SETTINGS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def package(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    save_package(tiny_export, folder)
    return folder


@pytest.fixture
def moved(package: Path, tmp_path: Path) -> Path:
    """A bundle of a package that was copied elsewhere."""
    copy = shutil.copytree(package, tmp_path / "copied here")
    return copy / "model_repository" / NAME / "1"


# -- configurations -------------------------------------------------------------------------------


def test_text_configuration_survives_its_text() -> None:
    config = triton_config.text_config("a-model", PACKAGED_SETTINGS)
    again = from_text(to_text(config))
    assert again == config
    assert again.model_transaction_policy.decoupled
    assert again.max_batch_size == 1
    names = {one.name for one in again.input}
    flags = {"chat", "add_special_tokens", "stream"}
    flags |= {"return_num_input_tokens", "return_num_output_tokens"}
    assert names == {"text_input", "messages"} | flags | (set(NAMES) - {"stop"})
    assert all(one.optional for one in again.input)
    assert set(again.parameters) == set(SETTINGS)
    assert again.dynamic_batching.default_queue_policy.max_queue_size == 32


@pytest.mark.parametrize(("queue", "in_triton"), [("0", 1), ("1", 1), ("2", 1), ("128", 64)])
def test_a_queue_always_has_an_end_in_triton(queue: str, in_triton: int) -> None:
    config = triton_config.text_config("a-model", {**PACKAGED_SETTINGS, "queue": queue})
    assert config.dynamic_batching.default_queue_policy.max_queue_size == in_triton


def test_engine_configuration_is_that_of_the_exported_model(tiny_export: Path) -> None:
    signature = triton_config.signature_of(tiny_export / "model.onnx")
    config = triton_config.engine_config("e", signature, max_batch_size=8, profiles=2)
    again = from_text(to_text(config))
    assert again == config
    inputs = {one.name: one for one in again.input}
    assert list(inputs["input_ids"].dims) == [-1]
    assert list(inputs["past_key_values.1.value"].dims) == [2, -1, 16]
    assert list(again.output[0].dims) == [-1, 384]
    assert {one.name for one in again.output} == {
        "logits",
        *(f"present.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")),
    }
    assert list(again.instance_group[0].profile) == ["0", "1"]
    kinds = dict(triton_config._messages().DataType.items())
    assert inputs["input_ids"].data_type == kinds["TYPE_INT64"]
    assert inputs["past_key_values.0.key"].data_type == kinds["TYPE_FP32"]


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec(name="x", element="FLOAT8E4M3FN", shape=(None, 3)),
        TensorSpec(name="x", element="FLOAT", shape=(2, None)),
        TensorSpec(name="x", element="FLOAT", shape=()),
    ],
)
def test_what_triton_cannot_serve_is_named(spec: TensorSpec) -> None:
    signature = triton_config.Signature(inputs=(spec,), outputs=())
    with pytest.raises(ArtifactError, match="cannot serve x"):
        triton_config.engine_config("e", signature, max_batch_size=1, profiles=1)


def test_engine_model_holds_its_plan(tmp_path: Path) -> None:
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"plan")
    spec = TensorSpec(name="x", element="FLOAT16", shape=(None, 3))
    folder = repository.write_engine_model(
        tmp_path / "out",
        name="m_engine",
        plan=plan,
        signature=triton_config.Signature(inputs=(spec,), outputs=(spec,)),
        max_batch_size=2,
        profiles=1,
    )
    assert (folder / "1" / "model.plan").read_bytes() == b"plan"
    assert from_text((folder / "config.pbtxt").read_text()).platform == "tensorrt_plan"


def test_broken_configurations_and_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no config\.pbtxt"):
        from_text("name: 3 }")
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match="cannot be read"):
        triton_config.signature_of(tmp_path / "model.onnx")


def test_messages_need_no_grpc() -> None:
    program = (
        "import sys; sys.modules['grpc'] = None; sys.modules['tritonclient.grpc'] = None\n"
        "from nmexport.serving.triton_config import from_text, text_config, to_text\n"
        "one = text_config('m', {'slots': '3'})\n"
        "assert from_text(to_text(one)) == one\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_a_tritonclient_without_messages_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.delitem(sys.modules, "tritonclient.grpc.model_config_pb2", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(EnvironmentFault, match="no model_config_pb2"):
        triton_config.text_config("x", {})


def test_without_tritonclient_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tritonclient.grpc.model_config_pb2", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="pip install tritonclient"):
        triton_config.text_config("x", {})


# -- packages -------------------------------------------------------------------------------------


def test_genai_is_told_of_the_native_op(package: Path, tiny_export: Path, tmp_path: Path) -> None:
    library = tmp_path / "libops.so"
    library.write_bytes(b"ops")
    bundle = save_package(tiny_export, tmp_path / "package", library=library)

    def options(folder: Path) -> Any:
        document = json.loads((folder / GENAI_CONFIG).read_text("utf-8"))
        return document["model"].get("decoder", {}).get("session_options", {})

    assert options(bundle) == {"custom_ops_library": library.name}
    assert (bundle / library.name).is_file()
    assert options(package / "model_repository" / NAME / "1") == {}


def test_words_of_a_package(package: Path) -> None:
    readme = (package / "README.md").read_text("utf-8")
    assert "| `slots` | 4 |" in readme
    for name, *_ in triton_config.TEXT_INPUTS:
        assert f"`{name}`" in readme or name == "random_seed"
    assert "plugins" not in readme
    assert "although the engine" not in readme
    assert "some/tiny" in (package / "NOTICE.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9}, {}),  # named, and not drawn from
        ({"do_sample": True}, {"temperature": 1.0}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1},
            {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1},
        ),
    ],
)
def test_defaults_are_the_authors(
    tmp_path: Path, document: dict[str, Any], expected: dict[str, Any]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(document))
    found = generation_defaults(tmp_path)
    assert found == options_from(expected)
    assert generation_defaults(tmp_path / "absent") == GenerationOptions()


def test_a_model_without_a_context_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="context length"):
        context_length(tmp_path)


# -- bundles --------------------------------------------------------------------------------------


def test_a_copy_that_was_cut_short_is_refused(moved: Path) -> None:
    data = moved / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data has"):
        TextService.open(moved, {})
    data.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        TextService.open(moved, {})


@pytest.mark.parametrize("text", [None, "{", '{"schema": 9}', '{"schema": 1}'])
def test_a_record_that_cannot_be_read(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "bundle.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"bundle\.json"):
        bundles.read_bundle(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda logits: np.roll(logits, 1), "does not compute here"),
        (lambda logits: logits * np.float32("nan"), "does not compute here"),
        (lambda logits: logits[1:], "its reference"),
        (lambda logits: None, "cannot be read"),
    ],
)
def test_other_logits_keep_a_bundle_from_serving(moved: Path, change: Any, words: str) -> None:
    path = moved / "reference.npy"
    changed = change(np.load(path))
    if changed is None:
        record = json.loads((moved / "bundle.json").read_text())
        size = next(one["bytes"] for one in record["files"] if one["path"] == "reference.npy")
        path.write_bytes(b"x" * size)
    else:
        np.save(path, changed)
        record = json.loads((moved / "bundle.json").read_text())
        for one in record["files"]:
            if one["path"] == "reference.npy":
                one["bytes"] = path.stat().st_size
        (moved / "bundle.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=words):
        TextService.open(moved, {})


def test_one_text_that_a_near_tie_moved_is_no_other_model(moved: Path) -> None:
    path = moved / "reference.npy"
    logits = np.load(path)
    logits[:3] = np.roll(logits[:3], 1, axis=1)
    np.save(path, logits)
    TextService.open(moved, {}).close()


def test_a_package_of_a_gpu_is_served_without_one(
    moved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = moved / "engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "provider": "cuda"}))
    record = json.loads((moved / "bundle.json").read_text())
    for one in record["files"]:
        if one["path"] == path.name:
            one["bytes"] = path.stat().st_size
    (moved / "bundle.json").write_text(json.dumps(record))
    with TextService.open(moved, {}) as service:
        assert ask(service, text="The quick", values={"max_tokens": 2}).outcome is not None
    assert "it runs on the CPU; install onnxruntime-gpu" in caplog.text


# -- service --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(package: Path) -> Iterator[TextService]:
    bundle = package / "model_repository" / NAME / "1"
    with TextService.open(bundle, {**PACKAGED_SETTINGS, "context_tokens": "100"}) as one:
        yield one


def ask(service: TextService, **fields: Any) -> ListSink:
    sink = ListSink()
    service.submit(TextRequest(**fields), sink)
    assert sink.ended.wait(20)
    return sink


def test_settings_become_limits(service: TextService) -> None:
    limits = service.scheduler.limits
    assert (limits.slots, limits.queue, limits.prefill_chunk) == (4, 64, 8)
    assert limits.context_tokens == 100
    assert 0 < limits.cache_bytes <= free_memory()


def test_text_and_messages_reach_the_model(service: TextService) -> None:
    plain = ask(service, text="The quick", values={"max_tokens": 5})
    assert plain.outcome is not None
    assert plain.outcome.prompt_tokens < 5
    chat = ask(service, text="The quick", chat=True, values={"max_tokens": 5})
    same = ask(
        service,
        messages='[{"role": "user", "content": "The quick"}]',
        values={"max_tokens": 5},
    )
    assert chat.all_text == same.all_text
    assert chat.outcome == same.outcome
    assert chat.outcome is not None
    assert chat.outcome.prompt_tokens > plain.outcome.prompt_tokens
    default = ask(service, text="The quick")
    assert default.outcome is not None
    assert default.outcome.completion_tokens <= 16


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "a" * 10**6},
        {"text": "é" * 10**6},
        {"text": "a" * 10**6, "chat": True},
        {"messages": json.dumps([{"role": "user", "content": "a" * 5000}])},
        {"messages": "[" * 10**6},
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_tokenised(
    service: TextService, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    monkeypatch.setattr(service._tokenizer, "encode", lambda *_, **__: pytest.fail("tokenised"))
    with pytest.raises(RequestError, match=r"Too long: .* bytes") as caught:
        service.submit(TextRequest(**fields), ListSink())
    assert "the model's context is 100 tokens" in str(caught.value)


def test_the_longest_text_that_may_fit_is_tokenised(service: TextService) -> None:
    longest = service._tokenizer.longest_token
    assert longest > 4
    with pytest.raises(RequestError, match=r"Too long: \d+ prompt tokens"):
        service.submit(TextRequest(text="a" * 100 * longest), ListSink())
    with pytest.raises(RequestError, match="Too long: text_input"):
        service.submit(TextRequest(text="a" * (100 * longest + 1)), ListSink())


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"slot": "1"}, "slot"), ({"slots": "-1"}, "-1"), ({"slots": "²"}, "slots")],
)
def test_wrong_settings_are_named(settings: dict[str, str], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        numbers_from(settings)


# -- the shell ------------------------------------------------------------------------------------


class FakeTensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> np.ndarray:
        return self.array

    def to_dlpack(self) -> np.ndarray:
        return self.array

    @staticmethod
    def from_dlpack(name: str, capsule: np.ndarray) -> FakeTensor:
        return FakeTensor(name, capsule)


class FakeError(Exception):
    INVALID_ARG, CANCELLED = "invalid", "cancelled"
    UNAVAILABLE, INTERNAL = "unavailable", "internal"

    def __init__(self, words: str, code: str = "internal") -> None:
        super().__init__(words)
        self.code = code


class FakeMetric:
    def __init__(self) -> None:
        self.value, self.seen = 0.0, []

    def increment(self, amount: float) -> None:
        self.value += amount

    def set(self, value: float) -> None:
        self.value = value

    def observe(self, value: float) -> None:
        self.seen.append(value)


class FakeFamily:
    COUNTER, GAUGE, HISTOGRAM = "c", "g", "h"
    made: dict[str, tuple[str, FakeMetric]]

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name, self.kind = name, kind
        assert description

    def Metric(self, labels: dict[str, str], buckets: Any = None) -> FakeMetric:  # noqa: N802
        assert (buckets is not None) == (self.kind == "h")
        metric = FakeMetric()
        self.made[self.name] = (self.kind, metric)
        return metric


class FakeSender:
    def __init__(self) -> None:
        self.sent: list[tuple[Any, int]] = []
        self.final = threading.Event()
        self.cancelled = False

    def send(self, response: Any, flags: int = 0) -> None:
        assert not self.final.is_set()
        self.sent.append((response, flags))
        if flags:
            self.final.set()

    def is_cancelled(self) -> bool:
        return self.cancelled


class FakeRequest:
    def __init__(self, inputs: dict[str, np.ndarray], parameters: str = "") -> None:
        self.tensors = inputs
        self.sender = FakeSender()
        self._parameters = parameters

    def get_response_sender(self) -> FakeSender:
        return self.sender

    def parameters(self) -> str:
        return self._parameters


def fake_backend(**changes: Any) -> Any:
    def tensor_of(request: FakeRequest, name: str) -> FakeTensor | None:
        return FakeTensor(name, request.tensors[name]) if name in request.tensors else None

    family = type("Family", (FakeFamily,), {"made": {}})
    parts = {
        "Tensor": FakeTensor,
        "TritonError": FakeError,
        "MetricFamily": family,
        "InferenceResponse": lambda output_tensors=(), error=None: types.SimpleNamespace(
            tensors={one.name: one.array for one in output_tensors}, error=error
        ),
        "get_input_tensor_by_name": tensor_of,
        "TRITONSERVER_RESPONSE_COMPLETE_FINAL": 1,
    }
    return types.SimpleNamespace(**{**parts, **changes})


@pytest.fixture
def model(package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TritonPythonModel]:
    backend = fake_backend()
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    folder = package / "model_repository" / NAME
    config = {"parameters": {"slots": {"string_value": "2"}, "FOREIGN": {"string_value": "x"}}}
    one = TritonPythonModel()
    one.initialize(
        {
            "model_repository": str(folder),
            "model_version": "1",
            "model_name": NAME,
            "model_config": json.dumps(config),
        }
    )
    yield one
    one.finalize()


def texts(*values: object) -> np.ndarray:
    return np.array([[str(one).encode() for one in values]], dtype=np.object_)


def call(model: TritonPythonModel, parameters: str = "", **inputs: np.ndarray) -> FakeSender:
    request = FakeRequest(inputs, parameters)
    model.execute([request])
    assert request.sender.final.wait(20)
    return request.sender


def test_whole_and_streamed_answers_are_the_same_text(model: TritonPythonModel) -> None:
    inputs = {"text_input": texts("The quick"), "max_tokens": np.array([[9]], np.int32)}
    ((whole, _),) = call(model, **inputs).sent
    streamed = call(model, **inputs, stream=np.array([[True]])).sent
    assert len(streamed) > 2
    pieces = [response.tensors["text_output"].item().decode() for response, _ in streamed]
    assert "".join(pieces) == whole.tensors["text_output"].item().decode()
    assert whole.tensors["finish_reason"].item() == b"length"
    assert whole.tensors["completion_tokens"].item() == 9
    assert {name: array.shape for name, array in whole.tensors.items()} == {
        name: (1, 1) for name, _ in triton_config.TEXT_OUTPUTS if not name.startswith("num_")
    }
    kind, waits = model._backend.MetricFamily.made["nmexport_time_to_first_token_ms"]
    assert kind == "h"
    assert len(waits.seen) == 2


def test_tokens_are_counted_for_who_asks(model: TritonPythonModel) -> None:
    yes = np.array([[True]])
    asked = {"return_num_input_tokens": yes, "return_num_output_tokens": yes}
    inputs = {"text_input": texts("The quick"), "max_tokens": np.array([[9]], np.int32)}
    ((whole, _),) = call(model, **inputs, **asked).sent
    streamed = [one.tensors for one, _ in call(model, **inputs, **asked, stream=yes).sent]
    assert whole.tensors.keys() == {name for name, _ in triton_config.TEXT_OUTPUTS}
    assert whole.tensors["num_output_tokens"].item() == 9
    prompt_tokens = whole.tensors["prompt_tokens"].item()
    assert {one["num_input_tokens"].item() for one in streamed} == {prompt_tokens}
    news = [one["num_output_tokens"].item() for one in streamed]
    assert sum(news) == 9
    assert len(news) > 2
    assert {one["num_output_tokens"].dtype for one in streamed} == {np.dtype(np.uint32)}
    one_of_them = call(model, **inputs, return_num_output_tokens=yes).sent[0][0].tensors
    assert "num_input_tokens" not in one_of_them


def counted(model: TritonPythonModel, name: str) -> float:
    _, metric = model._backend.MetricFamily.made[name]
    return metric.value


@pytest.mark.parametrize(
    ("inputs", "parameters", "words"),
    [
        ({"text_input": texts("")}, "", "text_input is empty"),
        ({"text_input": np.array([[b"\xff"]], np.object_)}, "", "not UTF-8"),
        ({"text_input": texts("a", "b")}, "", "holds 2 values"),
        ({"text_input": texts("a")}, '{"text_input": "b"}', "given twice"),
        ({"text_input": texts("a")}, '{"stream": 3}', "stream cannot be 3"),
        ({}, '{"text_input": 3}', "text_input cannot be 3"),
        ({"text_input": texts("a")}, '{"what": 1}', "Unknown parameter"),
        ({"text_input": texts("a"), "temperature": np.array([[-1]], np.float32)}, "", "-1.0"),
        (
            {"messages": texts('[{"role": "user", "content": "\\ud83d"}]')},
            "",
            "The chat is no text",
        ),
        ({"messages": texts("[" * 200_000)}, "", "Too long: messages"),
        ({"messages": texts("[" * 10_000)}, "", "nested too deeply"),
    ],
)
def test_refusals_are_the_clients_fault(
    model: TritonPythonModel, inputs: dict[str, np.ndarray], parameters: str, words: str
) -> None:
    ((response, flags),) = call(model, parameters, **inputs).sent
    assert words in str(response.error)
    assert response.error.code == FakeError.INVALID_ARG
    assert flags == 1
    assert counted(model, "nmexport_requests_rejected_total") == 1


def test_a_full_queue_asks_the_client_to_come_back(
    model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ServerBusyError("The queue is full.")

    monkeypatch.setattr(model._service, "submit", refuse)
    ((response, flags),) = call(model, text_input=texts("a")).sent
    assert (response.error.code, flags) == (FakeError.UNAVAILABLE, 1)
    assert counted(model, "nmexport_requests_rejected_total") == 1


def raise_index_error(*_: object, **__: object) -> None:
    raise IndexError


def test_whatever_goes_wrong_is_answered_and_the_server_goes_on(
    model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(model._service, "submit", raise_index_error)
    ((response, flags),) = call(model, text_input=texts("a")).sent
    assert "the server failed on this request" in str(response.error)
    assert (response.error.code, flags) == ("internal", 1)
    assert "IndexError" in caplog.text
    assert counted(model, "nmexport_requests_failed_total") == 1
    monkeypatch.undo()
    assert call(model, text_input=texts("a")).sent[-1][0].error is None


def test_a_refusal_that_cannot_be_sent_hurts_nobody(
    model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, right = FakeRequest({}), FakeRequest({"text_input": texts("a")})
    monkeypatch.setattr(wrong.sender, "send", raise_index_error)
    model.execute([wrong, right])
    assert right.sender.final.wait(20)
    assert right.sender.sent[-1][0].error is None


def test_parameters_of_triton_and_empty_stop_words_pass(model: TritonPythonModel) -> None:
    parameters = '{"triton_enable_empty_final_response": true, "max_tokens": 2, "stream": false}'
    ((response, _),) = call(
        model, parameters, text_input=texts("a"), stop_words=texts("", "zzz")
    ).sent
    assert response.error is None
    assert response.tensors["completion_tokens"].item() == 2


def test_cancelled_and_failed_requests_are_closed(
    model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = FakeRequest({"text_input": texts("a")})
    request.sender.cancelled = True
    model.execute([request])
    assert request.sender.final.wait(20)
    assert request.sender.sent[0][0].error.code == FakeError.CANCELLED
    monkeypatch.setattr(model._service._session, "extend", lambda *_: 1 / 0)
    ((response, _),) = call(model, text_input=texts("a")).sent
    assert response.error.code == "internal"
    assert "failed" in str(response.error)


def test_servers_without_histograms_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from nmexport.serving.triton_model import TritonMetrics

    backend = fake_backend()
    monkeypatch.delattr(FakeFamily, "HISTOGRAM")
    metrics = TritonMetrics(backend, "m")
    made = backend.MetricFamily.made
    assert len(made) == len(METRICS) + 3
    metrics.observe("nmexport_queue_time_ms", 5.0)
    metrics.observe("nmexport_queue_time_ms", 7.0)
    assert made["nmexport_queue_time_ms_sum"][1].value == 12.0
    assert made["nmexport_queue_time_ms_count"][1].value == 2
    metrics.set("nmexport_running_requests", 3)
    metrics.add("nmexport_requests_failed_total")
    assert made["nmexport_running_requests"][1].value == 3


def test_a_stub_that_repeats_the_first_element_is_refused() -> None:
    class Corrupt(FakeTensor):
        @staticmethod
        def from_dlpack(name: str, capsule: np.ndarray) -> FakeTensor:
            return FakeTensor(name, np.full_like(capsule, capsule[0]))

    require_whole_tensors(fake_backend())
    with pytest.raises(EnvironmentFault, match="corrupts tensors"):
        require_whole_tensors(fake_backend(Tensor=Corrupt))


def test_finalizing_what_never_opened_is_no_error() -> None:
    TritonPythonModel().finalize()


def opens_without(bundle: Path, *banned: str) -> None:
    """Open a text model where these packages cannot be imported."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({banned!r}))\n"
        "from pathlib import Path\n"
        "import nmexport.serving.triton_model\n"
        "from nmexport.serving.service import TextService\n"
        f"TextService.open(Path({str(bundle)!r}), {{}}).close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("banned", ["torch", "transformers", "onnx", "pydantic", "ml_dtypes"])
def test_the_servers_side_needs_no_torch(package: Path, banned: str) -> None:
    opens_without(package / "model_repository" / NAME / "1", banned)


def test_a_bfloat16_package_needs_no_onnx_either(tiny_llama: Path, tmp_path: Path) -> None:
    """What a processor takes lies ready in it; the exported file is there too, for GPUs."""
    export = save_export(tiny_llama, tmp_path / "export", dtype="bfloat16")
    engine = engine_of(export, element_type="bfloat16")
    bundle = save_package(export, tmp_path / "package", engine=engine)
    assert (bundle / "model.onnx").read_bytes() == (export / "model.onnx").read_bytes()
    assert json.loads((bundle / "engine.json").read_text())["cpu_model"] == "model.cpu.onnx"
    opens_without(bundle, "onnx", "ml_dtypes")


# -- the raw engine of a package ------------------------------------------------------------------


def engine_tensors(signature: Signature) -> tuple[EngineTensor, ...]:
    """What a builder records of a plan."""
    names = {"FLOAT16": "HALF", "BFLOAT16": "BF16"}
    return tuple(
        EngineTensor(
            name=spec.name,
            element=names.get(spec.element, spec.element),
            shape=tuple(-1 if size is None else size for size in spec.shape),
            is_input=spec in signature.inputs,
        )
        for spec in (*signature.inputs, *signature.outputs)
    )


def tensorrt_inputs(
    export: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> Any:
    """Stage inputs with an engine of TensorRT, as its stage describes one."""
    from nmexport.runtimes.tensorrt import library as tensorrt_library

    plugin = folder / "libnmexport_tensorrt.so"
    plugin.write_bytes(b"a plugin")
    monkeypatch.setattr(tensorrt_library, "require_plugin", lambda: plugin)
    fields: dict[str, Any] = {
        "target": "tensorrt",
        "version": "10.13.0",
        "dtype": "float32",
        "compute_capabilities": (),
        "in_place_cache": False,
        "why_not_in_place": "not asked for",
        "attention": "fused",
        "max_batch": 4,
        "max_sequence": 64,
        "max_context": 128,
        "profiles": ("prefill", "decode"),
        "tensors": engine_tensors(triton_config.signature_of(export / "model.onnx")),
        "plugin": PluginRecord(
            file=plugin.name, sha256=file_digest(plugin), version="1", embedded=False
        ),
    }
    fields |= changes
    (folder / "engine").mkdir()
    (folder / "engine" / "model.plan").write_bytes(b"a plan")
    target = {"runtime": fields["target"], "tensorrt": json_from(TensorRTEngine(**fields))}
    write_engine(engine_of(folder / "engine", **target), folder / "engine")
    (folder / "output").mkdir()
    return types.SimpleNamespace(
        upstream={"engine": folder / "engine", "export": export}, output=folder / "output"
    )


def test_a_tensorrt_engine_is_packaged_with_its_plugin(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tensorrt_inputs(tiny_export, tmp_path, monkeypatch)
    plugins, why = package_stage._write_engine(inputs, "tiny_engine")
    assert why is None
    assert plugins == ["plugins/libnmexport_tensorrt.so"]
    assert (inputs.output / plugins[0]).read_bytes() == b"a plugin"
    folder = inputs.output / "model_repository" / "tiny_engine"
    config = from_text((folder / "config.pbtxt").read_text("utf-8"))
    signature = triton_config.signature_of(tiny_export / "model.onnx")
    assert config == triton_config.engine_config(
        "tiny_engine", signature, max_batch_size=4, profiles=2
    )
    assert (config.max_batch_size, list(config.instance_group[0].profile)) == (4, ["0", "1"])
    assert (folder / "1" / config.default_model_filename).read_bytes() == b"a plan"


def test_the_configuration_is_the_plans_not_the_graphs(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = EngineTensor(name="only", element="BF16", shape=(-1, 7), is_input=True)
    inputs = tensorrt_inputs(tiny_export, tmp_path, monkeypatch, tensors=(tensor,))
    package_stage._write_engine(inputs, "e")
    path = inputs.output / "model_repository" / "e" / "config.pbtxt"
    config = from_text(path.read_text("utf-8"))
    assert [(one.name, one.data_type, list(one.dims)) for one in config.input] == [
        ("only", triton_config._messages().DataType.Value("TYPE_BF16"), [7])
    ]


def test_an_engine_that_does_not_say_its_tensors_is_built_again(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tensorrt_inputs(tiny_export, tmp_path, monkeypatch, tensors=())
    with pytest.raises(ArtifactError, match="nmexport engine --force"):
        package_stage._write_engine(inputs, "e")


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"target": "tensorrt-rtx"}, "not of TensorRT-RTX"), ({"in_place_cache": True}, "one buffer")],
)
def test_engines_that_triton_cannot_run_are_left_out(
    tiny_export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    words: str,
) -> None:
    inputs = tensorrt_inputs(tiny_export, tmp_path, monkeypatch, **changes)
    plugins, why = package_stage._write_engine(inputs, "tiny_engine")
    assert plugins == []
    assert words in (why or "")
    assert list(inputs.output.iterdir()) == []


def test_an_embedded_plugin_needs_no_file(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = PluginRecord(file="x.so", sha256="0", version="1", embedded=True)
    inputs = tensorrt_inputs(tiny_export, tmp_path, monkeypatch, plugin=record)
    assert package_stage._write_engine(inputs, "tiny_engine") == ([], None)
