"""The structure that the map in manual_lstm/README.md promises: imports go down, files stay small."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import manual_lstm

PACKAGE = Path(manual_lstm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join(("manual_lstm", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES
}
# A room uses itself and what stands before it.
ROOMS = ("layer", "swap", "check", "testing", "report")
# The files of the layer: the front room, engine/ and unrolled/. Each uses only what stands before it.
LAYER = (
    "cell",
    "engine.direction",
    "engine.context",
    "engine.dtypes",
    "engine.steps",
    "engine.cuts",
    "engine.gemm",
    "loop",
    "engine.workspace",
    "engine.dispatch",
    "engine.differentiate",
    "engine.input_product",
    "engine.forward",
    "engine.padding",
    "engine.backward",
    "engine.cuda",
    "engine.fused",
    "engine.sample_gradients",
    "engine.vmap",
    "engine.opacus",
    "engine.scan",
    "engine.traced",
    "engine.custom",
    "engine.stack",
    "engine.nested",
    "unrolled.figures",
    "unrolled.result",
    "unrolled.request",
    "engine.weights",
    "inputs",
    "engine.convert",
    "engine.constructor",
    "engine.arguments",
    "module",
    "cells",
    "functional",
)


def _imports(path: Path) -> Iterator[str]:
    """The modules of this package that a file imports, also inside its functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("manual_lstm"):
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                if whole in MODULES:
                    yield whole
                elif node.module in MODULES:
                    yield node.module
                else:
                    yield f"{node.module}.__init__"
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("manual_lstm"):
                    yield name.name if name.name in MODULES else f"{name.name}.__init__"


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 2 and parts[1] not in ("engine", "unrolled") else "layer"


def test_imports_run_in_no_circle() -> None:
    graph = {module: set(_imports(path)) for module, path in MODULES.items()}
    for imported in graph.values():
        assert imported <= set(MODULES)
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    # The names of the package are imported from all rooms, and the commands run them.
    if module in ("manual_lstm.__init__", "manual_lstm.__main__"):
        return
    for imported in _imports(MODULES[module]):
        if imported == "manual_lstm.__init__":
            assert _room(module) != "layer", f"{module} imports the whole package"
            continue
        assert ROOMS.index(_room(imported)) <= ROOMS.index(_room(module)), f"{module}: {imported}"


def test_the_files_of_the_layer_have_an_order() -> None:
    files = [m for m in MODULES if _room(m) == "layer" and not m.endswith("__")]
    assert sorted(files) == sorted(f"manual_lstm.{name}" for name in LAYER)
    for k, name in enumerate(LAYER):
        before = {f"manual_lstm.{other}" for other in LAYER[:k]}
        assert set(_imports(MODULES[f"manual_lstm.{name}"])) <= before, name


def test_no_import_is_relative() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path


def test_the_front_room_has_few_files() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 11


def _lines_without_docstrings(tree: ast.AST, lines: int) -> int:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if ast.get_docstring(node) is not None:
                assert first is not None
                assert first.end_lineno is not None
                lines -= first.end_lineno - first.lineno + 1
    return lines


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module: str) -> None:
    source = MODULES[module].read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert _lines_without_docstrings(tree, source.count("\n")) <= 480
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert _lines_without_docstrings(node, length) <= 90, node.name
