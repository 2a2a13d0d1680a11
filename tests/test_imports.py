"""No module of ito_kernels or ito imports one that imports it, wherever the import stands."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import ito
import ito_kernels

ROOTS = [Path(package.__file__).parent for package in (ito_kernels, ito)]
FILES = {
    ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for root in ROOTS
    for path in root.rglob("*.py")
}


def imported(name: str) -> set[str]:
    """The modules that a module imports: at its top, in functions and under TYPE_CHECKING."""
    path, found = FILES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                module = f"{base}.{alias.name}"
                # the native module is no file of Python, and no name that its package holds
                if module != "ito_kernels._native":
                    found.add(module if module in FILES else base)
    return (found & FILES.keys()) - {name}


def test_imports_form_no_circle():
    graph = {name: imported(name) for name in FILES}
    assert "ito_kernels.distributed.collectives" in graph["ito_kernels.distributed.gather"]
    assert "ito_kernels.distributed" in graph["ito.objectives"]
    TopologicalSorter(graph).prepare()  # raises CycleError, with the circle
