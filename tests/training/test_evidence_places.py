"""Heads whose classes have no names: words, places in a text and choices. There only the teacher's answers tell."""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput, SequenceClassifierOutput
from transformers.utils import logging

from hf_rrd.training import evidence
from hf_rrd.training.evidence import knows_classes
from hf_rrd.training.terms import GENTLE
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
        for module in ("training.evidence", "training.distillation", "models.teacher"):
            logger = logging.get_logger(f"hf_rrd.{module}")
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
    assert weights["relational_weight"] == (0 if kind == "target words" else GENTLE)
    if knows:
        assert said == []
        return
    (line,) = said
    what = "have a loss of" if "words" in kind else "name the label of"
    assert line.startswith(f"warning: The teacher's logits {what} ")
    if kind == "target words":
        assert "they are left out, and nothing of it teaches." in line and line.endswith("set kd_weight=1.")
    else:
        assert "its embeddings alone teach." in line and line.endswith("set kd_weight=1 and relational_weight=0.3.")


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
    for dataset in (run.train_dataset, iter(run.train_dataset)):  # a stream is not asked
        assert not knows_classes(dataset, run)
    what = "The teacher's logits have no labels to be compared with: they are left out, and "
    if kind == "target words":
        assert said == [f"warning: {what}nothing of it teaches. To learn them all the same, set kd_weight=1."] * 2
    else:
        instead = "set kd_weight=1 and relational_weight=0.3"
        assert said == [f"info: {what}its embeddings alone teach. To learn them all the same, {instead}."] * 2


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
    assert len(said) == 2 and said[0].startswith("info: No distillation of logits: ")
    assert "student and teacher read other tokens" in said[0] and said[1].startswith("info: The teacher's logits have")


def test_a_vocabulary_of_another_size_is_left_out(tmp_path: Path) -> None:
    teacher, batch = asked("words", True)
    teacher.resize_token_embeddings(24)
    run = run_of(tmp_path, "words", teacher, examples_of(batch))
    run.train()
    assert run.distillation.weights()["kd_weight"] == 0


@pytest.mark.slow
def test_processes_whose_texts_are_padded_to_other_lengths_ask_together(tmp_path: Path) -> None:
    first, second = found_by_two(tmp_path, "answers_in_texts")
    assert first == second == [1.0, GENTLE, 0.0, GENTLE]


# ---- What worked without the teacher's logits goes on without them ----


class OneStep(hf.GPT2LMHeadModel):
    """A student whose loss is fused with its head: in training it has no logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        return CausalLMOutput(loss=outputs.loss) if self.training else outputs


def prompted(student: Any) -> Any:
    how = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(student, how)


@pytest.mark.parametrize("kind", ["fused", "prompted"])
def test_a_student_without_logits_at_the_teachers_places_learns_its_embeddings_alone(
    tmp_path: Path, said: list[str], kind: str
) -> None:
    teacher, batch = asked("next words", True)
    batch = {name: batch[name] for name in ("input_ids", "labels")}
    student: Any = model_of("next words", 16)
    student = OneStep(student.config) if kind == "fused" else prompted(student)
    examples = [{name: rows[index] for name, rows in batch.items()} for index in range(8)]
    run = trainer(tmp_path, **AUTO, model=student, teacher=teacher, train_dataset=examples)
    run.train()
    assert run.distillation.weights()["kd_weight"] == 0 and log_of(run, "kd_loss") == []
    assert len(log_of(run, "relational_loss")) == 3
    theirs = "None" if kind == "fused" else "(8, 10, 20)"
    assert said == [f"warning: The teacher's logits, (8, 7, 20), are left out: the student's are {theirs}."]


class AsTuple(hf.GPT2LMHeadModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs).to_tuple()


@pytest.mark.parametrize("kind", ["spans", "next words"])
def test_a_teacher_without_logits_of_that_kind_is_left_out(tmp_path: Path, kind: str) -> None:
    _, batch = asked(kind, False)
    student, teacher = model_of(kind, 16), AsTuple(model_of("next words", 24).config)
    if kind == "spans":  # by a beam search
        how = {"vocab_size": 20, "d_model": 24, "n_layer": 1, "n_head": 2, "d_inner": 16}
        teacher = hf.XLNetForQuestionAnswering(hf.XLNetConfig(**how, start_n_top=2, end_n_top=2))
    run = trainer(tmp_path, **AUTO, model=student, teacher=teacher, train_dataset=examples_of(batch))
    run.train()
    assert run.distillation.weights()["kd_weight"] == 0 and len(log_of(run, "relational_loss")) == 3


class LMHeadRanker(hf.BertPreTrainedModel):
    """Several labels of a text, by a class whose name says something else."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert, self.head = hf.BertModel(config), nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **rest: Any) -> Any:
        logits = self.head(self.bert(input_ids, attention_mask=attention_mask, **rest).pooler_output)
        loss = None if labels is None else F.binary_cross_entropy_with_logits(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def test_a_class_that_is_called_a_language_model_and_is_none_is_left_out(tmp_path: Path) -> None:
    models = [LMHeadRanker(model_of("several labels", width).config) for width in (16, 24)]
    examples = examples_of(batch_of("several labels"))
    run = trainer(tmp_path, **AUTO, model=models[0], teacher=models[1], train_dataset=examples)
    run.train()
    assert run.distillation.weights()["kd_weight"] == 0 and len(log_of(run, "relational_loss")) == 3


class OwnForCausalLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.config = SimpleNamespace(hidden_size=8)

    def forward(self, input_ids: Tensor, labels: Any = None) -> CausalLMOutput:
        logits = self.head(self.embedding(input_ids))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def test_a_student_with_a_config_of_its_own_learns_what_the_teacher_knows(tmp_path: Path) -> None:
    teacher, batch = asked("next words", True)
    how = AUTO | {"relational_weight": 0.0}
    run = trainer(tmp_path, **how, model=OwnForCausalLM(), teacher=teacher, train_dataset=examples_of(batch))
    run.train()
    assert len(log_of(run, "kd_loss")) == 3


def test_a_teacher_that_cannot_read_what_is_to_be_written_teaches_nothing_and_says_so(
    tmp_path: Path, said: list[str]
) -> None:
    teacher, batch = asked("target words", True)
    del batch["decoder_input_ids"]
    run = run_of(tmp_path, "target words", teacher, examples_of(batch))
    run.train()
    assert run.distillation.weights()["kd_weight"] == 0 and len(log_of(run, "task_loss")) == 3
    what = "the teacher has to read what the student is to write. Add `decoder_input_ids`, as DataCollatorForSeq2Seq("
    assert len(said) == 1 and said[0].startswith(f"warning: No distillation of logits: {what}")


def test_answers_that_are_given_as_rows_of_one_are_asked_for(tmp_path: Path) -> None:
    teacher, batch = asked("spans", True)
    batch |= {name: batch[name].unsqueeze(1) for name in ("start_positions", "end_positions")}
    run = run_of(tmp_path, "spans", teacher, examples_of(batch))
    assert knows_classes(run.train_dataset, run)


# ---- How it is asked ----


def test_an_evaluation_before_the_training_asks_also_where_logits_alone_are_learned(tmp_path: Path) -> None:
    for knows in (True, False):
        teacher, batch = asked("target words", knows)
        examples = examples_of(batch)
        run = run_of(tmp_path, "target words", teacher, examples, eval_dataset=examples)
        assert ("eval_kd_loss" in run.evaluate()) == knows


def test_a_question_that_failed_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, batch = asked("next words", False)
    run = run_of(tmp_path, "next words", teacher, examples_of(batch))
    with monkeypatch.context() as patch:
        patch.setattr(evidence, "_compared", lambda *given: pytest.fail("out of memory"))
        with pytest.raises(pytest.fail.Exception):
            run.train()
    run.train()
    assert run.distillation.weights()["kd_weight"] == 0


def test_of_many_texts_no_more_is_kept_than_of_one_and_one_at_a_time_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, batch = asked("next words", True)
    run = run_of(tmp_path, "next words", teacher, examples_of(batch), per_device_eval_batch_size=2)
    read: list[Any] = []
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(
        F, "cross_entropy", lambda logits, *a, **k: read.append(logits) or cross_entropy(logits, *a, **k)
    )
    kept = evidence._asked(run.train_dataset, run)
    assert kept is not None and kept[1].shape == (1 + 20,) and kept[2] == 8
    assert [tuple(each.shape) for each in read] == [(7, 20)] * 8


def test_processes_agree_that_nothing_compares_where_one_alone_sees_other_tokens(tmp_path: Path) -> None:
    assert found_by_two(tmp_path, "other_tokens_in_one_batch") == [[0.0, GENTLE]] * 2


def test_a_teacher_beside_its_cached_embeddings_may_have_another_tokenizer(tmp_path: Path, said: list[str]) -> None:
    teacher, batch = asked("spans", True)
    words = [{"[PAD]": 0, "[UNK]": 1} | {f"{side}{number}": number for number in range(2, 20)} for side in "ab"]
    own, others = (
        hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(each, unk_token="[UNK]")), pad_token="[PAD]")
        for each in words
    )
    examples = examples_of(batch | {"teacher_embedding": torch.randn(8, 24)})
    run = run_of(tmp_path, "spans", teacher, examples, processing_class=own, teacher_processing_class=others)
    run.train()
    assert run.distillation.weights()["kd_weight"] == 0 and len(log_of(run, "relational_loss")) == 3
    assert len(said) == 2 and "No distillation of logits: student and teacher have different processors" in said[0]
