"""One process of a run under FSDP2: the child process of test_fsdp."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_rrd.models.head import HEAD
from tests import fsdp_on_cpu
from tests.builders import Images, Texts, tiny_bert, tiny_vit, trainer
from tests.processes import be_process

STEPS, SAVED_AT = 6, 3


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class HeadGradients(TrainerCallback):
    """Keeps the whole gradient of the head's weight at each step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.is_sharded = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradient = model.get_submodule(HEAD).projection.weight.grad
        self.is_sharded = isinstance(gradient, DTensor)
        self.steps.append(whole(gradient).flatten().clone())


def distillation_of(family: str, folder: str, processes: int, **settings: Any) -> Any:
    """A trainer of steps of 8 examples with the whole of the method on."""
    build, data = {"vit": (tiny_vit, Images), "bert": (tiny_bert, Texts)}[family]
    return trainer(
        folder,
        train_dataset=data(),
        per_device_train_batch_size=8 // processes // 2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        kd_weight=0.5,
        layer_weight=1.0,
        teacher_projection="center",
        save_strategy="steps",
        save_steps=SAVED_AT,
        **{"model": build, "teacher": build(width=24, seed=1)} | settings,
    )


def lines_of(distillation: Any) -> Tensor:
    """The log, (lines, terms)."""
    names = ("loss", "task_loss", "kd_loss", "relational_loss", "layer_loss", "grad_norm")
    lines = [line for line in distillation.state.log_history if "loss" in line]
    return torch.tensor([[line[name] for name in names] for line in lines])


def what_is_left(distillation: Any, gradients: HeadGradients) -> dict[str, Tensor]:
    """All that a run ends with, whole."""
    weights = {name: whole(weight.detach()) for name, weight in distillation.model.named_parameters()}
    return {
        **{f"student.{name}": weight.contiguous() for name, weight in weights.items()},
        "head_gradients": torch.stack(gradients.steps),
        "bank": distillation.distillation.bank.filled,
        "log": lines_of(distillation),
    }


def run(
    rank: int,
    processes: int,
    port: int,
    folder: str,
    family: str,
    state_dict_type: str,
    layers: str | None,
    goes_on: bool,
) -> None:
    """Train under FSDP2, from the start or from the checkpoint in the middle, and write down what is left."""
    be_process(rank, processes, port)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    fsdp_on_cpu.enable()
    fsdp_config: dict[str, Any] = {"fsdp_version": 2, "state_dict_type": state_dict_type}
    if layers is not None:
        fsdp_config["transformer_layer_cls_to_wrap"] = [layers]
    gradients = HeadGradients()
    distillation = distillation_of(
        family, folder, processes, fsdp="full_shard auto_wrap", fsdp_config=fsdp_config, callbacks=[gradients]
    )
    distillation.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVED_AT}" if goes_on else None)
    teacher = list(distillation.teacher.parameters())
    held = sum(weight.to_local().numel() if isinstance(weight, DTensor) else weight.numel() for weight in teacher)
    facts = {
        "head_is_sharded": torch.tensor(gradients.is_sharded),
        "teacher_held": torch.tensor(held / sum(weight.numel() for weight in teacher)),
        "teacher_whole": torch.tensor(sum(not isinstance(weight, DTensor) for weight in teacher)),
    }
    name = "resumed" if goes_on else "whole"
    save_file(what_is_left(distillation, gradients) | facts, Path(folder, f"{name}-{rank}.safetensors"))
    distillation.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    distillation.save_model(f"{folder}/student")


def run_alone(rank: int, processes: int, port: int, folder: str, family: str) -> None:
    """The same training in one process, without FSDP."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    gradients = HeadGradients()
    distillation = distillation_of(family, folder, 1, callbacks=[gradients])
    distillation.train()
    save_file(what_is_left(distillation, gradients), Path(folder, "alone.safetensors"))
