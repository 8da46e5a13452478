"""A hash of functions and classes by what they do, so that an edited one is another one."""

import hashlib
import os
import random
import sys
import sysconfig
import warnings
from functools import lru_cache
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets.utils._dill import Pickler

_PYTHON = os.path.join(os.path.realpath(sysconfig.get_path("stdlib")), "")
_CACHED: Any = type(lru_cache(len))
_RANDOM = (random.Random, np.random.RandomState, np.random.Generator, torch.Generator)


def hash_of(*things: Any) -> str:
    """Of objects by their state; of functions and classes that no installed package brings by their code.

    With the code goes what it refers to, as it is now: globals, closures, defaults, the objects of bound methods. What
    cannot be pickled, and generators of random numbers, count by their type alone.
    """
    digest = hashlib.sha256()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dill, about what it could not load again
        pickler = _Pickler(SimpleNamespace(write=digest.update), recurse=True)
        pickler.found = []
        pickler.dump(things)
        for own in pickler.found:  # which grows meanwhile: one after the other, whatever calls whatever
            pickler.dump(_content_of(own))
    return digest.hexdigest()


class _Pickler(Pickler):
    """That of datasets, whose bytes are alike in all processes, with code by value. Nobody loads what it writes."""

    found: list[Any]  # functions and classes whose code counts

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        """Write an object, or what stands for it."""
        try:
            super().save(self._standing_for(obj), save_persistent_id)
        except Exception:
            super().save(f"some {type(obj).__qualname__}", save_persistent_id)

    def _standing_for(self, obj: Any) -> Any:
        obj = obj.__wrapped__ if isinstance(obj, _CACHED) else obj
        if isinstance(obj, _RANDOM):
            return type(obj).__qualname__
        if isinstance(obj, ModuleType):
            return obj.__name__
        if isinstance(obj, frozenset):  # whose order differs from process to process
            return sorted(obj, key=repr)
        if isinstance(obj, CodeType):
            return obj.co_code, obj.co_consts, obj.co_names
        if not isinstance(obj, FunctionType | type) or not _is_own(obj):
            return obj
        if not any(own is obj for own in self.found):
            self.found.append(obj)
        return "own", next(number for number, own in enumerate(self.found) if own is obj)


def _content_of(own: Any) -> Any:
    """What a class tells, or what a function does and refers to."""
    if isinstance(own, type):
        told = {name: value for name, value in vars(own).items() if callable(value) or not name.startswith("__")}
        return own.__qualname__, own.__bases__, told
    codes = [own.__code__]
    for code in codes:  # which grows meanwhile by the functions inside
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    names = {name for code in codes for name in code.co_names}
    found = {name: own.__globals__[name] for name in names & own.__globals__.keys()}
    found |= {name: sys.modules[name] for name in names & sys.modules.keys() - found.keys()}  # imported when it runs
    for _ in range(2):  # module.CONSTANT, package.module.CONSTANT
        mine = [value for value in found.values() if isinstance(value, ModuleType) and _is_own(value)]
        found |= {f"{each.__name__}.{name}": vars(each)[name] for each in mine for name in names & vars(each).keys()}
    return own.__code__, own.__defaults__, own.__kwdefaults__, own.__closure__, found


def _is_own(thing: Any) -> bool:
    """Whether a function, a class or a module is of a script, a notebook, or a module beside them."""
    name = thing.__name__ if isinstance(thing, ModuleType) else thing.__module__
    file: str | None = thing.__code__.co_filename if isinstance(thing, FunctionType) else "<"
    if file and file.startswith("<"):  # made by a decorator, or typed in
        file = getattr(sys.modules.get(name), "__file__", None)
    if name == "__main__" or file is None:
        return name not in sys.builtin_module_names
    file = os.path.realpath(file)
    installed = file.startswith(_PYTHON) or {"site-packages", "dist-packages"} & set(file.split(os.sep))
    return not installed and str(name).partition(".")[0] != "hf_rrd"
