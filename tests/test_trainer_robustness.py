"""Unusual models, settings and orders of calls: each works, or is refused in one sentence."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    OPTConfig,
    OPTForCausalLM,
    TrainerCallback,
)
from transformers.trainer_utils import default_compute_objective

from hf_rrd import detach_head
from hf_rrd.models.head import HEAD
from hf_rrd.models.pooling import mean_pool
from hf_rrd.training.checkpoint import load_student
from tests.builders import Images, Texts, log_of, tiny_bert, tiny_vit, trainer

EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def opt(width: int = 16, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    size = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 32, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=50, num_hidden_layers=1, max_position_embeddings=32, **size))


def test_a_headless_student_is_evaluated_without_labels(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        model=BertModel(tiny_bert().config),
        teacher=tiny_bert(width=24, seed=1),
        train_dataset=Texts(),
        eval_dataset=Texts(11, seed=1),
        task_weight=0.0,
        load_best_model_at_end=True,
        metric_for_best_model="eval_relational_loss",
        **EVALUATED,
    )
    run.train()
    metrics = run.evaluate()
    assert metrics["eval_relational_loss"] == run.state.best_metric == pytest.approx(metrics["eval_loss"], abs=1e-5)


def rebuilt() -> Any:
    student = tiny_bert()
    student.classifier = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    student.bert.encoder.layer = student.bert.encoder.layer[:1]
    return student


def mixed() -> Any:
    student = tiny_bert().to(torch.bfloat16)
    student.classifier.float()
    return student


def mixed_vit() -> Any:
    student = tiny_vit().to(torch.bfloat16)
    student.classifier.float()
    return student


@pytest.mark.parametrize("build", [rebuilt, mixed, mixed_vit])
def test_weights_that_no_config_describes_are_loaded_bitwise(tmp_path: Path, build: Any) -> None:
    torch.manual_seed(5)
    saved, other = build(), build()
    for weight in saved.parameters():
        nn.init.normal_(weight)
    saved.save_pretrained(tmp_path)
    load_student(other, str(tmp_path), HEAD)
    expected, found = saved.state_dict(), other.state_dict()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert [name for name in expected if expected[name].dtype != found[name].dtype] == []


def test_settings_changed_after_construction_take_effect(tmp_path: Path) -> None:
    run = trainer(tmp_path, kd_weight=1.0, max_steps=2)
    run.args.kd_weight, run.args.bank_size = 0.25, 12
    run.train()
    line = run.state.log_history[1]
    assert line["loss"] == pytest.approx(
        line["task_loss"] + 0.25 * line["kd_loss"] + line["relational_loss"], abs=1e-5
    )
    assert run.distillation.bank is not None and len(run.distillation.bank) == 12


@pytest.mark.parametrize("name", ["relational_weight", "kd_weight"])
def test_a_term_cannot_be_turned_on_after_construction(tmp_path: Path, name: str) -> None:
    run = trainer(tmp_path, relational_weight=0.0)
    setattr(run.args, name, 1.0)
    with pytest.raises(ValueError, match=f"`{name}` was 0 when the trainer was made and is 1.0.*Make a new trainer"):
        run.train()


@pytest.mark.parametrize(
    ("name", "before", "now"),
    [("teacher_pooling", "auto", "mean"), ("teacher_projection", "orthogonal", "pca"), ("projection_dim", 8, 12)],
)
def test_what_is_read_when_a_trainer_is_made_cannot_be_searched_with_it(
    tmp_path: Path, name: str, before: Any, now: Any
) -> None:
    settings = {"teacher_projection": "orthogonal", "projection_dim": 8} | {name: before}
    run = trainer(tmp_path, model_init=lambda: tiny_vit(), **settings)
    setattr(run.args, name, now)  # as a search does, which would compare runs that are all alike
    with pytest.raises(ValueError, match=f"`{name}` was {before!r} when the trainer was made and is {now!r} now. Mak"):
        run.train()


def test_alignment_is_measured_on_as_many_examples_as_the_settings_say_now(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=Images(20))
    assert "eval_alignment_cka" not in run.evaluate()
    run.args.alignment_examples = 12
    assert "eval_alignment_cka" in run.evaluate()


def test_a_term_cannot_be_turned_on_while_training(tmp_path: Path) -> None:
    class Ramp(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            args.relational_weight = float(state.global_step)

    run = trainer(tmp_path, relational_weight=0.0, callbacks=[Ramp()])
    with pytest.raises(ValueError, match="`relational_weight` was 0 when the trainer was made and is 1.0"):
        run.train()


def test_a_term_that_is_turned_off_after_construction_is_logged_with_no_part_in_the_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.args.relational_weight = 0.0
    run.train()
    assert log_of(run) == pytest.approx(log_of(run, "task_loss")) and log_of(run, "relational_loss")[-1] > 0


def test_without_the_relational_term_an_earlier_head_is_taken_off(tmp_path: Path) -> None:
    student = tiny_vit()
    trainer(tmp_path, model=student)
    assert hasattr(student, HEAD)
    trainer(tmp_path, model=student, relational_weight=0.0, teacher=None)
    assert not hasattr(student, HEAD)


def test_a_trainer_whose_student_was_taken_over_has_the_head_that_it_gave_it(tmp_path: Path) -> None:
    student = tiny_vit()
    first = trainer(tmp_path, model=student)
    expected = first.evaluate(Images(8))["eval_relational_loss"]
    for take in (
        lambda: trainer(tmp_path, model=student, seed=2),
        lambda: trainer(tmp_path, model=student, relational_weight=0.0, teacher=None),
        lambda: detach_head(student),
    ):
        take()
        assert first.evaluate(Images(8))["eval_relational_loss"] == expected
    first.train()
    assert first.evaluate(Images(8))["eval_relational_loss"] != expected


def test_a_trainer_whose_student_was_replaced_says_so(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.model = run.model_wrapped = tiny_vit(seed=5)
    with pytest.raises(
        ValueError, match="not the head that the trainer gave to its own: `trainer.model` was replaced"
    ):
        run.train()


def test_a_trainer_is_freed_as_soon_as_nobody_holds_it(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    held = weakref.ref(run)
    gc.disable()  # what only the collector frees holds the memory of a GPU until it runs
    try:
        del run
        assert held() is None
    finally:
        gc.enable()


def test_steps_by_hand_feed_the_bank(tmp_path: Path) -> None:
    run = trainer(tmp_path, bank_size=40)
    run.train()
    bank, batch = run.distillation.bank, next(iter(run.get_train_dataloader()))
    assert bank is not None
    for _ in range(3):
        before = bank.filled.clone()
        run.training_step(run.model, dict(batch))
        assert torch.equal(bank.filled[:-8], before[8:]) and run.distillation.pending == []


def test_a_training_that_fails_at_its_end_has_ended(tmp_path: Path) -> None:
    class Ends(TrainerCallback):
        ended = 0

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.ended += 1

    ends = Ends()
    run = trainer(tmp_path, train_dataset=Images(4), dataloader_drop_last=True, callbacks=[ends])
    with pytest.raises(ValueError, match="gave no batch"):
        run.train()
    assert ends.ended == 1 and not run.is_in_train


def test_an_evaluation_after_one_with_a_broken_teacher_is_in_order(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=Images(8))
    weight = run.teacher.vit.embeddings.cls_token
    kept = weight.detach().clone()
    weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="teacher's embedding is not finite"):
        run.evaluate()
    weight.data.copy_(kept)
    assert run.evaluate()["eval_relational_loss"] > 0


def test_a_decoder_that_its_language_model_calls_directly_is_the_body(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, model=opt(), teacher=opt(width=24, seed=1), train_dataset=Texts(), task_weight=0.0, max_steps=2
    )
    run.train()
    assert run.state.log_history[1]["relational_kl"] > 0


def test_a_sequence_to_sequence_model_is_refused(tmp_path: Path) -> None:
    size = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32}
    depth = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=50, **size, **depth))
    decoder = BertLMHeadModel(
        BertConfig(
            **{"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1},
            is_decoder=True,
            add_cross_attention=True,
        )
    )
    both = EncoderDecoderModel(encoder=tiny_bert().bert, decoder=decoder)
    for model in (bart, both):
        what = f"{type(model).__name__} is not supported.*encoder.*or relational_weight=0, with which its logits"
        with pytest.raises(ValueError, match=what):
            trainer(tmp_path, model=model, teacher=tiny_bert(), train_dataset=Texts())


def test_a_long_mean_does_not_overflow_in_float16() -> None:
    outputs = type("Outputs", (), {"last_hidden_state": torch.full((1, 2048, 2), 40.0, dtype=torch.float16)})
    assert mean_pool(outputs, torch.ones(1, 2048)).tolist() == [[40.0, 40.0]]


def test_a_bank_that_could_teach_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compares within the micro-batch.*always 0"):
        trainer(tmp_path, bank_size=0, per_device_train_batch_size=1)


def test_a_name_in_place_of_the_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`model` must be a model, got 'bert-base'.*from_pretrained"):
        trainer(tmp_path, model="bert-base")
    with pytest.raises(TypeError, match="`model` must be a model, got <class .*from_pretrained"):
        trainer(tmp_path, model=type(tiny_vit()))


@pytest.mark.parametrize("scores", [False, True])
def test_the_default_objective_of_a_hyperparameter_search_is_the_loss_or_the_users_metrics(
    scores: bool, tmp_path: Path
) -> None:
    metrics = {"compute_metrics": lambda prediction: {"score": 0.25, "other": 0.5}} if scores else {}
    run = trainer(tmp_path, eval_dataset=Images(8), kd_weight=1.0, alignment_examples=8, max_steps=1, **metrics)
    run.compute_objective = default_compute_objective  # as `hyperparameter_search` sets it
    run.train()
    evaluated = run.evaluate()
    assert run.compute_objective(evaluated) == (0.75 if scores else evaluated["eval_loss"])


def test_a_hyperparameter_search_may_keep_its_objective_on_the_trainer(tmp_path: Path) -> None:
    run = trainer(tmp_path, model_init=lambda: tiny_vit(), eval_dataset=Images(8), **EVALUATED)
    run.objective = None  # as Trainer's search backends do before each trial
    run.train()
    assert len(log_of(run)) == 3


class Own(ValueError):
    """An error of a user's."""


@pytest.mark.parametrize(("error", "arrives_as"), [(Own("mine"), Own), (KeyError("id"), ValueError)])
def test_errors_of_a_data_set_name_it_and_those_of_a_user_s_class_stay(
    tmp_path: Path, error: Exception, arrives_as: type[Exception]
) -> None:
    class Broken(Images):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            if index == 40:
                raise error
            return super().__getitem__(index)

    with pytest.raises(arrives_as, match=str(error.args[0])) as caught:
        trainer(tmp_path, train_dataset=Broken(), max_steps=6).train()
    assert caught.value is error or "`train_dataset`" in str(caught.value)


def test_a_stream_that_can_be_read_once_is_not_read_for_a_task_alone(tmp_path: Path) -> None:
    class Once(torch.utils.data.IterableDataset[Any]):
        def __init__(self) -> None:
            self.read = 0

        def __iter__(self) -> Any:
            self.read += 1
            return (Images(24)[index] for index in range(24))

    stream = Once()
    trainer(tmp_path, teacher=None, relational_weight=0.0, train_dataset=stream)
    assert stream.read == 0
