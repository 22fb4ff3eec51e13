"""Finds, checks and loads the tasks that lm-evaluation-harness is to run.

Tasks of a local folder need no network: paths in their YAML are relative to that folder. A task
whose data lies on the hub says so before it is fetched.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nmexport.errors import EnvironmentFault, RecipeError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from nmexport.progress import Progress
    from nmexport.recipe import EvaluationSection

_HUB_SECONDS = 5.0
# Tasks that a note names; a benchmark like MMLU has 57 of one source.
_NAMED = 3
# Builders of `datasets` that read files, whatever the network.
_FILE_BUILDERS = frozenset({"json", "csv", "parquet", "text", "arrow"})
# Keys of tasks that come by their data in Python.
_CODE_KEYS = frozenset({"class", "custom_dataset"})
_CODE = "what its own code asks for"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Which tasks, from where, and how much of them."""

    names: tuple[str, ...]
    """Tasks, groups or tags; empty is all of the folder."""
    folder: Path | None = None
    """Local task files, searched before the harness's own."""
    limit: int | None = None
    """Documents a task; None is all."""
    fewshot: int | None = None
    """Examples before each question; None is what the task says."""

    @classmethod
    def of(cls, section: EvaluationSection) -> Suite | None:
        """Return the recipe's suite; None where it asks for no task."""
        if not section.tasks and section.tasks_path is None:
            return None
        return cls(
            names=section.tasks,
            folder=None if section.tasks_path is None else Path(section.tasks_path),
            limit=section.task_limit,
            fewshot=section.task_fewshot,
        )


def identity(suite: Suite | None) -> dict[str, object] | None:
    """Return what identifies a suite in a key: names, local files, the harness's version.

    Raises:
        EnvironmentFault: if the harness is not installed.
        RecipeError: if the folder is missing.
    """
    if suite is None:
        return None
    return {
        "names": list(suite.names),
        "limit": suite.limit,
        "fewshot": suite.fewshot,
        "harness": harness_version(),
        "files": _folder_digest(suite.folder),
    }


def harness_version() -> str:
    """Return the version of lm-evaluation-harness.

    Raises:
        EnvironmentFault: if it is not installed.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lm_eval")
    except PackageNotFoundError as error:
        raise EnvironmentFault(
            "Tasks need lm-evaluation-harness, which is not installed.",
            fix="pip install 'nmexport[tasks]', or leave --tasks out",
        ) from error


def check(suite: Suite, progress: Progress) -> None:
    """Refuse tasks that cannot be scored, before hours of building.

    Raises:
        EnvironmentFault: if the harness is not installed, or a task's data cannot be reached.
        RecipeError: if a task is not known, or its file cannot be read.
    """
    harness_version()
    with _inside(suite.folder), _quiet():
        manager, names = _manager(suite)
        if _reads_hub(manager.task_index, names) and not _hub_answers():
            _load(manager, names, progress=progress)


@contextlib.contextmanager
def opened(suite: Suite, *, seed: int, progress: Progress | None) -> Iterator[Any]:
    """Load a suite's tasks for the harness to evaluate, inside its folder and without its bars.

    Args:
        suite: Which tasks.
        seed: Of few-shot examples.
        progress: Told what may be fetched; None says nothing.

    Raises:
        EnvironmentFault: if data cannot be reached.
        RecipeError: if a task cannot be loaded for another reason.
    """
    with _inside(suite.folder), _quiet():
        yield _load_suite(suite, seed, progress)


def _load_suite(suite: Suite, seed: int, progress: Progress | None) -> Any:
    """Load the suite's tasks, with few-shot counts and seeds set."""
    manager, names = _manager(suite)
    loaded = _load(manager, names, progress=progress)
    for task in loaded["tasks"].values():
        if suite.fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=suite.fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def _load(manager: Any, names: Sequence[str], *, progress: Progress | None) -> Any:
    """Load tasks with their data, which may be fetched.

    Raises:
        EnvironmentFault: if data cannot be reached.
        RecipeError: if a task cannot be loaded for another reason.
    """
    if progress is not None:
        _announce(manager.task_index, names, progress)
    asks_hub = _reads_hub(manager.task_index, names)
    try:
        with contextlib.nullcontext() if not asks_hub or _hub_answers() else _force_offline():
            return manager.load(names)
    except (OSError, ValueError, KeyError) as error:
        raise _load_fault(names, error) from error


def _reads_hub(index: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Tell whether any of the tasks may fetch its data."""
    sources = [source for given in names for _, source in _sources(index, given)]
    return any(
        source and source not in _FILE_BUILDERS and not Path(source).exists() for source in sources
    )


@functools.cache
def _hub_answers() -> bool:
    """Ask the hub once: without an answer, its library would retry for half a minute."""
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=_HUB_SECONDS):  # noqa: S310
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _force_offline() -> Iterator[None]:
    """Make the libraries use only their caches."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _announce(index: Mapping[str, Any], names: Sequence[str], progress: Progress) -> None:
    """Say which tasks may fetch data, by their files, before they are loaded."""
    readers: dict[str, list[str]] = {}
    for given in names:
        for name, source in _sources(index, given):
            if source and source not in _FILE_BUILDERS and not Path(source).exists():
                readers.setdefault(source, []).append(name)
    for source, tasks in readers.items():
        more = f" and {len(tasks) - _NAMED} more" if len(tasks) > _NAMED else ""
        progress.note(
            f"verify: {', '.join(tasks[:_NAMED])}{more} will read {source}, which is fetched where "
            "it is not here yet"
        )


def _sources(
    index: Mapping[str, Any], member: Any, said: str | None = None
) -> Iterator[tuple[str, str | None]]:
    """List the tasks that a name stands for, each with what it reads.

    Args:
        index: The harness's: what the file of each task, group and tag says.
        member: A name, or what a group's file says of a member.
        said: What the group says that its tasks read.
    """
    own = member if isinstance(member, dict) else {"task": member}
    name = str(own.get("group") or own.get("task"))
    entry = index.get(name)
    config = own if entry is None else entry.cfg or {}
    said = own.get("dataset_path") or said
    if entry is not None and entry.kind.name == "TAG":
        members: Any = sorted(entry.tags)
    else:
        members = config.get("task")
        said = said or _source(config)
    if not isinstance(members, list):
        yield name, said
        return
    for task in members:
        yield from _sources(index, task, said)


def _source(config: Mapping[str, Any]) -> str | None:
    """Return the remote text that a task's file reads; None where its text lies next to it."""
    if _CODE_KEYS & config.keys():
        return _CODE
    source = config.get("dataset_path")
    if source in _FILE_BUILDERS:
        files = str((config.get("dataset_kwargs") or {}).get("data_files"))
        return next((word.strip("'\",[]{}") for word in files.split() if "://" in word), None)
    return source


def _manager(suite: Suite) -> tuple[Any, list[str]]:
    """Open the harness's index; return it with the names to load.

    The harness's own index takes seconds to read: it is left out where the folder has all names.

    Raises:
        RecipeError: if a name is in neither.
    """
    from lm_eval.tasks import TaskManager

    if suite.folder is not None:
        _check_yaml(suite.folder)
    # `_inside` stands in the folder already.
    local = TaskManager(include_path=".", include_defaults=False) if suite.folder else None
    if local is not None and suite.folder is not None:
        if not local.all_tasks:
            raise RecipeError(
                f"{suite.folder} holds no task.",
                allowed="YAML files with `task: NAME` as lm-evaluation-harness reads them",
            )
        names = list(suite.names) or local.all_subtasks
        if set(names) <= set(local.all_tasks):
            return local, names
    every = TaskManager(include_path="." if suite.folder else None)
    unknown = [name for name in suite.names if name not in every.task_index]
    if unknown:
        import difflib

        close = difflib.get_close_matches(unknown[0], every.all_tasks, n=3, cutoff=0.6)
        raise RecipeError(
            f"There is no task {unknown[0]!r}.",
            allowed="a task, group or tag of lm-evaluation-harness, or of the folder that "
            "--tasks-path names",
            fix=f"did you mean {' or '.join(close)}?" if close else None,
        )
    return every, list(suite.names)


def _check_yaml(folder: Path) -> None:
    """Name the file and line that are not YAML: the harness passes over such files in silence."""
    for path in sorted(path for end in ("yaml", "yml") for path in Path().rglob(f"*.{end}")):
        try:
            # Composed and not constructed: the harness has tags of its own.
            yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
            raise RecipeError(
                f"{folder / path}{line}: not YAML: {error.problem}",
                fix="check indentation, colons and quotes there",
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
            raise RecipeError(f"{folder / path} cannot be read: {error}") from error


def _load_fault(names: Sequence[str], error: Exception) -> UserError:
    reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
    fix = (
        "check the network, or keep the data next to a task file of your own: dataset_path: json, "
        "dataset_kwargs: {data_files: {test: FILE.jsonl}}, and --tasks-path FOLDER"
    )
    if isinstance(error, OSError):
        return EnvironmentFault(f"The data of {', '.join(names)} cannot be read: {reason}", fix=fix)
    return RecipeError(f"{', '.join(names)} cannot be loaded: {reason}", fix=fix)


@contextlib.contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    """Change to the folder of the task files: their relative paths mean files next to them."""
    if folder is None:
        yield
        return
    _require_folder(folder)
    with contextlib.chdir(folder):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Deprecations and bars inside the harness are not ours to show: requests are counted here."""
    from lm_eval.api import task

    shown = task.tqdm
    task.tqdm = functools.partial(shown, disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        task.tqdm = shown


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise RecipeError(
            f"--tasks-path {folder} is not a folder.",
            allowed="a folder with task files (YAML) and their data",
        )


def _folder_digest(folder: Path | None) -> str | None:
    """sha256 over names and contents of the files of a task folder."""
    if folder is None:
        return None
    _require_folder(folder)
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()
