"""setup.py declares every package that the library imports, and every file that it reads."""

import ast
import sys
from pathlib import Path

import pytest

from hf_jacobi.cli import EXTRA_OF, EXTRAS


ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "hf_jacobi"
DISTRIBUTIONS = {"yaml": "pyyaml"}  # where it differs from the module's name


def declared() -> dict[str, list[str]]:
    """The requirements of setup.py: by extra, and under `""` those of every installation."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    values = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS":
            values = ast.literal_eval(node.value)
    return values | {"": argument("install_requires")}


def argument(name: str):
    """The value of an argument of `setup`."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == name)
    return ast.literal_eval(next(found).value)


def name_of(requirement: str) -> str:
    return requirement.replace("_", "-").translate(dict.fromkeys(map(ord, "<>=!~;[ "), "|")).partition("|")[0].lower()


def imported(files) -> set[str]:
    """The distributions of the modules that these files import, except the standard library and the package."""
    modules = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.partition(".")[0])
    modules -= {*sys.stdlib_module_names, "hf_jacobi"}
    return {DISTRIBUTIONS.get(module, module.replace("_", "-")) for module in modules}


def test_whatever_is_imported_is_declared():
    found = imported(SOURCE.rglob("*.py"))
    assert {"torch", "pyyaml", "lm-eval"} <= found
    for_users = {extra: names for extra, names in declared().items() if extra not in ("test", "dev", "docs")}
    assert found <= {name_of(requirement) for names in for_users.values() for requirement in names}


@pytest.mark.parametrize(
    ("room", "extras"),
    [("decoding", ["flash"]), ("trajectories", ["train"]), ("training", ["train"]), ("serving", ["serve", "vllm"])],
)
def test_an_extra_has_what_its_room_imports(room, extras):
    names = [requirement for extra in ["", *extras] for requirement in declared()[extra]]
    assert imported((SOURCE / room).rglob("*.py")) <= set(map(name_of, names))


def test_the_wheel_has_every_file_of_the_package():
    """An editable installation hides a missing one."""
    packages = {path.parent for path in SOURCE.rglob("__init__.py")}
    patterns = argument("package_data")["hf_jacobi"]
    modules = {path for package in packages for path in package.glob("*.py")}
    files = {path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    others = [path.relative_to(SOURCE) for path in files - modules]
    assert Path("hub/card.md.jinja") in others
    assert not [path for path in others if not any(path.match(pattern) for pattern in patterns)]


def test_the_command_line_knows_what_the_extras_install():
    for extra, modules in EXTRAS.items():
        known = {module.replace("_", "-") for module in modules}
        assert known == set(map(name_of, declared()[extra]))
    assert declared().keys() - {"", "test", "docs", "dev"} == EXTRAS.keys() >= set(EXTRA_OF.values())
