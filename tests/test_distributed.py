"""Two real processes do what one does."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.builders import free_port
from tests.distributed_worker import run


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What one process ends with, and each of two."""
    folder = tmp_path_factory.mktemp("distributed")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.resume_worker", "tests.distributed_worker"])
    port = free_port()
    for processes in (1, 2):
        children = [
            context.Process(target=run, args=(rank, processes, port, str(folder))) for rank in range(processes)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(timeout=120)
        assert [child.exitcode for child in children] == [0] * processes
    return {path.stem: load_file(path) for path in Path(folder).glob("rank-*")}


def test_two_processes_end_bitwise_equal_to_each_other(results: dict[str, dict[str, Tensor]]) -> None:
    first, second = results["rank-0-of-2"], results["rank-1-of-2"]
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_two_processes_train_the_student_that_one_trains(results: dict[str, dict[str, Tensor]]) -> None:
    one, two = results["rank-0-of-1"], results["rank-0-of-2"]
    assert (one["student"] - two["student"]).abs().max() < 1e-5
    assert (one["log"] - two["log"]).abs().max() < 1e-4
    assert (one["eval"] - two["eval"]).abs().max() < 1e-4


def test_the_bank_holds_the_rows_of_all_processes(results: dict[str, dict[str, Tensor]]) -> None:
    one, two = results["rank-0-of-1"]["bank"], results["rank-0-of-2"]["bank"]
    assert one.shape == two.shape == (48, 20)  # 3 steps of 16, each in another order
    in_order = [rows[rows[:, 0].argsort()] for rows in (one, two)]
    assert (in_order[0] - in_order[1]).abs().max() < 1e-6
