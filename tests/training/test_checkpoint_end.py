"""Runs that are resumed at their end, in the midst of a stream or of augmented data, or with other settings."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import Images, tiny_vit, trainer
from tests.training.test_streams import Stream


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of all files under a folder."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


loads_random_state = pytest.mark.skipif(
    version("transformers").startswith("5.0."), reason="Trainer forgets the random state there where a pass has ended"
)


ENDS: dict[str, dict[str, Any]] = {
    "within a pass": {"save_strategy": "steps", "save_steps": 2},
    "within a pass, saved at its end": {"save_strategy": "epoch"},
    "within a pass, evaluated and saved at its end": {
        **{"save_strategy": "epoch", "eval_strategy": "epoch", "eval_dataset": Images(8, seed=3)},
        **{"load_best_model_at_end": True, "metric_for_best_model": "loss"},
    },
    "within a pass that a fraction ends": {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 0.6},
    "with a pass": {"save_strategy": "steps", "save_steps": 2, "max_steps": 6},
    "of a stream": {"save_strategy": "steps", "save_steps": 2, "train_dataset": Stream(48)},
}


@pytest.mark.parametrize("end", ENDS)
def test_a_run_that_has_ended_is_resumed_without_a_step_or_a_file_more(tmp_path: Path, end: str) -> None:
    def made() -> Any:
        return trainer(tmp_path, **({"model": tiny_vit(dropout=0.1), "max_steps": 4} | ENDS[end]))

    first = made()
    first.train()
    before, lines = files_of(tmp_path), [line for line in first.state.log_history if "train_runtime" not in line]
    for _ in range(2):
        again = made()
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == first.state.global_step
        assert [line for line in again.state.log_history if "train_runtime" not in line] == lines
        weights = zip(first.model.parameters(), again.model.parameters(), strict=True)
        assert all(torch.equal(left, right) for left, right in weights)
        assert files_of(tmp_path) == before


def test_a_pass_that_ends_within_a_step_is_resumed_within_it(tmp_path: Path) -> None:
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    runs = [trainer(tmp_path, train_dataset=Images(40), gradient_accumulation_steps=2, **saved) for _ in range(2)]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))  # of 3 steps, the last of a single batch
    weights = zip(*(run.model.parameters() for run in runs), strict=True)
    assert all(torch.equal(left, right) for left, right in weights)


def test_a_run_that_had_ended_goes_on_where_more_steps_are_asked_for(tmp_path: Path) -> None:
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = trainer(tmp_path / "whole", max_steps=5, **saved)
    whole.train()
    trainer(tmp_path / "parts", max_steps=2, **saved).train()
    second = trainer(tmp_path / "parts", max_steps=5, **saved)
    second.train(resume_from_checkpoint=True)
    weights = zip(whole.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in weights)


class Augmented(Images):
    """Images with noise: of the global random state, or of the example's own seed."""

    def __init__(self, own_seed: bool) -> None:
        super().__init__()
        self.own_seed = own_seed

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        example, generator = super().__getitem__(index), torch.Generator().manual_seed(index)
        noise = torch.randn(3, 16, 16, generator=generator if self.own_seed else None)
        return example | {"pixel_values": example["pixel_values"] + noise}


@pytest.mark.parametrize(
    ("data", "save_steps", "same"),
    [
        pytest.param(Augmented(own_seed=True), 2, True, id="augmented by a seed of each example's"),
        pytest.param(Augmented(own_seed=False), 6, True, id="augmented at random, at the end of an epoch"),
        pytest.param(Augmented(own_seed=False), 2, False, id="augmented at random, within an epoch"),
        pytest.param(Stream(96), 2, True, id="a stream in its first pass"),
        pytest.param(Stream(48), 6, True, id="a stream at the end of its first pass", marks=loads_random_state),
        pytest.param(Stream(24), 4, False, id="a stream past its first pass"),
    ],
)
def test_how_far_a_resumed_run_is_bitwise_the_same(
    tmp_path: Path, data: Any, save_steps: int, same: bool, caplog: pytest.LogCaptureFixture
) -> None:
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": save_steps, "max_steps": save_steps + 2}
    whole = trainer(tmp_path, train_dataset=data, model=tiny_vit(dropout=0.1), **saved)
    whole.train()
    again = trainer(tmp_path, train_dataset=data, model=tiny_vit(dropout=0.1), **saved)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{save_steps}"))
    weights = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in weights) == same
    assert ("past its first pass" in caplog.text) == (not same and isinstance(data, Stream))


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ({}, {"relational_weight": 0.0}, "relational_weight above 0, this run has relational_weight 0"),
        ({"relational_weight": 0.0}, {}, "relational_weight 0, this run has relational_weight above 0"),
        (
            {},
            {"student_projection": "centered"},
            "student_projection linear, this run has student_projection centered",
        ),
        (
            {"teacher_projection": "pca", "projection_dim": 8},
            {"teacher_projection": "orthogonal", "projection_dim": 8},
            "teacher_projection pca, this run has teacher_projection orthogonal",
        ),
        (
            {"teacher_projection": "orthogonal", "projection_dim": 8},
            {"teacher_projection": "orthogonal", "projection_dim": 12},
            "projection_dim 8, this run has projection_dim 12",
        ),
        ({}, {"matryoshka_dims": [24, 8]}, r"matryoshka_dims none, this run has matryoshka_dims \[24, 8\]"),
        ({"matryoshka_dims": [24, 8]}, {}, r"matryoshka_dims \[24, 8\], this run has matryoshka_dims none"),
        ({"relational_loss": "rkd_distance"}, {}, "bank_size none, this run has bank_size 20"),
        ({}, {"bank_size": 40}, "bank_size 20, this run has bank_size 40"),
        ({"bank_size": 4096}, {}, "bank_size for the whole training set, this run has bank_size 20"),
    ],
)
def test_a_run_with_other_settings_than_a_checkpoint_says_which(
    tmp_path: Path, then: dict[str, Any], now: dict[str, Any], message: str
) -> None:
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "kd_weight": 0.5}
    trainer(tmp_path, **saved, **then).train()
    before = files_of(tmp_path)
    with pytest.raises(
        ValueError, match=f"checkpoint-2 was written with {message}. Resume with the same settings, or"
    ):
        trainer(tmp_path, **(saved | {"max_steps": 4}), **now).train(resume_from_checkpoint=True)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({}, {"relational_loss": "infonce"}),
        ({"matryoshka_dims": [8, 24]}, {"matryoshka_dims": [24, 8]}),
        ({}, {"relational_loss": "rkd_distance"}),
        ({"kd_weight": 0.0}, {"kd_weight": 1.0}),
        ({"bank_size": 60}, {"bank_size": 4096, "train_dataset": Images(56)}),
        ({"task_weight": 0.0}, {"task_weight": 2.0, "relational_weight": 3.0, "student_temperature": 0.3}),
    ],
)
def test_a_run_may_go_on_with_other_weights_and_losses(
    tmp_path: Path, then: dict[str, Any], now: dict[str, Any]
) -> None:
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(tmp_path, **saved, **then).train()
    run = trainer(tmp_path, **(saved | {"max_steps": 4}), **now)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 4


def test_a_student_that_is_frozen_elsewhere_than_in_its_checkpoint_is_an_error_that_says_so(tmp_path: Path) -> None:
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(tmp_path, **saved).train()
    frozen = tiny_vit()
    frozen.vit.requires_grad_(False)
    run = trainer(tmp_path, model=frozen, **(saved | {"max_steps": 4}))
    with pytest.raises(
        ValueError, match="checkpoint-2 was written by a run that trained other weights .*frozen and ad"
    ):
        run.train(resume_from_checkpoint=True)
