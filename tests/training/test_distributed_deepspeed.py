"""Under ZeRO-1, 2 and 3 the run is the one that a process alone would make; skipped where it is not installed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.deepspeed_worker import run, save_models
from tests.fsdp_worker import run_alone
from tests.processes import context, run_together

pytest.importorskip("deepspeed", reason="make test-deepspeed runs these")

# Stage, and whether the models are read by name, after the settings are made.
CASES = [(1, False), (2, False), (3, False), (3, True)]


@pytest.fixture(scope="module", params=CASES, ids=[f"zero-{stage}{'-by-name' * by_name}" for stage, by_name in CASES])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the runs of a case left what they ended with."""
    stage, by_name = request.param
    folder = tmp_path_factory.mktemp("deepspeed")
    save_models(folder)
    run_together(context(), run_alone, 1, str(folder / "alone"), "vit")
    for goes_on in (False, True):
        run_together(context(), run, 2, str(folder), stage, by_name, goes_on, seconds=240)
    yield folder


def left(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


def test_all_processes_have_the_same_student_bank_and_log(folder: Path) -> None:
    first, second = left(folder, "whole-0"), left(folder, "whole-1")
    assert [name for name in first if name != "teacher_held" and not torch.equal(first[name], second[name])] == []


def test_the_run_is_that_of_one_process(folder: Path) -> None:
    several, alone = left(folder, "whole-0"), left(folder / "alone", "alone")
    del alone["head_gradients"]
    for name, expected in alone.items():
        if name.endswith(("k_proj.bias", "key.bias")):
            continue  # without a gradient but for rounding, which AdamW takes for one
        assert (several[name] - expected).abs().max() < 2e-5, name


def test_zero_3_partitions_the_teacher(folder: Path, request: pytest.FixtureRequest) -> None:
    stage = request.node.callspec.params["folder"][0]
    held = left(folder, "whole-0")["teacher_held"].item()
    assert 0.4 < held < 0.6 if stage == 3 else held == 1


def test_a_resumed_run_ends_bitwise_as_the_undisturbed_one(folder: Path) -> None:
    for rank in range(2):
        whole, resumed = left(folder, f"whole-{rank}"), left(folder, f"resumed-{rank}")
        assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_the_student_is_saved_whole_and_without_its_head(folder: Path) -> None:
    saved, trained = load_file(folder / "saved" / "model.safetensors"), left(folder, "whole-0")
    assert [name for name in saved if "relational" in name] == []
    sizes = [tensor.numel() for name, tensor in trained.items() if name.startswith(("student.vit", "student.class"))]
    assert sum(tensor.numel() for tensor in saved.values()) == sum(sizes)
