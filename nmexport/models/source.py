"""Finds a model's files and what identifies them, without torch.

A model is looked for in this order, and the first place that has it is taken:

1. a folder or `.gguf` file of this machine, where the id is a path that exists;
2. the hub's local cache, where the snapshot there is complete (so a build does not depend on
   whether the hub answers today);
3. the hub;
4. the `.gguf` of the Python package that the recipe names, where the hub cannot be reached.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nmexport.errors import ModelError
from nmexport.models.gguf_files import gguf_parts
from nmexport.models.quantised.layouts import find_packing
from nmexport.models.quantised.methods import SIDE_FILES, method_of, quantisation_section
from nmexport.models.unsupported import UnsupportedModelError, refuse_adapter
from nmexport.models.weight_files import (
    CONFIG,
    check_sizes,
    read_config,
    stored_tensors,
    weight_files,
)

if TYPE_CHECKING:
    from nmexport.recipe import ModelSection

logger = logging.getLogger(__name__)

_ALLOWED = "a recipe name (see `nmexport recipes`), a Hub id, a local folder, or a .gguf file"
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_TIMEOUT_S = 5.0
_HASHED_AT_A_TIME = 8  # one core hashes 0.5 to 1.5 GB/s

_SIDE_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    *SIDE_FILES,
)
_LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
_ADAPTER = "adapter_config.json"
_DOWNLOADED = (*_SIDE_FILES, _ADAPTER, *_LICENCES, "*.safetensors.index.json", "*.safetensors")
_NOT_DOWNLOADED = ("*/*", "consolidated*")  # other formats' copies of the same weights


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that was found."""

    id: str
    """As the recipe names it: a Hub id, or a path."""
    revision: str | None
    """Hub commit, where it came from a hub."""
    folder: Path
    """Local folder with config, weights and tokenizer files, or with the `.gguf` file."""
    gguf_file: str | None
    """Name of the `.gguf` file in the folder, or of the first of its parts, where that is the
    format."""
    digest: str
    """sha256 over the names and contents of the files that the model is loaded from."""
    trust_remote_code: bool = False
    """Python files of the model may run."""
    unpacked: Path | None = None
    """Folder that holds a `.gguf`'s model as safetensors, see `nmexport.models.unpacked`."""
    more_parts: tuple[str, ...] = ()
    """Names of the other parts of a split `.gguf`, in their order."""

    @property
    def gguf_files(self) -> tuple[Path, ...]:
        """The `.gguf` file, or all of its parts in order; nothing in another format."""
        names = () if self.gguf_file is None else (self.gguf_file, *self.more_parts)
        return tuple(self.folder / name for name in names)

    @property
    def packed(self) -> bool:
        """Tell whether weights are dequantised from a `.gguf` each time they are loaded."""
        return self.gguf_file is not None and self.unpacked is None

    @property
    def may_hold_integers(self) -> bool:
        """Tell whether weights may be stored in integers, by the configuration alone."""
        if self.gguf_file is not None:
            return True
        if not (self.folder / CONFIG).is_file():
            return False
        return quantisation_section(self.folder, read_config(self.folder)) is not None

    @property
    def weights_folder(self) -> Path:
        """The folder that config and weights are read from."""
        return self.unpacked or self.folder

    @property
    def gguf_option(self) -> dict[str, str]:
        """Option that names a `.gguf` in the weights' folder to transformers."""
        return {"gguf_file": str(self.gguf_file)} if self.packed else {}


def resolve(section: ModelSection) -> ModelSource:
    """Find a model and check that its files are whole.

    Raises:
        ModelError: if it is nowhere to be found, is incomplete, or comes as pickles only; says
            what was tried and what to do.
    """
    path = Path(section.id).expanduser()
    if section.id and path.exists():
        return _local_source(section, path)
    if _looks_like_a_path(section.id):
        raise ModelError(
            f"There is no model at {section.id!r}.", allowed=_ALLOWED, fix="check the path"
        )
    if not _HUB_ID.fullmatch(section.id):
        raise ModelError(f"{section.id!r} does not name a model.", allowed=_ALLOWED)
    return _hub_source(section)


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "~", "/")) or is_gguf(name) or name.count("/") > 1


def _local_source(section: ModelSection, path: Path) -> ModelSource:
    if section.revision is not None:
        raise ModelError(
            f"{section.id!r} is on this machine, and revision {section.revision!r} could only be "
            "one of the hub's.",
            fix="leave out --revision (model.revision in a recipe), or name a model of the hub",
        )
    if path.is_dir():
        return _folder_source(section, path, revision=None)
    if not is_gguf(path.name):
        raise ModelError(f"{section.id!r} is a file, and not a .gguf.", allowed=_ALLOWED)
    return _gguf_source(section, path)


def is_gguf(name: str) -> bool:
    """Tell whether a file is a GGUF by its name, in upper or lower case."""
    return name.lower().endswith(".gguf")


def _folder_source(section: ModelSection, folder: Path, *, revision: str | None) -> ModelSource:
    files = model_files(folder, with_code=section.trust_remote_code)
    return ModelSource(
        id=section.id,
        revision=revision,
        folder=folder.absolute(),
        gguf_file=None,
        digest=digest_of(files),
        trust_remote_code=section.trust_remote_code,
    )


def _gguf_source(section: ModelSection, path: Path) -> ModelSource:
    parts = gguf_parts(path)
    return ModelSource(
        id=section.id,
        revision=None,
        folder=path.absolute().parent,
        gguf_file=parts[0].name,
        more_parts=tuple(part.name for part in parts[1:]),
        digest=digest_of(parts),
        trust_remote_code=section.trust_remote_code,
    )


def model_files(folder: Path, *, with_code: bool = False) -> list[Path]:
    """List and check the files that a model folder is loaded from.

    Args:
        folder: A Hugging Face model folder.
        with_code: Whether the model's own Python files count (`trust_remote_code`).

    Raises:
        ModelError: if the config or weights are missing, damaged, or pickles.
    """
    check_kind(folder)
    find_packing(folder, read_config(folder), stored_tensors(folder))
    indices = sorted(folder.glob("*.safetensors.index.json"))
    sides = [folder / name for name in _SIDE_FILES] + indices
    code = sorted(folder.glob("*.py")) if with_code else []
    return [path for path in sides if path.is_file()] + code + weight_files(folder)


def check_kind(folder: Path) -> None:
    """Check by a folder's configuration that it is a whole model of a supported form.

    Raises:
        ModelError: if it is not.
    """
    refuse_adapter(folder)
    check_sizes(folder)
    section = quantisation_section(folder, read_config(folder))
    if section is not None:
        method_of(folder, section)


def licence_files(folder: Path) -> tuple[Path, ...]:
    """List the licence files of a model's folder."""
    licences = {path for name in _LICENCES for path in folder.glob(name) if path.is_file()}
    return tuple(sorted(licences))


def digest_of(files: list[Path]) -> str:
    """Hash names and contents, in order (sha256)."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_HASHED_AT_A_TIME) as pool:
        for path, content in zip(files, pool.map(_content_sha256, files), strict=True):
            digest.update(f"{path.name}\0{content}\n".encode())
    return digest.hexdigest()


def _content_sha256(path: Path) -> str:
    """Hash a file's bytes; the hub's cache stores large files under that very name."""
    blob = path.resolve()
    if (
        path.is_symlink()
        and blob.parent.name == "blobs"
        and re.fullmatch("[0-9a-f]{64}", blob.name)
    ):
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hub_source(section: ModelSection) -> ModelSource:
    cached = _cached_snapshot(section)
    if cached is not None:
        return cached
    try:
        folder = _download(section)
    except _HubUnreachableError as error:
        packaged = None if section.package is None else packaged_gguf(section.package)
        if packaged is None:
            raise _nowhere(section, str(error)) from error
        logger.info("The hub cannot be reached; using the weights of package %s.", section.package)
        return _gguf_source(section, packaged)
    return _folder_source(section, folder, revision=folder.name)


class _HubUnreachableError(Exception):
    """The hub did not answer; says nothing about the model."""


def _cached_snapshot(section: ModelSection) -> ModelSource | None:
    """Find a complete snapshot in the local cache; None where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(section.id, revision=section.revision, local_files_only=True)
        )
        return _folder_source(section, folder, revision=folder.name)
    except UnsupportedModelError:
        raise
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, ModelError) as error:
        logger.debug("No complete snapshot in the cache: %s", error)
        return None


def _download(section: ModelSection) -> Path:
    """Fetch config, tokenizer and safetensors, and return the snapshot folder.

    Raises:
        ModelError: if the hub says no.
        _HubUnreachableError: if it says nothing.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*_DOWNLOADED, *(["*.py"] if section.trust_remote_code else [])]
    try:
        # One quick question first: a download would try again and again where nobody listens.
        HfApi().model_info(section.id, revision=section.revision, timeout=_TIMEOUT_S)
        fetch = functools.partial(
            snapshot_download,
            section.id,
            revision=section.revision,
            etag_timeout=_TIMEOUT_S,
            ignore_patterns=list(_NOT_DOWNLOADED),
        )
        # What it is comes first: nobody waits for gigabytes that are then refused.
        check_kind(Path(fetch(allow_patterns=[CONFIG, _ADAPTER, *SIDE_FILES])))
        return Path(fetch(allow_patterns=patterns))
    except ModelError:
        raise
    except GatedRepoError as error:
        raise ModelError(
            f"The hub gives {section.id!r} only to those who accepted its terms.",
            fix="accept them on the model's page and run `hf auth login`, then build again",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{section.id!r} has no revision {section.revision!r}.", fix="check --revision"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"The hub has no model {section.id!r} that is open to you.",
            allowed=_ALLOWED,
            fix="check the spelling; for a private model run `hf auth login`",
        ) from error
    except Exception as error:  # whatever its client raises without a network, by version
        raise _HubUnreachableError(f"{type(error).__name__}: {error}") from error


def packaged_gguf(package: str) -> Path | None:
    """Find the one `.gguf` file of an installed package, without importing it.

    Raises:
        ModelError: if the package has several.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    folders = spec.submodule_search_locations or []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if len(files) > 1:
        raise ModelError(
            f"Package {package} carries {len(files)} models.",
            fix=f"name one of them with --model, such as {files[0]}",
        )
    return files[0] if files else None


def _nowhere(section: ModelSection, reason: str) -> ModelError:
    tried = [f"no such file or folder here, nothing in the hub's cache, no hub ({reason[:200]})"]
    fixes = ["connect to the hub (HF_ENDPOINT names a mirror)", "give --model a local folder"]
    if os.environ.get("HF_HUB_OFFLINE"):
        fixes[0] = "unset HF_HUB_OFFLINE"
    if section.package is not None:
        tried.append(f"no .gguf in a package {section.package!r}")
        fixes.append(f"install the package ({section.package.replace('_', '-')})")
    return ModelError(
        f"Model {section.id!r} was not found: {'; '.join(tried)}.",
        allowed=_ALLOWED,
        fix=", or ".join(fixes),
    )
