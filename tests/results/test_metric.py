"""The alignment as a module of `evaluate`: from its folder, offline, whole and in pieces."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch
import yaml
from evaluate.loading import get_imports
from torch import Tensor

from hf_rrd import relational_alignment

FOLDER = Path(__file__).parents[2] / "examples" / "relational_alignment"


@pytest.fixture(scope="module")
def alignment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Loaded once; `evaluate` writes nothing outside a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_MODULES_CACHE", tmp_path_factory.mktemp("modules"))
        patch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path_factory.mktemp("metrics")))
        yield evaluate.load(str(FOLDER))


def sets(count: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(count, 7, generator=generator)
    return teacher[:, :5] + torch.randn(count, 5, generator=generator), teacher


def test_it_is_a_metric_of_its_name_whose_inputs_are_sequences_of_floats(alignment: Any) -> None:
    assert alignment.name == "relational_alignment" and alignment.module_type == "metric"
    assert sorted(alignment.features) == ["predictions", "references"]
    assert (
        alignment.description and "neighbors" in alignment.inputs_description and "kornblith2019" in alignment.citation
    )


@pytest.mark.parametrize("kind", ["tensors", "arrays", "lists", "bfloat16"])
def test_it_equals_the_function(kind: str, alignment: Any) -> None:
    student, teacher = sets()
    given: tuple[Any, Any] = student, teacher
    if kind == "arrays":
        given = student.numpy(), teacher.numpy()
    elif kind == "lists":
        given = student.tolist(), teacher.tolist()
    elif kind == "bfloat16":
        given = student, teacher = student.bfloat16().requires_grad_(), teacher.bfloat16()
    measured = alignment.compute(predictions=given[0], references=given[1])
    assert measured == relational_alignment(student, teacher)
    measured = alignment.compute(predictions=given[0], references=given[1], neighbors=3, debiased=False)
    assert measured == relational_alignment(student, teacher, neighbors=3, debiased=False)


@pytest.mark.parametrize("size", [1, 7, 25, 50])
def test_batches_added_in_pieces_are_measured_as_one_set(size: int, alignment: Any) -> None:
    student, teacher = sets()
    for start in range(0, 50, size):
        alignment.add_batch(predictions=student[start : start + size], references=teacher[start : start + size])
    assert alignment.compute(neighbors=4) == relational_alignment(student, teacher, neighbors=4)
    for own, other in zip(student, teacher, strict=True):
        alignment.add(prediction=own, reference=other)
    assert alignment.compute() == relational_alignment(student, teacher)


def test_combined_with_another_it_is_measured_over_all_batches(alignment: Any) -> None:
    student, teacher = sets()
    combined = evaluate.combine({"first": alignment, "second": evaluate.load(str(FOLDER))})
    for rows in (slice(0, 20), slice(20, 50)):
        combined.add_batch(predictions=student[rows], references=teacher[rows])
    expected = relational_alignment(student, teacher, neighbors=3)
    measured = combined.compute(neighbors=3)
    assert measured == {f"{name}_{key}": expected[key] for name in ("first", "second") for key in expected}


@pytest.mark.parametrize(
    ("predictions", "references", "options", "message"),
    [
        ([[1.0, 2.0]], [[1.0]], {}, r"2 or more examples.* got \(1, 2\) and \(1, 1\)"),
        ([[1.0], [2.0]], [[1.0], [2.0]], {"neighbors": 0}, "`neighbors` must be at least 1, got 0"),
        ([[1.0], [2.0]], [[1.0], [float("nan")]], {}, "`teacher` must be finite"),
        ([[1.0], [2.0, 3.0]], [[1.0], [2.0]], {}, "expected sequence of length 1 at dim 1"),
        ([[1.0], [2.0]], [[1.0], [2.0], [3.0]], {}, "Mismatch in the number of predictions"),
        ([1.0, 2.0], [[1.0], [2.0]], {}, "don't match the expected format"),
    ],
)
def test_an_error_comes_through_and_leaves_nothing_behind(
    predictions: list[Any], references: list[Any], options: dict[str, int], message: str, alignment: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        alignment.compute(predictions=predictions, references=references, **options)
    student, teacher = sets()
    assert alignment.compute(predictions=student, references=teacher) == relational_alignment(student, teacher)


def test_it_imports_only_what_evaluate_and_the_package_bring() -> None:
    packages = {name for _, name, _, _ in get_imports(str(FOLDER / "relational_alignment.py"))}
    assert packages == {"evaluate", "hf_rrd"}
    assert (FOLDER / "requirements.txt").read_text(encoding="utf-8").split() == ["hf_rrd"]


def test_the_card_is_that_of_a_space_and_its_example_gives_what_it_says(
    alignment: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---")[1])
    assert header["sdk"] == "static" and {"evaluate", "metric"} <= set(header["tags"])
    monkeypatch.chdir(FOLDER.parents[1])
    example = re.findall(r"```python\n(import evaluate\n.*?)```", card, re.DOTALL)[0]
    exec(example, {})
    assert capsys.readouterr().out.strip() == example.strip().splitlines()[-1].removeprefix("# ")
