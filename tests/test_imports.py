"""Who may import whom: read from the source, so that no layer creeps into another."""

from __future__ import annotations

import ast
import functools
import graphlib
import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nmexport
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable

PACKAGE = Path(nmexport.__file__).parent
STAGES = ("calibrate", "fold", "export", "engine", "verify", "package")
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "pydantic")

# A module or package of ours -> what neither it nor anything below it may import.
FORBIDDEN = {
    "nmexport.sparsity": (
        *("onnx", "onnx_ir", "onnxruntime", "transformers", "safetensors", "pydantic"),
        *("pathlib", "os", "io", "shutil", "json", "tempfile", "yaml"),
        *("nmexport.graph", "nmexport.runtimes", "nmexport.models", "nmexport.calibration"),
    ),
    "nmexport.graph": ("torch", "transformers", "onnxruntime", "nmexport.models"),
    "nmexport.oracle": ("torch", "onnx", "onnxruntime", "nmexport.graph"),
    "nmexport.oracle_weights": ("torch", "onnx", "onnxruntime", "nmexport.graph"),
    "nmexport.runtimes": ("torch", "transformers", "nmexport.verification"),
    "nmexport.generation": ("torch", "nmexport.serving", "nmexport.verification"),
    "nmexport.errors": ("nmexport",),
    "nmexport.store.layers": ("torch", "onnx", "numpy"),
}
# Every layer -> the layers above it, which it must not know.
ABOVE = {
    "nmexport.cli": (),
    "nmexport.pipeline": ("nmexport.cli",),
    "nmexport.stages": ("nmexport.cli", "nmexport.pipeline"),
}
LOWER_LAYERS = (
    "sparsity",
    "allocation",
    "calibration",
    "graph",
    "models",
    "runtimes",
    "verification",
    "oracle",
    "oracle_weights",
)
ABOVE |= {
    f"nmexport.{name}": ("nmexport.cli", "nmexport.pipeline", "nmexport.stages")
    for name in LOWER_LAYERS
}
OF_ONE_RUNTIME = {
    "onnxruntime": ("nmexport.runtimes", "nmexport.bench"),
    "tensorrt": ("nmexport.runtimes",),
    "tensorrt_rtx": ("nmexport.runtimes",),
    "polygraphy": ("nmexport.runtimes.tensorrt",),
    "starlette": ("nmexport.serving.openai",),
    "uvicorn": ("nmexport.serving.openai",),
}


@dataclass(frozen=True)
class Import:
    """One import statement."""

    importer: str
    imported: str
    at_module_level: bool
    line: int
    for_types: bool = False
    """It stands under `if TYPE_CHECKING:` and does not run."""

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


class _Collector(ast.NodeVisitor):
    def __init__(self, importer: str) -> None:
        self.importer = importer
        self.depth = 0
        self.for_types = False
        self.found: list[Import] = []

    def _add(self, imported: str, line: int) -> None:
        self.found.append(Import(self.importer, imported, self.depth == 0, line, self.for_types))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"{self.importer}:{node.lineno}: absolute imports only"
        for alias in node.names:
            self._add(f"{node.module}.{alias.name}", node.lineno)

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            self.for_types = True
            for statement in node.body:
                self.visit(statement)
            self.for_types = False
            node.body = []
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, importer: str) -> list[Import]:
    collector = _Collector(importer)
    collector.visit(ast.parse(source))
    return collector.found


@functools.cache
def sources() -> dict[str, str]:
    return {module_name(p): p.read_text(encoding="utf-8") for p in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def every_import() -> tuple[Import, ...]:
    """Imports for a type checker included."""
    return tuple(i for name, source in sources().items() for i in imports_of(source, name))


@functools.cache
def all_imports() -> tuple[Import, ...]:
    """Imports that run."""
    return tuple(i for i in every_import() if not i.for_types)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def breaches(rules: dict[str, tuple[str, ...]]) -> list[str]:
    return [
        str(found)
        for found in all_imports()
        for owner, forbidden in rules.items()
        if is_within(found.importer, owner)
        and any(is_within(found.imported, name) for name in forbidden)
    ]


def test_the_walk_sees_imports():
    source = (
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\nelse:\n    import f\n"
        "def g():\n    import h\n"
    )
    seen = imports_of(source, "m")
    assert {(i.imported, i.at_module_level) for i in seen if not i.for_types} == {
        *(("a.b", True), ("c.d", True), ("f", True), ("h", False)),
    }
    assert [i.imported for i in seen if i.for_types] == ["e"]
    assert any(is_within(i.imported, "torch") for i in all_imports())


def package_of(name: str) -> str:
    """`nmexport.graph.passes.X` -> `nmexport.graph`; a module at the top is its own package."""
    return ".".join(name.split(".")[:2])


def package_imports(imports: Iterable[Import]) -> dict[str, set[str]]:
    """Packages of ours -> those of ours that they import."""
    graph: dict[str, set[str]] = {}
    for each in imports:
        importer, imported = package_of(each.importer), package_of(each.imported)
        graph.setdefault(importer, set())
        if imported != importer and imported in sources():
            graph[importer].add(imported)
    return graph


@pytest.mark.parametrize(
    "source", ["import nmexport.b.c", "if TYPE_CHECKING:\n    from nmexport.b import c"]
)
def test_the_walk_sees_a_circle(source, monkeypatch):
    both = {"nmexport.a": source, "nmexport.b": "def f():\n    from nmexport.a import x"}
    monkeypatch.setitem(globals(), "sources", lambda: both)
    graph = package_imports(i for name, text in both.items() for i in imports_of(text, name))
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()


def test_no_circles_between_packages():
    """Imports inside functions and for type checkers count too."""
    graph = package_imports(every_import())
    packages = {f"nmexport.{p.stem}" for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert packages <= set(graph)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][::-1]
        steps = set(itertools.pairwise(circle))
        pytest.fail(
            " -> ".join(circle)
            + "".join(
                f"\n{i}"
                for i in every_import()
                if (package_of(i.importer), package_of(i.imported)) in steps
            )
        )


def test_layers_keep_out_what_is_not_theirs():
    assert breaches(FORBIDDEN) == []


def test_data_flows_one_way():
    assert breaches(ABOVE) == []


def test_a_stage_knows_only_the_stages_before_it():
    later = {
        f"nmexport.stages.{stage}": tuple(f"nmexport.stages.{s}" for s in STAGES[position + 1 :])
        for position, stage in enumerate(STAGES)
    }
    assert breaches(later) == []


@pytest.mark.parametrize("runtime", OF_ONE_RUNTIME)
def test_a_runtime_is_imported_behind_its_interface_only(runtime):
    strays = [
        str(found)
        for found in all_imports()
        if is_within(found.imported, runtime)
        and not any(is_within(found.importer, owner) for owner in OF_ONE_RUNTIME[runtime])
    ]
    assert strays == []


def test_the_method_opens_no_file():
    opened = [
        f"{name}:{node.lineno}"
        for name, source in sources().items()
        if is_within(name, "nmexport.sparsity")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {"open", "torch.save", "torch.load", "np.save", "np.load"}
    ]
    assert opened == []


def test_nothing_loads_pickles_or_prints():
    banned = {"print", "pickle.load", "pickle.loads", "torch.load", "eval", "exec"}
    calls = [
        f"{name}:{node.lineno} calls {ast.unparse(node.func)}"
        for name, source in sources().items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in banned
    ]
    assert calls == []
    assert [str(i) for i in all_imports() if is_within(i.imported, "pickle")] == []


def loaded_at_start(start: str) -> set[str]:
    """Modules of ours that importing `start` imports in turn, at module level."""
    waiting, seen = [start], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in sources():
            continue
        seen.add(name)
        parents = name.split(".")
        waiting += [".".join(parents[:depth]) for depth in range(1, len(parents))]
        for found in all_imports():
            if found.importer == name and found.at_module_level:
                waiting += [found.imported, found.imported.rpartition(".")[0]]
    return seen


def libraries_of(start: str) -> set[str]:
    """Packages of others that importing `start` imports in turn, at module level."""
    loaded = loaded_at_start(start)
    roots = {
        i.imported.partition(".")[0]
        for i in all_imports()
        if i.importer in loaded and i.at_module_level
    }
    return roots - sys.stdlib_module_names - {"nmexport"}


def idle_imports() -> list[str]:
    """Imports of ours inside functions that neither spare a library nor avoid a circle."""
    libraries = functools.cache(libraries_of)
    return [
        str(found)
        for found in all_imports()
        if is_within(found.imported, "nmexport")
        and not found.at_module_level
        and not is_within(found.importer, "nmexport.cli")
        for target in [owner_of(found.imported)]
        if libraries(target) <= libraries(found.importer)
        and found.importer not in loaded_at_start(target)
    ]


def owner_of(name: str) -> str:
    """The module of ours that a name is, or is imported from."""
    return name if name in sources() else name.rpartition(".")[0]


def test_an_import_inside_a_function_spares_a_library():
    """Else it belongs at the top, where a reader looks for what a module needs."""
    assert idle_imports() == []


@pytest.mark.parametrize(("needs", "idle"), [("import json", True), ("import torch", False)])
def test_the_walk_sees_an_idle_import(needs, idle, monkeypatch):
    both = {"nmexport.a": "def f():\n    from nmexport.b import x", "nmexport.b": needs}
    imports = tuple(i for name, text in both.items() for i in imports_of(text, name))
    monkeypatch.setitem(globals(), "sources", lambda: both)
    monkeypatch.setitem(globals(), "all_imports", lambda: imports)
    assert bool(idle_imports()) is idle


def test_the_command_line_starts_light():
    started = {
        name
        for start in sources()
        if is_within(start, "nmexport.cli") or start == "nmexport.__main__"
        for name in loaded_at_start(start)
    }
    heavy = [
        str(found)
        for found in all_imports()
        if found.importer in started
        and found.at_module_level
        and any(is_within(found.imported, name) for name in (*HEAVY, "numpy", "matplotlib"))
    ]
    assert heavy == []


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"]], ids=" ".join)
def test_help_loads_no_heavy_library(arguments):
    program = (
        "import json, sys\n"
        f"sys.argv = ['nmexport', *{arguments!r}]\n"
        "from nmexport.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "json.dump(sorted(sys.modules), sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert "Usage:" in done.stdout
    loaded = set(json.loads(done.stderr))
    assert "click" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_what_a_key_asks_of_the_method_needs_no_torch():
    """A build with nothing to do would wait for its import longer than for all else."""
    program = (
        "import sys\n"
        "from nmexport.calibration.effort import learning_settings\n"
        "from nmexport.models.offload import needs_whole\n"
        "from nmexport.recipe import resolve\n"
        "from nmexport.stages import calibrate, engine, export, fold, package, verify\n"
        "recipe = resolve('qwen3', {'allocation.budget.max_kl': 0.1})\n"
        "assert needs_whole(recipe) and learning_settings(recipe.sparsity, recipe.seed)\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers', 'matplotlib', 'scipy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
