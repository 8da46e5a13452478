"""Small models from configs, small data sets, and a trainer with quiet settings."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_rrd import RelationalDistillationConfig, RelationalDistillationTrainer
from tests.processes import be_process as be_process
from tests.processes import free_port as free_port
from tests.processes import run_together as run_together

CLASSES = 4


def tiny_vit(width: int = 16, layers: int = 2, seed: int = 0, classes: int = CLASSES, dropout: float = 0.0) -> Any:
    """A ViT for 16 x 16 images in patches of 8."""
    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=2 * width,
            image_size=16,
            patch_size=8,
            num_labels=classes,
            hidden_dropout_prob=dropout,
        )
    )


def tiny_bert(width: int = 16, layers: int = 2, seed: int = 0, classes: int = CLASSES, dropout: float = 0.0) -> Any:
    """A BERT classifier over 50 tokens."""
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=2 * width,
            max_position_embeddings=32,
            num_labels=classes,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def tiny_gpt2(width: int = 16, seed: int = 0) -> Any:
    """A GPT-2 over 50 tokens."""
    torch.manual_seed(seed)
    sizes = {"n_embd": width, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 50}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=1, eos_token_id=1))


def tiny_tokens(build: Any = BertForTokenClassification, width: int = 16, seed: int = 0) -> Any:
    """A BERT that gives logits for each of 50 tokens."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return build(BertConfig(vocab_size=50, max_position_embeddings=32, **sizes, **dropout, num_labels=CLASSES))


class Images(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random images with labels."""

    def __init__(self, count: int = 48, seed: int = 0, labels: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pixels = torch.randn(count, 3, 16, 16, generator=generator)
        self.labels = torch.randint(0, CLASSES, (count,), generator=generator) if labels else None

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = {"pixel_values": self.pixels[index]}
        return example if self.labels is None else example | {"labels": self.labels[index]}


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random token sequences of length 9, padded on the right by 0 to 4 tokens, with labels."""

    def __init__(self, count: int = 48, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(2, 50, (count, 9), generator=generator)
        lengths = torch.randint(5, 10, (count,), generator=generator)
        self.mask = (torch.arange(9) < lengths.unsqueeze(1)).long()
        self.tokens = self.tokens * self.mask
        self.labels = torch.randint(0, CLASSES, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.tokens[index],
            "attention_mask": self.mask[index],
            "labels": self.labels[index],
        }


class Tokens(Texts):
    """Texts with a label for each token, of which 1 to 9 count."""

    def __init__(self, count: int = 24, classes: int = 50) -> None:
        super().__init__(count)
        generator = torch.Generator().manual_seed(1)
        labels = torch.randint(0, classes, (count, 9), generator=generator)
        kept = torch.randint(1, 10, (count, 1), generator=generator)
        self.labels = labels.masked_fill(torch.arange(9) < 9 - kept, -100)


def config(output_dir: str | Path, **changes: Any) -> RelationalDistillationConfig:
    """Quiet settings for some steps on the CPU."""
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "bank_size": 20,
        "teacher_projection": "none",
        "kd_weight": 0.0,  # the loss as its formula says, without what the defaults add to that
        "relational_weight": 1.0,
        "balance_losses": False,
        "student_projection": "linear",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    return RelationalDistillationConfig(**(settings | changes))


def trainer(output_dir: str | Path, **given: Any) -> RelationalDistillationTrainer:
    """A trainer of a tiny ViT under a wider one on random images, or of what is given.

    Names of config fields change the settings; the others are arguments of the trainer. A function as the model is
    called once the settings are made.
    """
    fields = RelationalDistillationConfig.__dataclass_fields__
    settings = {name: given.pop(name) for name in list(given) if name in fields}
    arguments: dict[str, Any] = {"train_dataset": Images()}
    if "model" not in given and "model_init" not in given:
        arguments["model"] = tiny_vit()
    if "teacher" not in given:
        arguments["teacher"] = tiny_vit(width=24, seed=1)
    args = config(output_dir, **settings)
    arguments |= given
    if inspect.isfunction(arguments.get("model")):  # to be made after the settings
        arguments["model"] = arguments["model"]()
    return RelationalDistillationTrainer(args=args, **arguments)


def log_of(run: RelationalDistillationTrainer, key: str = "loss") -> list[float]:
    """The values of a key in the training log, in order."""
    return [entry[key] for entry in run.state.log_history if key in entry and "loss" in entry]
