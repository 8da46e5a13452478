"""Relational Representation Distillation (arXiv:2407.12073) for the Hugging Face Trainer."""

from hf_rrd.config import RelationalDistillationConfig
from hf_rrd.losses.bank import FeatureBank
from hf_rrd.losses.in_batch import (
    correlation_congruence_loss,
    own_space_loss,
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_preserving_loss,
)
from hf_rrd.losses.logits import dist_loss, logit_loss
from hf_rrd.losses.regression import cosine_loss, mse_loss, srd_loss
from hf_rrd.losses.relational import infonce_loss, relational_loss
from hf_rrd.models.embedding import embed
from hf_rrd.models.head import detach_head
from hf_rrd.models.initialization import Initialization, student_from_teacher
from hf_rrd.models.vocabulary import prune_vocabulary
from hf_rrd.results.alignment import relational_alignment
from hf_rrd.results.card import write_card
from hf_rrd.results.report import DistillationReport, compare_models
from hf_rrd.results.sentence_transformers import save_sentence_transformer
from hf_rrd.trainer import RelationalDistillationTrainer
from hf_rrd.training.caching import cache_teacher_outputs, with_views
from hf_rrd.training.data import DataCollatorForDistillation

__version__ = "0.2.0"

__all__ = [
    "DataCollatorForDistillation",
    "DistillationReport",
    "FeatureBank",
    "Initialization",
    "RelationalDistillationConfig",
    "RelationalDistillationTrainer",
    "cache_teacher_outputs",
    "compare_models",
    "correlation_congruence_loss",
    "cosine_loss",
    "detach_head",
    "dist_loss",
    "embed",
    "infonce_loss",
    "logit_loss",
    "mse_loss",
    "own_space_loss",
    "pkt_loss",
    "prune_vocabulary",
    "relational_alignment",
    "relational_loss",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "save_sentence_transformer",
    "similarity_preserving_loss",
    "srd_loss",
    "student_from_teacher",
    "with_views",
    "write_card",
]
