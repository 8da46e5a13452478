"""The embedding model: without labels, on two processes, and what it measures."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    BertModel,
)

from tests.examples.scripts import QUIET, load_script, start_process


def test_text_embeddings_run_on_two_processes_and_save_a_plain_encoder(folder: Path, tmp_path: Path) -> None:
    line = (
        "--train_file {}/train.csv --validation_file {}/validation.csv --text_column_name sentence "
        "--label_column_name verdict --teacher_model_name_or_path {}/embedder --student_num_layers 1 "
        f"--num_train_epochs 1 {QUIET} --output_dir OUT"
    )
    printed = start_process("text_embeddings", line, folder, tmp_path, processes=2)
    assert [printed.count(name) for name in ("student before", "student after")] == [1, 1]
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 3  # 48 sentences by twice 8
    metrics = json.loads((tmp_path / "eval_results.json").read_text())
    for name in ("retrieval", "linear_probe", "knn"):
        assert 0 <= metrics[f"eval_{name}"] <= 1
        assert f"{100 * metrics[f'eval_{name}']:.1f} %" in printed
    student = AutoModel.from_pretrained(tmp_path)
    assert type(student) is BertModel and student.config.num_hidden_layers == 1


def test_text_embeddings_train_without_the_labels(start: Any) -> None:
    line = (
        "--train_file {}/train.jsonl --validation_file {}/validation.jsonl --text_column_name sentence "
        "--label_column_name verdict --teacher_model_name_or_path {}/embedder --student_model_name_or_path {}/other "
        "--student_projection none --teacher_projection pca --projection_dim 8 "  # as wide as that student
        f"--max_steps 1 {QUIET} --output_dir OUT"
    )
    trainer = start("text_embeddings", line)
    columns = set(trainer.train_dataset.column_names)
    assert {"input_ids", "teacher_input_ids"} <= columns and not columns & {"label", "labels", "verdict"}
    assert trainer.args.task_weight == 0
    assert trainer.distillation.bank.dim == 8


def test_retrieval_counts_the_teachers_nearest_among_the_ten_nearest() -> None:
    measure = load_script("text_embeddings").measure
    angles = torch.arange(40) * 0.01 * torch.arange(40)  # gaps grow: each one's nearest is the one before it
    teacher = torch.stack([angles.mul(0.05).cos(), angles.mul(0.05).sin()], dim=1)  # (40, 2)
    assert measure({"validation": teacher}, teacher, {}) == {"retrieval": 1.0}
    # Shuffled by 20 places, the nearest of each is far away, except around the cut.
    far = measure({"validation": teacher[torch.arange(40).mul(7) % 40]}, teacher, {})["retrieval"]
    assert far < 0.5
