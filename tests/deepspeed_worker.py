"""One process of a run under DeepSpeed: the child process of test_deepspeed."""

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageClassification

from tests.builders import tiny_vit
from tests.fsdp_worker import SAVED_AT, distillation_of, lines_of
from tests.processes import be_process


def settings_of(stage: int) -> dict[str, Any]:
    """A DeepSpeed config as examples/accelerate has it, small enough that ZeRO-3 really partitions."""
    return {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }


def whole_weights(model: Any) -> dict[str, Tensor]:
    """A model's parameters with the parts of all processes."""
    import deepspeed

    weights = {}
    for name, weight in model.named_parameters():
        with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
            weights[name] = weight.detach().clone()
    return weights


def run(rank: int, processes: int, port: int, folder: str, stage: int, by_name: bool, goes_on: bool) -> None:
    """Train under DeepSpeed, from the start or from the checkpoint in the middle, and write down what is left.

    By name: student and teacher are read from folders after the settings are made, as a script does. Under ZeRO-3
    they are then partitioned from the start.
    """
    be_process(rank, processes, port)
    os.environ.pop("ACCELERATE_USE_CPU", None)  # with which accelerate takes no notice of DeepSpeed
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    models: dict[str, Any] = {}
    if by_name:
        models["teacher"] = f"{folder}/teacher"
        models["model"] = lambda: AutoModelForImageClassification.from_pretrained(f"{folder}/student")
    distillation = distillation_of("vit", folder, processes, deepspeed=settings_of(stage), **models)
    assert distillation.is_deepspeed_enabled
    distillation.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVED_AT}" if goes_on else None)
    held = [getattr(weight, "ds_tensor", weight).numel() for weight in distillation.teacher.parameters()]
    full = [getattr(weight, "ds_numel", weight.numel()) for weight in distillation.teacher.parameters()]
    left = {
        **{f"student.{name}": weight for name, weight in whole_weights(distillation.model).items()},
        "bank": distillation.distillation.bank.filled,
        "log": lines_of(distillation),
        "teacher_held": torch.tensor(sum(held) / sum(full)),
    }
    name = "resumed" if goes_on else "whole"
    save_file(left, Path(folder, f"{name}-{rank}.safetensors"))
    distillation.save_model(f"{folder}/saved")


def save_models(folder: Path) -> None:
    """The student and the teacher, for a run by name."""
    tiny_vit().save_pretrained(folder / "student")
    tiny_vit(width=24, seed=1).save_pretrained(folder / "teacher")
