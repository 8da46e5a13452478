"""Relational Representation Distillation (arXiv:2407.12073) for the Hugging Face Trainer."""

from hf_rrd.alignment import relational_alignment
from hf_rrd.config import RelationalDistillationConfig
from hf_rrd.data import DataCollatorForDistillation
from hf_rrd.feature_bank import FeatureBank
from hf_rrd.losses import logit_loss, relational_loss
from hf_rrd.trainer import RelationalDistillationTrainer

__version__ = "0.1.0"

__all__ = [
    "DataCollatorForDistillation",
    "FeatureBank",
    "RelationalDistillationConfig",
    "RelationalDistillationTrainer",
    "logit_loss",
    "relational_alignment",
    "relational_loss",
]
