"""What the package says it needs is what it imports, and what the tests run on."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import hf_rrd

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
    found -= {"hf_rrd", "triton", *sys.stdlib_module_names}  # torch for CUDA brings Triton
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


# ---- A release ----


def workflow(name: str) -> Any:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))


def test_there_is_one_version_and_the_changelog_begins_with_it() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    sections = re.findall(r"^## \[(.+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation["version"] == sections[0][0] == hf_rrd.__version__
    assert all(re.fullmatch(r"Unreleased|\d{4}-\d\d-\d\d", date) for _, date in sections)


def test_the_workflows_run_each_python_of_the_classifiers(project: Any) -> None:
    said = re.findall(r"Python :: (3\.\d+)", "\n".join(project["project"]["classifiers"]))
    jobs = workflow("tests")["jobs"]
    newest = jobs["newest"]["strategy"]["matrix"]["python-version"]
    oldest = [step["with"]["python-version"] for step in jobs["oldest"]["steps"] if "with" in step]
    assert oldest + newest == said


def test_the_workflows_run_targets_of_the_makefile_and_have_no_rights_but_to_read() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    called = []
    for file in (ROOT / ".github" / "workflows").iterdir():
        jobs = workflow(file.stem)
        assert jobs["permissions"] == {"contents": "read"}, "what a job needs beside it asks for itself"
        steps = [step for job in jobs["jobs"].values() for step in job["steps"]]
        called += [step["run"].removeprefix("make ") for step in steps if step.get("run", "").startswith("make ")]
    assert set(called) == {"check", "docs", "test", "test-oldest", "test-slow", "package"} <= set(targets)


def test_a_release_is_published_by_a_trusted_publisher_after_its_wheel_was_tried() -> None:
    release = workflow("release")
    assert release[True] == {"push": {"tags": ["v*"]}}  # `on`, as YAML reads it
    publish, text = release["jobs"]["publish"], (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert publish["needs"] == "build" and publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in text and "password" not in text


def test_the_templates_ask_for_what_env_prints() -> None:
    forms = ROOT / ".github" / "ISSUE_TEMPLATE"
    bug = yaml.safe_load((forms / "bug_report.yml").read_text(encoding="utf-8"))
    asked = {field["id"]: field for field in bug["body"]}
    assert "`python -m hf_rrd env`" in asked["env"]["attributes"]["description"]
    assert [name for name, field in asked.items() if field.get("validations")] == ["what", "code", "env"]
    for file in (forms / "feature_request.yml", ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md"):
        assert "`python -m hf_rrd env`" in file.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_wheel_trains_and_writes_a_card_where_the_repository_is_not(tmp_path: Path) -> None:
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    twine = pytest.importorskip("twine.commands.check")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    wheel, archive = (str(next((tmp_path / "dist").glob(f"*{kind}"))) for kind in (".whl", ".tar.gz"))
    assert not twine.check([archive, wheel], strict=True)
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    of_ours = {str(path.relative_to(ROOT)) for path in (ROOT / "hf_rrd").rglob("*") if path.is_file()}
    assert held == {name for name in of_ours if "__pycache__" not in name}, "no tests, no examples"

    # Our dependencies and not this repository: the .pth files of a path that a .pth file adds are not read.
    venv.create(tmp_path / "empty", with_pip=False)
    (packages,) = (tmp_path / "empty" / "lib").glob("python3*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python, install = str(tmp_path / "empty" / "bin" / "python"), ["-m", "pip", "install", "--no-deps", "--no-index"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    how: dict[str, Any] = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    for command in ([*install, "--ignore-installed", wheel], ["-c", TRAIN], ["-m", "hf_rrd", "env"]):
        done = subprocess.run([python, *command], **how)
        assert done.returncode == 0, done.stderr
    assert f"- hf_rrd: {hf_rrd.__version__}\n" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "distilled from a `ViTForImageClassification`" in (tmp_path / "out" / "README.md").read_text()


TRAIN = """
import sys, torch, hf_rrd
from transformers import ViTConfig, ViTForImageClassification
assert hf_rrd.__file__.startswith(sys.prefix), hf_rrd.__file__
size = dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8)
size |= dict(num_labels=4)
student, teacher = (ViTForImageClassification(ViTConfig(hidden_size=width, **size)) for width in (16, 24))
rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": number % 4} for number in range(32)]
args = hf_rrd.RelationalDistillationConfig("out", max_steps=2, report_to=[], save_strategy="no", use_cpu=True)
trainer = hf_rrd.RelationalDistillationTrainer(student, args, train_dataset=rows, teacher=teacher)
trainer.train(), trainer.save_model(), trainer.report(rows), trainer.create_model_card()
"""
