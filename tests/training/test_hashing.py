"""Code has another hash when it, or what it refers to, is another."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from hf_rrd.training.hashing import hash_of

BELOW = """
CONSTANT = 1
def helper(x): return x * 2
"""
ABOVE = """
import functools, random, threading
import below
SIZE = 3
TABLE = {"a": {1, 2}, "b": frozenset(["x", "y", "z"])}
LOCK = threading.Lock()
RANDOM = random.Random(0)
def inner(x): return x + SIZE
def recursive(n): return recursive(n - 1) if n else 0
@functools.lru_cache(None)
def memory(x): return inner(x)
def transform(x, by=1):
    if x in {"p", "q", "r"}: return RANDOM.random()
    with LOCK:
        return memory(x) + by + below.CONSTANT + TABLE["a"] + recursive(2)
def late(x):
    import below as module
    return module.helper(x)
def outer(y):
    return lambda x: x + y
closure = outer(2)
class Base:
    def go(self, x): return x
class Augment(Base):
    scale = 2
    def __init__(self): self.size, self.lock = 1, threading.Lock()
    def __call__(self, x): return self.go(x) * self.size
    @property
    def name(self): return "three"
    @staticmethod
    def still(x): return "four"
"""
THINGS: dict[str, Callable[[Any], Any]] = {
    "transform": lambda module: module.transform,
    "partial": lambda module: functools.partial(module.transform, by=2),
    "recursive": lambda module: module.recursive,
    "late": lambda module: module.late,
    "closure": lambda module: module.closure,
    "object": lambda module: module.Augment(),
    "bound method": lambda module: module.Augment().__call__,
    "class": lambda module: module.Augment,
}


def loaded(above: str = ABOVE, below: str = BELOW, folder: str = "/home/somebody") -> Any:
    """Two modules of somebody's own."""
    for name, source in (("below", below), ("above", above)):
        module = ModuleType(name)
        module.__file__ = f"{folder}/{name}.py"
        sys.modules[name] = module
        exec(compile(source, module.__file__, "exec"), module.__dict__)
    return sys.modules["above"]


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("above", "below"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))


def hashes(**sources: str) -> dict[str, str]:
    module = loaded(**sources)
    return {name: hash_of(thing(module)) for name, thing in THINGS.items()}


FUNCTIONS, OBJECTS = {"transform", "partial"}, {"object", "bound method", "class"}


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("import functools", "# a comment\nimport functools", set()),
        ("SIZE = 3", "SIZE = 4", FUNCTIONS),
        ("x + SIZE", "x - SIZE", FUNCTIONS),
        ("{1, 2}", "{1, 3}", FUNCTIONS),
        ('"y"', '"w"', FUNCTIONS),
        ('"q"', '"s"', FUNCTIONS),
        ("by=1", "by=7", {"transform", "partial"}),
        ("recursive(n - 1)", "recursive(n - 2)", {*FUNCTIONS, "recursive"}),
        ("outer(2)", "outer(3)", {"closure"}),
        ("go(self, x): return x", "go(self, x): return -x", OBJECTS),
        ("scale = 2", "scale = 3", OBJECTS),
        ("three", "3", OBJECTS),
        ("four", "4", OBJECTS),
        ("= 1, threading", "= 2, threading", {*OBJECTS}),
    ],
)
def test_an_edit_changes_what_is_made_of_it_and_nothing_else(old: str, new: str, changed: set[str]) -> None:
    before, after = hashes(), hashes(above=ABOVE.replace(old, new))
    assert {name for name in THINGS if before[name] != after[name]} == changed


def test_a_module_further_down_counts_as_far_as_it_is_used() -> None:
    before = hashes()
    for old, new, changed in (("= 1", "= 2", FUNCTIONS), ("x * 2", "x * 3", {"late"})):
        after = hashes(below=BELOW.replace(old, new))
        assert {name for name in THINGS if before[name] != after[name]} == changed


@pytest.mark.parametrize(
    "folder", ["/home/somebody/.local/lib/python3/site-packages", "/usr/lib/python3/dist-packages"]
)
def test_an_installed_module_counts_by_the_names_in_it(folder: str) -> None:
    before = hashes(folder=folder)
    after = hashes(folder=folder, above=ABOVE.replace("SIZE = 3", "SIZE = 4").replace("scale = 2", "scale = 3"))
    assert before == after


def test_a_long_chain_of_calls_has_the_same_hash_at_any_depth_of_the_stack() -> None:
    source = "def f0(x): return x\n" + "".join(f"def f{n}(x): return f{n - 1}(x)\n" for n in range(1, 500))

    def hashed_below(depth: int, above: str) -> str:
        return hashed_below(depth - 1, above) if depth else hash_of(loaded(above=above).f499)

    assert hashed_below(0, source) == hashed_below(300, source)
    assert hashed_below(0, source) != hashed_below(0, source.replace("f0(x): return x", "f0(x): return -x"))


def test_globals_and_attributes_count_as_they_are_now() -> None:
    module = loaded()
    augment = module.Augment()
    first = hash_of(module.transform, augment.__call__)
    module.SIZE = 4
    second = hash_of(module.transform, augment.__call__)
    augment.size = 9
    assert len({first, second, hash_of(module.transform, augment.__call__)}) == 3


def test_two_lambdas_are_two_and_one_twice_is_one() -> None:
    assert hash_of(lambda x: x[0]) == hash_of(lambda x: x[0]) != hash_of(lambda x: x[1])


def test_a_function_of_no_module_counts_by_its_code() -> None:
    first, second = (loaded(above=f"def use(x): return x + {number}").use for number in (1, 2))
    first.__module__ = second.__module__ = None
    assert hash_of(first) != hash_of(second)


def test_what_packages_bring_counts_by_its_name() -> None:
    assert hash_of(torch.nn.Linear) == hash_of(torch.nn.Linear) != hash_of(torch.nn.Conv1d)
    assert hash_of(torch.nn.functional.gelu) != hash_of(torch.nn.functional.relu)


def test_generators_of_random_numbers_count_by_their_type() -> None:
    for make in (np.random.default_rng, lambda seed: torch.Generator().manual_seed(seed)):
        assert hash_of(make(0)) == hash_of(make(1))


@pytest.mark.slow
def test_the_hash_is_the_same_in_other_processes(tmp_path: Path) -> None:
    for name, source in (("above", ABOVE), ("below", BELOW)):
        (tmp_path / f"{name}.py").write_text(source)
    script = (
        "import above; from hf_rrd.training.hashing import hash_of; print(hash_of(above.transform, above.Augment()))"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    printed = {
        subprocess.check_output(
            [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": seed}
        )
        for seed in "123"
    }
    module = loaded()
    assert printed == {f"{hash_of(module.transform, module.Augment())}\n".encode()}
