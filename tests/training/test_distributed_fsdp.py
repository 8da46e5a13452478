"""Under FSDP2, head and teacher are sharded, and the run is the one that a process alone would make."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageClassification

from tests.fsdp_worker import STEPS, run, run_alone
from tests.processes import context, run_together

# Family, kind of checkpoint, layers to wrap: None is accelerate's default, which fails on both families without help.
CASES = [
    pytest.param(("vit", "FULL_STATE_DICT", None), marks=pytest.mark.slow),
    pytest.param(("vit", "SHARDED_STATE_DICT", "ViTLayer"), marks=pytest.mark.slow),
    ("bert", "SHARDED_STATE_DICT", None),
]


@pytest.fixture(scope="module", params=CASES, ids=["vit-full", "vit-sharded", "bert-sharded"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the runs of a case left what they ended with."""
    family, kind, layers = request.param
    folder = tmp_path_factory.mktemp("fsdp")
    run_together(context(), run_alone, 1, str(folder / "alone"), family)
    for goes_on in (False, True):
        run_together(context(), run, 2, str(folder), family, kind, layers, goes_on)
    return folder


def left(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


def test_all_processes_have_the_same_head_gradients_bank_and_log(folder: Path) -> None:
    first, second = left(folder, "whole-0"), left(folder, "whole-1")
    assert len(first["head_gradients"]) == STEPS
    assert [name for name in first if name != "teacher_held" and not torch.equal(first[name], second[name])] == []


def test_the_run_is_that_of_one_process(folder: Path) -> None:
    sharded, alone = left(folder, "whole-0"), left(folder / "alone", "alone")
    for name, expected in alone.items():
        if name.endswith(("k_proj.bias", "key.bias")):
            continue  # without a gradient but for rounding, which AdamW takes for one
        error = (sharded[name] - expected).abs()
        # Single gradients near 0 are rounding, too.
        assert error.max() < 1e-4 and error.mean() < 5e-6, name


def test_head_and_teacher_are_sharded(folder: Path) -> None:
    for rank in range(2):
        found = left(folder, f"whole-{rank}")
        assert found["head_is_sharded"]
        assert 0.4 < found["teacher_held"] < 0.6
        assert found["teacher_whole"] == 0


def test_a_resumed_run_ends_bitwise_as_the_undisturbed_one(folder: Path) -> None:
    for rank in range(2):
        whole, resumed = left(folder, f"whole-{rank}"), left(folder, f"resumed-{rank}")
        assert torch.equal(whole["head_gradients"][STEPS // 2 :], resumed["head_gradients"])
        # The log of a resumed run begins with that of the checkpoint.
        different = [
            name for name in whole if name != "head_gradients" and not torch.equal(whole[name], resumed[name])
        ]
        assert different == []


def test_the_student_is_saved_whole_and_without_its_head(folder: Path) -> None:
    saved, trained = load_file(folder / "student" / "model.safetensors"), left(folder, "whole-0")
    assert [name for name in saved if "relational" in name] == []
    if "vit" in next(iter(saved)):
        model = AutoModelForImageClassification.from_pretrained(folder / "student")
        for name, weight in model.named_parameters():
            assert torch.equal(weight, trained[f"student.{name}"])
