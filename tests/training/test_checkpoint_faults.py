"""What machines and people do to a run: it goes on as if nothing had been, or it ends with one clear error."""

import json
import os
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from hf_rrd import cache_teacher_outputs
from hf_rrd.models.teacher import Teacher
from hf_rrd.training import caching
from hf_rrd.training.checkpoint import SIDECAR, flaw_in, last_complete_checkpoint
from hf_rrd.training.data import Preview
from hf_rrd.training.finite import FiniteCheck
from hf_rrd.training.identity import teacher_identity, weights_hash, weights_sample
from tests.builders import Images, tiny_bert, tiny_vit, trainer

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "logging_steps": 2}
FILES = [
    "config.json",
    "model.safetensors",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    SIDECAR,
    "trainer_state.json",
]
"""All of a checkpoint, in the order in which they are written."""


def run_in(folder: Path, **changes: Any) -> Any:
    """A trainer of a student with dropout whose every random number shows."""
    return trainer(folder, **({"model": tiny_vit(dropout=0.1), "kd_weight": 0.5} | SAVED | changes))


def left_of(run: Any) -> dict[str, Tensor]:
    return {**run.model.state_dict(), **run.distillation.head.state_dict(), "bank": run.distillation.bank.filled}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder with the checkpoints 2, 4 and 6, and what the run ended with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = run_in(folder)
    run.train()
    return folder, left_of(run)


@pytest.fixture
def interrupted(undisturbed: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """A folder with the checkpoints 2 and 4."""
    for step in (2, 4):
        shutil.copytree(undisturbed[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


def tree_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of all files under a folder."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


# ---- Files of a checkpoint ----


def test_a_checkpoint_has_these_files_and_no_other(undisturbed: tuple[Path, dict[str, Tensor]]) -> None:
    assert sorted(path.name for path in (undisturbed[0] / "checkpoint-6").iterdir()) == sorted(FILES)


def kill_at(checkpoint: Path, file: str, damage: str) -> None:
    """Leave a checkpoint as a kill would that fell into the writing of a file, or right before it."""
    for later in FILES[FILES.index(file) + (damage == "cut") :]:
        (checkpoint / later).unlink()
    if damage == "cut":
        os.truncate(checkpoint / file, (checkpoint / file).stat().st_size // 2)


@pytest.mark.parametrize("damage", ["cut", "absent"])
@pytest.mark.parametrize("file", FILES)
def test_a_kill_in_the_writing_of_any_file_costs_that_checkpoint_alone(
    undisturbed: tuple[Path, dict[str, Tensor]], interrupted: Path, file: str, damage: str
) -> None:
    kill_at(interrupted / "checkpoint-4", file, damage)
    assert last_complete_checkpoint(str(interrupted)) == str(interrupted / "checkpoint-2")
    run = run_in(interrupted)
    run.train(resume_from_checkpoint=True)
    assert_same(left_of(run), undisturbed[1])
    assert flaw_in(interrupted / "checkpoint-4") is None


def test_rotation_never_leaves_an_incomplete_checkpoint_alone(interrupted: Path) -> None:
    (interrupted / "checkpoint-4" / "trainer_state.json").unlink()
    run = run_in(interrupted, save_steps=3, max_steps=3, save_total_limit=1)
    run.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in interrupted.iterdir()) == ["checkpoint-3", "incomplete-checkpoint-4"]
    assert last_complete_checkpoint(str(interrupted)) == str(interrupted / "checkpoint-3")


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_file_lost_or_cut_later_is_noticed_and_named(interrupted: Path, file: str) -> None:
    checkpoint = interrupted / "checkpoint-4"
    os.truncate(checkpoint / file, 5)
    with pytest.raises(ValueError, match=f"checkpoint-4 is not a complete checkpoint: its file {file} has 5 bytes"):
        run_in(interrupted).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / file).unlink()
    with pytest.raises(ValueError, match=f"its file {file} has gone"):
        run_in(interrupted).train(resume_from_checkpoint=str(checkpoint))
    assert last_complete_checkpoint(str(interrupted)) == str(interrupted / "checkpoint-2")


def test_weights_that_were_cut_into_shards_are_resumed_from_and_a_lost_shard_is_noticed(
    interrupted: Path, undisturbed: tuple[Path, dict[str, Tensor]]
) -> None:
    checkpoint = interrupted / "checkpoint-4"
    weights = load_file(checkpoint / "model.safetensors")
    places = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(weights)}
    for shard in sorted(set(places.values())):
        part = {name: weights[name] for name in weights if places[name] == shard}
        save_file(part, checkpoint / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    (checkpoint / "model.safetensors").unlink()
    run = run_in(interrupted)
    run.train(resume_from_checkpoint=str(checkpoint))
    assert_same(left_of(run), undisturbed[1])
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="its file model.safetensors has gone"):
        run_in(interrupted).train(resume_from_checkpoint=str(checkpoint))


def test_a_text_that_was_edited_is_nobody_s_business(interrupted: Path) -> None:
    checkpoint = interrupted / "checkpoint-4"
    (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text() + "\n")
    (checkpoint / "training_args.bin").unlink()
    (checkpoint / "notes.txt").write_text("a good one")
    assert last_complete_checkpoint(str(interrupted)) == str(checkpoint)


def test_a_cut_sidecar_is_passed_over_and_an_absent_one_is_an_error(interrupted: Path) -> None:
    sidecar = interrupted / "checkpoint-4" / SIDECAR
    os.truncate(sidecar, 100)
    assert last_complete_checkpoint(str(interrupted)) == str(interrupted / "checkpoint-2")
    sidecar.unlink()
    with pytest.raises(ValueError, match=f"checkpoint-4 has no {SIDECAR}.*start a new run"):
        run_in(interrupted).train(resume_from_checkpoint=True)


BEST: dict[str, Any] = {"eval_dataset": Images(8, seed=3), "eval_strategy": "steps", "eval_steps": 2}


def lose_folder(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoint-2")


def lose_weights(folder: Path) -> None:
    (folder / "checkpoint-2" / "model.safetensors").unlink()


def lose_the_way(folder: Path) -> None:
    os.chdir(folder)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lose_folder, "checkpoint-2, is not loaded, there is no such folder: the last weights stay"),
        (
            lose_weights,
            "its file model.safetensors has gone, it was 35120 bytes long: it is now incomplete-checkpoint-2",
        ),
        (lose_the_way, "run/checkpoint-2, is not loaded, there is no such folder"),
    ],
)
def test_a_best_checkpoint_that_is_lost_is_a_warning_and_the_last_weights_stay(
    tmp_path: Path, loss: Any, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    lost = Lost(loss)
    run = run_in(Path("run"), load_best_model_at_end=True, metric_for_best_model="loss", callbacks=[lost], **BEST)
    run.train()
    assert run.state.global_step == 6
    assert message in caplog.text
    assert run._facts.best_step is None, "the card is of the last step"
    assert_same(run.model.state_dict(), {name: lost.last_weights[name] for name in run.model.state_dict()})


class Lost(TrainerCallback):
    """Makes checkpoint-2 the best, and loses it before the last step."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            state.best_metric, state.best_global_step = -1.0, 2
        if state.global_step == 6:
            self.loss(Path("run"))
            self.last_weights = {name: each.clone() for name, each in kwargs["model"].state_dict().items()}


# ---- A full disk ----


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let every write fail that makes a file longer, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The first file in the order of writing that is longer than the one named.
@pytest.mark.parametrize("fits", ["scheduler.pt", "training_args.bin", "rng_state.pth", SIDECAR, "model.safetensors"])
def test_a_disk_that_fills_up_during_a_checkpoint_costs_that_checkpoint_alone(
    undisturbed: tuple[Path, dict[str, Tensor]], tmp_path: Path, fits: str
) -> None:
    shutil.copytree(undisturbed[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    size = (tmp_path / "checkpoint-2" / fits).stat().st_size
    run = run_in(tmp_path)
    with (
        files_of_at_most(size + 100),
        pytest.raises(OSError, match="checkpoint-4 could not be written: .*make room, and go on.*resume_from"),
    ):
        run.train(resume_from_checkpoint=True)
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    again = run_in(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert_same(left_of(again), undisturbed[1])


def test_a_disk_that_fills_up_during_a_cache_write_costs_that_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "SHARD_EXAMPLES", 8)
    images = Images(20)
    assert images.labels is not None
    data = datasets.Dataset.from_dict({"pixel_values": images.pixels.tolist(), "labels": images.labels.tolist()})
    teacher = tiny_vit(width=24, seed=1)
    with files_of_at_most(500), pytest.raises(OSError):
        cache_teacher_outputs(data, teacher, 4, cache_dir=tmp_path)
    finished = cache_teacher_outputs(data, teacher, 4, cache_dir=tmp_path)
    fresh = cache_teacher_outputs(data, teacher, 4, cache_dir=tmp_path / "fresh")
    assert finished["teacher_embedding"][:] == fresh["teacher_embedding"][:]


# ---- Numbers that are none ----


def test_a_loss_that_is_not_finite_ends_the_run_before_it_reaches_the_weights(tmp_path: Path) -> None:
    data = Images(48)
    run = run_in(tmp_path, train_dataset=data, model=tiny_vit())
    compute = run.distillation.kd_terms

    def broken_at_step_4(*args: Any) -> Any:
        return {"kd_loss": compute(*args)["kd_loss"] * (float("inf") if run.state.global_step == 3 else 1)}

    run.distillation.kd_terms = broken_at_step_4
    with pytest.raises(ValueError, match=r"the loss \(kd_loss\) is not finite \(nan or inf\) at step 4"):
        run.train()
    assert all(weight.isfinite().all() for weight in run.model.parameters())
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    run = run_in(tmp_path, learning_rate=1e38, max_grad_norm=0, optim="sgd", save_steps=1)
    with torch.no_grad():
        run.model.classifier.bias[:] = torch.finfo(torch.float32).max
    with pytest.raises(ValueError, match=r"student's weights are not finite.*first: .*checkpoint-1 is not written"):
        run.train()
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_a_student_that_is_not_finite_from_the_start_is_named(tmp_path: Path) -> None:
    student = tiny_vit()
    student.classifier.weight.data.fill_(torch.nan)
    said = r"the loss \(task_loss, kd_loss\) is not finite .* at step 1\. .*max_grad_norm"
    with pytest.raises(ValueError, match=said):
        run_in(tmp_path, model=student).train()


def test_a_step_that_a_loss_scaler_skips_is_no_end_and_no_damage(tmp_path: Path) -> None:
    calls = []

    def broken_once(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        calls.append(1)  # twice before the first step, to see whether it counts labels
        return torch.nn.functional.cross_entropy(outputs["logits"], labels) * (torch.nan if len(calls) == 4 else 1)

    run = run_in(tmp_path, compute_loss_func=broken_once, logging_steps=5, max_steps=4)
    run.accelerator.scaler = torch.amp.GradScaler("cpu")  # as a float16 training on a GPU has one
    run.train()
    again = run_in(tmp_path, logging_steps=5, max_steps=4)
    again.accelerator.scaler = torch.amp.GradScaler("cpu")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4


def test_what_is_not_trained_need_not_be_finite(tmp_path: Path) -> None:
    student = tiny_vit()
    mask = torch.nn.Parameter(torch.full((4,), -torch.inf), requires_grad=False)
    student.classifier.register_parameter("mask", mask)
    run_in(tmp_path, model=student, save_strategy="no", max_steps=2).train()


def test_a_loss_that_divides_by_no_labels_is_named_instead_of_ruining_the_run(tmp_path: Path) -> None:
    data = Images(16)
    assert data.labels is not None
    data.labels[:] = -100

    def mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits, labels)  # 0 / 0

    with pytest.raises(ValueError, match=r"the loss \(task_loss\) is not finite.*divide by 1 at least"):
        run_in(tmp_path, train_dataset=data, compute_loss_func=mean).train()


# ---- Another teacher ----


def fine_tuned() -> Any:
    teacher = tiny_vit(width=24, seed=1)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight += 1e-4
    return teacher


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher": fine_tuned()},
            "teacher_embedding from ViTForImageClassification, float32, weights .*, pooling cls and teacher_logits "
            "from ViTForImageClassification, float32, weights [0-9a-f]{16}; this run has teacher_emb",
        ),
        ({"teacher": tiny_vit(width=32, seed=1)}, "teacher_embedding from ViTForImageClassification"),
        ({"teacher_pooling": "mean"}, "from ViT.*, pooling cls; this run has teacher_embedding from ViT.* mean"),
    ],
)
def test_another_teacher_is_refused(interrupted: Path, changes: dict[str, Any], message: str) -> None:
    before = tree_of(interrupted)
    with pytest.raises(ValueError, match=f"written with another teacher.*{message}.*Pass the same teacher"):
        run_in(interrupted, **changes).train(resume_from_checkpoint=True)
    assert tree_of(interrupted) == before


def test_cached_outputs_of_another_teacher_are_refused(interrupted: Path, tmp_path: Path) -> None:
    images = Images(48)
    assert images.labels is not None
    data = datasets.Dataset.from_dict({"pixel_values": images.pixels.tolist(), "labels": images.labels.tolist()})
    data = data.with_format("torch")
    folders = [tmp_path / "first", tmp_path / "second"]
    cached = [cache_teacher_outputs(data, tiny_vit(width=24, seed=seed), 8, cache_dir=tmp_path) for seed in (1, 2)]
    run_in(folders[0], teacher=None, train_dataset=cached[0], max_steps=2).train()
    with pytest.raises(ValueError, match="embedding from cached .* and teacher_logits from cached .*; this run has"):
        run_in(folders[0], teacher=None, train_dataset=cached[1]).train(resume_from_checkpoint=True)
    with pytest.raises(
        ValueError, match="another teacher: teacher_embedding from ViTFor.*this run has teacher_embedding from cached"
    ):
        run_in(interrupted, teacher=None, train_dataset=cached[0]).train(resume_from_checkpoint=True)
    run_in(folders[0], teacher=None, train_dataset=cached[0]).train(resume_from_checkpoint=True)


def test_the_same_teacher_saved_loaded_and_used_is_the_same(tmp_path: Path) -> None:
    teacher, data = tiny_vit(width=24, seed=1, classes=12), Images(48)
    teacher.save_pretrained(tmp_path / "teacher")
    teacher(data.pixels[:2], labels=torch.tensor([0, 1]))  # which sets config.problem_type
    teacher.config.use_cache = False
    student = tiny_vit(classes=12)
    run_in(tmp_path / "run", teacher=teacher, model=student, max_steps=2).train()
    again = run_in(tmp_path / "run", teacher=str(tmp_path / "teacher"), model=tiny_vit(classes=12))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_the_order_of_a_config_s_entries_is_no_part_of_a_teacher() -> None:
    models = [tiny_vit(), tiny_vit()]
    for model, names in zip(models, ("ab", "ba"), strict=True):
        model.config.rope_parameters = {name: {"theta": 1.0} for name in names}  # saving sorts such entries
    for hashed in (weights_hash, weights_sample):
        assert hashed(models[0]) == hashed(models[1])
        assert hashed(models[0]) != hashed(tiny_vit())


def test_adapters_are_part_of_a_teacher() -> None:
    def lora(alpha: int) -> Any:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["query", "value"], lora_alpha=alpha, init_lora_weights=False)
        model = get_peft_model(tiny_bert(width=24, seed=1), config, adapter_name="first")
        model.add_adapter("second", config)
        return model

    first, other_scale, other_adapter = lora(2), lora(64), lora(2)
    assert weights_hash(first) == weights_hash(lora(2))
    other_adapter.set_adapter("second")
    for hashed in (weights_hash, weights_sample):
        assert len({hashed(model) for model in (first, other_scale, other_adapter)}) == 3


def test_logits_cached_and_embeddings_online_are_told_apart(tmp_path: Path) -> None:
    def identity(seed: int, data: Any, **wanted: bool) -> dict[str, str]:
        return teacher_identity(Teacher(tiny_vit(width=24, seed=seed), **wanted), Preview(data))

    cached = [[{"teacher_logits": [float(value), 1.0]}] for value in range(2)]
    both, logits = {"wants_embedding": True, "wants_logits": True}, {"wants_embedding": False, "wants_logits": True}
    assert identity(1, cached[0], **logits) == identity(2, cached[0], **logits)  # the teacher is not asked
    assert identity(1, cached[0], **logits) != identity(1, cached[1], **logits)
    assert identity(1, cached[0], **both) != identity(2, cached[0], **both)
    assert identity(1, Images(4), wants_embedding=False, wants_logits=False) == {}


# ---- Hostile sidecars ----


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any], **metadata: str) -> None:
    tensors = load_file(path)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        about = json.loads(file.read(length))["__metadata__"]
    change(tensors)
    save_file(tensors, path, about | metadata)


def header(text: bytes, length: int | None = None) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)


def tensors(**changed: Tensor) -> Callable[[Path], None]:
    names = {name.replace("__", "."): tensor for name, tensor in changed.items()}
    return lambda path: rewrite(path, lambda own: own.update(names))


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a header of 2 ** 62 bytes": (header(b"{}", 2**62), "damaged"),
    "a header of 200 MB": (header(b" " * 1000, 200_000_000), "damaged"),
    "a header that is no JSON": (header(b"not json"), "damaged"),
    "a header that is a list": (header(b"[1, 2]"), "damaged"),
    "offsets outside the file": (
        header(b'{"bank.rows":{"dtype":"F32","shape":[9,24],"data_offsets":[0,864]}}'),
        "damaged",
    ),
    "negative offsets": (
        header(b'{"bank.rows":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}'),
        "damaged",
    ),
    "a pickle": (lambda path: path.write_bytes(b"\x80\x04cposix\nsystem\n(S'touch owned'\ntR."), "damaged"),
    "whole numbers in the bank": (tensors(bank__rows=torch.ones(20, 24, dtype=torch.int64)), "damaged .*int64"),
    "whole numbers in the head": (
        tensors(head__projection__bias=torch.ones(24, dtype=torch.uint8)),
        "damaged .*uint8",
    ),
    "nan in the bank": (tensors(bank__rows=torch.full((20, 24), torch.nan)), "damaged .*not finite"),
    "rows of 1e30": (tensors(bank__rows=torch.full((20, 24), 1e30)), "damaged .*rows of length 1"),
    "rows in float8": (tensors(bank__rows=torch.eye(20, 24).to(torch.float8_e4m3fn)), "damaged .*16 to 64 bits"),
    "a thousand tensors": (tensors(**{f"head__{i}": torch.ones(1) for i in range(1000)}), "damaged .*100. tensors"),
    "a header of 11 MB": (header(b"{}" + b" " * 11_000_000), "damaged .*a header of 11000002 bytes"),
    "inf in the head": (tensors(head__projection__bias=torch.full((24,), torch.inf)), "damaged .*not finite"),
    "a bank of another width": (tensors(bank__rows=torch.eye(20, 23)), "another teacher or another projection"),
    "a bank without a width": (tensors(bank__rows=torch.ones(1)), "another teacher or another projection"),
    "a head of another shape": (tensors(head__projection__bias=torch.ones(1, 24)), "the saved head has"),
    "a head with a weight too many": (tensors(head__extra=torch.ones(1)), "the saved head has"),
    "a matrix that was not asked for": (tensors(teacher_projection__matrix=torch.ones(24, 24)), "the saved teacher"),
    "a name with a path": (lambda path: rewrite(path, lambda own: own.update({"../../x": torch.ones(1)})), "damaged"),
    "a file list with a path": (
        lambda path: rewrite(path, lambda own: None, files='{"../../../etc/passwd": 5}'),
        "damaged .*etc/passwd",
    ),
    "a file list with an absolute path": (
        lambda path: rewrite(path, lambda own: None, files='{"/etc/passwd": 5}'),
        "damaged .*etc/passwd",
    ),
    "a file list that is none": (lambda path: rewrite(path, lambda own: None, files="[3]"), "damaged"),
    "a file list with a long name": (
        lambda path: rewrite(path, lambda own: None, files=json.dumps({"a" * 300: 1})),
        "damaged",
    ),
    "a file list that is deep": (lambda path: rewrite(path, lambda own: None, files="[" * 200_000), "damaged"),
    "tensors of another kind": (tensors(log__loss=torch.ones(2, 3)), "damaged .*of none of the groups"),
    "a folder in its place": (lambda path: (path.unlink(), path.mkdir()), "has no"),
    "a pipe in its place": (lambda path: (path.unlink(), os.mkfifo(path)), "has no"),
}


@pytest.mark.parametrize("trick", HOSTILE)
def test_a_hostile_sidecar_is_refused_and_nothing_is_written(interrupted: Path, trick: str) -> None:
    change, message = HOSTILE[trick]
    change(interrupted / "checkpoint-4" / SIDECAR)
    before = tree_of(interrupted)
    with pytest.raises(ValueError, match=message):
        run_in(interrupted).train(resume_from_checkpoint=str(interrupted / "checkpoint-4"))
    assert tree_of(interrupted) == before
    assert not Path("owned").exists()


def test_a_link_left_in_the_sidecar_s_place_is_not_written_through(interrupted: Path, tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.write_text("mine")
    (interrupted / "checkpoint-6").mkdir()
    for name in (SIDECAR, SIDECAR + ".tmp"):
        (interrupted / "checkpoint-6" / name).symlink_to(treasure)
    run_in(interrupted).train(resume_from_checkpoint=str(interrupted / "checkpoint-4"))
    assert treasure.read_text() == "mine"


def test_what_we_write_into_a_checkpoint_is_no_pickle(undisturbed: tuple[Path, dict[str, Tensor]]) -> None:
    of_transformers = {name for name in FILES if name != SIDECAR}
    ours = [path for path in (undisturbed[0] / "checkpoint-6").iterdir() if path.name not in of_transformers]
    assert [path.name for path in ours] == [SIDECAR]
    for path in ours:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        described = json.loads(content[8 : 8 + length])
        described.pop("__metadata__")
        assert 8 + length + max(entry["data_offsets"][1] for entry in described.values()) == len(content)
        assert load_file(path).keys() == described.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_numbers_are_finite_and_one_that_is_not_is_found_among_many(dtype: torch.dtype) -> None:
    check = FiniteCheck(lambda: [])
    check.note_teacher(1, torch.ones(3, 4, dtype=torch.int8), torch.ones(3, 2, dtype=torch.int64))  # quantised ones
    outputs = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)
    check.note_teacher(1, outputs, -outputs)
    for broken in (torch.nan, torch.inf, -torch.inf):
        outputs[1, 2] = broken
        with pytest.raises(ValueError, match="the teacher's logits is not finite .* at step 2"):
            check.note_teacher(2, None, outputs)
