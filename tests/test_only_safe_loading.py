"""The code loads files only in ways that cannot run their contents: safetensors, torch.load with weights_only."""

import ast
from collections.abc import Iterator

import pytest

from tests.paths import ROOT

FOLDERS = ("shared", "trainer", "service", "benchmarks")
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
UNSAFE_CALLS = {"jit.load", "hub.load", "package.PackageImporter", "read_pickle", "PickleSerializer"}


def _dotted(node: ast.expr) -> str:
    """The name of what is called: torch.load, load, torch.hub.load; ?.load where it hangs on another expression."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            return f"{_dotted(value)}.{attr}"
    return "?"


def _keyword(call: ast.Call, name: str) -> object:
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def unsafe(source: str) -> Iterator[str]:
    """What in a module could run code out of a file, as `line: what`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                modules = {alias.name.partition(".")[0] for alias in names}
            case ast.ImportFrom(module=module, names=names):
                modules = {(module or "").partition(".")[0]}
                if (module or "").partition(".")[0] == "torch" and any(alias.name == "load" for alias in names):
                    yield f"{node.lineno}: torch's load under a name of its own"
            case ast.Call():
                name = _dotted(node.func)
                if name == "torch.load" and _keyword(node, "weights_only") is not True:
                    yield f"{node.lineno}: torch.load without weights_only=True"
                bad = name in ("eval", "exec") or any(f".{name}".endswith(f".{call}") for call in UNSAFE_CALLS)
                if bad or _keyword(node, "allow_pickle"):
                    yield f"{node.lineno}: {name}"
                continue
            case _:
                continue
        if found := modules & UNSAFE_MODULES:
            yield f"{node.lineno}: imports {', '.join(sorted(found))}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import joblib.numpy_pickle",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "torch.load(path, None, None)",
        "from torch import load",
        "from torch.serialization import load as safe",
        "np.load(path, allow_pickle=True)",
        "torch.jit.load(path)",
        "torch.hub.load('x', 'y')",
        "pandas.read_pickle(path)",
        "eval(text)",
        "Queue('x', serializer=PickleSerializer())",
    ],
)
def test_the_check_sees_every_unsafe_way(source: str) -> None:
    assert list(unsafe(source))


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "json.loads(x)",
        "network.to(device).eval()",
        "load(path)",
    ],
)
def test_the_check_lets_safe_ways_pass(source: str) -> None:
    assert not list(unsafe(source))


@pytest.mark.parametrize("folder", FOLDERS)
def test_only_safe_ways_of_loading_are_used(folder: str) -> None:
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert sources
    assert {str(path.relative_to(ROOT)): found for path in sources if (found := list(unsafe(path.read_text())))} == {}


def test_a_worker_reads_no_pickle_from_redis() -> None:
    for path in (ROOT / "service").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and _dotted(node.func) in ("Queue", "RqJob.fetch", "SimpleWorker"):
                given = {keyword.arg: _dotted(keyword.value) for keyword in node.keywords}
                assert given.get("serializer") == "JSONSerializer", f"{path.name}:{node.lineno}"
