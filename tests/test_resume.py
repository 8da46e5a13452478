"""A killed run, resumed, ends as if nothing had happened."""

import json
import multiprocessing
import random
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_rrd.checkpoint import SIDECAR, last_complete_checkpoint
from tests.resume_worker import STEPS, run

KILLS = 10


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Children that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.resume_worker"])
    return context


def train(
    processes: ForkServerContext, family: str, folder: Path, kill_at: int | None = None, delay: float = 0
) -> int:
    """Train in a child process, to the end or until a SIGKILL some time after a step began; returns its exit code."""
    step = processes.Value("i", -1)
    child = processes.Process(target=run, args=(family, str(folder), step))
    child.start()
    while child.is_alive() and kill_at is not None:
        if step.value >= kill_at:
            time.sleep(delay)
            child.kill()
            break
        time.sleep(0.0005)
    child.join()
    assert child.exitcode is not None
    return child.exitcode


@pytest.fixture(scope="module")
def undisturbed(processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) for family in ("vit", "bert")}
    for family, folder in folders.items():
        assert train(processes, family, folder) == 0
    return folders


@pytest.mark.parametrize("kill", range(KILLS))
@pytest.mark.parametrize("family", ["vit", "bert"])
def test_a_run_killed_at_a_random_moment_ends_bitwise_as_the_undisturbed_one(
    processes: ForkServerContext, undisturbed: dict[str, Path], tmp_path: Path, family: str, kill: int
) -> None:
    chance = random.Random(f"{family} {kill}")
    kill_at = chance.randrange(STEPS - 3)  # so that it falls before the end, however fast the machine
    assert train(processes, family, tmp_path, kill_at, delay=chance.uniform(0, 0.02)) == -9
    assert train(processes, family, tmp_path) == 0

    expected, found = (load_file(folder / "left.safetensors") for folder in (undisturbed[family], tmp_path))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert json.loads((tmp_path / "log.json").read_text()) == json.loads(
        (undisturbed[family] / "log.json").read_text()
    )


def test_the_undisturbed_run_logs_across_checkpoints(undisturbed: dict[str, Path]) -> None:
    lines = json.loads((undisturbed["vit"] / "log.json").read_text())
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    checkpoint = last_complete_checkpoint(str(undisturbed["vit"]))
    assert checkpoint is not None
    sidecar = load_file(Path(checkpoint, SIDECAR))
    assert sidecar["bank.rows"].shape == (20, 24)  # 14 steps of 8 went through a bank of 20
    assert int(sidecar["log.last_logged_step"]) == 12
