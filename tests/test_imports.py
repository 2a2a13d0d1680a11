"""No module of ito_kernels or ito imports one that imports it, wherever the import stands; no test
file needs an optional package to be collected; the trainer's package requires these losses."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import ito
import ito_kernels

REPOSITORY = Path(__file__).parents[1]
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


def test_tests_are_collected_without_optional_packages():
    """`pytest -m gpu` imports all of them, also on a machine without the extras. A file may import
    a package without which it skips itself."""
    installed = {"torch", "numpy", "PIL", "safetensors", "tokenizers", "pytest", "hypothesis"}
    own = {path.stem for path in (REPOSITORY / "benchmarks").rglob("*.py")}
    known = sys.stdlib_module_names | installed | own | {"ito", "ito_kernels", "support"}
    tests = REPOSITORY / "tests"
    patterns = ("test_*.py", "conftest.py", "support/*.py")
    for path in (path for pattern in patterns for path in tests.rglob(pattern)):
        text = path.read_text(encoding="utf-8")
        optional = set(re.findall(r'if find_spec\("(\w+)"\) is None:\n    pytest.skip', text))
        for node in ast.parse(text).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            others = {name.partition(".")[0] for name in names} - known - optional
            assert not others, f"{path.name} imports {others} where pytest collects it"


def test_every_file_that_names_the_version_has_the_same():
    trainer = (REPOSITORY / "trainer" / "pyproject.toml").read_text()
    version = ito_kernels.__version__
    assert f'\nversion = "{version}"' in trainer
    assert f'"ito_kernels=={version}"' in trainer
    assert f"\nversion: {version}\n" in (REPOSITORY / "CITATION.cff").read_text()
    assert f"\n## {version}" in (REPOSITORY / "CHANGELOG.md").read_text()
