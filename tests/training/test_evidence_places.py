"""Heads whose classes have no names: words, places in a text and choices. There only the teacher's answers tell."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import logging

from hf_rrd.training import evidence
from hf_rrd.training.evidence import knows_classes
from tests.builders import log_of, trainer
from tests.test_trainer_heads import batch_of, model_of
from tests.training.test_distributed import found_by_two

AUTO: dict[str, Any] = {"kd_weight": "auto", "relational_weight": "auto"}
KINDS = ("words", "next words", "target words", "spans", "choices")


def asked(kind: str, knows: bool) -> tuple[Any, dict[str, Tensor]]:
    """A teacher, and a batch of examples whose labels are its answers, or whatever."""
    teacher, batch = model_of(kind, 24), batch_of(kind)
    with torch.no_grad():  # sure of what it says
        for name, weight in teacher.named_parameters():
            if any(head in name for head in ("cls.", "lm_head", "shared", "wte", "qa_outputs", "classifier")):
                weight *= 4
        outputs = teacher(**{name: each for name, each in batch.items() if "position" not in name})
    if not knows:
        return teacher, batch
    if kind == "spans":
        batch["start_positions"], batch["end_positions"] = (
            outputs[name].masked_fill(batch["attention_mask"] == 0, -torch.inf).argmax(-1)
            for name in ("start_logits", "end_logits")
        )
        return teacher, batch
    answers = outputs.logits.argmax(-1)
    answers = answers.roll(1, 1) if kind == "next words" else answers
    batch["labels"] = torch.where(batch["labels"] == -100, -100, answers)
    return teacher, batch


def examples_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: rows[index] for name, rows in batch.items()} for index in range(len(batch["attention_mask"]))]


def run_of(folder: Path, kind: str, teacher: Any, examples: Any, **given: Any) -> Any:
    alone = {"relational_weight": 0.0} if kind == "target words" else {}
    return trainer(folder, **AUTO | alone | given, model=model_of(kind, 16), teacher=teacher, train_dataset=examples)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    for name in ("warning", "info"):
        logger = logging.get_logger("hf_rrd.training.evidence")
        monkeypatch.setattr(logger, name, lambda line, name=name: lines.append(f"{name}: {line}"))
    return lines


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("knows", [True, False])
def test_a_teacher_whose_answers_are_the_labels_teaches_its_logits_and_another_its_embeddings_alone(
    tmp_path: Path, said: list[str], kind: str, knows: bool
) -> None:
    teacher, batch = asked(kind, knows)
    run = run_of(tmp_path, kind, teacher, examples_of(batch))
    run.train()
    weights = run.distillation.weights()
    assert weights["kd_weight"] == knows and len(log_of(run, "kd_loss")) == 3 * knows
    assert weights["relational_weight"] == (kind != "target words")
    if knows:
        assert said == []
        return
    (line,) = said
    what = "have a loss of" if "words" in kind else "name the label of"
    assert line.startswith(f"warning: The teacher's logits {what} ")
    if kind == "target words":
        assert "they are left out, and nothing of it teaches." in line and line.endswith("set kd_weight=1.")
    else:
        assert "its embeddings alone teach." in line and line.endswith("set kd_weight=1 and relational_weight=1.")


@pytest.mark.parametrize("kind", ["words", "next words"])
def test_words_have_to_be_told_better_than_by_their_frequencies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], kind: str
) -> None:
    teacher, batch = asked(kind, True)
    with torch.no_grad():
        logits = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss, words = 0.0, []
    for i, length in enumerate(batch["attention_mask"].sum(1)):
        for place in range(int(length)):
            labelled = place + 1 if kind == "next words" else place
            label = int(batch["labels"][i, labelled]) if labelled < 7 else -100
            if label != -100:
                words.append(label)
                loss -= float(logits[i, place].log_softmax(-1)[label])
    blind = -sum(count * math.log(count / len(words)) for count in Counter(words).values())
    run = run_of(tmp_path, kind, teacher, examples_of(batch))
    for margin, expected in ((-1e-4, True), (1e-4, False)):
        monkeypatch.setattr(evidence, "SOME", 1 - loss / blind + margin)
        assert knows_classes(run.train_dataset, run) == expected
    (line,) = said
    of = f"{loss / len(words):.3g} on {len(words)} words of training examples"
    assert f"have a loss of {of}, the words' frequencies {blind / len(words):.3g}: " in line


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_has_a_label_logits_are_left_out(tmp_path: Path, said: list[str], kind: str) -> None:
    teacher, batch = asked(kind, True)
    if kind == "spans":
        batch |= {name: torch.full((8,), -1) for name in ("start_positions", "end_positions")}
    else:
        batch["labels"] = torch.full_like(batch["labels"], -100)
    run = run_of(tmp_path, kind, teacher, examples_of(batch))
    assert not knows_classes(run.train_dataset, run) and said == []


@pytest.mark.parametrize("kind", ["words", "spans"])
def test_a_teacher_that_reads_other_tokens_is_left_out_without_a_warning(
    tmp_path: Path, said: list[str], kind: str
) -> None:
    teacher, batch = asked(kind, True)
    ids, mask = (batch[name].repeat_interleave(2, 1)[:, :9] for name in ("input_ids", "attention_mask"))
    run = run_of(
        tmp_path, kind, teacher, examples_of(batch | {"teacher_input_ids": ids, "teacher_attention_mask": mask})
    )
    run.train()
    assert run.distillation.weights()["kd_weight"] == 0 and log_of(run, "kd_loss") == []
    assert len(said) == 1 and said[0].startswith("info: No distillation of logits: ")
    assert "student and teacher read other tokens" in said[0]


def test_a_vocabulary_of_another_size_is_left_out(tmp_path: Path) -> None:
    teacher, batch = asked("words", True)
    teacher.resize_token_embeddings(24)
    run = run_of(tmp_path, "words", teacher, examples_of(batch))
    run.train()
    assert run.distillation.weights()["kd_weight"] == 0


def test_processes_whose_texts_are_padded_to_other_lengths_ask_together(tmp_path: Path) -> None:
    first, second = found_by_two(tmp_path, "answers_in_texts")
    assert first == second == [1.0, 1.0, 0.0, 1.0]
