"""The package as it is installed and imported: what is public, what it needs, which way imports go."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxcomm

ROOT = Path(__file__).parents[1]
HOMES = {"jaxcomm": "jaxcomm", "converters": "jaxcomm.converters", "evals": "jaxcomm.evals"}
"""Folders at the top of the repository, and the packages they are installed as."""
ONLY_COMMANDS = ("tyro", "matplotlib", "plotly", "pyarrow", "tensorboardX", "lm_eval", "datasets", "torch")


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in HOMES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imports(name: str, path: Path, known) -> set[str]:
    """Modules of the package that one imports, anywhere in it, but for names of types alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                stem = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                base = f"{stem}.{base}".rstrip(".")
            inner = {f"{base}.{alias.name}" for alias in node.names} & known
            found |= inner or {base}
    return found & known


def test_public_names_are_there_and_hide_no_module():
    for name in ("jaxcomm", "jaxcomm.protocols", "jaxcomm.lmnet", "jaxcomm.converters", "jaxcomm.evals.games"):
        package = importlib.import_module(name)
        assert len(set(package.__all__)) == len(package.__all__)
        for public in package.__all__:
            assert getattr(package, public) is not None
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{name}.{module.name}")
            assert getattr(package, module.name) is sys.modules[f"{name}.{module.name}"], (
                f"{name}.{module.name} is hidden"
            )
    assert jaxcomm.load_agent is importlib.import_module("jaxcomm.converters").load_agent
    assert re.fullmatch(r"\d+\.\d+\.\d+", jaxcomm.__version__) and set(dir(jaxcomm)) == {
        *jaxcomm.__all__,
        "__version__",
    }
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jaxcomm.nothing  # noqa: B018


def test_imports_go_one_way_and_neighbours_are_imported_as_such():
    """evals -> converters -> the core, without a circle; what stands in one folder is imported relatively."""
    every = modules()
    rank = lambda name: 2 if name.startswith("jaxcomm.evals") else 1 if name.startswith("jaxcomm.converters") else 0
    graph = {name: imports(name, path, set(every)) - {name} for name, path in every.items()}
    graph["jaxcomm"] -= {"jaxcomm.converters"}  # handed through, when asked for
    for name, found in graph.items():
        assert all(rank(other) <= rank(name) for other in found), f"{name} imports {sorted(found)}"
        text = every[name].read_text(encoding="utf-8")
        home = re.compile(r"^\s*(from|import) jaxcomm\.(converters|evals)\b", re.MULTILINE)
        assert not (rank(name) and home.search(text)), f"{name} imports a neighbour absolutely"

    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' -> '.join((*above[above.index(name) :], name))}"
        if name not in done:
            for other in graph[name]:
                if every[other].name != "__init__.py":  # a package gathers what its modules have
                    walk(other, (*above, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_functions_can_be_seen_whole():
    """None is longer than 60 lines besides what it says of itself, or takes more than 8 parameters; options of many are declared
    once (`Unpack`)."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                a = node.args
                count = len([*a.posonlyargs, *a.args, *a.kwonlyargs]) + bool(a.vararg) + bool(a.kwarg)
                count -= a.args[:1] != [] and a.args[0].arg in ("self", "cls")
                lines = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node):
                    lines -= node.body[0].end_lineno - node.body[0].lineno + 1
                assert count <= 8 and lines <= 60, f"{name}.{node.name}"


MISSING = f"""
import sys
sys.modules.update(dict.fromkeys({ONLY_COMMANDS!r}))
"""


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", MISSING + code], capture_output=True, text=True)


def test_the_library_needs_nothing_that_only_commands_need():
    done = python(
        "import jaxcomm, jaxcomm.protocols, jaxcomm.lmnet, jaxcomm.lora, jaxcomm.training, jaxcomm.int8\n"
        "from jaxcomm.evals.pair import folder\n"
        "b = jaxcomm.load_agent(folder('b'))\n"
        "print(b.encode('Alice'))\n"
    )
    assert done.returncode == 0 and done.stdout.startswith("["), done.stderr
    done = python("from jaxcomm.evals.__main__ import main; main()")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "jaxcomm: the command line needs tyro: pip install 'jaxcomm[cli]'"


def test_files_that_a_package_has():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").split()[:2] == ["Apache", "License"]
    assert 'license = "Apache-2.0"' in text and (ROOT / "jaxcomm" / "py.typed").exists()
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {jaxcomm.__version__}\n" in cited


def test_every_mutant_changes_one_line_that_is_there():
    """Or `make mutants` would end half way."""
    from mutations import MUTANTS

    for file, line, instead, test in MUTANTS:
        assert (ROOT / file).read_text(encoding="utf-8").count(line) == 1 and line != instead, (file, line)
        assert (ROOT / "tests" / f"{test}.py").exists(), test
