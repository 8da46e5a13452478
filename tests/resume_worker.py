"""One process of a run of a trainer, to be killed and resumed: the child process of test_resume."""

import json
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import TrainerCallback

from hf_rrd.training.checkpoint import last_complete_checkpoint
from tests.builders import Images, Texts, tiny_bert, tiny_vit, trainer
from tests.processes import be_process

STEPS = 14

DEFAULTS: dict[str, Any] = {"balance_losses": True, "student_projection": "centered", "teacher_projection": "center"}
DEFAULTS |= {"relational_weight": "auto", "per_device_train_batch_size": 8}  # enough for a mean of their own


class Steps(TrainerCallback):
    """Shows the parent process which step is running."""

    def __init__(self, step: Any) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step.value = state.global_step


def run(rank: int, processes: int, port: int, family: str, folder: str, step: "Synchronized[int]") -> None:
    """Train to the end, from the newest checkpoint if there is one, and write down all that the run left.

    Dropout is on, two micro-batches make a step of 8, an epoch has 6 steps, a checkpoint and a log line come every
    2.
    """
    be_process(rank, processes, port)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    models: dict[str, Any] = {"vit": (tiny_vit, Images, {}), "bert": (tiny_bert, Texts, {})}
    models["the defaults"] = (tiny_bert, Texts, DEFAULTS)
    build, data, changes = models[family]
    settings: dict[str, Any] = {"per_device_train_batch_size": 4 // processes, "kd_weight": 0.5} | changes
    distillation = trainer(
        folder,
        model=build(dropout=0.1),
        teacher=build(width=24, seed=1),
        train_dataset=data(),
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        logging_steps=2,
        save_strategy="steps",
        save_steps=2,
        callbacks=[Steps(step)],
        **settings,
    )
    distillation.train(resume_from_checkpoint=last_complete_checkpoint(folder) is not None)
    left = {f"student.{name}": value for name, value in distillation.model.state_dict().items()}
    for part, state in distillation.distillation.state_dict().items():
        left |= {f"{part}.{name}": value for name, value in state.items()}
    save_file(left, Path(folder, f"left-{rank}.safetensors"))
    lines = [line for line in distillation.state.log_history if "loss" in line]
    Path(folder, f"log-{rank}.json").write_text(json.dumps(lines))
