"""Finding a model: order, digests, and bad input that must end in one clear message."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from nmexport.errors import ModelError
from nmexport.models import source as module
from nmexport.models.quantised.methods import SIDE_FILES
from nmexport.models.source import packaged_gguf, resolve
from nmexport.recipe import ModelSection

from tests.support.tiny import EMPTY_GGUF

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache and a hub that does not answer."""

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)


def package_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> str:
    """An importable package that must not be imported, with `.gguf` files of those names."""
    package = tmp_path / "site" / "fake_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    for name in names:
        (package / name).write_bytes(EMPTY_GGUF)
    monkeypatch.syspath_prepend(str(package.parent))
    return package.name


def test_folder(folder: Path) -> None:
    source = resolve(ModelSection(id=str(folder)))
    assert (source.folder, source.gguf_file, source.revision) == (folder, None, None)
    assert len(source.digest) == 64


def test_a_folder_has_no_revisions(folder: Path) -> None:
    with pytest.raises(ModelError, match="revision 'v2' could only be one of the hub's") as caught:
        resolve(ModelSection(id=str(folder), revision="v2"))
    assert "--revision" in str(caught.value.fix)


def test_a_name_of_nothing_is_no_model() -> None:
    """The path of no characters is that of the current folder."""
    with pytest.raises(ModelError, match="'' does not name a model"):
        resolve(ModelSection(id=""))


def test_digest_follows_contents_and_not_the_place(folder: Path, tiny_llama: Path) -> None:
    digests = [resolve(ModelSection(id=str(path))).digest for path in (tiny_llama, folder)]
    assert digests[0] == digests[1]
    config = folder / "config.json"
    config.write_text(config.read_text().replace("silu", "gelu"))
    assert resolve(ModelSection(id=str(folder))).digest != digests[0]


def test_digest_ignores_what_is_not_loaded(folder: Path) -> None:
    before = resolve(ModelSection(id=str(folder))).digest
    (folder / "README.md").write_text("hello")
    (folder / "modeling_x.py").write_text("pass")
    assert resolve(ModelSection(id=str(folder))).digest == before
    trusted = resolve(ModelSection(id=str(folder), trust_remote_code=True))
    assert trusted.digest != before, "code that runs is part of what the model is"
    assert trusted.trust_remote_code
    assert not resolve(ModelSection(id=str(folder))).trust_remote_code


def test_digest_takes_the_name_of_a_cache_blob(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"anything")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes(b"anything")
    assert module._content_sha256(link) == "ab" * 32
    assert module._content_sha256(plain) != "ab" * 32


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/nope", "a.gguf", "a/b/c"])
def test_missing_path(name: str) -> None:
    with pytest.raises(ModelError, match="There is no model at"):
        resolve(ModelSection(id=name))


def test_name_that_is_none() -> None:
    with pytest.raises(ModelError, match="does not name a model") as caught:
        resolve(ModelSection(id="what is this"))
    assert "recipe name" in str(caught.value)


def test_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"not a \.gguf"):
        resolve(ModelSection(id=str(tmp_path / "model.bin")))


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve(ModelSection(id=str(tmp_path)))


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_broken_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve(ModelSection(id=str(folder)))


def test_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickles") as caught:
        resolve(ModelSection(id=str(folder)))
    assert "safe_serialization" in str(caught.value)


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks the weights model\.safetensors"):
        resolve(ModelSection(id=str(folder)))


def test_missing_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    with pytest.raises(ModelError, match=r"lacks the weights two\.safetensors"):
        resolve(ModelSection(id=str(folder)))


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}'])
def test_broken_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json cannot be read"):
        resolve(ModelSection(id=str(folder)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:4],
        lambda _: b"",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"x" + data[9:],
        lambda data: data + b"more",
    ],
    ids=["one byte", "half", "no header", "empty", "huge header", "no json", "too long"],
)
def test_damaged_safetensors(folder: Path, damage: object) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ModelError, match="damaged or incomplete") as caught:
        resolve(ModelSection(id=str(folder)))
    assert str(path) in str(caught.value)


def test_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(EMPTY_GGUF)
    source = resolve(ModelSection(id=str(path)))
    assert (source.folder, source.gguf_file) == (tmp_path, "model.gguf")
    path.write_bytes(b"something else")
    with pytest.raises(ModelError, match="damaged"):
        resolve(ModelSection(id=str(path)))


@pytest.mark.usefixtures("no_hub")
def test_hub_unreachable_falls_back_on_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = package_with(tmp_path, monkeypatch, "model.gguf")
    source = resolve(ModelSection(id="someone/model", package=package))
    assert (source.gguf_file, source.id) == ("model.gguf", "someone/model")


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("package", [None, "no_such_package"])
def test_nowhere(package: str | None) -> None:
    with pytest.raises(ModelError, match="was not found") as caught:
        resolve(ModelSection(id="someone/model", package=package))
    message = str(caught.value)
    assert "no route to host" in message
    assert "Next:" in message
    assert (package is None) or "no-such-package" in message


@pytest.mark.usefixtures("no_hub")
def test_complete_snapshot_in_the_cache_needs_no_hub(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = shutil.copytree(tiny_llama, tmp_path / "snapshots" / "c0ffee")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    source = resolve(ModelSection(id="someone/model"))
    assert (source.folder, source.revision) == (snapshot, "c0ffee")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="was not found"):
        resolve(ModelSection(id="someone/model"))


def test_download(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only configs, tokenizers and safetensors are asked for, and no other format's copies."""
    snapshot = shutil.copytree(tiny_llama, tmp_path / "snapshots" / "c0ffee")
    asked: list[dict[str, object]] = []

    def download(_: str, **options: object) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("nothing here")
        asked.append(options)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    assert resolve(ModelSection(id="someone/model")).folder == snapshot
    first = ["config.json", "adapter_config.json", *SIDE_FILES]
    assert asked[0]["allow_patterns"] == first, "looked at first"
    patterns = asked[1]["allow_patterns"]
    assert "*.safetensors" in patterns
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in patterns)
    assert "consolidated*" in asked[1]["ignore_patterns"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("GatedRepoError", "accepted its terms"),
        ("RepositoryNotFoundError", "has no model"),
        ("RevisionNotFoundError", "has no revision"),
    ],
)
@pytest.mark.usefixtures("no_hub")
def test_hub_says_no(
    error: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An answer is final: the package is not taken instead of what was asked for."""
    from huggingface_hub import errors

    kind = getattr(errors, error)

    def answer(*_: object, **__: object) -> None:
        raise kind.__new__(kind)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", answer)
    package = package_with(tmp_path, monkeypatch, "model.gguf")
    with pytest.raises(ModelError, match=words):
        resolve(ModelSection(id="someone/model", package=package))


def test_package_with_several_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = package_with(tmp_path, monkeypatch, "a.gguf", "b.gguf")
    with pytest.raises(ModelError, match="carries 2 models"):
        packaged_gguf(package)


def test_package_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packaged_gguf(package_with(tmp_path, monkeypatch)) is None


def test_finding_a_model_needs_no_torch(tiny_llama: Path) -> None:
    code = (
        "import sys\n"
        "from nmexport.models.source import resolve\n"
        "from nmexport.recipe import ModelSection\n"
        f"resolve(ModelSection(id={str(tiny_llama)!r}))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
