"""The structure of the code: small subpackages, no torch where the API runs, a client that needs its extra alone.

The import rules themselves are import-linter's, in pyproject.toml.
"""

import ast
import functools
import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.paths import ROOT

HEAVY = ("torch", "torchvision", "safetensors", "numpy", "numba")


def heavy_modules_after(statement: str, modules: tuple[str, ...] = HEAVY) -> set[str]:
    """Return those of `modules` that a fresh interpreter has loaded after the statement."""
    program = f"{statement}\nimport sys\nprint('loaded:', *(m for m in {modules} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_the_api_imports_no_torch() -> None:
    modules = "shared.options, shared.vocabulary, shared.registry, service.api.app, service.webhooks.sender"
    assert heavy_modules_after(f"import {modules}") == set()


def test_a_worker_starts_without_what_only_the_trainer_needs() -> None:
    """torchvision brings torch's compiler, which takes as long to import as the rest of torch."""
    slow = ("torch", "torchvision", "torch._dynamo", "numba")
    assert heavy_modules_after("import service.worker.process", slow) == {"torch"}


def test_a_checkpoints_description_is_read_without_torch(tmp_path: Path) -> None:
    from tests.shared.test_checkpoint import publish_toy

    publish_toy(tmp_path)
    statement = f"from shared.registry import *\nfrom pathlib import Path\nassert scan(Path({str(tmp_path)!r})).infos"
    assert heavy_modules_after(statement) == set()


def installed_with(requirements: Iterable[str]) -> set[str]:
    """Return the normalised names of all distributions that pip installs for these requirements."""
    found: set[tuple[str, frozenset[str]]] = set()
    left = [Requirement(one) for one in requirements]
    while left:
        requirement = left.pop()
        name, extras = requirement.name.lower().replace("_", "-"), frozenset(requirement.extras)
        if (name, extras) in found:
            continue
        found.add((name, extras))
        needed = [Requirement(one) for one in importlib.metadata.requires(name) or []]
        left += [
            one for one in needed if not one.marker or any(one.marker.evaluate({"extra": e}) for e in {"", *extras})
        ]
    return {name for name, _ in found}


@functools.cache
def modules_without(extra: str) -> set[str]:
    """Return the installed top-level modules that `pip install '.[extra]'` does not bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    brought = installed_with([*project["dependencies"], *project["optional-dependencies"][extra]]) | {"labelgrid"}
    owners = importlib.metadata.packages_distributions()
    return {module for module, of in owners.items() if not brought & {name.lower().replace("_", "-") for name in of}}


def import_with_extra(extra: str, module: str) -> subprocess.CompletedProcess[str]:
    """Import a module in an interpreter that sees only what the extra brings."""
    program = f"""if True:
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {modules_without(extra)}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Absent())
        import {module}
    """
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_client_needs_its_extra_alone() -> None:
    """Its command line, too, which imports the client first."""
    assert import_with_extra("client", "service.client.__main__").stderr == ""


PACKAGES = ("labelgrid", "shared", "trainer", "service", "iclevr")
SUBPACKAGES = sorted({path.parent for top in PACKAGES for path in (ROOT / top).rglob("*.py")})


@pytest.mark.parametrize("subpackage", SUBPACKAGES, ids=lambda one: str(one.relative_to(ROOT)))
def test_a_subpackage_says_what_it_is_for(subpackage: Path) -> None:
    assert ast.get_docstring(ast.parse((subpackage / "__init__.py").read_text()))


def test_the_check_sees_what_an_extra_does_not_bring() -> None:
    absent = modules_without("client")
    assert {"pydantic_settings", "redis", "rq", "fastapi", "structlog", *HEAVY} <= absent
    assert not absent & {"pydantic", "httpx", "httpx_sse", "typer", "rich", "service", "shared"}
    assert "No module named" in import_with_extra("client", "service.api.app").stderr


def test_the_check_sees_what_is_loaded() -> None:
    assert "numpy" in heavy_modules_after("import numpy")
