"""Numbers in words, and the table of teacher and student."""

import pytest

from hf_rrd import compare_models
from hf_rrd.results.table import digits, rows_of, size
from tests.builders import Images, tiny_vit


@pytest.fixture(autouse=True)
def few_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_rrd.results.measure.MOST", 3)


def test_the_table_has_a_row_for_each_measure_and_the_ratio() -> None:
    report = compare_models(tiny_vit(), tiny_vit(width=24, seed=1), Images(40))
    table = report.table()
    assert [column.header for column in table.columns] == ["", "teacher", "student", "student / teacher"]
    assert table.row_count == 15
    sizes = [report.facts[name]["parameters"] for name in ("teacher", "student")]
    assert [list(column.cells)[0] for column in table.columns] == [
        "parameters",
        f"{sizes[0]:,}",
        f"{sizes[1]:,}",
        f"{sizes[1] / sizes[0]:.3g}",
    ]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (digits(0.012), "0.0120"),
        (digits(120.4), "120"),
        (digits(1234.5), "1,234"),
        (digits(0.66666, 4), "0.6667"),
        (size(999), "999 B"),
        (size(72_872), "72.9 kB"),
        (size(2.5e15), "2 PB"),
        (size(635_776, "FLOP"), "636 kFLOP"),
    ],
)
def test_numbers_are_written_with_so_many_digits_and_units(written: str, expected: str) -> None:
    assert written == expected


def test_what_was_not_measured_has_no_row_and_no_ratio() -> None:
    facts = {"teacher": {"parameters": 200, "latency_ms": {"1": {"median": 4.0, "p95": 5.0}}}, "student": {}}
    facts["student"] = {"parameters": 50, "accuracy": 0.5}
    assert rows_of(facts | {"agreement": 0.25}) == [
        ("parameters", "200", "50", "0.250"),
        ("latency, batch of 1, median", "4.00 ms", "", ""),
        ("latency, batch of 1, p95", "5.00 ms", "", ""),
        ("accuracy", "", "50.0 %", ""),
        ("same top class as the teacher", "", "25.0 %", ""),
    ]


def test_a_file_has_rows_of_its_own_with_the_teacher_beside_it() -> None:
    facts = {"teacher": {"parameters": 9, "bytes": 200, "accuracy": 0.75}, "student": {}}
    assert rows_of(facts | {"onnx": {"bytes": 50, "accuracy": 0.5, "agreement": 0.25}})[3:] == [
        ("ONNX file: weights", "200 B", "50.0 B", "0.250"),
        ("ONNX file: accuracy", "75.0 %", "50.0 %", ""),
        ("ONNX file: same top class as the student", "", "25.0 %", ""),
    ]
