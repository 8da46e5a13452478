"""Finished runs, and what their cards say."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard

from hf_rrd import RelationalDistillationTrainer
from hf_rrd.results.card import CARD, FACTS_FILE
from tests.builders import Images, trainer


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


def finished(folder: Path, report: bool = True, **settings: Any) -> RelationalDistillationTrainer:
    """A run that was trained, evaluated and compared with its teacher."""
    run = trainer(folder, **({"eval_dataset": Images(40, seed=3), "compute_metrics": accuracy} | settings))
    run.train()
    run.evaluate(metric_key_prefix="test")
    if report:
        run.report()
    return run


def card_of(run: RelationalDistillationTrainer, **given: Any) -> ModelCard:
    run.create_model_card(**given)
    return ModelCard.load(Path(run.args.output_dir, CARD))


def facts_of(run: RelationalDistillationTrainer) -> dict[str, Any]:
    return json.loads(Path(run.args.output_dir, FACTS_FILE).read_text())


def usage_of(card: ModelCard) -> str:
    return re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]  # type: ignore[index]


def numbers_in(facts: Any) -> set[float]:
    """All numbers of a JSON value, those within its texts too."""
    if isinstance(facts, dict):
        return set().union(*(numbers_in(each) for each in [*facts, *facts.values()]), set())
    if isinstance(facts, list):
        return set().union(*map(numbers_in, facts), set())
    if isinstance(facts, str):
        return {float(found) for found in re.findall(r"\d+(?:\.\d+)?", facts)}
    return {float(facts)} if isinstance(facts, int | float) and not isinstance(facts, bool) else set()


def numbers_shown(card: str) -> list[tuple[str, int]]:
    """The numbers of a page without its header and its citations: the digits, and how many of them count."""
    page = card.split("---\n", 2)[2].split("## Citation")[0].replace("arxiv.org/abs/2407.12073", "")
    page = re.sub(r"figures/\w+\.png", "", page)
    shown = []
    for found in re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?", page):
        digits = re.sub(r"e.*|[-,.]", "", found).lstrip("0")
        shown.append((found.replace(",", ""), len(digits)))
    return shown


def is_said_by(shown: str, digits: int, numbers: set[float]) -> bool:
    """Whether a number on a page is one of the facts, rounded to its digits, maybe in other units."""
    value = float(shown)
    for number in numbers:
        for power in (0, 2, 3, -3, -6, -9, -12):  # a share in percent, milliseconds, kB, MB, GFLOP
            scaled = number * 10.0**power
            if math.isclose(value, scaled, rel_tol=1e-9, abs_tol=1e-12):
                return True
            decimals = len(shown.split("e")[0].partition(".")[2])
            if power in (0, 2) and "e" not in shown and round(scaled, decimals) == value and decimals > 0:
                return True
            if digits >= 3 and scaled and float(f"{scaled:.{digits}g}") == value:
                return True
    return False


def unsaid(card: str, facts: dict[str, Any]) -> list[str]:
    """The numbers of a page that are neither among its facts nor ratios of student and teacher."""
    numbers = numbers_in(facts)
    report = facts.get("report", {})
    for name, value in _flat(report.get("student", {})).items():
        other = _flat(report.get("teacher", {})).get(name)
        numbers |= {float(f"{value / other:.3g}")} if other else set()
    fixed = {1.0, 10.0, 32.0, 95.0}  # batches, the percentile, the neighbours, and 1 as the best alignment
    return [text for text, digits in numbers_shown(card) if not is_said_by(text, digits, numbers | fixed)]


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            flat[prefix + name] = value
    return flat
