"""Alignment at each evaluation: the student as it is saved against its teacher, on examples spread over the set."""

import multiprocessing
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from hf_rrd import cache_teacher_outputs, relational_alignment
from hf_rrd.results.alignment import EmbeddingLog, evenly_spaced
from tests.builders import Images, be_process, run_together, tiny_vit, trainer

MEASURES = ("cka", "rank_correlation", "neighbor_overlap")


def reported(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[f"eval_alignment_{name}"] for name in MEASURES}


@torch.no_grad()
def expected(student: Any, teacher: Any, pixels: torch.Tensor) -> dict[str, float]:
    rows = [model.eval().vit(pixels).last_hidden_state[:, 0] for model in (student, teacher)]
    return relational_alignment(*rows)


def test_an_evaluation_compares_the_embeddings_of_the_student_as_it_is_saved(tmp_path: Path) -> None:
    data, teacher = Images(40, seed=3), tiny_vit(width=24, seed=1)
    run = trainer(tmp_path, teacher=teacher, eval_dataset=data, alignment_examples=100)
    run.train()
    metrics = run.evaluate()
    run.save_model()
    saved = type(run.model).from_pretrained(tmp_path)
    assert reported(metrics) == pytest.approx(expected(saved, teacher, data.pixels), abs=1e-5)
    assert reported(run.evaluate()) == pytest.approx(reported(metrics), abs=1e-6), "an earlier evaluation is forgotten"
    assert "test_alignment_cka" in run.evaluate(metric_key_prefix="test")


def test_of_many_examples_some_are_compared_that_lie_evenly(tmp_path: Path) -> None:
    data, teacher = Images(41, seed=3), tiny_vit(width=24, seed=1)
    run = trainer(tmp_path, teacher=teacher, eval_dataset=data, alignment_examples=11)
    some = data.pixels[torch.arange(0, 41, 4)]
    assert reported(run.evaluate()) == pytest.approx(expected(run.model, teacher, some), abs=1e-5)


def test_memory_does_not_grow_with_the_evaluation() -> None:
    log, rows = EmbeddingLog(10), torch.arange(1000.0).unsqueeze(1)
    for batch in rows.split(7):
        log.add(batch, batch.expand(-1, 3), lambda rows: rows)
        assert len(log._student) == len(log._teacher) <= 20
    kept = log._student[:, 0]
    assert kept[0] == 0 and len(set(kept.diff().tolist())) == 1, "evenly spread"
    assert log._teacher.shape == (len(kept), 3) and torch.equal(log._teacher[:, 2], kept)


def test_cached_outputs_stand_in_for_the_teacher(tmp_path: Path) -> None:
    data, teacher = Images(24), tiny_vit(width=24, seed=1)
    rows = datasets.Dataset.from_dict({"pixel_values": data.pixels.numpy(), "labels": data.labels.numpy()})
    rows = cache_teacher_outputs(rows.with_format("torch"), teacher, dtype="float32")
    run = trainer(tmp_path, teacher=None, train_dataset=rows, eval_dataset=rows, alignment_examples=100)
    assert reported(run.evaluate()) == pytest.approx(expected(run.model, teacher, data.pixels), abs=1e-4)


def test_nothing_is_compared_unless_asked_or_without_a_teachers_outputs(tmp_path: Path) -> None:
    asked, data = {"alignment_examples": 100}, Images(8)
    rows = datasets.Dataset.from_dict({"pixel_values": data.pixels.numpy(), "labels": data.labels.numpy()})
    cached = cache_teacher_outputs(rows.with_format("torch"), tiny_vit(width=24, seed=1))
    for run in (
        trainer(tmp_path, eval_dataset=data),
        trainer(tmp_path, teacher=None, train_dataset=cached, eval_dataset=data, **asked),
    ):
        assert [name for name in run.evaluate() if "alignment" in name] == []


def test_two_examples_have_neighbors_and_nothing_else(tmp_path: Path) -> None:
    metrics = trainer(tmp_path, eval_dataset=Images(2), alignment_examples=100).evaluate()
    assert [name for name in metrics if "alignment" in name] == ["eval_alignment_neighbor_overlap"]
    log = EmbeddingLog(10)
    assert log.alignment() == {}
    log.add(torch.ones(1, 2), torch.ones(1, 3), lambda rows: rows)
    assert log.alignment() == {}


def test_the_best_model_may_be_the_most_alike(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        eval_dataset=Images(40, seed=3),
        alignment_examples=40,
        metric_for_best_model="eval_alignment_cka",
        greater_is_better=True,
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=4,
    )
    run.train()
    values = [entry["eval_alignment_cka"] for entry in run.state.log_history if "eval_alignment_cka" in entry]
    assert len(values) == 4 and run.state.best_metric == max(values)
    assert run.evaluate()["eval_alignment_cka"] == pytest.approx(max(values), abs=1e-6)


def test_training_outputs_carry_no_pooled_embedding(tmp_path: Path) -> None:
    run = trainer(tmp_path, alignment_examples=100)
    inputs = {"pixel_values": Images(4).pixels, "with_relational_embedding": True}
    assert "relational_pooled" not in run.model.train()(**inputs)
    assert run.model.eval()(**inputs)["relational_pooled"].shape == (4, 16)


@pytest.mark.parametrize(("length", "count"), [(1, 1), (5, 9), (9, 5), (10, 3), (7, 1)])
def test_evenly_takes_the_first_the_last_and_none_twice(length: int, count: int) -> None:
    rows = evenly_spaced(length, count)
    assert len(rows) == len(set(rows.tolist())) == min(length, count)
    assert rows[0] == 0 and (len(rows) == 1 or rows[-1] == length - 1)


def _evaluate(rank: int, processes: int, port: int, folder: str) -> None:
    be_process(rank, processes, port)
    torch.set_num_threads(1)
    run = trainer(folder, eval_dataset=Images(21, seed=3), alignment_examples=12, per_device_eval_batch_size=4)
    found = reported(run.evaluate())
    Path(folder, f"{processes}-{rank}.txt").write_text(repr(found))


@pytest.mark.slow
def test_two_processes_compare_what_one_does(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    for processes in (1, 2):
        run_together(context, _evaluate, processes, str(tmp_path))
    one, first, second = (eval((tmp_path / name).read_text()) for name in ("1-0.txt", "2-0.txt", "2-1.txt"))
    assert first == second
    assert first == pytest.approx(one, abs=1e-5)
