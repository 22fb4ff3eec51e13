"""Who may import whom: read from the source, so that no layer creeps into another."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nmexport
import pytest

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
    "nmexport.runtimes": ("torch", "transformers", "nmexport.graph", "nmexport.verification"),
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
    "engines",
    "sparsity",
    "allocation",
    "calibration",
    "graph",
    "models",
    "runtimes",
    "verification",
    "oracle",
)
ABOVE |= {
    f"nmexport.{name}": ("nmexport.cli", "nmexport.pipeline", "nmexport.stages")
    for name in LOWER_LAYERS
}
OF_ONE_RUNTIME = {
    "onnxruntime": ("nmexport.runtimes", "nmexport.bench", "nmexport.cuda_bench"),
    "tensorrt": ("nmexport.runtimes", "nmexport.engines", "nmexport.bench"),
    "tensorrt_rtx": ("nmexport.runtimes", "nmexport.engines", "nmexport.bench"),
    "polygraphy": ("nmexport.engines",),
}


@dataclass(frozen=True)
class Import:
    """One import statement that runs (not one for a type checker)."""

    importer: str
    imported: str
    at_module_level: bool
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


class _Collector(ast.NodeVisitor):
    def __init__(self, importer: str) -> None:
        self.importer = importer
        self.depth = 0
        self.found: list[Import] = []

    def _add(self, imported: str, line: int) -> None:
        self.found.append(Import(self.importer, imported, self.depth == 0, line))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"{self.importer}:{node.lineno}: absolute imports only"
        for alias in node.names:
            self._add(f"{node.module}.{alias.name}", node.lineno)

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
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
def all_imports() -> tuple[Import, ...]:
    return tuple(i for name, source in sources().items() for i in imports_of(source, name))


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
    found = {(i.imported, i.at_module_level) for i in imports_of(source, "m")}
    assert found == {("a.b", True), ("c.d", True), ("f", True), ("h", False)}
    assert any(is_within(i.imported, "torch") for i in all_imports())


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
        "recipe = resolve('smollm2')\n"
        "assert needs_whole(recipe) and learning_settings(recipe.sparsity, recipe.seed)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
