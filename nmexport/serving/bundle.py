"""The folder that a server opens: model, library, tokenizer, and what it must answer.

`bundle.json` says what serving needs and no other file next to it says. All paths in it are
relative: the folder works wherever it is copied.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from nmexport.errors import ArtifactError
from nmexport.generation.options import GenerationOptions, options_from
from nmexport.store.artifact import FileRecord

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from nmexport.runtimes.session import Session

SCHEMA = 1
FILENAME = "bundle.json"
REFERENCE = "reference.npy"
REFERENCE_TEXTS = (
    "The river was grey.",
    "Water boils at",
    "In 1969, two men",
    "def add(a, b):",
    "She opened the window and",
    "Paris is the capital of",
    "One, two, three,",
    "Dear Sir or Madam,",
    "The theorem follows from",
)
"""Short, so that few near ties lie on the way to the last token, and many: see `TOLERANCE`."""
TOLERANCE = 0.05
"""Largest median, over the reference texts, of the root mean square difference of the logits over
their own deviation. CPUs that round otherwise differ by one part in a million; but where that
decides a near tie, another channel is kept, and that text's logits move as far as other weights
would move them. So one text says nothing, and most of them must agree. Another model moves all."""
_REPACKAGE = "run `nmexport package --force` on the work directory"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A server's description of its model."""

    folder: Path
    name: str
    """Name of the Triton model."""
    model: str
    pattern: str
    verdict: str
    """The report's: pass, fail or none."""
    context_tokens: int
    end_tokens: frozenset[int]
    defaults: GenerationOptions
    reference_tokens: tuple[tuple[int, ...], ...]
    """Token ids of each reference text."""
    files: tuple[FileRecord, ...]
    """Every file of the folder but this record."""

    def reference_logits(self) -> NDArray[np.float32]:
        """Read the logits `[R, V]` after each reference text, from when the bundle was made.

        Raises:
            ArtifactError: if they cannot be read.
        """
        try:
            logits = np.load(self.folder / REFERENCE, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{self.folder / REFERENCE} cannot be read: {error}", fix=_REPACKAGE
            ) from error
        return np.asarray(logits, dtype=np.float32)

    def check_files(self) -> None:
        """Compare the files' sizes with the record: a copy that was cut short shows at once.

        Raises:
            ArtifactError: naming the first file that is missing or of another size.
        """
        for record in self.files:
            path = self.folder / record.path
            size = path.stat().st_size if path.is_file() else None
            if size != record.bytes:
                problem = "is missing" if size is None else f"has {size} bytes"
                raise ArtifactError(
                    f"{path} {problem}.", allowed=f"{record.bytes} bytes", fix=_REPACKAGE
                )


def read_bundle(folder: Path) -> Bundle:
    """Read `bundle.json`.

    Raises:
        ArtifactError: if it is missing, malformed or of another schema.
    """
    path = folder / FILENAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ArtifactError(
                f"{path} has schema {document['schema']}.", allowed=f"schema {SCHEMA}"
            )
        return Bundle(
            folder=folder,
            name=document["name"],
            model=document["model"],
            pattern=document["pattern"],
            verdict=document["verdict"],
            context_tokens=document["context_tokens"],
            end_tokens=frozenset(document["end_tokens"]),
            defaults=options_from(document["defaults"]),
            reference_tokens=tuple(map(tuple, document["reference_tokens"])),
            files=tuple(FileRecord(**record) for record in document["files"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error!r}", fix=_REPACKAGE) from error


def write_bundle(bundle: Bundle) -> None:
    """Write `bundle.json` into its folder, which holds everything else."""
    defaults = asdict(bundle.defaults)
    document = {
        "schema": SCHEMA,
        "name": bundle.name,
        "model": bundle.model,
        "pattern": bundle.pattern,
        "verdict": bundle.verdict,
        "context_tokens": bundle.context_tokens,
        "end_tokens": sorted(bundle.end_tokens),
        "defaults": {name: value for name, value in defaults.items() if value is not None},
        "reference_tokens": bundle.reference_tokens,
        "files": [asdict(record) for record in bundle.files],
    }
    text = json.dumps(document, indent=1) + "\n"
    (bundle.folder / FILENAME).write_text(text, encoding="utf-8")


def first_logits(session: Session, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """Compute the logits `[R, V]` after each of R prompts."""
    rows = [session.extend_last(None, np.asarray([ids], np.int64))[0][0, -1] for ids in prompts]
    return np.stack(rows)


def smoke_check(session: Session, bundle: Bundle) -> float:
    """Check that the session gives the reference logits.

    Returns:
        How far its logits are from the reference: see `TOLERANCE`.

    Raises:
        ArtifactError: if they are further than the tolerance: this is not the model, or not the
            computation, that was verified.
    """
    expected = bundle.reference_logits()
    actual = first_logits(session, bundle.reference_tokens)
    if actual.shape != expected.shape:
        raise ArtifactError(
            f"The model has logits {actual.shape}, its reference {expected.shape}.", fix=_REPACKAGE
        )
    difference = float(np.median(relative_differences(actual, expected)))
    if not difference <= TOLERANCE:  # NaN is no pass
        raise ArtifactError(
            f"The model of {bundle.folder} does not compute here what it computed when it was "
            f"packaged: logits after the reference texts differ by {difference:.3f} of their "
            "deviation.",
            allowed=f"{TOLERANCE}",
            fix="compare the files' digests with bundle.json; on this machine, build it again",
        )
    return difference


def relative_differences(
    actual: NDArray[np.float32], expected: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return each row's root mean square difference `[V]`, over the expected row's deviation."""
    difference = actual.astype(np.float64) - expected
    scale = expected.astype(np.float64).std(axis=-1)
    ratios: NDArray[np.float64] = np.sqrt(np.mean(difference**2, axis=-1)) / scale
    return ratios
