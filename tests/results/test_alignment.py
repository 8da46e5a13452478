"""The alignment measures against numpy and loops over their definitions, and at each evaluation of a run."""

import math
import multiprocessing
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor

from hf_rrd import cache_teacher_outputs, relational_alignment
from hf_rrd.results.alignment import EmbeddingLog, evenly_spaced, teacher_retrieval
from tests.builders import Images, be_process, run_together, tiny_vit, trainer

SIZES = [2, 3, 50, 1000]


def embeddings(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(count: int, widths: tuple[int, int] = (5, 7)) -> tuple[Tensor, Tensor]:
    """Two sets that share a part of their relations."""
    teacher = embeddings(count, widths[1], seed=1) + 0.3
    student = teacher @ embeddings(widths[1], widths[0], seed=2)
    return student / student.std() + embeddings(count, widths[0], seed=3), teacher


def signs(count: int, width: int, seed: int) -> Tensor:
    """Of width 16 or 64 their cosines are multiples of 1/8 or 1/32: exact in float32, with ties in plenty."""
    return embeddings(count, width, seed).sign()


def in_blocks_of(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the path of large sets."""
    monkeypatch.setattr("hf_rrd.results.alignment.EXACT_EXAMPLES", 1)
    monkeypatch.setattr("hf_rrd.results.alignment.BLOCK", size)


def naive_hsic(left: np.ndarray, right: np.ndarray, debiased: bool) -> float:
    """By both kernel matrices; the package goes by the embeddings."""
    count, ones = len(left), np.ones(len(left))
    if not debiased:
        centring = np.eye(count) - 1 / count
        return float(((centring @ left @ centring) * right).sum())
    left, right = left - np.diag(np.diag(left)), right - np.diag(np.diag(right))
    return float(
        (left * right).sum()
        + (ones @ left @ ones) * (ones @ right @ ones) / ((count - 1) * (count - 2))
        - 2 / (count - 2) * ((ones @ left) @ (right @ ones))
    ) / (count * (count - 3))


def naive_cka(student: np.ndarray, teacher: np.ndarray, debiased: bool) -> float:
    if debiased and len(student) < 4:
        return math.nan
    left, right = student @ student.T, teacher @ teacher.T
    own = naive_hsic(left, left, debiased) * naive_hsic(right, right, debiased)
    return naive_hsic(left, right, debiased) / own**0.5


def naive_cosines(rows: np.ndarray) -> np.ndarray:
    """Rounded, so that ties are ties."""
    lengths = np.sqrt((rows * rows).sum(1))
    return np.round(rows @ rows.T / np.outer(lengths, lengths), 10)


def naive_ranks(cosines: np.ndarray) -> np.ndarray:
    """How many pairs are less similar, and half of those that are as similar."""
    values = cosines[np.triu_indices(len(cosines), 1)]
    rising = np.sort(values)
    return (np.searchsorted(rising, values, "left") + np.searchsorted(rising, values, "right") + 1) / 2


def naive_rank_correlation(student: np.ndarray, teacher: np.ndarray) -> float:
    left, right = (naive_ranks(naive_cosines(rows)) for rows in (student, teacher))
    if len(set(left)) == 1 or len(set(right)) == 1:
        return math.nan
    return float(np.corrcoef(left, right)[0, 1])


def naive_overlap(student: np.ndarray, teacher: np.ndarray, neighbors: int) -> float:
    cosines = [naive_cosines(rows) for rows in (student, teacher)]
    shares = []
    for i in range(len(student)):
        nearest = []
        for cosine in cosines:
            least = np.sort(np.delete(cosine[i], i))[::-1][:neighbors][-1]
            nearest.append(set(np.flatnonzero(cosine[i] >= least)) - {i})
        shares.append(len(nearest[0] & nearest[1]) / max(map(len, nearest)))
    return sum(shares) / len(shares)


def naive(student: Tensor, teacher: Tensor, neighbors: int, debiased: bool) -> dict[str, float]:
    left, right = student.numpy(), teacher.numpy()
    return {
        "cka": naive_cka(left, right, debiased),
        "rank_correlation": naive_rank_correlation(left, right),
        "neighbor_overlap": naive_overlap(left, right, neighbors),
    }


def same(expected: dict[str, float], tolerance: float = 1e-6) -> object:
    return pytest.approx(expected, abs=tolerance, nan_ok=True)


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("widths", [(5, 7), (12, 90)])
@pytest.mark.parametrize(("count", "neighbors"), [(2, 1), (3, 1), (3, 2), (50, 1), (50, 10), (50, 49), (1000, 10)])
def test_the_three_measures_equal_their_definitions(
    count: int, neighbors: int, widths: tuple[int, int], debiased: bool
) -> None:
    student, teacher = related(count, widths)
    measured = relational_alignment(student, teacher, neighbors=neighbors, debiased=debiased)
    assert measured == same(naive(student, teacher, neighbors, debiased))
    assert all(type(value) is float for value in measured.values())


@pytest.mark.parametrize("neighbors", [1, 5, 20])
def test_tied_similarities_share_their_mean_rank_and_all_that_tie_with_the_last_neighbor_are_neighbors(
    neighbors: int,
) -> None:
    student, teacher = signs(30, 4, seed=1), signs(30, 6, seed=2)
    teacher[:, 0] = student[:, 0]
    measured = relational_alignment(student, teacher, neighbors=neighbors)
    assert measured == same(naive(student, teacher, neighbors, debiased=True))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert relational_alignment(student[order], teacher[order], neighbors=neighbors) == same(measured, 1e-12)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("change", ["rotate", "scale", "permute"])
def test_rotation_scale_and_the_order_of_examples_change_nothing(change: str, count: int) -> None:
    student, teacher = related(count)
    expected = [relational_alignment(student, teacher, neighbors=4, debiased=debiased) for debiased in (True, False)]
    if change == "rotate":
        student = student @ torch.linalg.qr(embeddings(5, 5, seed=9)).Q
        teacher = teacher @ torch.linalg.qr(embeddings(7, 7, seed=9)).Q
    elif change == "scale":
        student, teacher = 1e200 * student, 1e-200 * teacher
    else:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        student, teacher = student[order], teacher[order]
    for debiased, before in zip((True, False), expected, strict=True):
        after = relational_alignment(student, teacher, neighbors=4, debiased=debiased)
        assert after == same(before, 1e-9)


def test_moving_a_set_leaves_the_cka_alone() -> None:
    student, teacher = related(50)
    for debiased in (True, False):
        before = relational_alignment(student, teacher, debiased=debiased)["cka"]
        after = relational_alignment(student + 1000.0, teacher - 3.0, debiased=debiased)["cka"]
        assert after == pytest.approx(before, abs=1e-9)


@pytest.mark.parametrize("debiased", [True, False])
def test_a_set_is_wholly_aligned_with_itself_and_with_itself_made_wider(debiased: bool) -> None:
    rows = embeddings(12, 5, seed=0)
    wider = torch.cat([rows, torch.zeros(12, 3)], dim=1)
    for other in (rows, wider, rows.float()):
        perfect = {"cka": 1.0, "rank_correlation": 1.0, "neighbor_overlap": 1.0}
        assert relational_alignment(rows, other, neighbors=3, debiased=debiased) == same(perfect)


def test_opposite_similarities_have_a_rank_correlation_of_minus_1() -> None:
    angles = torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64)  # pairs by nearness: 0-1, 1-2, 0-2
    opposite = torch.tensor([0.0, 0.5, 0.1], dtype=torch.float64)  # 0-2, 1-2, 0-1
    student, teacher = (torch.stack([a.cos(), a.sin()], dim=1) for a in (angles, opposite))
    assert relational_alignment(student, teacher, neighbors=1)["rank_correlation"] == pytest.approx(-1.0, abs=1e-9)


def test_more_neighbors_than_other_examples_overlap_wholly() -> None:
    assert relational_alignment(*related(6), neighbors=100)["neighbor_overlap"] == 1.0


def test_unrelated_sets_share_about_the_neighbors_that_chance_gives() -> None:
    measured = relational_alignment(embeddings(300, 16, seed=1), embeddings(300, 16, seed=2))
    assert measured["neighbor_overlap"] == pytest.approx(10 / 299, abs=0.02)
    assert measured["rank_correlation"] == pytest.approx(0.0, abs=0.05)


def test_few_wide_unrelated_embeddings_have_a_cka_near_0_that_the_classic_one_puts_near_1() -> None:
    debiased, classic = [], []
    for seed in range(10):
        student, teacher = embeddings(20, 512, seed=seed), embeddings(20, 512, seed=100 + seed)
        debiased.append(relational_alignment(student, teacher)["cka"])
        classic.append(relational_alignment(student, teacher, debiased=False)["cka"])
    assert max(map(abs, debiased)) < 0.25 and np.mean(debiased) == pytest.approx(0.0, abs=0.08)
    assert min(debiased) < 0 and min(classic) > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("blocks", [False, True])
def test_a_set_of_any_dtype_has_the_alignment_of_its_values(
    dtype: torch.dtype, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks:
        in_blocks_of(16, monkeypatch)
    student, teacher = (rows.to(dtype) for rows in related(50))
    measured = relational_alignment(student, teacher)
    assert measured == relational_alignment(student.double(), teacher.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relational_alignment(student, teacher) == measured


def test_arrays_and_lists_are_sets_too() -> None:
    student, teacher = related(50)
    expected = relational_alignment(student, teacher)
    assert relational_alignment(student.numpy(), teacher.numpy()) == expected
    assert relational_alignment(student, teacher.numpy().tolist()) == pytest.approx(expected, abs=1e-6)


def test_the_sets_are_only_read() -> None:
    student, teacher = (rows.requires_grad_() for rows in related(50))
    before = student.detach().clone(), teacher.detach().clone()
    relational_alignment(student, teacher)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@pytest.mark.parametrize("neighbors", [1, 10, 49])
@pytest.mark.parametrize("size", [1, 7, 16, 49, 50, 64])
def test_blocks_give_what_whole_matrices_give(size: int, neighbors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = signs(50, 16, seed=1), signs(50, 64, seed=2)
    teacher[:, :16] = student
    whole = relational_alignment(student, teacher, neighbors=neighbors)
    in_blocks_of(size, monkeypatch)
    blocks = relational_alignment(student, teacher, neighbors=neighbors)
    assert blocks["neighbor_overlap"] == whole["neighbor_overlap"]
    assert blocks == same(whole)


@pytest.mark.parametrize(
    ("count", "size", "tolerance"), [(2, 1, 1e-6), (3, 2, 1e-6), (50, 16, 1e-4), (1000, 256, 1e-6), (1000, 333, 1e-6)]
)
def test_blocks_are_as_near_to_the_definitions_as_the_steps_of_their_similarities(
    count: int, size: int, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = related(count, (12, 20))
    in_blocks_of(size, monkeypatch)
    measured, expected = (compare(student, teacher, 5, True) for compare in (relational_alignment, naive))
    swaps = 2 / (5 * count) if count > 3 else 0.0  # a neighbour that ties with the next
    assert measured["neighbor_overlap"] == pytest.approx(expected["neighbor_overlap"], abs=swaps + 1e-9)
    assert measured["rank_correlation"] == pytest.approx(expected["rank_correlation"], abs=tolerance, nan_ok=True)
    assert measured["cka"] == pytest.approx(expected["cka"], abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("count", [2, 3])
def test_fewer_than_4_examples_have_no_debiased_cka(count: int) -> None:
    assert math.isnan(relational_alignment(*related(count))["cka"])
    assert relational_alignment(*related(count), debiased=False)["cka"] > 0
    assert not math.isnan(relational_alignment(*related(4))["cka"])


@pytest.mark.parametrize("blocks", [False, True])
def test_one_pair_and_similarities_that_are_all_the_same_have_no_rank_correlation(
    blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks:
        in_blocks_of(4, monkeypatch)
    others = embeddings(9, 5, seed=0)
    same_for_all = embeddings(1, 700, seed=1).abs().expand(9, 700) * torch.arange(1, 10)[:, None]
    assert math.isnan(relational_alignment(*related(2))["rank_correlation"])
    for alike in (same_for_all, torch.eye(9), torch.zeros(9, 3)):
        measured = relational_alignment(alike, others, neighbors=2), relational_alignment(others, alike, neighbors=2)
        assert all(math.isnan(each["rank_correlation"]) for each in measured)
        assert all(each["neighbor_overlap"] == pytest.approx(2 / 8) for each in measured)  # all 8 are neighbours


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e-150, 1e150])
def test_a_collapsed_set_is_aligned_with_nothing(scale: float, debiased: bool) -> None:
    collapsed, others = scale * embeddings(1, 5, seed=1).expand(777, 5), embeddings(777, 3, seed=0)
    assert relational_alignment(collapsed, others, debiased=debiased)["cka"] == 0.0
    assert relational_alignment(others, collapsed, debiased=debiased)["cka"] == 0.0
    assert relational_alignment(collapsed, collapsed, debiased=debiased)["cka"] == 0.0


def test_pairs_that_are_all_alike_have_a_debiased_cka_of_0() -> None:
    others, outlier = embeddings(40, 5, seed=0), torch.zeros(40, 3, dtype=torch.float64)
    outlier[7] = torch.tensor([0.1, 0.7, -0.3])
    for alike in (0.3 * torch.eye(40), outlier):
        assert relational_alignment(alike, others)["cka"] == 0.0
        assert relational_alignment(alike, others, debiased=False)["cka"] > 0.01


def test_a_small_spread_far_from_0_is_no_collapse() -> None:
    student, teacher = related(50)
    expected = relational_alignment(student, teacher)["cka"]
    assert relational_alignment(1.0 + 1e-8 * student, teacher)["cka"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher", "shapes"),
    [
        ((4, 3), (5, 3), r"\(4, 3\) and \(5, 3\)"),
        ((1, 3), (1, 3), r"\(1, 3\) and \(1, 3\)"),
        ((0, 3), (0, 3), r"\(0, 3\) and \(0, 3\)"),
        ((4, 3, 1), (4, 3), r"\(4, 3, 1\) and \(4, 3\)"),
        ((4,), (4,), r"\(4,\) and \(4,\)"),
    ],
)
def test_sets_that_cannot_be_compared_are_an_error_that_gives_their_shapes(
    student: tuple[int, ...], teacher: tuple[int, ...], shapes: str
) -> None:
    with pytest.raises(ValueError, match=f"two sets of the same 2 or more examples.* got {shapes}"):
        relational_alignment(torch.randn(student), torch.randn(teacher))


def test_embeddings_without_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 or more wide, got \(4, 3\) and \(4, 0\)"):
        relational_alignment(torch.randn(4, 3), torch.randn(4, 0))


@pytest.mark.parametrize("name", ["student", "teacher"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_an_error_that_names_the_set(name: str, value: float) -> None:
    sets = dict(zip(("student", "teacher"), related(5), strict=True))
    sets[name][1:3, 2] = value
    with pytest.raises(ValueError, match=f"`{name}` must be finite, got nan or infinity in 2 of 5 embeddings"):
        relational_alignment(**sets)


def test_fewer_than_one_neighbor_is_refused() -> None:
    with pytest.raises(ValueError, match="`neighbors` must be at least 1, got 0"):
        relational_alignment(torch.randn(5, 3), torch.randn(5, 3), neighbors=0)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [False, True])
def test_a_gpu_gives_what_a_cpu_gives(blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocks:
        in_blocks_of(16, monkeypatch)
    student, teacher = signs(50, 16, seed=1), signs(50, 64, seed=2)
    teacher[:, :16] = student
    assert relational_alignment(student.cuda(), teacher) == same(relational_alignment(student, teacher))


# ---- At each evaluation: the student as it is saved against its teacher ----

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
        assert len(log._kept) <= 20
    kept = log._kept[:, 0]
    assert kept[0] == 0 and len(set(kept.diff().tolist())) == 1, "evenly spread"
    assert log._kept.shape == (len(kept), 4) and torch.equal(log._kept[:, 3], kept)


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


def test_outputs_carry_the_pooled_embedding_where_it_is_asked_for_alone(tmp_path: Path) -> None:
    student, pixels = trainer(tmp_path).model, Images(4).pixels
    for mode in (True, False):
        student.train(mode)
        assert student(pixels, with_relational_embedding=True)["relational_pooled"].shape == (4, 16)
        assert "relational_pooled" not in student(pixels)


# ---- Whether the student's row finds its own teacher's ----


def naive_retrieval(student: Tensor, teacher: Tensor) -> dict[str, float]:
    found = {1: 0, 10: 0}
    for number, row in enumerate(student):
        cosines = [float(row @ other / (row.norm() * other.norm())) for other in teacher]
        place = sum(cosine > cosines[number] + 1e-5 for cosine in cosines)
        for most in found:
            found[most] += place < most
    return {f"teacher_retrieval@{most}": count / len(student) for most, count in found.items()}


@pytest.mark.parametrize("block", [1024, 7])
@pytest.mark.parametrize("count", [2, 60])
def test_retrieval_is_that_of_a_loop_over_all_pairs(count: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_rrd.results.alignment.BLOCK", block)
    teacher = embeddings(count, 8, seed=1)
    student = 3 * (teacher + embeddings(count, 8, seed=2))
    found = teacher_retrieval(student, teacher)
    assert found == pytest.approx(naive_retrieval(student, teacher))
    assert count == 2 or 0.1 < found["teacher_retrieval@1"] < found["teacher_retrieval@10"] < 1


def test_a_student_in_its_teachers_place_finds_all_and_one_elsewhere_none() -> None:
    rows = embeddings(50, 8, seed=1)
    assert teacher_retrieval(rows.float(), 7 * rows) == {"teacher_retrieval@1": 1.0, "teacher_retrieval@10": 1.0}
    assert teacher_retrieval(-rows, rows) == {"teacher_retrieval@1": 0.0, "teacher_retrieval@10": 0.0}
    assert teacher_retrieval(torch.zeros_like(rows), rows)["teacher_retrieval@10"] == 0.0  # not a tie with all


def test_copies_of_a_teachers_row_do_not_come_before_it() -> None:
    rows = embeddings(5, 8, seed=1).repeat(12, 1)  # each twelve times
    assert teacher_retrieval(rows, rows)["teacher_retrieval@1"] == 1.0
    noisy = rows + 1e-7 * embeddings(60, 8, seed=2)
    assert teacher_retrieval(rows, noisy)["teacher_retrieval@1"] == 1.0
    other = rows.roll(1, 0)  # the row of another: its twelve come first
    assert teacher_retrieval(other, rows) == {"teacher_retrieval@1": 0.0, "teacher_retrieval@10": 0.0}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((embeddings(1, 8, 0), embeddings(1, 8, 0)), "two sets of the same 2 or more examples"),
        ((embeddings(3, 8, 0), embeddings(4, 8, 0)), "two sets of the same 2 or more examples"),
        ((embeddings(3, 8, 0) / 0, embeddings(3, 8, 0)), "`student` must be finite, got nan or infinity in 3 of 3"),
    ],
)
def test_retrieval_refuses_what_are_no_rows_of_the_same_examples(rows: tuple[Tensor, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        teacher_retrieval(*rows)


def retrieved(metrics: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("eval_"): value for name, value in metrics.items() if "retrieval" in name}


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ({}, 24),
        ({"teacher_projection": "center", "student_projection": "centered"}, 24),
        ({"teacher_projection": "pca", "projection_dim": 12}, 12),
        ({"teacher_projection": "center", "matryoshka_dims": [4, 9]}, 9),
    ],
    ids=repr,
)
def test_an_evaluation_says_how_many_projected_rows_find_their_own_teachers(
    tmp_path: Path, settings: dict[str, Any], width: int
) -> None:
    data, teacher = Images(40, seed=3), tiny_vit(width=24, seed=1)
    run = trainer(tmp_path, teacher=teacher, eval_dataset=data, alignment_examples=100, max_steps=9, **settings)
    run.train()
    found = retrieved(run.evaluate())
    with torch.no_grad():
        pooled, rows = (model.eval().vit(data.pixels).last_hidden_state[:, 0] for model in (run.model, teacher))
        projected, target = run.distillation.head(pooled), run.distillation.projection(rows)
    assert found == pytest.approx(naive_retrieval(projected[:, :width], target[:, :width]))
    assert 0 < found["teacher_retrieval@1"] < found["teacher_retrieval@10"] < 1
    run.args.per_device_eval_batch_size = 3
    assert retrieved(run.evaluate()) == found


def test_retrieval_is_among_as_many_examples_as_the_settings_say(tmp_path: Path) -> None:
    data, teacher = Images(41, seed=3), tiny_vit(width=24, seed=1)
    run = trainer(tmp_path, teacher=teacher, eval_dataset=data, alignment_examples=11)
    some = data.pixels[torch.arange(0, 41, 4)]
    with torch.no_grad():
        pooled, rows = (model.eval().vit(some).last_hidden_state[:, 0] for model in (run.model, teacher))
        expected = naive_retrieval(run.distillation.head(pooled), rows)
    assert retrieved(run.evaluate()) == pytest.approx(expected)


def test_without_training_examples_to_measure_there_is_no_retrieval(tmp_path: Path) -> None:
    for projection, known in (("none", True), ("center", False)):
        run = trainer(tmp_path, train_dataset=None, teacher_projection=projection, alignment_examples=8)
        metrics = run.evaluate(Images(8))
        assert ("eval_teacher_retrieval@1" in metrics) == known and "eval_alignment_cka" in metrics


def test_the_best_model_may_be_the_one_whose_rows_find_their_teachers(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        eval_dataset=Images(40, seed=3),
        alignment_examples=40,
        metric_for_best_model="teacher_retrieval@10",
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=4,
    )
    run.train()
    values = [entry["eval_teacher_retrieval@10"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(values) == 4 and run.state.best_metric == max(values) and run.args.greater_is_better
    assert run.evaluate()["eval_teacher_retrieval@10"] == max(values)
    run.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "teacher_retrieval@1 " in card and "teacher_retrieval@10 " in card


@pytest.mark.parametrize(("length", "count"), [(1, 1), (5, 9), (9, 5), (10, 3), (7, 1)])
def test_evenly_takes_the_first_the_last_and_none_twice(length: int, count: int) -> None:
    rows = evenly_spaced(length, count)
    assert len(rows) == len(set(rows.tolist())) == min(length, count)
    assert rows[0] == 0 and (len(rows) == 1 or rows[-1] == length - 1)


def _evaluate(rank: int, processes: int, port: int, folder: str) -> None:
    be_process(rank, processes, port)
    torch.set_num_threads(1)
    run = trainer(folder, eval_dataset=Images(21, seed=3), alignment_examples=12, per_device_eval_batch_size=4)
    metrics = run.evaluate()
    found = reported(metrics) | retrieved(metrics)
    Path(folder, f"{processes}-{rank}.txt").write_text(repr(found))


@pytest.mark.slow
def test_two_processes_compare_what_one_does(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    for processes in (1, 2):
        run_together(context, _evaluate, processes, str(tmp_path))
    one, first, second = (eval((tmp_path / name).read_text()) for name in ("1-0.txt", "2-0.txt", "2-1.txt"))
    assert first == second
    assert first == pytest.approx(one, abs=1e-5)
