"""Numbers in words: with their units, and as the table of teacher and student."""

from collections.abc import Callable
from typing import Any, NamedTuple

HEADER = ("", "teacher", "student", "student / teacher")


def digits(value: Any, count: int = 3) -> str:
    """So many digits that count, and more only before the point: 0.0120, 1.20, 120, 1,200."""
    if abs(value) < 10**count - 0.5 or abs(value) >= 1e12:
        return f"{value:#.{count}g}".rstrip(".")
    return f"{value:,.0f}"


whole = "{:,}".format
"""A number of things."""

decimal = "{:.3f}".format
"""A measure without a unit."""


def percent(value: Any) -> str:
    """A share from 0 to 1."""
    return f"{100 * value:.1f} %"


def size(value: Any, unit: str = "B") -> str:
    """Bytes, or another unit, in powers of 1,000."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5:
            return f"{digits(value)} {prefix}{unit}"
        value /= 1000
    return f"{value:,.0f} P{unit}"


class Measure(NamedTuple):
    """A row of the table: its title, how a value is written, and whether student / teacher is of interest."""

    title: str
    written: Callable[[Any], str]
    has_ratio: bool = False


ALIGNMENT = {
    "cka": Measure("CKA with the teacher", decimal),
    "rank_correlation": Measure("rank correlation with the teacher", decimal),
    "neighbor_overlap": Measure("nearest neighbours in common", percent),
}
"""The measures of `relational_alignment`, by their names there."""

_MEASURES = {
    "parameters": Measure("parameters", whole, True),
    "bytes": Measure("weights", size, True),
    "dtype": Measure("dtype", str),
    "flops": Measure("forward of one example", lambda flops: size(flops, "FLOP"), True),
    "latency_ms": Measure("latency", lambda ms: f"{digits(ms)} ms", True),  # by batch and kind, a row each
    "examples_per_second": Measure("examples per second", digits, True),
    "accuracy": Measure("accuracy", percent),
    "calibration_error": Measure("expected calibration error", percent),
}
"""Of each model, by their names among its facts."""


def rows_of(facts: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table of a `DistillationReport`: each measure among its facts, in the order of `HEADER`."""
    teacher, onnx = facts.get("teacher", {}), facts.get("onnx", {})
    rows = _measured(teacher, facts.get("student", {}))
    rows.append(_row(Measure("same top class as the teacher", percent), None, facts.get("agreement")))
    rows += [_row(measure, None, facts.get("alignment", {}).get(name)) for name, measure in ALIGNMENT.items()]
    of_file = [row for row in _measured(teacher, onnx) if row[2]]
    of_file.append(_row(Measure("same top class as the student", percent), None, onnx.get("agreement")))
    rows += [(f"ONNX file: {title}", old, new, ratio) for title, old, new, ratio in of_file]
    return [row for row in rows if any(row[1:])]


def _measured(teacher: dict[str, Any], student: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The rows of what each of the two has among its own facts."""
    rows = []
    for name, measure in _MEASURES.items():
        if name != "latency_ms":
            rows.append(_row(measure, teacher.get(name), student.get(name)))
            continue
        old, new = teacher.get(name, {}), student.get(name, {})
        for batch in {**old, **new}:
            for kind in ("median", "p95"):
                one = measure._replace(title=f"latency, batch of {batch}, {kind}")
                rows.append(_row(one, old.get(batch, {}).get(kind), new.get(batch, {}).get(kind)))
    return rows


def _row(measure: Measure, teacher: Any, student: Any) -> tuple[str, str, str, str]:
    old, new = ("" if value is None else measure.written(value) for value in (teacher, student))
    has_ratio = measure.has_ratio and teacher and student is not None
    return measure.title, old, new, digits(student / teacher) if has_ratio else ""


def place(environment: dict[str, Any]) -> str:
    """Where a report was measured, in words."""
    threads = environment.get("threads")
    count = "" if threads is None else f", {threads} thread{'s' * (threads != 1)}"
    return f"{environment['device']} ({environment['machine']}){count}, torch {environment['torch']}"


def plain(facts: dict[str, Any]) -> str:
    """The table of a `DistillationReport` as text: the first column to the left, the others to the right."""
    rows = [HEADER, *rows_of(facts)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{'>' if index else '<'}{widths[index]}}" for index, cell in enumerate(row)) for row in rows
    ]
    return "\n".join([f"{facts['examples']:,} examples on {place(facts['environment'])}", *map(str.rstrip, lines)])


def markdown(header: Any, rows: Any) -> str:
    """A Markdown table. All columns but the first are numbers; no text in a cell can break it."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    cells = [
        [" ".join(str(cell).split()).replace("|", "&#124;").replace("<", "&lt;") for cell in line] for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
