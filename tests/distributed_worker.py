"""One process of a data-parallel run: the child process of test_distributed."""

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from tests.builders import Images, be_process, trainer


def run(rank: int, processes: int, port: int, folder: str) -> None:
    """Train 5 steps of 16 examples over the processes, and write down what this process ends with."""
    be_process(rank, processes, port)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    distillation = trainer(
        folder,
        per_device_train_batch_size=16 // processes // 2,
        gradient_accumulation_steps=2,
        max_steps=5,
        bank_size=48,
        kd_weight=0.5,
        teacher_projection="pca",
        projection_dim=20,
        calibration_examples=40,
        optim="sgd",
        train_dataset=Images(64),
        eval_dataset=Images(19, seed=5),
    )
    distillation.train()
    metrics = distillation.evaluate()
    assert distillation.objective.bank is not None
    logged = [line[name] for line in distillation.state.log_history if "loss" in line for name in sorted(line)]
    save_file(
        {
            "student": torch.cat([weight.detach().flatten() for weight in distillation.model.parameters()]),
            "bank": distillation.objective.bank.filled,
            "log": torch.tensor(logged),
            "eval": torch.tensor([metrics[f"eval_{name}_loss"] for name in ("kd", "relational")]),
        },
        Path(folder, f"rank-{rank}-of-{processes}.safetensors"),
    )
