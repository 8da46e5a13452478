"""Several real processes do what one does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed_worker import SCENARIOS, STEPS, layers_alone, run, run_alone
from tests.processes import context, run_together


class Results(dict[str, dict[str, Tensor]]):
    """What each process ends with, by `scenario-rank-of-processes`: run once one is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, key: str) -> dict[str, Tensor]:
        fast = key.split("-")[0] in FAST
        scenarios = [name for name in SCENARIOS if (name in FAST) == fast]
        for processes in (1, 2, 4):
            run_together(context(), run, processes, str(self.folder), scenarios)
        self.update({path.stem: load_file(path) for path in self.folder.glob("*-of-*")})
        return self[key]


SHARED_BANK = [name for name in SCENARIOS if name != "no bank"]
# The first scenarios are among the fast tests.
FAST = ["plain", "no bank", "the defaults"]
SEVERAL = [
    pytest.param(name, processes, marks=[] if name in FAST else pytest.mark.slow)
    for name, (_, most) in SCENARIOS.items()
    for processes in (2, 4)
    if processes <= most
]
SEVERAL_SHARE = [each for each in SEVERAL if each.values[0] in SHARED_BANK]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize(("scenario", "processes"), SEVERAL)
def test_processes_end_bitwise_equal_to_each_other(results: Results, scenario: str, processes: int) -> None:
    first, *others = [results[f"{scenario}-{rank}-of-{processes}"] for rank in range(processes)]
    for other in others:
        assert [name for name in first if not torch.equal(first[name], other[name])] == []


@pytest.mark.parametrize(("scenario", "processes"), SEVERAL_SHARE)
def test_processes_train_the_student_that_one_trains(results: Results, scenario: str, processes: int) -> None:
    one, several = results[f"{scenario}-0-of-1"], results[f"{scenario}-0-of-{processes}"]
    assert len(one["gradients"]) == len(several["gradients"]) == STEPS
    for name in ("student", "gradients", "log", "eval"):
        assert ((one[name] - several[name]).abs() / one[name].abs().clamp(min=1)).max() < 1e-5, name


@pytest.mark.parametrize(("scenario", "processes"), SEVERAL)
def test_an_evaluations_loss_is_the_weighted_sum_of_its_terms(results: Results, scenario: str, processes: int) -> None:
    loss, total = results[f"{scenario}-0-of-{processes}"]["eval_total"]  # 19 examples, which leave a last batch short
    assert abs(loss - total) < 1e-5


@pytest.mark.parametrize(("scenario", "processes"), SEVERAL_SHARE)
def test_the_bank_holds_the_rows_of_all_processes_in_the_order_of_one(
    results: Results, scenario: str, processes: int
) -> None:
    one, several = results[f"{scenario}-0-of-1"]["bank"], results[f"{scenario}-0-of-{processes}"]["bank"]
    settings = SCENARIOS[scenario][0]
    assert one.shape == several.shape == (settings.get("bank_size", 48), settings.get("projection_dim", 20))
    assert (one.float() - several.float()).abs().max() < 1e-6


@pytest.mark.parametrize(("scenario", "processes"), SEVERAL)
def test_a_step_gathers_its_rows_once_and_the_sizes_of_its_micro_batches(
    results: Results, scenario: str, processes: int
) -> None:
    found = results[f"{scenario}-0-of-{processes}"]
    assert len(found["gathered_numbers"]) == STEPS
    assert len(found["gathered_rows"]) == (STEPS if scenario in SHARED_BANK else 0)
    examples, rows = (found[name].sum().item() for name in ("examples", "gathered_rows"))
    padded = 4 * 6 if scenario == "the last batch is short on one process" else 0  # 4 of 8, in each of 6 epochs
    assert rows * processes == (examples + padded if scenario in SHARED_BANK else 0)


def found_by_two(folder: Path, case: str) -> list[Any]:
    """What each of two processes returns or raises."""
    run_together(context(), run_alone, 2, str(folder), case)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("other_lengths", "`train_dataset` must have one length on all processes, got [48, 44]. Give each"),
        (
            "other_lengths_of_evaluation_sets",
            "`eval_dataset` must have one length on all processes, got [{'a': 8, 'b'",
        ),
        ("other_lengths_of_streams", "`train_dataset` must have one length on all processes, got [20, 8]. Give"),
    ],
)
def test_data_of_another_length_on_one_process_is_an_error_on_all(tmp_path: Path, case: str, message: str) -> None:
    for found in found_by_two(tmp_path, case):
        assert found.startswith(message)


def test_processes_with_seeds_of_their_own_share_projection_and_bank(tmp_path: Path) -> None:
    first, second = found_by_two(tmp_path, "other_seeds")
    assert first == second


def test_processes_train_one_student_also_after_an_evaluation(tmp_path: Path) -> None:
    first, second = found_by_two(tmp_path, "evaluated_before")
    assert first == second
    assert first[0] == first[1]


def test_evaluators_ask_one_process_and_both_know_what_they_say(tmp_path: Path) -> None:
    first, second = found_by_two(tmp_path, "embedding_model")
    assert first == second
    assert first[0] == pytest.approx(first[1], abs=1e-5)


@pytest.mark.slow
def test_processes_train_by_the_last_layers_relations_alone_as_one_does(tmp_path: Path) -> None:
    first, second = found_by_two(tmp_path, "layers_alone")
    assert first == second
    assert first == pytest.approx(layers_alone(0, str(tmp_path), 1), abs=1e-6)
