"""The comparison of losses: its data, its runs and its arithmetic, on a task of random images."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import ttest_1samp

from tests.builders import tiny_vit

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> tuple[ModuleType, ModuleType]:
    """`comparison_tasks` and `compare_losses`, as a run of the script imports them; beside them `write_comparison`."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        importlib.import_module("write_comparison")
        return importlib.import_module("comparison_tasks"), importlib.import_module("compare_losses")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def task(modules: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch) -> Any:
    """60 random images in two views, of 4 classes, of which 15 count as labelled."""
    tasks, comparison = modules
    for module in modules:
        monkeypatch.setattr(module, "LABELED", 15)
    generator = torch.Generator().manual_seed(0)
    split = tasks.Split(
        {"pixel_values": torch.randn(60, 2, 3, 16, 16, generator=generator)},
        torch.arange(60) % 4,
        torch.randn(60, 2, 24, generator=generator),
        torch.randn(60, 2, 4, generator=generator),
    )
    settings = {"per_device_train_batch_size": 16, "max_steps": 2, "use_cpu": True}
    for settings_of_row in comparison.KNOBS.values():
        if "projection_dim" in settings_of_row:  # the teacher here is 24 wide
            monkeypatch.setitem(settings_of_row, "projection_dim", 8)
    return tasks.Task(split, split, split, lambda seed: tiny_vit(seed=seed), settings, Path("none"))


def test_with_few_labels_a_quarter_of_the_examples_is_labelled(
    modules: tuple[ModuleType, ModuleType], task: Any
) -> None:
    examples = modules[0].examples_of(task.train, "few", distils=True)
    labels = torch.stack([examples[index]["labels"] for index in range(len(examples))])
    assert len(examples) == 60 + 15
    assert (labels != -100).sum() == 15 + 15  # once among all, and once more
    plain = modules[0].examples_of(task.train, "few", distils=False)
    assert [int(plain[index]["labels"]) for index in range(len(plain))] == [index % 4 for index in range(15)]


def test_inputs_and_teacher_outputs_are_of_one_view(modules: tuple[ModuleType, ModuleType], task: Any) -> None:
    examples = modules[0].examples_of(task.train, "none", distils=True)
    assert "labels" not in examples[0]
    seen = set()
    for _ in range(20):
        example = examples[5]
        view = 0 if torch.equal(example["pixel_values"], task.train.inputs["pixel_values"][5, 0]) else 1
        assert torch.equal(example["teacher_embedding"], task.train.embedding[5, view])
        assert torch.equal(example["teacher_logits"], task.train.logits[5, view])
        seen.add(view)
    assert seen == {0, 1}


def test_the_task_loss_is_the_mean_over_labelled_examples(modules: tuple[ModuleType, ModuleType]) -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, -100, 2, -100, 1])
    expected = F.cross_entropy(logits[[0, 2, 4]], labels[[0, 2, 4]])
    assert torch.isclose(modules[1].task_loss({"logits": logits}, labels), expected)
    assert modules[1].task_loss({"logits": logits}, torch.full((5,), -100)) == 0


@pytest.mark.slow
def test_every_row_trains_without_labels_and_every_regime_trains(
    modules: tuple[ModuleType, ModuleType], task: Any
) -> None:
    _, comparison = modules
    rows = comparison.methods({name: weights[1] for name, weights in comparison.WEIGHTS.items()})
    assert len(rows) == 2 + 2 * len(comparison.RELATIONAL) + len(comparison.KNOBS)
    for regime in comparison.REGIMES:
        for name, settings in rows.items():
            if (regime, name) == ("none", "plain") or (regime != "none" and name not in ("plain", "KD", "rrd")):
                continue
            figures = comparison.train(task, comparison.run_of(regime, settings, seed=0), None)
            assert 0 <= figures["accuracy"] <= 100
            assert ("probe" in figures) == (regime == "none")


def test_the_interval_is_that_of_a_t_test(modules: tuple[ModuleType, ModuleType]) -> None:
    values = [1.0, 2.5, -0.5, 3.0, 1.5]
    mean, half = modules[1].interval(values)
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))


class Recorder:
    """A pool that writes down what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def submit(self, function: Any, args: Any, run: Any) -> Any:
        from concurrent.futures import Future

        self.asked.append(run)
        future: Future[None] = Future()
        future.set_result(None)
        return future


def test_a_finished_run_is_not_trained_again(modules: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    _, comparison = modules
    args = comparison.Arguments(task="sst2", output_dir=str(tmp_path))
    first, second = comparison.run_of("all", {}, 0), comparison.run_of("all", {}, 1)
    path = comparison.path_of(args, first)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**vars(first), "accuracy": 50.0}))
    pool = Recorder()
    comparison.finish_all(args, pool, [first, second, second])
    assert pool.asked == [second]


def test_differences_are_paired_by_seed_and_the_weight_is_chosen_on_validation(
    modules: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    _, comparison = modules
    args = comparison.Arguments(task="sst2", output_dir=str(tmp_path), seeds=3, kd_seeds=0, rows=["plain", "rrd"])

    def finished(run: Any, accuracy: float) -> None:
        path = comparison.path_of(args, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**vars(run), "accuracy": accuracy, "cka": 0.5, "neighbor_overlap": 10.0}))

    for accuracy, (_, run) in zip((60.0, 59.0, 61.0, 58.0), comparison.tuning_runs("rrd"), strict=True):
        finished(run, accuracy)
    assert comparison.chosen_weights(args)["rrd"] == 3.0
    for seed, (plain, distilled) in enumerate(((70.0, 71.0), (72.0, 75.0), (71.0, 73.0))):
        finished(comparison.run_of("all", {"relational_weight": 0.0}, seed), plain)
        finished(comparison.run_of("all", comparison.methods(comparison.chosen_weights(args))["rrd"], seed), distilled)
    plan = comparison.planned(args, comparison.chosen_weights(args))
    (row,) = [each for each in comparison.summarize(args, plan) if each["method"] == "rrd"]
    assert (row["seeds"], row["score"], row["difference"]) == (3, 73.0, 2.0)
    assert row["half_interval"] == pytest.approx(4.302653 * 1.0 / 3**0.5, rel=1e-5)
    comparison.report(args, plan, comparison.chosen_weights(args))
    assert (tmp_path / "sst2" / "summary.csv").read_text().count("\n") == 3


def test_a_page_holds_the_figures_of_the_table(modules: tuple[ModuleType, ModuleType]) -> None:
    common = {"probe_few": "", "cka": "0.5", "neighbor_overlap": "9.6"}
    rows = [
        {"regime": "few", "method": "plain", "seeds": "3", "score": "60", "deviation": "1"}
        | {"difference": "0", "half_interval": "0", **common},
        {"regime": "few", "method": "rrd", "seeds": "3", "score": "70.25", "deviation": "0.5"}
        | {"difference": "10.25", "half_interval": "2.25", **common},
        {"regime": "all", "method": "rrd", "seeds": "1", "score": "90", "deviation": "nan"}
        | {"difference": "nan", "half_interval": "nan", **common},
    ]
    page = sys.modules["write_comparison"].page("sst2", rows)
    everything, few, none = page.split("\n## ")[1:]
    assert "| rrd | 70.2 ± 0.5 | +10.2 ± 2.2 |  | 0.50 | 10 | 3 |" in few
    assert "| plain | 60.0 ± 1.0 |  |" in few and "90.0" not in few
    assert "| rrd | 90.0 | +nan |" in everything and "| rrd" not in none


def test_the_mean_over_regimes_is_paired_by_seed_and_wants_all_regimes(
    modules: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    _, comparison = modules
    args = comparison.Arguments(task="sst2", output_dir=str(tmp_path))
    folder = comparison.path_of(args, comparison.run_of("all", {}, 0)).parent
    folder.mkdir(parents=True)
    plan = []
    ours = {(0, "all"): 80, (0, "few"): 60, (0, "none"): 70, (1, "all"): 82, (1, "few"): 64, (1, "none"): 70}
    for name, weight, gains in (("rrd", 1.0, (0, 0)), ("other", 2.0, (1, 4)), ("unfinished", 3.0, (9, 9))):
        for (seed, regime), score in ours.items():
            run = comparison.run_of(regime, {"relational_weight": weight}, seed)
            plan.append((regime, name, run))
            if (name, seed, regime) != ("unfinished", 1, "none"):
                value = score + gains[seed] * (3 if regime == "none" else 0)  # by that much over three regimes
                figures = {"accuracy": value, "probe": value} if regime == "none" else {"accuracy": value}
                comparison.path_of(args, run).write_text(json.dumps({**vars(run), **figures}))
    (other, mean, gain, error), rrd = comparison.over_regimes(args, plan)
    assert (other, rrd[0], rrd[2:]) == ("other", "rrd", (0, 0))
    assert mean == pytest.approx(71 + 2.5)
    assert (gain, error) == pytest.approx((2.5, 1.5))  # gains of 1 and 4
