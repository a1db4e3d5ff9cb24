"""The rooms of the house: which file of the package may import which.

The rules are read from the syntax tree, so an import inside a function counts like any other. Only the ban on heavy
imports looks at what runs on import; a second test really imports those modules and looks for torch.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "alignkit"

# A folder of the kit imports only itself and the folders before it.
FOLDERS = (
    "core",
    "data",
    "teacher",
    "models",
    "generation",
    "scoring",
    "retrieval",
    "training",
    "evaluation",
    "reporting",
)
# What `--help`, a config error and `import alignkit` touch; these stay free of the imports that take seconds.
LIGHT_FOLDERS = ("core", "data", "teacher")
HEAVY = frozenset({"accelerate", "bitsandbytes", "datasets", "matplotlib", "peft", "torch", "transformers", "trl"})
FRONT_DOORS = ("__init__", "__main__")


@dataclass(frozen=True)
class Import:
    """One imported name, absolute and dotted: `from a.b import c` is `a.b.c`."""

    name: str
    line: int
    runs_on_import: bool


def imports_of(path: Path, package: Path) -> list[Import]:
    """Every import of a file, wherever it stands in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    folder = (package.name, *path.relative_to(package).parts[:-1])
    return list(_walk(tree, folder, runs_on_import=True))


def _walk(node: ast.AST, folder: tuple[str, ...], runs_on_import: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, runs_on_import) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        start = folder[: len(folder) + 1 - node.level] if node.level else ()
        source = (*start, node.module) if node.module else start
        yield from (Import(".".join((*source, alias.name)), node.lineno, runs_on_import) for alias in node.names)
    elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for statement in node.body:
            yield from _walk(statement, folder, runs_on_import=False)
        for statement in node.orelse:
            yield from _walk(statement, folder, runs_on_import)
    else:
        inside_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from _walk(child, folder, runs_on_import and not inside_function)


def violations(package: Path) -> list[str]:
    """Every broken rule of the package, as `file:line: what is wrong`."""
    files = sorted(path for path in package.rglob("*.py"))
    stages = {path.stem for path in package.glob("*.py")} - set(FRONT_DOORS)
    found = []
    for path in files:
        place = path.relative_to(package)
        room = place.parts[0].removesuffix(".py")
        if len(place.parts) > 1 and room not in FOLDERS:
            found.append(f"{place}: {room}/ is not a folder of the kit")
            continue
        for imported in imports_of(path, package):
            problem = _problem(place, room, imported, stages)
            if problem:
                found.append(f"{place}:{imported.line}: {problem}")
    return found


def _problem(place: Path, room: str, imported: Import, stages: set[str]) -> str | None:
    top, *rest = imported.name.split(".")
    if top == "alignkit" and rest:
        return _kit_problem(room, rest[0], stages)
    if top in HEAVY and imported.runs_on_import and (room not in FOLDERS or room in LIGHT_FOLDERS):
        return f"{top} is imported when the module is; import it inside the function that needs it"
    if place == Path("core", "app.py") or imported.name == "omegaconf.MISSING":
        return None
    if top in ("hydra", "omegaconf"):
        return f"{top} is imported outside core/app.py"
    return None


def _kit_problem(room: str, target: str, stages: set[str]) -> str | None:
    """What is wrong with `room` importing `alignkit.<target>`."""
    if target in stages:
        return None if target == room else f"{room} imports the stage {target}; stages meet on disk"
    if target == "__version__":
        return None
    if target not in FOLDERS:
        return f"alignkit.{target} is not a folder of the kit; import the name from where it is defined"
    if room in FOLDERS and FOLDERS.index(target) > FOLDERS.index(room):
        return f"{room} imports {target}, which comes after it"
    return None


def test_the_package_keeps_its_layers() -> None:
    assert (PACKAGE / "__init__.py").is_file()
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("data/chat.py", "from alignkit.models import loading", "data imports models, which comes after it"),
        ("data/chat.py", "def f():\n    import alignkit.models.loading", "data imports models"),
        ("data/sources/faq.py", "from ...training import sft", "data imports training"),
        ("data/chat.py", "from alignkit import sft", "data imports the stage sft"),
        ("data/chat.py", "from alignkit import RewardModel", "import the name from where it is defined"),
        ("dpo.py", "def run():\n    from alignkit.sft import run", "dpo imports the stage sft"),
        ("dpo.py", "from . import sft", "dpo imports the stage sft"),
        ("__main__.py", "import alignkit.sft", "__main__ imports the stage sft"),
        ("dpo.py", "import torch", "torch is imported when the module is"),
        ("core/config.py", "class C:\n    import torch.nn", "torch is imported when the module is"),
        ("teacher/client.py", "if True:\n    from trl import DPOTrainer", "trl is imported when the module is"),
        ("dpo.py", "def run():\n    import hydra", "hydra is imported outside core/app.py"),
        ("core/config.py", "from omegaconf import OmegaConf", "omegaconf is imported outside core/app.py"),
        ("helpers/text.py", "", "helpers/ is not a folder of the kit"),
    ],
)
def test_a_broken_layer_is_found(tmp_path: Path, file: str, source: str, problem: str) -> None:
    package = _package(tmp_path, {"sft.py": "", "models/loading.py": "", "training/sft.py": "", file: source})
    found = violations(package)
    assert len(found) == 1
    assert found[0].startswith(file)
    assert problem in found[0]


def test_what_is_allowed_stays_allowed(tmp_path: Path) -> None:
    package = _package(
        tmp_path,
        {
            "sft.py": "from alignkit.core.config import C\ndef run():\n    import torch\n    import alignkit.training",
            "core/config.py": "from omegaconf import MISSING\nfrom alignkit import __version__",
            "core/app.py": "import hydra\nfrom omegaconf import OmegaConf",
            "data/chat.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor",
            "models/loading.py": "import torch\nfrom alignkit.data import chat\nfrom . import memory",
        },
    )
    assert violations(package) == []


def test_importing_stages_and_light_folders_loads_nothing_heavy() -> None:
    files = [path for path in PACKAGE.glob("*.py") if path.stem not in FRONT_DOORS]
    files += [path for folder in LIGHT_FOLDERS for path in (PACKAGE / folder).rglob("*.py")]
    modules = ["alignkit", *(_module_name(path) for path in files)]
    program = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, *modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert HEAVY.isdisjoint(done.stdout.split())


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def _package(parent: Path, sources: dict[str, str]) -> Path:
    """Write a package of that name and those files, and return its folder."""
    package = parent / "alignkit"
    for name, source in {"__init__.py": "", **sources}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return package
