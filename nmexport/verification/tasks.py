"""Benchmark tasks through lm-evaluation-harness, dense next to sparse, on the built artifact.

The harness is an optional package. Tasks of a local folder need no network: paths in their YAML
are relative to that folder. A task whose data lies on the hub says so before it is fetched.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nmexport.errors import EnvironmentFault, RecipeError, UserError
from nmexport.report.model import MetricScore, TaskScore

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from nmexport.progress import Progress
    from nmexport.recipe import EvaluationSection
    from nmexport.runtimes.session import Limits, Session
    from nmexport.store.layers import ModelPhases

PROTOCOL = (
    "lm-evaluation-harness {version} asks both models the same requests; dense and sparse answers "
    "come from the shipped model files. A score is the task's first metric. Standard errors are "
    "over documents; that of the difference is paired, document by document."
)
_STEPWISE = (
    " The model's phases differ, so contexts run as prompts and continuations token by token."
)
_CUT = (
    " The engine holds {window} tokens, fewer than the model's {model}: for both models, longer "
    "texts are cut to them, from the left or into pieces."
)
# Bootstrap draws of the standard errors that have no formula; the harness's default takes minutes.
_BOOTSTRAP = 1000
_WINDOW_KEYS = ("n_positions", "max_position_embeddings", "n_ctx")
_DEFAULT_WINDOW = 2048
_HUB_SECONDS = 5.0
_NO_LIMIT = 1 << 30
# Tasks that a note names; a benchmark like MMLU has 57 of one source.
_NAMED = 3
# Builders of `datasets` that read files, whatever the network.
_FILE_BUILDERS = frozenset({"json", "csv", "parquet", "text", "arrow"})
# Keys of tasks that come by their data in Python.
_CODE_KEYS = frozenset({"class", "custom_dataset"})
_CODE = "what its own code asks for"


@dataclass(frozen=True, kw_only=True)
class TextSide:
    """A model's tokenizer, and how many tokens fit into its window."""

    tokenizer: Any
    max_length: int

    def within(self, limits: Limits) -> TextSide:
        """The same with the window of a session that takes no more."""
        return replace(self, max_length=min(self.max_length, limits.tokens or self.max_length))


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


def identity(suite: Suite | None) -> dict[str, Any] | None:
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
    """Version of lm-evaluation-harness.

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


def compare(
    dense: Session,
    sparse: Session,
    text: TextSide,
    suite: Suite,
    *,
    phases: ModelPhases = "all",
    seed: int = 0,
    progress: Progress,
) -> dict[str, TaskScore]:
    """Score both models on every task.

    Args:
        dense: The baseline.
        sparse: The model that was built.
        text: Tokenizer and window of both.
        suite: Which tasks.
        phases: When the sparse model is sparse; where that is not always, it is scored token by
            token.
        seed: Of few-shot examples and draws.
        progress: Counts requests.

    Returns:
        Scores by task.

    Raises:
        EnvironmentFault: if the harness is not installed, or a task's data cannot be reached.
        RecipeError: if a task is not known.
    """
    harness_version()
    text = _window(text, dense, sparse)
    sides = {}
    for side, session in (("dense", dense), ("sparse", sparse)):
        stepwise = side == "sparse" and phases != "all"
        sides[side] = _results(
            session, text, suite, stepwise=stepwise, seed=seed, progress=progress, side=side
        )
    return {name: _figures(sides["dense"][name], sides["sparse"][name]) for name in sides["dense"]}


def protocol(phases: ModelPhases, text: TextSide, *sessions: Session) -> str:
    """How the figures of `compare` come about, in words.

    Args:
        phases: When the sparse model is sparse.
        text: The model's window.
        sessions: What was scored.
    """
    words = PROTOCOL.format(version=harness_version()) + ("" if phases == "all" else _STEPWISE)
    window = _window(text, *sessions).max_length
    cut = _CUT.format(window=window, model=text.max_length) if window < text.max_length else ""
    return words + cut


def text_side(tokenizer: Any, config: Mapping[str, Any]) -> TextSide:
    """Tokenizer and window of a model, from its `config.json`, as the harness finds them."""
    inner = config.get("text_config") or config
    known = [inner[key] for key in _WINDOW_KEYS if inner.get(key) is not None]
    limit = getattr(tokenizer, "model_max_length", None)
    if not known and limit is not None and limit < _NO_LIMIT:
        known = [limit]
    return TextSide(tokenizer=tokenizer, max_length=int(known[0]) if known else _DEFAULT_WINDOW)


def _window(text: TextSide, *sessions: Session) -> TextSide:
    """Cut the window to what all sessions take, so that both models read the same."""
    return functools.reduce(lambda side, session: side.within(session.limits), sessions, text)


def check(suite: Suite, progress: Progress) -> None:
    """Refuse tasks that cannot be scored, before hours are spent on what they would score.

    Raises:
        EnvironmentFault: if the harness is not installed, or a task's data cannot be reached.
        RecipeError: if a task is not known, or its file cannot be read.
    """
    harness_version()
    with _inside(suite.folder), _quiet():
        manager, names = _manager(suite)
        if _reads_hub(manager.task_index, names) and not _hub_answers():
            _load(manager, names, progress=progress)


# -- the harness -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _TaskResult:
    """One task on one model."""

    metrics: Mapping[str, tuple[float, float | None]]
    """Value and standard error by metric, the task's first metric first."""
    documents: int
    by_document: Mapping[str, list[float]]
    """Values by metric, where a document has one: what a paired difference is made of."""


def _results(
    session: Session,
    text: TextSide,
    suite: Suite,
    *,
    stepwise: bool,
    seed: int,
    progress: Progress,
    side: str,
) -> dict[str, _TaskResult]:
    """Score one model; tasks are loaded anew, since they keep what was answered."""
    from lm_eval.evaluator import evaluate

    from nmexport.verification.tasks_adapter import SessionLM

    with _inside(suite.folder), _quiet():
        loaded = _loaded(suite, seed, progress if side == "dense" else None)
        model = SessionLM(
            session,
            text,
            stepwise=stepwise,
            progress=progress,
            label=f"verify: tasks, {side}",
            seed=seed,
        )
        results = evaluate(
            lm=model, task_dict=loaded, limit=suite.limit, bootstrap_iters=_BOOTSTRAP
        )
    return {name: _task_result(results, name) for name in loaded["tasks"]}


def _loaded(suite: Suite, seed: int, progress: Progress | None) -> Any:
    """The suite's tasks, with few-shot counts and seeds set."""
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
    """Have the libraries look into their caches alone."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _announce(index: Mapping[str, Any], names: Sequence[str], progress: Progress) -> None:
    """Say which tasks may fetch their data, before loading them does: from their files alone."""
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
    """The tasks that a name stands for, each with what it reads.

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
    """The harness's index and the names to load from it.

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
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
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


# -- figures -----------------------------------------------------------------------------------


def _task_result(results: Mapping[str, Any], name: str) -> _TaskResult:
    """Pick one task out of the harness's answer, whose keys read `acc,none`, `acc_stderr,none`."""
    row = results["results"][name]
    metrics: dict[str, tuple[float, float | None]] = {}
    for key, value in row.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = row.get(f"{metric}_stderr,{kind}")
        label = metric if kind == "none" else key
        metrics[label] = (float(value), _number(stderr))
    samples = results["samples"][name]
    return _TaskResult(
        metrics=metrics,
        documents=int(results["n-samples"][name]["effective"]),
        by_document={metric: _by_document(samples, metric) for metric in metrics},
    )


def _by_document(samples: Sequence[Mapping[str, Any]], label: str) -> list[float]:
    """A metric's value on each document, in order of documents; empty where it has no such."""
    metric, _, kind = label.partition(",")
    rows = [row for row in samples if row.get("filter", "none") == (kind or "none")]
    values = [row.get(metric) for row in sorted(rows, key=lambda row: row["doc_id"])]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return numbers if len(numbers) == len(values) else []


def _figures(dense: _TaskResult, sparse: _TaskResult) -> TaskScore:
    """Make a task's entry in the report."""
    scores = {
        metric: MetricScore(
            dense=dense.metrics[metric][0],
            sparse=sparse.metrics[metric][0],
            dense_stderr=dense.metrics[metric][1],
            sparse_stderr=sparse.metrics[metric][1],
            difference_stderr=paired_stderr(dense.by_document[metric], sparse.by_document[metric]),
        )
        for metric in dense.metrics
    }
    metric, first = next(iter(scores.items()))
    return TaskScore(
        **vars(first),
        stderr=first.sparse_stderr,
        n=sparse.documents,
        metric=metric,
        metrics=scores,
    )


def paired_stderr(dense: Sequence[float], sparse: Sequence[float]) -> float | None:
    """Standard error of the mean of `sparse - dense`; None for fewer than two pairs."""
    if len(dense) != len(sparse) or len(dense) < 2:  # noqa: PLR2004 - one value has no spread
        return None
    differences = [after - before for before, after in zip(dense, sparse, strict=True)]
    mean = math.fsum(differences) / len(differences)
    squares = math.fsum((value - mean) ** 2 for value in differences)
    return math.sqrt(squares / (len(differences) - 1) / len(differences))


def _number(value: object) -> float | None:
    """A standard error; the harness writes `N/A` where it has none."""
    return float(value) if isinstance(value, int | float) else None
