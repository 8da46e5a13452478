"""What the modules may import, checked over their syntax trees, and a few limits on what they are."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Trainer

import hf_rrd

PACKAGE = Path(hf_rrd.__file__).parent
ROOT = PACKAGE.parent

# The rooms of the package, modules and folders: a module imports from the rooms of its row, and from its own.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "losses": set(),
    "models": {"errors", "files", "losses"},
    "training": {"errors", "files", "losses", "models"},
    "config": {"errors", "files", "losses", "models", "training"},
    "results": {"errors", "files", "losses", "models", "training", "config"},
    "trainer": {"errors", "files", "losses", "models", "training", "config", "results"},
    "__init__": {"errors", "files", "losses", "models", "training", "config", "results", "trainer"},
    "__main__": {"errors", "files", "losses", "models", "training", "config", "results", "trainer", "__init__"},
}
# Rooms, and modules of others, that are of use in any loop: they know torch and the standard library alone.
PURE_TORCH = ("losses", "models.pooling", "training.finite", "results.alignment", "results.reliability")


def name_of(path: Path) -> str:
    """`losses.bank` of a file of the package; a folder's own module has the folder's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


SOURCES = {name_of(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = sorted(SOURCES)


def room_of(module: str) -> str:
    return module.split(".")[0]


def imports_of(source: str) -> set[str]:
    """All that a source imports, wherever in it: `a.b` for both `import a.b` and `from a import b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "ruff bans relative imports"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports_of(source: str) -> set[str]:
    """The modules of ours among them; a name that is taken from the package itself counts as `__init__`."""
    found = set()
    for name in imports_of(source):
        package, _, inside = name.partition(".")
        if package == "hf_rrd":
            parents = [inside.rsplit(".", cut)[0] for cut in range(inside.count(".") + 1)]
            found.add(next((module for module in parents if module in SOURCES), "__init__"))
    return found


def test_the_table_has_every_room_and_no_other() -> None:
    assert {room_of(module) for module in MODULES} == set(ALLOWED)


def test_the_top_level_has_at_most_nine_entries_and_a_command_line() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert len([name for name in entries if name != "__main__.py"]) <= 9, sorted(entries)


def test_the_table_is_one_way() -> None:
    above: set[str] = set()
    for room, allowed in ALLOWED.items():
        assert allowed - above == set(), f"{room} may not import what stands below it"
        above.add(room)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_the_rooms_that_the_table_allows(module: str) -> None:
    own = room_of(module)
    below = {name for name in own_imports_of(SOURCES[module]) if room_of(name) not in ALLOWED.get(own, set()) | {own}}
    assert below == set()


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: own_imports_of(source) - {module} for module, source in SOURCES.items()}
    while leaves := [module for module, imported in graph.items() if not imported & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert graph == {}, "these, or some of them, import each other in a circle"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import hf_rrd.trainer", "trainer"),
        ("from hf_rrd.trainer import log", "trainer"),
        ("from hf_rrd import trainer", "trainer"),
        ("def late():\n    from hf_rrd.trainer import log", "trainer"),
        ("if TYPE_CHECKING:\n    from hf_rrd.losses.bank import FeatureBank", "losses.bank"),
        ("from hf_rrd.losses import bank", "losses.bank"),
        ("import hf_rrd.losses.bank as b", "losses.bank"),
        ("import hf_rrd", "__init__"),
        ("from hf_rrd import FeatureBank", "__init__"),
    ],
)
def test_every_form_of_an_import_is_seen(source: str, found: str) -> None:
    assert own_imports_of(source) == {found}


@pytest.mark.parametrize("pure", PURE_TORCH)
def test_a_pure_torch_room_imports_torch_and_the_standard_library_alone(pure: str) -> None:
    modules = [module for module in MODULES if f"{module}.".startswith(f"{pure}.")]
    assert modules
    for module in modules:
        packages = {name.split(".")[0] for name in imports_of(SOURCES[module])}
        comes_with_torch = {"triton"} if module == "losses.kernels" else set()
        assert packages - {"torch", "hf_rrd"} - comes_with_torch - sys.stdlib_module_names == set(), module
        pure_ones = tuple(f"{each}." for each in PURE_TORCH)
        known = [name for name in own_imports_of(SOURCES[module]) if not f"{name}.".startswith(pure_ones)]
        assert known == [], module


@pytest.mark.parametrize("module", MODULES)
def test_no_module_reads_or_writes_pickles(module: str) -> None:
    packages = {name.split(".")[0] for name in imports_of(SOURCES[module])}
    assert packages & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"} == set()


@pytest.mark.parametrize("module", MODULES)
def test_no_module_calls_what_would_unpickle(module: str) -> None:
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(SOURCES[module])) if isinstance(node, ast.Call)]
    unsafe = (
        "torch.load",
        "torch.save",
        "np.load",
        "np.save",
        "numpy.load",
        "read_pickle",
        "to_pickle",
        "eval",
        "exec",
    )
    assert [call for call in calls if call in unsafe or call.endswith(("_pickle", ".load_sharded_checkpoint"))] == []


@pytest.mark.parametrize("module", MODULES)
def test_no_module_trusts_remote_code_of_itself(module: str) -> None:
    assert re.findall(r"trust_remote_code[\"']?\s*[=:]\s*True", SOURCES[module]) == []


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_at_most_400_lines_and_that_of_the_trainer_500(module: str) -> None:
    assert len(SOURCES[module].splitlines()) <= (500 if module == "trainer" else 400)


@pytest.mark.parametrize("name", sorted(hf_rrd.__all__))
def test_a_public_name_has_a_docstring_of_its_own_of_3_lines_or_more(name: str) -> None:
    public = getattr(hf_rrd, name)
    documentation = inspect.cleandoc(public.__doc__ or "")
    assert len(documentation.splitlines()) >= 3
    assert not documentation.startswith(f"{name}("), "a dataclass without a docstring gets its signature as one"


def test_the_public_names_are_sorted_and_each_once() -> None:
    assert list(hf_rrd.__all__) == sorted(set(hf_rrd.__all__))


# ---- Names of test files ----

ABOUT_THE_REPOSITORY = {"architecture", "documentation", "packaging"}


def subjects_of(folder: Path) -> set[str]:
    """What the test files of a folder may be named for: modules of the room, or scripts and folders of examples."""
    if folder == ROOT / "tests":
        return {module for module in MODULES if "." not in module} | ABOUT_THE_REPOSITORY
    if folder == ROOT / "tests" / "examples":
        scripts = [*(ROOT / "examples").glob("*.py"), *(ROOT / "examples" / "benchmarks").glob("*.py")]
        folders = [path for path in (ROOT / "examples").iterdir() if path.is_dir()]
        return {path.stem for path in [*scripts, *folders, ROOT / "examples"]}
    return {module.split(".")[1] for module in MODULES if module.startswith(f"{folder.name}.")}


@pytest.mark.parametrize("path", sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")))
def test_a_test_file_has_the_name_of_the_module_whose_facts_it_states(path: str) -> None:
    name = Path(path).stem.removeprefix("test_")
    subjects = subjects_of((ROOT / path).parent)
    assert any(f"{name}_".startswith(f"{subject}_") for subject in subjects), f"none of {sorted(subjects)}"


# ---- Types ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("self.distilation.resett()", 'has no attribute "distilation"'),
        ("self.train(resume_from_checkpont=True)", 'Unexpected keyword argument "resume_from_checkpont"'),
        ("self.args.relational_wait", 'has no attribute "relational_wait"'),
    ],
)
def test_mypy_sees_a_mistake_in_the_trainers_class(mistake: str, message: str, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    shutil.copytree(PACKAGE, tmp_path / "hf_rrd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    trainer = tmp_path / "hf_rrd" / "trainer.py"
    source = trainer.read_text(encoding="utf-8")
    methods = [
        node
        for each in ast.parse(source).body
        if isinstance(each, ast.ClassDef) and each.name == "RelationalDistillationTrainer"
        for node in each.body
        if isinstance(node, ast.FunctionDef) and node.name == "compute_loss"
    ]
    lines = source.splitlines()
    lines.insert(methods[0].body[-1].lineno - 1, f"        {mistake}")
    trainer.write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(ROOT / ".mypy_cache")]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert message in printed


# ---- The trainer's class ----


def overridden() -> set[str]:
    """The methods of the Trainer that ours overrides."""
    ours, theirs = vars(hf_rrd.RelationalDistillationTrainer), dir(Trainer)
    return {name for name, value in ours.items() if name in theirs and inspect.isfunction(value)}


def test_the_trainer_overrides_few_methods_and_of_the_private_ones_those_of_checkpoints_and_pushes() -> None:
    assert len(overridden()) <= 16
    private = {name for name in overridden() if name.startswith("_") and not name.startswith("__")}
    checkpoints = {"_save_checkpoint", "_save_rng_state", "_load_from_checkpoint", "_load_best_model"}
    assert private == checkpoints | {"_push_from_checkpoint"}


def test_the_trainers_class_has_at_most_400_lines() -> None:
    assert len(inspect.getsource(hf_rrd.RelationalDistillationTrainer).splitlines()) <= 400
