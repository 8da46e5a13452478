"""The layers' term in a training: logged, weighed, independent of the cut, resumed, and refused where it cannot be."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_rrd.models.layers import LayerPairs
from tests.builders import Images, Texts, Tokens, log_of, tiny_bert, tiny_tokens, tiny_vit, trainer

STATES: dict[str, Any] = {"model": tiny_bert, "train_dataset": Texts(), "layer_weight": 2.0}


def teacher(width: int = 16, layers: int = 4) -> Any:
    return tiny_bert(width=width, layers=layers, seed=1)


def weights_of(run: Any) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in run.model.parameters()])


@pytest.mark.parametrize("width", [16, 24], ids=["states", "relations"])
def test_the_term_is_logged_weighed_and_falls(tmp_path: Path, width: int) -> None:
    given = {**STATES, "layer_weight": 3.0, "max_steps": 12, "eval_dataset": Texts(13)}
    run = trainer(tmp_path, teacher=teacher(width), **given)
    run.train()
    for line in (line for line in run.state.log_history if "layer_loss" in line):
        total = line["task_loss"] + line["relational_loss"] + 3 * line["layer_loss"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    losses = log_of(run, "layer_loss")
    assert len(losses) == 12 and (losses[-1] < 0.5 * losses[0] or width == 24)
    metrics = run.evaluate()
    total = metrics["eval_task_loss"] + metrics["eval_relational_loss"] + 3 * metrics["eval_layer_loss"]
    assert metrics["eval_loss"] == pytest.approx(total, rel=1e-5)


def test_the_layers_alone_make_a_student_alike(tmp_path: Path) -> None:
    none = dict.fromkeys(("task_weight", "kd_weight", "relational_weight"), 0.0)
    run = trainer(tmp_path, teacher=teacher(24), **{**STATES, **none, "max_steps": 30, "logging_steps": 5})
    run.train()
    losses = log_of(run, "layer_loss")
    assert [line.keys() & {"task_loss", "relational_loss"} for line in run.state.log_history if "loss" in line] == (
        [set()] * 6
    )
    assert losses[-1] < 0.7 * losses[0]


def test_an_evaluations_term_is_that_of_the_pairs(tmp_path: Path) -> None:
    run = trainer(tmp_path, teacher=teacher(), eval_dataset=Texts(13), layer_pairs=[[1, 0]], **STATES)
    found = run.evaluate()["eval_layer_loss"]
    pairs = LayerPairs(run.model, run.teacher, [[1, 0]])
    assert run.distillation.layers is not None and run.distillation.layers.pairs == [(1, 0)]
    batch = {name: torch.stack([each[name] for each in Texts(13)]) for name in ("input_ids", "attention_mask")}
    states = []
    for model in (run.model, run.teacher):
        assert model is not None
        states.append(model.eval()(**batch, output_hidden_states=True).hidden_states)
    expected = pairs.terms([states[0][2]], [states[1][1]], batch).mean()
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_a_step_is_the_same_however_its_batch_is_cut(tmp_path: Path) -> None:
    whole, cut = (
        trainer(
            tmp_path,
            teacher=teacher(),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            optim="sgd",
            **STATES,
        )
        for size in (8, 2)
    )
    for run in (whole, cut):
        run.train()
    assert (weights_of(whole) - weights_of(cut)).abs().max() < 1e-6
    assert log_of(whole, "layer_loss") == pytest.approx(log_of(cut, "layer_loss"), rel=1e-5)


def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path) -> None:
    given = {**STATES, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole, again = (trainer(tmp_path, teacher=teacher(), **given) for _ in range(2))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights_of(whole), weights_of(again))
    assert log_of(whole, "layer_loss") == log_of(again, "layer_loss")


def test_by_default_and_at_0_nothing_is_caught(tmp_path: Path) -> None:
    runs = [trainer(tmp_path, teacher=teacher(), **{**STATES, "layer_weight": each}) for each in ("auto", 0.0)]
    for run in runs:
        run.train()
        assert run.distillation.layers is None and log_of(run, "layer_loss") == []
    assert torch.equal(*map(weights_of, runs))


def test_a_trained_student_is_plain_again(tmp_path: Path) -> None:
    run = trainer(tmp_path, teacher=teacher(), **STATES)
    run.train()
    for module in run.model.modules():
        assert [name for name in module.__dict__ if "hf_rrd" in name] == []
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_each_student_of_model_init_has_its_own_layers(tmp_path: Path) -> None:
    given = {name: value for name, value in STATES.items() if name != "model"}
    run = trainer(tmp_path, teacher=teacher(), model_init=lambda: tiny_bert(), **given)
    run.train()
    assert len(log_of(run, "layer_loss")) == 3
    assert run.distillation.layers is not None and run.distillation.layers.student.model is run.model


def test_the_balance_does_not_see_the_layers(tmp_path: Path) -> None:
    pulls = []
    for weight in (0.0, 5.0):
        given = {**STATES, "layer_weight": weight, "balance_losses": True, "max_steps": 1}
        run = trainer(tmp_path, teacher=teacher(), **given)
        run.train()
        assert run.distillation.balance is not None
        pulls.append(run.distillation.balance.measured[:2])
    torch.testing.assert_close(pulls[0], pulls[1])


def test_tokens_and_images_have_layers_too(tmp_path: Path) -> None:
    for given in (
        {"model": tiny_vit(), "teacher": tiny_vit(layers=4, seed=1), "train_dataset": Images()},
        {"model": tiny_tokens(), "teacher": tiny_tokens(width=24, seed=1), "train_dataset": Tokens(24, 4)},
    ):
        run = trainer(tmp_path, layer_weight=1.0, **given)
        run.train()
        assert all(0 < loss < 4 for loss in log_of(run, "layer_loss"))


@pytest.mark.parametrize("how", [{"bf16": True}, {"gradient_checkpointing": True}, {"dtype": torch.bfloat16}])
def test_half_precision_and_checkpoints_of_activations_give_about_the_same(tmp_path: Path, how: Any) -> None:
    dtype = how.pop("dtype", None)
    own = teacher() if dtype is None else teacher().to(dtype)
    plain, other = trainer(tmp_path, teacher=teacher(), **STATES), trainer(tmp_path, teacher=own, **STATES, **how)
    for run in (plain, other):
        run.train()
    assert log_of(other, "layer_loss") == pytest.approx(log_of(plain, "layer_loss"), rel=0.03)


# ---- What is refused ----


def test_a_checkpoint_of_activations_without_a_graph_is_refused(tmp_path: Path) -> None:
    reenters = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    run = trainer(tmp_path, teacher=teacher(24), **STATES, **reenters)
    with pytest.raises(ValueError, match="gradient checkpointing leaves out .*kwargs={'use_reentrant': False}"):
        run.train()


def columns(**more: Any) -> datasets.Dataset:
    texts = Texts()
    rows = {"input_ids": texts.tokens, "attention_mask": texts.mask, "labels": texts.labels}
    return datasets.Dataset.from_dict({name: each.tolist() for name, each in (rows | more).items()})


def test_cached_outputs_of_a_teacher_are_refused(tmp_path: Path) -> None:
    data = columns(teacher_embedding=torch.randn(48, 24))
    for given in ({"teacher": None}, {"teacher": teacher(24)}):
        with pytest.raises(
            ValueError, match=r"needs a teacher in training, `train_dataset` has \['teacher_embedding'\]"
        ):
            trainer(tmp_path, **{**STATES, "train_dataset": data}, **given)
    with pytest.raises(ValueError, match="needs a teacher in training, there is none. Pass `teacher=` a model"):
        trainer(tmp_path, teacher=None, relational_weight=0.0, **STATES)


def test_an_input_of_the_teachers_own_is_refused(tmp_path: Path) -> None:
    data = columns(teacher_input_ids=Texts().tokens, teacher_attention_mask=Texts().mask)
    message = "must read the same input, and the data have columns of the teacher's own, .*'teacher_input_ids'"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, teacher=teacher(), **{**STATES, "train_dataset": data})


class Late(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Texts with an input of the teacher's own, of which nothing is known before the first batch."""

    def __iter__(self) -> Any:
        for text in Texts():
            yield text | {f"teacher_{name}": text[name] for name in ("input_ids", "attention_mask")}


def test_an_input_of_the_teachers_own_is_refused_at_the_first_batch_of_a_stream(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must read the same input, and the data have columns of the teacher's own"):
        trainer(tmp_path, teacher=teacher(), **{**STATES, "train_dataset": Late()}).train()


def test_another_number_of_tokens_is_refused_at_the_first_batch(tmp_path: Path) -> None:
    other = tiny_vit(seed=1)
    other = type(other)(type(other.config)(**(other.config.to_dict() | {"patch_size": 4})))
    with pytest.raises(ValueError, match=r"needs as many tokens on both sides.*\(8, 5\) of the student and \(8, 17\)"):
        trainer(tmp_path, teacher=other, layer_weight=1.0).train()


class Raises(TrainerCallback):
    def on_step_end(self, args: Any, *others: Any, **kwargs: Any) -> None:
        args.layer_weight = 1.0


def test_a_weight_that_was_0_cannot_be_raised(tmp_path: Path) -> None:
    run = trainer(tmp_path, teacher=teacher(), callbacks=[Raises()], **{**STATES, "layer_weight": 0.0})
    with pytest.raises(ValueError, match="`layer_weight` was 0 when the trainer was made and is 1.0 now"):
        run.train()
