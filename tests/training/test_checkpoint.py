"""The sidecar, whole checkpoints, and a student loaded back to the bit."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from hf_rrd import FeatureBank
from hf_rrd.losses.rows import unit
from hf_rrd.models.head import HEAD, attach_head
from hf_rrd.training import checkpoint
from hf_rrd.training.checkpoint import (
    SIDECAR,
    flaw_in,
    has_sidecar,
    invalidate,
    last_complete_checkpoint,
    load_sidecar,
    load_student,
    save_sidecar,
    sizes_of,
)
from tests.builders import tiny_vit

WEIGHTS = "model.safetensors"


def state_of(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "head": {
            "projection.weight": torch.randn(3, 4, generator=generator).T,  # not contiguous, and a dot in its name
            "projection.bias": torch.randn(4, generator=generator).bfloat16(),
        },
        "bank": {"rows": unit(torch.randn(7, 3, generator=generator, dtype=torch.float64))},
        "teacher_projection": {"mean": torch.empty(0, 3), "matrix": torch.empty(0, 3)},
    }


def assert_same_state(left: dict[str, dict[str, Tensor]], right: dict[str, dict[str, Tensor]]) -> None:
    assert {group: sorted(content) for group, content in left.items()} == {
        group: sorted(content) for group, content in right.items()
    }
    for group, content in left.items():
        for name, tensor in content.items():
            assert tensor.dtype == right[group][name].dtype
            assert torch.equal(tensor, right[group][name])


def test_what_a_sidecar_holds_comes_back_to_the_bit(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"  # made by the write
    save_sidecar(str(folder), state_of())
    assert has_sidecar(str(folder))
    assert_same_state(load_sidecar(str(folder))[0], state_of())
    assert [file.name for file in folder.iterdir()] == [SIDECAR]


def test_a_bank_goes_through_a_sidecar_and_on_as_before(tmp_path: Path) -> None:
    bank, restored = FeatureBank(5, 3), FeatureBank(5, 3)
    bank.enqueue(unit(torch.randn(4, 3)))
    save_sidecar(str(tmp_path), {"bank": bank.state_dict()})
    restored.load_state_dict(load_sidecar(str(tmp_path))[0]["bank"])
    rows = torch.randn(2, 3)
    bank.enqueue(rows)
    restored.enqueue(rows)
    assert torch.equal(restored.filled, bank.filled)


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sidecar(str(tmp_path), state_of(seed=1))

    def half(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata=metadata)
        os.truncate(path, os.path.getsize(path) // 2)
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        save_sidecar(str(tmp_path), state_of(seed=2))
    assert_same_state(load_sidecar(str(tmp_path))[0], state_of(seed=1))
    monkeypatch.undo()
    save_sidecar(str(tmp_path), state_of(seed=3))  # the half file is not in the way
    assert_same_state(load_sidecar(str(tmp_path))[0], state_of(seed=3))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_sidecar_is_an_error_that_names_the_file(tmp_path: Path, share: float) -> None:
    save_sidecar(str(tmp_path), state_of())
    path = tmp_path / SIDECAR
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(ValueError, match=f"{SIDECAR} is damaged .*Resume from an earlier checkpoint"):
        load_sidecar(str(tmp_path))


def test_a_sidecar_of_other_bytes_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / SIDECAR).write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=f"{SIDECAR} is damaged"):
        load_sidecar(str(tmp_path))


def test_a_missing_sidecar_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    assert not has_sidecar(str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path} has no {SIDECAR}.*save_only_model=True.*start a new run"):
        load_sidecar(str(tmp_path))


def make_checkpoint(folder: Path, name: str, state: str | None = '{"global_step": 1}') -> Path:
    path = folder / name
    path.mkdir(parents=True)
    if state is not None:
        (path / "trainer_state.json").write_text(state, encoding="utf-8")
    return path


def test_the_last_checkpoint_is_the_one_of_the_highest_number(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-8"):
        make_checkpoint(tmp_path, name)
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize(
    "state",
    [
        *(None, "", '{"global_step": 11, "log_his', "\x00" * 20, "[" * 200_000, "[]", "{}", '{"max_steps": 3}'),
        *('{"global_step": "11"}', '{"global_step": -1}', '{"global_step": 11, "unknown": 1}'),
    ],
)
def test_a_checkpoint_whose_state_is_absent_or_cut_off_is_passed_over(tmp_path: Path, state: str | None) -> None:
    make_checkpoint(tmp_path, "checkpoint-9")
    make_checkpoint(tmp_path, "checkpoint-10")
    broken = make_checkpoint(tmp_path, "checkpoint-11", state)
    assert flaw_in(broken) is not None
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")


def test_what_is_not_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "checkpoint-3")
    make_checkpoint(tmp_path, "checkpoint-best")
    make_checkpoint(tmp_path, "checkpoint-12-old")
    make_checkpoint(tmp_path, "checkpoint-²")
    make_checkpoint(tmp_path, "runs")
    (tmp_path / "checkpoint-99").write_text("a file", encoding="utf-8")
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-3")


def test_a_folder_without_a_complete_checkpoint_gives_none(tmp_path: Path) -> None:
    assert last_complete_checkpoint(str(tmp_path / "absent")) is None
    assert last_complete_checkpoint(str(tmp_path)) is None
    make_checkpoint(tmp_path, "checkpoint-1", state=None)
    assert last_complete_checkpoint(str(tmp_path)) is None


def test_an_invalidated_checkpoint_is_incomplete_until_its_state_is_written_again(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "checkpoint-4")
    assert flaw_in(path) is None
    invalidate(str(path))
    invalidate(str(path))  # once more is no error
    assert flaw_in(path) is not None
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 4}), encoding="utf-8")
    assert flaw_in(path) is None


def test_incomplete_checkpoints_beside_the_one_that_is_written_are_set_aside_and_one_of_them_is_kept(
    tmp_path: Path,
) -> None:
    for name, state in (("10", '{"global_step": 10}'), ("20", None), ("30", None), ("best", None), ("15", None)):
        make_checkpoint(tmp_path, f"checkpoint-{name}", state)
    (tmp_path / "checkpoint-20" / "model.safetensors").write_bytes(b"half")
    invalidate(str(tmp_path / "checkpoint-15"))
    names = ["checkpoint-10", "checkpoint-15", "checkpoint-best", "incomplete-checkpoint-20"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "incomplete-checkpoint-20" / "model.safetensors").read_bytes() == b"half"
    make_checkpoint(tmp_path, "checkpoint-20", None)
    invalidate(str(tmp_path / "checkpoint-15"))
    assert not (tmp_path / "incomplete-checkpoint-20" / "model.safetensors").exists()


def test_a_folder_that_is_gone_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="run/checkpoint-4 is gone: there is no such folder"):
        load_student(tiny_vit(), "run/checkpoint-4", HEAD)


def test_what_killed_writes_left_half_done_is_cleared_away_and_never_asked_for(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "checkpoint-4")
    for name in (".tmpA1b2C3", f".{SIDECAR}.x1y2.tmp", "kept.bin", "checkpoint-is-incomplete.txt"):
        (path / name).write_bytes(b"half")
    assert json.loads(sizes_of(str(path))) == {"kept.bin": 4}
    (path / "checkpoint-is-incomplete.txt").unlink()  # as the Trainer's just-in-time checkpoints do
    invalidate(str(path))
    assert [file.name for file in path.iterdir()] == ["kept.bin"]


def assert_same_weights(left: Any, right: dict[str, Tensor]) -> None:
    state = left.state_dict()
    assert sorted(state) == sorted(right)
    assert [name for name, tensor in right.items() if not torch.equal(state[name], tensor)] == []


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_every_weight_of_a_vit_comes_back_to_the_bit(tmp_path: Path) -> None:
    saved, student = tiny_vit(seed=0), tiny_vit(seed=1)
    saved.save_pretrained(tmp_path)
    random_state = torch.get_rng_state()
    load_student(student, str(tmp_path), HEAD)
    assert_same_weights(student, saved.state_dict())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_tied_weights_come_back_and_stay_tied(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8
    )
    saved, student = BertForMaskedLM(config), BertForMaskedLM(config)
    saved.save_pretrained(tmp_path)
    load_student(student, str(tmp_path), HEAD)
    assert_same_weights(student, saved.state_dict())
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_the_head_of_a_student_is_neither_in_the_file_nor_touched_by_loading(tmp_path: Path) -> None:
    saved, student = tiny_vit(seed=0), tiny_vit(seed=1)
    attach_head(saved, dim=8, seed=0)
    head = attach_head(student, dim=8, seed=1)
    before = weights_of(head)
    saved.save_pretrained(tmp_path)
    assert [name for name in load_file(tmp_path / WEIGHTS) if HEAD in name] == []
    load_student(student, str(tmp_path), HEAD)
    assert_same_weights(head, before)
    assert_same_weights(student.vit, saved.vit.state_dict())


def change_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# Those of the layers are among the names that transformers 5.23 writes differently from its modules'.
@pytest.mark.parametrize("part", ["classifier.weight", "embeddings.cls_token", "layer.1.output.dense.weight"])
def test_a_weight_that_the_file_lacks_is_an_error(tmp_path: Path, part: str) -> None:
    tiny_vit(seed=0).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.pop(next(name for name in tensors if name.endswith(part))))
    with pytest.raises(ValueError, match=f"{tmp_path} does not hold this student: 1 weights are missing"):
        load_student(tiny_vit(seed=1), str(tmp_path), HEAD)


def test_a_weight_too_many_in_the_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    tiny_vit(seed=0).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.update({"extra.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"does not hold this student: .*1 are unknown .*'extra.weight'"):
        load_student(tiny_vit(seed=1), str(tmp_path), HEAD)


def test_a_weight_of_another_shape_in_the_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    tiny_vit(seed=0).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.update({"classifier.weight": torch.zeros(3, 16)}))
    with pytest.raises(ValueError, match=r"does not hold this student: .*of another shape .*classifier.weight"):
        load_student(tiny_vit(seed=1), str(tmp_path), HEAD)
