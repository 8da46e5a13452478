"""Tests run offline, on one thread, in a home of their own, and report to nobody."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

HOME = tempfile.mkdtemp(prefix="home-of-tests-")
os.environ["HF_HOME"] = HOME  # nothing of the user's is read or written
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["OMP_NUM_THREADS"] = "1"  # or accelerate lets each of several processes have as many as there are cores
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"  # of the Hub that the tests run: Xet has servers of its own
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
os.environ["HF_TOKEN"] = ""

import pytest  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        return  # pytest-xdist's own process runs no test, and need not import all this
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def pytest_unconfigure() -> None:
    shutil.rmtree(HOME, ignore_errors=True)


def freeze() -> None:
    """Have what is there left out of garbage collection: what is imported stays, and each training collects anew."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    if nextitem is None or nextitem.path != item.path:  # its fixtures are gone, what it imported is not
        freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    freeze()

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not by a keyword: a folder of that name is one
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
