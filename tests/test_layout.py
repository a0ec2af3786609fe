"""How the code is laid out: imports run one way, scripts stay short, and whoever reads finds what things are."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A room may import itself and those before it. Files beside the rooms are rooms of their own.
ROOMS = (
    "errors", "distributed", "sharding", "storage", "data", "tasks", "training", "models", "interventions",
    "evaluation", "cli", "arguments", "unlearning", "plan", "job", "audit", "runs", "compare", "race",
)  # fmt: skip
LONGEST = {"qlora": 130, "spul": 130, "baselines": 180, "inference_spul": 180}  # lines of each script
SOURCES = sorted((ROOT / "utils").rglob("*.py"))


def module_of(path):
    """`utils.models.chain` of its file; a package's own file stands for the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


def imported(path):
    """The modules of `utils` that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{name.name}" for name in node.names} | {node.module}
    return {name for name in found if name in MODULES and MODULES[name].name != "__init__.py"}


GRAPH = {module: imported(path) for module, path in MODULES.items()}


def test_every_room_is_known():
    assert {module.split(".")[1] for module in MODULES if "." in module} == set(ROOMS)


def test_no_room_imports_one_above_it():
    rank = {room: i for i, room in enumerate(ROOMS)}
    upward = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if rank[other.split(".")[1]] > rank[module.split(".")[1]]
    ]
    assert not upward


def test_there_is_no_circle():
    left = {module: set(others) for module, others in GRAPH.items()}
    while free := {module for module, others in left.items() if not others}:
        left = {module: others - free for module, others in left.items() if module not in free}
    assert not left


@pytest.mark.parametrize("script", LONGEST)
def test_scripts_are_short(script):
    assert len((ROOT / f"{script}.py").read_text(encoding="utf-8").splitlines()) <= LONGEST[script]


def test_the_readme_is_read_to_the_end():
    assert (ROOT / "README.md").stat().st_size <= 14_000


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.stem)
def test_no_test_file_imports_another(path):
    """What several need lies in a file of its own."""
    tree, found = ast.walk(ast.parse(path.read_text(encoding="utf-8"))), []
    for node in tree:
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or "", *(name.name for name in node.names if node.module in (None, "tests"))]
    assert not [name for name in found if name.split(".")[-1].startswith("test_")]


def annotated(function):
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    given = [*arguments, *filter(None, [function.args.vararg, function.args.kwarg])]
    return function.returns is not None and all(a.annotation or a.arg in ("self", "cls") for a in given)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_functions_and_fields_are_annotated(path):
    """A field of a dataclass without an annotation is none; what a class sets in its body is a constant."""
    bare = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not annotated(node):
            bare.append(f"{node.name}, line {node.lineno}")
    assert not bare


def test_no_function_takes_all_arguments_without_saying_why():
    """Only the scripts read a command's `args`. Elsewhere the docstring, or a comment beside it, gives the reason."""
    silent = []
    for path in SOURCES:
        if path.stem in ("compare", "race"):  # scripts, too: python -m utils.compare
            continue
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and any(a.arg == "args" and is_namespace(a) for a in node.args.args):
                said = "`args`" in (ast.get_docstring(node) or "")
                comment = next(a for a in node.args.args if a.arg == "args").lineno
                if not said and "#" not in text.splitlines()[comment - 1]:
                    silent.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not silent


def is_namespace(argument):
    return argument.annotation is None or "Namespace" in ast.unparse(argument.annotation)
