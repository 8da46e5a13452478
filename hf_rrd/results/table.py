"""Numbers in words: with their units, and as the table of teacher and student."""

from collections.abc import Callable
from typing import Any, NamedTuple

HEADER = ("", "teacher", "student", "student / teacher")


def digits(value: Any, count: int = 3) -> str:
    """So many digits that count, and more only before the point: 0.0120, 1.20, 120, 1,200."""
    if abs(value) < 10**count - 0.5 or abs(value) >= 1e12:
        return f"{value:#.{count}g}".rstrip(".")
    return f"{value:,.0f}"


def whole(value: Any) -> str:
    """A number of things."""
    return f"{value:,}"


def percent(value: Any) -> str:
    """A share from 0 to 1."""
    return f"{100 * value:.1f} %"


def decimal(value: Any) -> str:
    """A measure without a unit."""
    return f"{value:.3f}"


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

AGREEMENT = Measure("same top class as the teacher", percent)


def rows_of(facts: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table of a report: what was measured, of the teacher, of the student, and the student's share of it.

    Args:
        facts: Those of a `DistillationReport`. What is not among them has no row.
    """
    rows = []
    for measure, values in _of_each(*(facts.get(name, {}) for name in ("teacher", "student"))):
        teacher, student = ("" if value is None else measure.written(value) for value in values)
        if teacher or student:
            has_ratio = measure.has_ratio and values[0] and values[1] is not None
            rows.append((measure.title, teacher, student, digits(values[1] / values[0]) if has_ratio else ""))
    shared = [(AGREEMENT, facts.get("agreement"))]
    shared += [(measure, facts.get("alignment", {}).get(name)) for name, measure in ALIGNMENT.items()]
    return rows + [(measure.title, "", measure.written(value), "") for measure, value in shared if value is not None]


def _of_each(teacher: dict[str, Any], student: dict[str, Any]) -> list[tuple[Measure, tuple[Any, ...]]]:
    """What is measured of each model, in the order of the rows, with the teacher's value and the student's."""
    found = []
    for name, measure in _MEASURES.items():
        found.append((measure, (teacher.get(name), student.get(name))))
        if name == "flops":
            latencies = [model.get("latency_ms", {}) for model in (teacher, student)]
            for batch in {**latencies[0], **latencies[1]}:
                for kind in ("median", "p95"):
                    measure = Measure(f"latency, batch of {batch}, {kind}", lambda ms: f"{digits(ms)} ms", True)
                    found.append((measure, tuple(each.get(batch, {}).get(kind) for each in latencies)))
    return found


_MEASURES = {
    "parameters": Measure("parameters", whole, True),
    "bytes": Measure("weights", size, True),
    "dtype": Measure("dtype", str),
    "flops": Measure("forward of one example", lambda flops: size(flops, "FLOP"), True),
    "examples_per_second": Measure("examples per second", digits, True),
    "accuracy": Measure("accuracy", percent),
    "calibration_error": Measure("expected calibration error", percent),
}
"""By their names among a model's facts. The latencies, which depend on the batch, come after the forward."""


def place(environment: dict[str, Any]) -> str:
    """Where a report was measured, in words."""
    threads = environment.get("threads")
    count = "" if threads is None else f", {threads} thread{'s' * (threads != 1)}"
    return f"{environment['device']} ({environment['machine']}){count}, torch {environment['torch']}"


def markdown(header: Any, rows: Any) -> str:
    """A Markdown table. All columns but the first are numbers; no text in a cell can break it."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    cells = [
        [" ".join(str(cell).split()).replace("|", "&#124;").replace("<", "&lt;") for cell in line] for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
