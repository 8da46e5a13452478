"""A killed run, resumed, ends as if nothing had happened."""

import json
import random
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_rrd.training.checkpoint import SIDECAR, last_complete_checkpoint
from tests.processes import context, free_port
from tests.resume_worker import STEPS, run

needs_resume_of_several = pytest.mark.skipif(
    version("transformers").startswith("5.0."), reason="Trainer cannot resume several processes on a CPU there"
)

FAMILIES = ["vit", "bert", "the defaults"]
# Of each kind one is among the fast tests.
KILLS = [0, *(pytest.param(kill, marks=pytest.mark.slow) for kill in range(1, 10))]
PAIR_KILLS = [0, *(pytest.param(kill, marks=pytest.mark.slow) for kill in range(1, 4))]


@dataclass
class Job:
    """A training in so many processes, which goes on from its newest checkpoint."""

    family: str
    processes: int = 1

    def train(self, folder: Path, kill_at: int | None = None, delay: float = 0, victim: int = 0) -> list[int | None]:
        """Train to the end, or until a SIGKILL to one process some time after a step began; returns the exit codes.

        As a launcher would, it takes the others down with it.
        """
        step, port = context().Value("i", -1), free_port()
        children = [
            context().Process(target=run, args=(rank, self.processes, port, self.family, str(folder), step))
            for rank in range(self.processes)
        ]
        for child in children:
            child.start()
        while children[victim].is_alive() and kill_at is not None:
            if step.value >= kill_at:
                time.sleep(delay)
                children[victim].kill()
                children[victim].join()
                break
            time.sleep(0.0005)
        for child in children:
            if kill_at is not None:
                child.kill()
            child.join(timeout=120)
        return [child.exitcode for child in children]

    def assert_same_end(self, expected: Path, found: Path) -> None:
        """All that two runs left is bitwise the same."""
        for rank in range(self.processes):
            ends = [load_file(folder / f"left-{rank}.safetensors") for folder in (expected, found)]
            assert ends[0].keys() == ends[1].keys()
            assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []
            logs = [json.loads((folder / f"log-{rank}.json").read_text()) for folder in (expected, found)]
            assert logs[0] == logs[1]

    def kill_and_resume(self, undisturbed: Path, folder: Path, seed: str, victim: int = 0) -> None:
        """Kill once at a random moment, train on to the end, and compare."""
        chance = random.Random(seed)
        kill_at = chance.randrange(STEPS - 3)  # so that it falls before the end, however fast the machine
        assert self.train(folder, kill_at, chance.uniform(0, 0.02), victim)[victim] == -9
        assert self.train(folder) == [0] * self.processes
        self.assert_same_end(undisturbed, folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family.replace(" ", "_")) for family in FAMILIES}
    for family, folder in folders.items():
        assert Job(family).train(folder) == [0]
    return folders


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_killed_at_a_random_moment_ends_bitwise_as_the_undisturbed_one(
    undisturbed: dict[str, Path], tmp_path: Path, family: str, kill: int
) -> None:
    Job(family).kill_and_resume(undisturbed[family], tmp_path, seed=f"{family} {kill}")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """A job of two processes, and what they leave undisturbed."""
    job, folder = Job("vit", 2), tmp_path_factory.mktemp("pair")
    assert job.train(folder) == [0, 0]
    return job, folder


@needs_resume_of_several
@pytest.mark.parametrize("kill", PAIR_KILLS)
def test_two_processes_of_which_one_is_killed_end_bitwise_as_undisturbed(
    pair: tuple[Job, Path], tmp_path: Path, kill: int
) -> None:
    job, undisturbed = pair
    job.kill_and_resume(undisturbed, tmp_path, seed=f"pair {kill}", victim=kill % 2)


def test_the_undisturbed_run_leaves_a_full_bank(undisturbed: dict[str, Path]) -> None:
    checkpoint = last_complete_checkpoint(str(undisturbed["vit"]))
    assert checkpoint is not None
    sidecar = load_file(Path(checkpoint, SIDECAR))
    assert sidecar["bank.rows"].shape == (20, 24)  # 14 steps of 8 went through a bank of 20
