"""What the modules may import, checked over their syntax trees, and a few limits on what they are."""

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest

import hf_rrd

PACKAGE = Path(hf_rrd.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

# In order: a module imports only from those above it.
ALLOWED: dict[str, set[str]] = {
    "losses": set(),
    "batch_losses": set(),
    "feature_bank": set(),
    "pooling": set(),
    "alignment": set(),
    "finite": set(),
    "reliability": set(),
    "embedding_log": {"alignment"},
    "presentation": set(),
    "objective": {"batch_losses", "losses", "feature_bank"},
    "terms": {"objective"},
    "body": {"pooling"},
    "errors": set(),
    "data": {"body", "errors"},
    "student": {"body"},
    "teacher": {"body", "data", "errors"},
    "calibration": {"data", "feature_bank", "teacher"},
    "identity": {"body", "data", "errors"},
    "caching": {"body", "calibration", "data", "identity", "teacher"},
    "initialization": set(),
    "checkpoint": set(),
    "comparison": {"checkpoint", "feature_bank", "student", "teacher"},
    "distributed": {"teacher"},
    "config": {"batch_losses", "objective", "pooling", "student", "teacher"},
    "export": {"body", "errors", "student"},
    "plots": {"reliability"},
    "report": {
        "alignment",
        "body",
        "calibration",
        "data",
        "embedding_log",
        "errors",
        "presentation",
        "reliability",
        "student",
    },
    "run_facts": {"body", "config", "objective", "report", "teacher", "terms"},
    "model_card": {"presentation", "run_facts"},
    "hub": set(),
    "publishing": {"data", "hub", "model_card", "plots", "report", "run_facts"},
    "trainer": {
        "body",
        "calibration",
        "checkpoint",
        "comparison",
        "config",
        "data",
        "distributed",
        "embedding_log",
        "errors",
        "feature_bank",
        "finite",
        "identity",
        "objective",
        "publishing",
        "student",
        "teacher",
        "terms",
    },
}
PURE_TORCH = [
    *("losses", "batch_losses", "feature_bank", "pooling", "alignment", "finite", "objective", "terms"),
    *("reliability", "embedding_log", "presentation"),
]


def source_of(module: str) -> str:
    return (PACKAGE / f"{module}.py").read_text(encoding="utf-8")


def imports_of(source: str) -> set[str]:
    """All that a source imports, wherever in it: `a.b` for both `import a.b` and `from a import b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = "hf_rrd" if node.level else ""  # the package is flat
            module = ".".join(part for part in (prefix, node.module) if part)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def own_imports_of(source: str) -> set[str]:
    """The modules of ours among them; a name taken from the package itself counts as one."""
    return {
        name.split(".")[1] if "." in name else name for name in imports_of(source) if name.split(".")[0] == "hf_rrd"
    }


def test_the_table_has_every_module_and_no_other() -> None:
    assert sorted(ALLOWED) == MODULES


def test_the_table_is_one_way() -> None:
    above: set[str] = set()
    for module, allowed in ALLOWED.items():
        assert allowed - above == set(), f"{module} may not import what stands below it"
        above.add(module)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_the_table_allows(module: str) -> None:
    assert own_imports_of(source_of(module)) - ALLOWED.get(module, set()) == set()


@pytest.mark.parametrize(
    "source",
    [
        "import hf_rrd.trainer",
        "from hf_rrd.trainer import log",
        "from hf_rrd import trainer",
        "def late():\n    from hf_rrd.trainer import log",
        "from .trainer import log",
        "from . import trainer",
    ],
)
def test_every_form_of_an_import_is_seen(source: str) -> None:
    assert own_imports_of(source) == {"trainer"}


@pytest.mark.parametrize("module", PURE_TORCH)
def test_a_pure_torch_module_imports_torch_and_the_standard_library_alone(module: str) -> None:
    packages = {name.split(".")[0] for name in imports_of(source_of(module))}
    assert packages - {"torch", "hf_rrd"} - sys.stdlib_module_names == set()
    assert ALLOWED[module] <= set(PURE_TORCH)


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_no_module_reads_or_writes_pickles(module: str) -> None:
    packages = {name.split(".")[0] for name in imports_of(source_of(module))}
    assert packages & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"} == set()


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_no_module_calls_what_would_unpickle(module: str) -> None:
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(source_of(module))) if isinstance(node, ast.Call)]
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


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_no_module_trusts_remote_code_of_itself(module: str) -> None:
    assert re.findall(r"trust_remote_code[\"']?\s*[=:]\s*True", source_of(module)) == []


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_a_module_has_at_most_600_lines(module: str) -> None:
    assert len(source_of(module).splitlines()) <= 600


@pytest.mark.parametrize("name", sorted(hf_rrd.__all__))
def test_a_public_name_has_a_docstring_of_its_own_of_3_lines_or_more(name: str) -> None:
    public = getattr(hf_rrd, name)
    documentation = inspect.cleandoc(public.__doc__ or "")
    assert len(documentation.splitlines()) >= 3
    assert not documentation.startswith(f"{name}("), "a dataclass without a docstring gets its signature as one"


def test_the_public_names_are_sorted_and_each_once() -> None:
    assert list(hf_rrd.__all__) == sorted(set(hf_rrd.__all__))
