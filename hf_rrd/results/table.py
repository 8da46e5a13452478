"""Facts of a report in words: numbers with their units, and the table of teacher and student."""

from typing import Any

HEADER = ("", "teacher", "student", "student / teacher")


def rows_of(facts: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table of a report: what is measured, of the teacher, of the student, and the student's share of it.

    Args:
        facts: Of a `DistillationReport`; what is not among them has no row.
    """
    models = [facts.get(name, {}) for name in ("teacher", "student")]
    rows = []
    for path, (title, form, has_ratio) in {**SIZES, **_latencies(models), **QUALITY}.items():
        values = [_at(model, path) for model in models]
        if values != [None, None]:
            rows.append((title, *(form(value) for value in values), _ratio(*values) if has_ratio else ""))
    for path, (title, form) in SHARED_MEASURES.items():
        value = _at(facts, path)
        if value is not None:
            rows.append((title, "", form(value), ""))
    return rows


def place(environment: dict[str, Any]) -> str:
    """Where a report was measured, in words."""
    threads = environment.get("threads")
    on = f"{environment['device']} ({environment['machine']})"
    on += "" if threads is None else f", {threads} thread{'s' * (threads != 1)}"
    return f"{on}, torch {environment['torch']}"


def digits(value: float, count: int = 3) -> str:
    """So many digits that count, and more only before the point: 0.0120, 1.20, 120, 1,200."""
    if abs(value) < 10**count - 0.5 or abs(value) >= 1e12:
        return f"{value:#.{count}g}".rstrip(".")
    return f"{value:,.0f}"


def whole(value: Any) -> str:
    """A number of things."""
    return "" if value is None else f"{value:,}"


def percent(value: Any) -> str:
    """A share from 0 to 1."""
    return "" if value is None else f"{100 * value:.1f} %"


def decimal(value: Any) -> str:
    """A measure without a unit."""
    return "" if value is None else f"{value:.3f}"


def size(value: Any) -> str:
    """Bytes, in powers of 1,000."""
    return _scaled(value, "B")


def _flop(value: Any) -> str:
    return _scaled(value, "FLOP")


def _milliseconds(value: Any) -> str:
    return "" if value is None else f"{digits(value)} ms"


def _per_second(value: Any) -> str:
    return "" if value is None else digits(value)


def _scaled(value: Any, unit: str) -> str:
    if value is None:
        return ""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5:
            return f"{digits(value)} {prefix}{unit}"
        value /= 1000
    return f"{value:,.0f} P{unit}"


def _ratio(teacher: Any, student: Any) -> str:
    return "" if not teacher or student is None else digits(student / teacher)


def _at(facts: dict[str, Any], path: str) -> Any:
    value: Any = facts
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _latencies(models: list[dict[str, Any]]) -> dict[str, Any]:
    batches = dict.fromkeys(batch for model in models for batch in model.get("latency_ms", {}))
    kinds = {"median": "median", "p95": "p95"}
    return {
        f"latency_ms.{batch}.{kind}": (f"latency, batch of {batch}, {title}", _milliseconds, True)
        for batch in batches
        for kind, title in kinds.items()
    }


SIZES = {
    "parameters": ("parameters", whole, True),
    "bytes": ("weights", size, True),
    "dtype": ("dtype", lambda name: name or "", False),
    "flops": ("forward of one example", _flop, True),
}
"""By its place among the facts of a model: the row's title, its form, and whether student / teacher is of interest."""

QUALITY = {
    "examples_per_second": ("examples per second", _per_second, True),
    "accuracy": ("accuracy", percent, False),
    "calibration_error": ("expected calibration error", percent, False),
}
"""The same for what comes after the latencies."""

ALIGNMENT = {
    "cka": ("CKA with the teacher", decimal),
    "rank_correlation": ("rank correlation with the teacher", decimal),
    "neighbor_overlap": ("nearest neighbours in common", percent),
}
"""Of `relational_alignment`."""

SHARED_MEASURES = {
    "agreement": ("same top class as the teacher", percent),
    **{f"alignment.{name}": measure for name, measure in ALIGNMENT.items()},
}
"""The same for what is measured of both together."""
