"""What holds for every file of the repository."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted((ROOT / "efftrain").rglob("*.py"))
ROOT_FOLDERS = ("parallel", "federated", "ondevice", "launch", "tests", "benchmarks", "tools")

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def tracked_texts() -> list[Path]:
    """Every text file that git knows."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    binary = {".npz", ".png", ".gz", ".bin"}
    paths = [ROOT / name for name in names.split("\0") if name and Path(name).suffix not in binary]
    return [path for path in paths if path.is_file()]


def public(body: list[ast.stmt], place: str) -> Iterator[tuple[str, Documented]]:
    """Public classes, functions and methods of a module; magic methods say what they do by their name."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield f"{place}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{place}.{node.name}")


def test_everything_public_is_documented() -> None:
    missing = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        module = str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
        missing += [name for name, node in [(module, tree), *public(tree.body, module)] if not ast.get_docstring(node)]
    assert missing == []


def test_no_file_names_a_machine() -> None:
    pattern = re.compile(
        r"(?<![\w.])/(?:work|home|root|Users|mnt|scratch)/\w|(?:https?://)(?:localhost|10\.|192\.168\.)"
    )
    found = []
    for path in tracked_texts():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_runs_code_from_data() -> None:
    """No pickle, no eval, no exec, no shell; ``torch.load`` and ``numpy.load`` only in their safe forms."""
    found = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        } | {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        place = path.relative_to(ROOT)
        found += [
            f"{place} imports {name}" for name in imported & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
        ]
        for name, call in calls(tree):
            options = {k.arg: ast.unparse(k.value) for k in call.keywords}
            unsafe = (
                name in ("eval", "exec", "os.system", "os.popen", "torch.save")
                or options.get("shell") == "True"
                or options.get("allow_pickle") == "True"
                or options.get("weights_only") == "False"
                or (name == "torch.load" and options.get("weights_only") != "True")
                or (name in ("np.load", "numpy.load") and options.get("allow_pickle") != "False")
            )
            if unsafe:
                found.append(f"{place}:{call.lineno} {name}")
    assert found == []


@pytest.mark.parametrize(
    "module", ["efftrain", "efftrain.compression", "efftrain.config", "efftrain.models", "efftrain.data"]
)
def test_cheap_imports_load_no_torch(module: str) -> None:
    code = f"import sys, {module}; heavy = {{'torch', 'flwr', 'horovod'}} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_folders_that_people_run_are_no_packages() -> None:
    for folder in ROOT_FOLDERS:
        assert list((ROOT / folder).rglob("__init__.py")) == [], f"{folder} would shadow a module of that name"


def test_no_module_is_too_long() -> None:
    """600 lines; a longer one says at its top why."""
    assert [str(p) for p in SOURCES if len(p.read_text(encoding="utf-8").splitlines()) > 600] == []
