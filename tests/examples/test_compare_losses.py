"""The comparison of losses: its data, its runs and its arithmetic, on a task of random images and one of sentences."""

import dataclasses
import importlib
import json
import sys
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr, ttest_1samp
from transformers import BertConfig, BertModel, set_seed

from hf_rrd import RelationalDistillationConfig
from tests.builders import tiny_vit

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
Modules = tuple[ModuleType, ModuleType]


@pytest.fixture(scope="module")
def modules() -> Modules:
    """`comparison_tasks` and `compare_losses`, as a run of the script imports them; beside them `write_comparison`."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        importlib.import_module("write_comparison")
        return importlib.import_module("comparison_tasks"), importlib.import_module("compare_losses")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def task(modules: Modules, monkeypatch: pytest.MonkeyPatch) -> Any:
    """60 random images in two views, of 4 classes, of which 15 count as labelled."""
    tasks, _ = modules
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
    return tasks.Task(split, split, split, lambda seed: tiny_vit(seed=seed), settings, "cls")


@pytest.fixture
def sentences(modules: Modules) -> Any:
    """40 random sentences without labels, 12 pairs with a score, and a probe of two classes."""
    tasks, _ = modules
    generator = torch.Generator().manual_seed(0)

    def split(count: int, views: int, labels: Any = None, taught: bool = False) -> Any:
        tokens = torch.randint(1, 20, (count, views, 5), generator=generator)
        embedding = torch.randn(count, views, 24, generator=generator) if taught else None
        return tasks.Split({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, labels, embedding)

    def student(seed: int) -> BertModel:
        set_seed(seed)
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return BertModel(BertConfig(vocab_size=20, **size), add_pooling_layer=False)

    scores = torch.rand(12, generator=generator)
    probes = {"trec": (split(20, 1, torch.arange(20) % 2), split(10, 1, torch.arange(10) % 2))}
    settings = {"per_device_train_batch_size": 16, "max_steps": 2, "use_cpu": True}
    pairs = [split(12, 2, scores), split(12, 2, scores)]
    return tasks.Task(split(40, 1, taught=True), *pairs, student, settings, "mean", probes=probes)


def test_with_few_labels_a_quarter_of_the_examples_is_labelled(modules: Modules, task: Any) -> None:
    examples = modules[0].examples_of(task, "few", distils=True)
    labels = torch.stack([examples[index]["labels"] for index in range(len(examples))])
    assert len(examples) == 60 + 15
    assert (labels != -100).sum() == 15 + 15  # once among all, and once more
    plain = modules[0].examples_of(task, "few", distils=False)
    assert [int(plain[index]["labels"]) for index in range(len(plain))] == [index % 4 for index in range(15)]


def test_inputs_and_teacher_outputs_are_of_one_view(modules: Modules, task: Any) -> None:
    examples = modules[0].examples_of(task, "none", distils=True)
    assert "labels" not in examples[0]
    seen = set()
    for _ in range(20):
        example = examples[5]
        view = 0 if torch.equal(example["pixel_values"], task.train.inputs["pixel_values"][5, 0]) else 1
        assert torch.equal(example["teacher_embedding"], task.train.embedding[5, view])
        assert torch.equal(example["teacher_logits"], task.train.logits[5, view])
        seen.add(view)
    assert seen == {0, 1}


def test_a_teacher_without_a_head_has_no_logits_among_the_columns(modules: Modules, sentences: Any) -> None:
    example = modules[0].examples_of(sentences, "none", distils=True)[0]
    assert example.keys() == {"input_ids", "attention_mask", "teacher_embedding"}


def test_teacher_outputs_are_read_once(modules: Modules, tmp_path: Path) -> None:
    rows, calls = {"input_ids": torch.arange(600)[:, None]}, []

    def read(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, None]:
        calls.append(len(batch["input_ids"]))
        return batch["input_ids"].float(), None

    for _ in range(2):
        embedding, logits = modules[0].teacher_outputs(read, rows, tmp_path / "out" / "teacher.safetensors")
        assert torch.equal(embedding, torch.arange(600.0)[:, None])
        assert logits is None
    assert calls == [256, 256, 88]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["teacher.safetensors"]


def test_the_task_loss_is_the_mean_over_labelled_examples(modules: Modules) -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, -100, 2, -100, 1])
    expected = F.cross_entropy(logits[[0, 2, 4]], labels[[0, 2, 4]])
    assert torch.isclose(modules[1].task_loss({"logits": logits}, labels), expected)
    assert modules[1].task_loss({"logits": logits}, torch.full((5,), -100)) == 0


@pytest.mark.slow
def test_every_row_trains_without_labels_and_every_regime_trains(modules: Modules, task: Any) -> None:
    _, comparison = modules
    rows = comparison.rows_of(comparison.Arguments(), {name: w[1] for name, (_, w) in comparison.RIVALS.items()})
    assert [*rows] == ["plain", *comparison.RIVALS, "ours"]
    for regime in comparison.REGIMES:
        for name, (settings, package) in rows.items():
            if (regime, name) == ("none", "plain") or (regime != "none" and name not in ("plain", "KD", "ours")):
                continue
            figures = comparison.train(task, comparison.run_of(regime, settings, seed=0, package=package))
            assert 0 <= figures["accuracy"] <= 100
            assert figures["score"] == figures["probe" if regime == "none" else "accuracy"]


def test_without_labels_a_student_is_read_where_it_was_compared(modules: Modules, task: Any) -> None:
    _, comparison = modules
    compared, alone = ({"relational_loss": "mse", "relational_weight": 1.0}, {"kd_weight": 1.0})
    for settings, asks in ((compared, True), (alone, False)):
        trainer = comparison.trained(task, comparison.run_of("none", settings, 0))
        own, projected, logits = comparison.read(trainer, task.test, view=1)
        with torch.no_grad():
            pixels = task.test.inputs["pixel_values"][:, 1]
            torch.testing.assert_close(own, trainer.model.vit(pixels).last_hidden_state[:, 0])
            torch.testing.assert_close(logits, trainer.model(pixels).logits)
        assert (projected is not None) == asks
    assert trainer.distillation.head is None


def test_sentences_are_scored_by_correlation_in_both_spaces_and_probed_for_the_tables_alone(
    modules: Modules, sentences: Any
) -> None:
    _, comparison = modules
    settings = {"relational_loss": "mse", "relational_weight": 1.0}
    run = comparison.run_of("none", settings, 0)
    figures = comparison.train(sentences, run)
    trainer = comparison.trained(sentences, run)
    with torch.no_grad():
        tokens, one = sentences.test.inputs, trainer.distillation.head.projection
        own = [
            trainer.model(tokens["input_ids"][:, view], tokens["attention_mask"][:, view]).last_hidden_state.mean(1)
            for view in (0, 1)
        ]
        for name, pair in (("own", own), ("projected", [one(each) for each in own])):
            expected = spearmanr(F.cosine_similarity(*pair), sentences.test.labels).statistic
            assert figures[name] == pytest.approx(100 * expected, abs=1e-3)
    assert figures["score"] == pytest.approx((figures["own"] + figures["projected"]) / 2)
    assert 0 <= figures["trec"] <= 100
    assert "trec" not in comparison.train(sentences, dataclasses.replace(run, split="validation"))


def test_a_longer_run_has_so_many_times_the_steps(modules: Modules, task: Any) -> None:
    trainer = modules[1].trained(task, modules[1].run_of("all", {}, 0), None, 3)
    assert trainer.state.global_step == 6


def test_the_interval_is_that_of_a_t_test(modules: Modules) -> None:
    values = [1.0, 2.5, -0.5, 3.0, 1.5]
    mean, half = modules[1].interval(values)
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))


class Recorder:
    """A pool that writes down what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def submit(self, function: Any, args: Any, task: str, run: Any) -> Any:
        self.asked.append(run)
        future: Future[None] = Future()
        future.set_result(None)
        return future


def finished(comparison: ModuleType, args: Any, task: str, run: Any, score: float, **figures: float) -> None:
    path = comparison.path_of(args, task, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**vars(run), "score": score, **figures}))


def test_a_finished_run_is_not_trained_again(
    modules: Modules, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, comparison = modules
    args = comparison.Arguments(output_dir=str(tmp_path))
    first, second = comparison.run_of("all", {}, 0), comparison.run_of("all", {}, 1)
    finished(comparison, args, "sst2", first, 50.0)
    pool = Recorder()
    comparison.finish_all(args, "sst2", pool, [first, second, second])
    assert pool.asked == [second]
    trained = []
    monkeypatch.setattr(comparison, "_task", task)
    monkeypatch.setattr(comparison, "train", lambda task, run, *how: trained.append(run) or {"score": 1.0})
    for _ in range(2):  # as another process that was asked for it too
        comparison.finish(args, "sst2", second)
    assert trained == [second]
    assert comparison.result(args, "sst2", second)["score"] == 1.0
    assert {file.suffix for file in comparison.path_of(args, "sst2", second).parent.iterdir()} == {".json"}


def test_runs_of_other_lengths_are_in_other_folders_and_the_weights_are_of_the_usual_length(
    modules: Modules, tmp_path: Path
) -> None:
    _, comparison = modules
    args = comparison.Arguments(output_dir=str(tmp_path))
    longer = dataclasses.replace(args, steps_factor=4)
    run = comparison.run_of("all", {}, 0)
    paths = [comparison.path_of(each, "sst2", run) for each in (args, longer, dataclasses.replace(args, max_steps=5))]
    assert [path.parent.name for path in paths] == ["runs", "runs-x4", "runs-5"]
    for score, (_, candidate) in zip((3.0, 1.0, 2.0, 0.0), comparison.candidates("sst2", "MSE"), strict=True):
        finished(comparison, args, "sst2", candidate, score)
    assert comparison.chosen_weights(longer, "sst2") == {"MSE": comparison.RIVALS["MSE"][1][0]}


def test_only_rows_of_ours_start_from_the_packages_defaults(
    modules: Modules, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, comparison = modules
    args = comparison.Arguments(row=['weight 3={"relational_weight": 3}'])
    rows = comparison.rows_of(args, {"MSE": 3.0})
    assert rows["plain"] == ({}, "")
    assert rows["MSE"] == ({"relational_loss": "mse", "relational_weight": 3.0}, "")
    assert rows["ours"][0] == {}
    assert rows["weight 3"][0] == {"relational_weight": 3}
    assert rows["weight 3"][1] == rows["ours"][1] == comparison.defaults_of_package()
    assert {"relational_weight", "student_pooling"} <= json.loads(comparison.defaults_of_package()).keys()
    seen = []

    def config(**settings: Any) -> Any:
        seen.append(settings)
        return RelationalDistillationConfig(**settings)

    monkeypatch.setattr(comparison, "RelationalDistillationConfig", config)
    for name in ("ours", "MSE"):
        settings, package = rows[name]
        comparison.trained(task, comparison.run_of("all", settings, 0, package=package), 1)
    ours, fixed = ({key: each[key] for key in {*comparison.FIXED, "student_pooling"} & each.keys()} for each in seen)
    assert ours == {}
    assert fixed == {**comparison.FIXED, "student_pooling": "cls", "relational_weight": 3.0}


def test_ours_of_other_defaults_or_other_code_is_another_run(modules: Modules) -> None:
    _, comparison = modules
    rows = [comparison.rows_of(comparison.Arguments(code=code), {}) for code in ("", "new")]
    runs = [
        {name: comparison.run_of("all", settings, 0, package=package) for name, (settings, package) in each.items()}
        for each in rows
    ]
    assert runs[0]["plain"].name == runs[1]["plain"].name
    assert runs[0]["ours"].name != runs[1]["ours"].name


def test_the_weight_is_chosen_for_each_task_on_its_own_validation_data(modules: Modules, tmp_path: Path) -> None:
    _, comparison = modules
    args, candidates = comparison.Arguments(output_dir=str(tmp_path)), comparison.RIVALS["cosine"][1]
    for task, scores, regime in (("sst2", (1, 4, 3, 2), "few"), ("sentences", (1, 2, 3, 4), "none")):
        assert comparison.chosen_weights(args, task) == {}
        runs = comparison.candidates(task, "cosine")
        for score, (_, run) in zip(scores, runs, strict=True):
            assert (run.regime, run.split, run.seed) == (regime, "validation", comparison.TUNING_SEED)
            finished(comparison, args, task, run, score)
        assert comparison.chosen_weights(args, task) == {"cosine": candidates[scores.index(4)]}


def test_the_tables_pair_by_seed_and_find_the_best_rival_of_each_cell(
    modules: Modules, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, comparison = modules
    args = comparison.Arguments(task=["sst2", "sst2_raw"], output_dir=str(tmp_path), seeds=3)
    for task in args.task:
        for name in ("KD", "MSE") if task == "sst2" else ("MSE",):
            for weight, run in comparison.candidates(task, name):
                finished(comparison, args, task, run, -weight if task == "sst2" else weight)
    scores = {
        ("sst2", "all", "plain"): (70.0, 72.0, 71.0),
        ("sst2", "all", "KD"): (70.0, 73.0, 70.0),
        ("sst2", "all", "MSE"): (73.0, 73.0, 73.0),
        ("sst2", "all", "ours"): (71.0, 75.0, 73.0),
        ("sst2", "few", "plain"): (60.0, 61.0, 62.0),
        ("sst2", "none", "ours"): (62.0, 63.5, 63.5),
        ("sst2_raw", "few", "MSE"): (60.0, 61.0, 62.0),
        ("sst2_raw", "few", "ours"): (65.0, 66.0, 67.0),
    }
    for task in args.task:
        for regime, name, run in comparison.planned(args, task, comparison.chosen_weights(args, task)):
            if (task, regime, name) in scores:
                finished(comparison, args, task, run, scores[task, regime, name][run.seed], cka=0.5)
    found = comparison.collected(args)
    row = next(r for r in comparison.summarized(found) if (r["regime"], r["row"]) == ("all", "ours"))
    assert (row["seeds"], row["score"], row["deviation"], row["difference"], row["cka"]) == (3, 73.0, 2.0, 2.0, 0.5)
    assert row["half_interval"] == pytest.approx(4.302653 * 1.0 / 3**0.5, rel=1e-5)
    lines = {line["cell"]: line for line in comparison.against(found, "ours")}
    assert lines["sst2 all"]["KD"] == pytest.approx((2.0, 4.302653 * 1.0 / 3**0.5))
    assert (lines["sst2 all"]["rival"], lines["sst2 all"]["best rival"][0]) == ("MSE", 0.0)
    assert lines["sst2 none"]["plain"] == pytest.approx((2.0, 4.302653 * 0.5 / 3**0.5))  # of few
    assert lines["sst2_raw few"]["rival"] == "MSE" and "KD" not in lines["sst2_raw few"]
    comparison.report(args)
    printed = capsys.readouterr().out
    assert "ours against KD: above in 0 of 1 cells, below in 0" in printed
    assert "ours against best rival: above in 1 of 2 cells, below in 0" in printed
    assert "mean +2.50, worst +0.00" in printed
    assert [line.split(": ")[1] for line in printed.splitlines() if "highest" in line] == ["none", "MSE"]
    assert (tmp_path / "cells.csv").read_text().count("\n") == 1 + len(scores)
    assert (tmp_path / "sst2" / "runs.csv").read_text().count("\n") == 1 + 3 * 6
    sys.modules["write_comparison"].main(
        sys.modules["write_comparison"].Arguments(str(tmp_path), str(tmp_path / "page" / "cells.md"))
    )
    page = (tmp_path / "page" / "cells.md").read_text()
    everything = page.split("\n## ")[1:]
    assert [part.partition("\n")[0].partition(",")[0] for part in everything].count("sst2") == 3
    assert "| ours | 73.0 ± 2.0 | +2.0 ± 2.5 | 0.50 | 3 | `{}` |" in page
    assert "| plain | 71.0 ± 1.0 |  | 0.50 | 3 |" in page
