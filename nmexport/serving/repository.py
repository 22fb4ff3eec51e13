"""Writes a Triton model repository: folders, configurations, launch script, and words with it.

<output>/model_repository/<name>/config.pbtxt
<output>/model_repository/<name>/1/model.py         imports `nmexport.serving.triton_model`
<output>/model_repository/<name>/1/bundle.json ...  model, library, tokenizer, reference
<output>/model_licence/...                          the model's own, where found with its weights
<output>/launch.sh  README.md  NOTICE.md  SHA256SUMS
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nmexport.environment import probe
from nmexport.generation.context import context_length, length_switch
from nmexport.generation.defaults import end_tokens, generation_defaults
from nmexport.generation.tokenizer import Tokenizer
from nmexport.runtimes.engine import Engine, write_engine
from nmexport.runtimes.opening import open_on_onnxruntime
from nmexport.serving import bundle as bundles
from nmexport.serving import triton_config
from nmexport.store.artifact import record_files
from nmexport.store.exported import GENAI_CONFIG, MODEL

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

REPOSITORY = "model_repository"
PLUGINS = "plugins"
"""Folder of TensorRT plugin libraries, next to the repository."""
VERSION = "1"
LAUNCH = "launch.sh"
LICENCES = "model_licence"
"""Folder of the model's own licence files, as they lay next to its weights."""
SUMS = "SHA256SUMS"
_CPU_MODEL = "model.cpu.onnx"
_CUDA_MODEL = "model.cuda.onnx"
_STEP_MODEL = "model.step.onnx"
_TEMPLATES = ("README.md", "NOTICE.md", LAUNCH)
_MODEL_PY = '''"""Triton's entry; the environment of the server's python3 must have nmexport."""

from nmexport.serving.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """The parts of a repository's text model."""

    name: str
    model: str
    """Id of the model that was built."""
    pattern: str
    verdict: str
    export: Path
    """The folder of the exported model."""
    files: tuple[str, ...]
    """Files to serve, relative to `export`."""
    engine: Engine
    library: Path | None
    settings: Mapping[str, str]
    licences: tuple[Path, ...] = ()
    """Licence files that lie next to the model's weights."""


def write_text_model(output: Path, source: TextModel) -> Path:
    """Write the model that takes and streams text, and run it once for its reference logits.

    Returns:
        The bundle's folder.

    Raises:
        ArtifactError: if the exported model lacks what serving needs, or does not run.
        EnvironmentFault: if this machine lacks what it needs to run.
    """
    model_folder = output / REPOSITORY / source.name
    folder = model_folder / VERSION
    folder.mkdir(parents=True)
    for name in source.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        # Copies, not links: onnx refuses weights with a second link as a possible attack.
        shutil.copyfile(source.export / name, folder / name)
    if source.library is not None:
        shutil.copyfile(source.library, folder / source.library.name)
        _name_library(folder / GENAI_CONFIG, source.library.name)
    cpu_model = None
    if source.engine.needs_rewrite("cpu"):
        cpu_model = _write_cpu_model(folder, has_native_ops=source.library is not None)
    engine = _relocate(source.engine, folder.resolve(), cpu_model)
    if source.engine.cuda is not None and engine.cuda is not None:
        shutil.copyfile(source.engine.cuda.model, engine.cuda.model)
    if source.engine.shared_step is not None and engine.shared_step is not None:
        shutil.copyfile(source.engine.shared_step.model, engine.shared_step.model)
    write_engine(engine, folder)
    (folder / "model.py").write_text(_MODEL_PY, encoding="utf-8")
    tokenizer = Tokenizer(folder)
    tokens = [tokenizer.encode(text) for text in bundles.REFERENCE_TEXTS]
    _write_reference(folder, tokens)
    bundles.write_bundle(
        bundles.Bundle(
            folder=folder,
            name=source.name,
            model=source.model,
            pattern=source.pattern,
            verdict=source.verdict,
            context_tokens=_served_context(folder),
            end_tokens=end_tokens(folder, tokenizer),
            defaults=generation_defaults(folder),
            reference_tokens=tuple(map(tuple, tokens)),
            files=record_files(folder),
        )
    )
    config = triton_config.text_config(source.name, source.settings)
    (model_folder / triton_config.CONFIG).write_text(triton_config.to_text(config), "utf-8")
    return folder


def write_engine_model(
    output: Path,
    *,
    name: str,
    plan: Path,
    signature: triton_config.Signature,
    max_batch_size: int,
    profiles: int,
) -> Path:
    """Write the model that hands a TensorRT plan to Triton as it is; return its folder."""
    folder = output / REPOSITORY / name
    (folder / VERSION).mkdir(parents=True)
    shutil.copyfile(plan, folder / VERSION / triton_config.PLAN)
    config = triton_config.engine_config(
        name, signature, max_batch_size=max_batch_size, profiles=profiles
    )
    (folder / triton_config.CONFIG).write_text(triton_config.to_text(config), encoding="utf-8")
    return folder


def write_plugin(output: Path, library: Path) -> str:
    """Copy a TensorRT plugin library into the package; return its path there."""
    (output / PLUGINS).mkdir(exist_ok=True)
    shutil.copyfile(library, output / PLUGINS / library.name)
    return f"{PLUGINS}/{library.name}"


def write_words(
    output: Path,
    *,
    source: TextModel,
    engine: str | None = None,
    plugins: Iterable[str] = (),
) -> None:
    """Write launch script, README, licences and notices, then the sums of all that is there.

    Args:
        output: The package's folder, its repository complete.
        source: What it was made from.
        engine: Name of the model that is the raw engine, where there is one.
        plugins: TensorRT plugin libraries that it needs, relative to `output`.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        autoescape=False,  # noqa: S701  a shell script and Markdown
    )
    for path in source.licences:
        (output / LICENCES).mkdir(exist_ok=True)
        shutil.copyfile(path, output / LICENCES / path.name)
    given = {
        "source": source,
        "engine": engine,
        "plugins": list(plugins),
        "chats": Tokenizer(source.export).has_chat_template,
        "licences": [f"{LICENCES}/{path.name}" for path in source.licences],
    }
    for name in _TEMPLATES:
        text = environment.get_template(f"{name}.j2").render(given)
        (output / name).write_text(text, encoding="utf-8")
    (output / LAUNCH).chmod(0o755)
    lines = [f"{record.sha256}  {record.path}\n" for record in record_files(output)]
    (output / SUMS).write_text("".join(lines), encoding="utf-8")


def _name_library(path: Path, library: str) -> None:
    """Let onnxruntime-genai load the native op by itself: the name counts from the folder."""
    document = json.loads(path.read_text(encoding="utf-8"))
    decoder = document["model"].setdefault("decoder", {})
    decoder.setdefault("session_options", {})["custom_ops_library"] = library
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _served_context(folder: Path) -> int:
    """Return the most tokens of a request: chunked prompts need one set of frequencies."""
    return min(context_length(folder), length_switch(folder) or context_length(folder))


def _write_cpu_model(folder: Path, *, has_native_ops: bool) -> Path:
    """Write a bfloat16 graph rewritten for a CPU: a server has no `onnx` to do so."""
    from nmexport.graph.cpu import widen_file

    path = folder.resolve() / _CPU_MODEL
    path.write_bytes(widen_file(folder / MODEL, has_native_ops=has_native_ops))
    return path


def _relocate(engine: Engine, folder: Path, cpu_model: Path | None) -> Engine:
    """Describe the engine in the folder that holds copies of all that it names."""
    library = engine.library
    return replace(
        engine,
        # The text model keeps its caches in ONNX Runtime, whatever else was built.
        runtime="onnxruntime",
        runtime_version=probe().version("onnxruntime"),
        model=folder / MODEL,
        cpu_model=cpu_model,
        cuda=engine.cuda
        and replace(engine.cuda, model=folder / _CUDA_MODEL, dense_model=None, stored_model=None),
        shared_step=engine.shared_step
        and replace(
            engine.shared_step, model=folder / _STEP_MODEL, dense_model=None, stored_model=None
        ),
        dense_model=None,
        stored_model=None,
        library=library and replace(library, file=folder / library.file.name),
        tensorrt=None,
        build=None,
    )


def _write_reference(folder: Path, tokens: list[list[int]]) -> None:
    import numpy as np

    with open_on_onnxruntime(folder) as session:
        np.save(folder / bundles.REFERENCE, bundles.first_logits(session, tokens))
