"""A page says the facts of its run and nothing else."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import BertTokenizer

from hf_rrd import RelationalDistillationTrainer
from hf_rrd.results.card import FACTS_FILE
from hf_rrd.results.facts import CardFacts
from hf_rrd.results.render import TEMPLATE, render_card
from tests.builders import Images, Texts, tiny_bert, tiny_vit, trainer
from tests.loopback_hub import header_errors
from tests.results.runs import card_of, facts_of, usage_of

DATASET = {"dataset_tags": "org/images", "dataset": "Images"}


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


def test_every_number_of_a_card_is_among_the_facts_of_the_run(run: RelationalDistillationTrainer) -> None:
    card = str(card_of(run, **DATASET))
    assert len(numbers_shown(card)) > 60
    assert unsaid(card, facts_of(run)) == [] and header_errors(card) == []
    wrong = card.replace("| accuracy | ", "| accuracy | 99.87 % ", 1)
    assert unsaid(wrong, facts_of(run)) == ["99.87"], "the check sees a number that is not among them"


def test_the_cards_of_our_own_students_say_the_facts_beside_them() -> None:
    folders = sorted(path.parent for path in (Path(__file__).parents[2] / "model_cards").glob(f"*/{FACTS_FILE}"))
    assert len(folders) >= 4
    for folder in folders:
        card, facts = ModelCard.load(folder / "README.md"), json.loads((folder / FACTS_FILE).read_text())
        assert unsaid(str(card), facts) == [], folder.name
        assert header_errors(str(card)) == [], folder.name
        pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", card.text)
        assert len(pictures) >= 3 and all((folder / picture).is_file() for picture in pictures)
        again = render_card(CardFacts.from_json(facts))
        assert str(again).strip() == str(card).strip(), f"{folder.name} was rendered by another version"


def test_a_card_is_a_function_of_its_facts(run: RelationalDistillationTrainer) -> None:
    card = card_of(run, license="mit", tags="mine", language=["en", "de"], finetuned_from="org/base", **DATASET)
    facts = CardFacts.from_json(facts_of(run))
    assert str(render_card(facts)).strip() == str(card).strip()
    assert facts.to_json() == facts_of(run)


def test_what_is_unknown_is_absent(tmp_path: Path) -> None:
    run = trainer(tmp_path / "student", train_dataset=Images(16))
    card = card_of(run)
    header, page = card.data.to_dict(), card.text
    assert header.keys() == {"library_name", "pipeline_tag", "tags"}
    for section in ("Teacher and student", "Results", "How alike", "!["):
        assert section not in page
    for nothing in ("None", "nan", "null", "unknown", "[]", "{}", "More information"):
        assert nothing not in page.split("## Citation")[0]
    assert "\n\n\n" not in page


def test_the_student_is_used_in_four_lines_or_fewer_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "text"]))
    tokenizer = BertTokenizer(str(vocabulary))
    runs = {
        "vit": ({}, "pixel_values = torch.zeros(1, 3, 16, 16)", (1, 4)),
        "bert": (
            {
                "model": tiny_bert(),
                "teacher": tiny_bert(width=24),
                "train_dataset": Texts(),
                "processing_class": tokenizer,
            },
            "",
            (1, 4),
        ),
        "headless": (
            {"model": tiny_vit().vit, "task_weight": 0.0},
            "pixel_values = torch.zeros(1, 3, 16, 16)",
            (1, 16),
        ),
    }
    for name, (given, before, shape) in runs.items():
        run = trainer(tmp_path / name, **given)
        run.save_model()
        code = usage_of(card_of(run))
        assert len(code.strip().splitlines()) <= 4
        result = "embedding" if name == "headless" else "logits"
        names: dict[str, Any] = {"torch": torch}
        exec(f"{before}\n{code}", names)
        assert names[result].shape == shape, name


def test_the_template_has_no_fact_of_its_own() -> None:
    text = TEMPLATE.read_text().split("## Citation")[0]
    assert re.findall(r"\d", text) == []


def test_names_cannot_break_a_table(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=Images(8), compute_metrics=lambda _: {"a|b\nc <i>": 0.5, "flag": True})
    run.train()
    run.evaluate()
    card = card_of(run)
    assert "| a&#124;b c &lt;i> | 0.5000 |" in card.text and "flag" not in card.text
