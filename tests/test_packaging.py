"""What the package says it needs is what it imports, and what the tests run on."""

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
# Imported names whose distribution has another name.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml", "onnx_ir": "onnxscript"}
# Imported only where somebody else has imported them: nobody need install them for this package.
GUESTS = {"deepspeed"}


@pytest.fixture(scope="module")
def project() -> Any:
    tomllib = pytest.importorskip("tomllib", reason="in Python 3.11 and newer")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def name_of(requirement: str) -> str:
    return re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0].lower().replace("-", "_")


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {name_of(line): line.split("==")[1] for line in lines if "==" in line}


def imported(late: bool) -> set[str]:
    """The distributions that the package imports: as a module is imported, or later, within functions."""
    found = set()
    for path in (ROOT / "hf_rrd").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree) if late else ast.iter_child_nodes(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").split(".")[0])
    found -= {"hf_rrd", *sys.stdlib_module_names}
    return {name_of(DISTRIBUTIONS.get(name, name)) for name in found}


def test_what_is_imported_with_the_package_is_a_dependency(project: Any) -> None:
    declared = {name_of(each) for each in project["project"]["dependencies"]}
    assert imported(late=False) - declared == set()


def test_what_is_imported_later_is_a_dependency_or_in_an_extra(project: Any) -> None:
    extras = [each for group in project["project"]["optional-dependencies"].values() for each in group]
    declared = {name_of(each) for each in [*project["project"]["dependencies"], *extras]}
    assert imported(late=True) - declared - GUESTS == set()


def test_both_constraints_pin_all_that_is_installed_by_name(project: Any) -> None:
    extras = project["project"]["optional-dependencies"]
    named = {name_of(each) for group in extras.values() for each in group}
    named |= {name_of(each) for each in project["project"]["dependencies"]}
    of_newest_alone = {name_of(each) for each in [*extras["onnx"], *extras["docs"]]} - {"torch", "transformers"}
    assert named - {"hf_rrd"} - pins("constraints.txt").keys() == set()
    assert named - {"hf_rrd"} - of_newest_alone - pins("constraints-oldest.txt").keys() == set()


@pytest.mark.parametrize("name", ["transformers", "accelerate", "datasets", "huggingface_hub"])
def test_a_lower_bound_is_what_the_oldest_run_has(name: str, project: Any) -> None:
    (requirement,) = [each for each in project["project"]["dependencies"] if name_of(each) == name]
    lower = re.search(r">=([\d.]+)", requirement)
    assert lower is not None
    oldest = pins("constraints-oldest.txt")[name]
    assert oldest == lower[1] or oldest.startswith(f"{lower[1]}.")


def test_the_oldest_python_is_the_one_that_is_linted_and_typed_for(project: Any) -> None:
    said = re.findall(r"Python :: (3\.\d+)", "\n".join(project["project"]["classifiers"]))
    assert said == sorted(said, key=lambda version: int(version.split(".")[1])) != []
    assert project["project"]["requires-python"] == f">={said[0]}"
    assert project["tool"]["ruff"]["target-version"] == f"py{said[0].replace('.', '')}"
    assert project["tool"]["mypy"]["python_version"] == said[0]


def test_the_hooks_have_the_pinned_versions_and_environments_of_their_own() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    newest = pins("constraints.txt")
    for repository in config["repos"]:
        for hook in repository["hooks"]:
            assert repository["repo"] == "local" and hook["language"] == "python"
            assert hook["additional_dependencies"]
            for requirement in hook["additional_dependencies"]:
                assert requirement.split("==") == [name_of(requirement), newest[name_of(requirement)]]
            assert name_of(hook["entry"]) in {name_of(each) for each in hook["additional_dependencies"]}
