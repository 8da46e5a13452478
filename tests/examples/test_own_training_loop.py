"""The loop without a trainer: on two processes, forked and by a launcher."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tests.examples.scripts import EXAMPLES, start_process
from tests.processes import free_port


def test_the_own_loop_runs_on_two_processes_and_saves_a_student_of_the_printed_accuracy(
    folder: Path, tmp_path: Path
) -> None:
    line = (
        "--train_file {}/train.csv --validation_file {}/validation.csv --text_column_name sentence "
        "--per_device_train_batch_size 8 --teacher_model_name_or_path {}/classifier --student_num_layers 1 "
        "--kd_weight 1 --bank_size 30 --learning_rate 0.01 --output_dir OUT "
        "--card_teacher 'a bigger one' --card_baseline '{\"accuracy\": 0.125}'"
    )
    printed = start_process("own_training_loop", line, folder, tmp_path, processes=2)
    assert printed.count("epoch 2: loss") == 1
    assert printed.count("the last of 3 steps") == 2  # 48 examples by twice 8
    saved = json.loads((tmp_path / "distillation_report.json").read_text())
    for name, model in (("student", tmp_path), ("teacher", folder / "classifier")):
        rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
        network, tokenizer = (
            AutoModelForSequenceClassification.from_pretrained(model),
            AutoTokenizer.from_pretrained(model),
        )
        found = [network(**tokenizer(row["sentence"], return_tensors="pt")).logits.argmax().item() for row in rows]
        right = sum(a == row["label"] for a, row in zip(found, rows, strict=True)) / len(rows)
        assert saved[name]["accuracy"] == pytest.approx(right)
        assert f"{100 * right:.1f} %" in printed
    card = (tmp_path / "README.md").read_text()
    assert "distilled from a bigger one (" in card and "against a bank of 30 of" in card
    assert re.search(r"\| accuracy \| validation \| [\d.]+ \| 0.125 \| [\d.]+ \|\n", card), "student, without, teacher"
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.num_hidden_layers == 1


@pytest.mark.slow
def test_accelerate_launch_starts_a_script_as_two_processes(folder: Path, tmp_path: Path) -> None:
    # `--cpu` would start one process, whatever the number; ACCELERATE_USE_CPU is set in conftest.
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    line = (
        f"{launcher} --dynamo_backend no --main_process_port {free_port()} {EXAMPLES}/own_training_loop.py "
        f"--train_file {folder}/train.csv --validation_file {folder}/validation.csv --text_column_name sentence "
        f"--per_device_train_batch_size 8 --teacher_model_name_or_path {folder}/classifier --student_num_layers 1 "
        "--output_dir out"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    printed = subprocess.run(
        [sys.executable, *shlex.split(line)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        timeout=150,
        env=environment,
    ).stdout
    assert printed.count("the last of 3 steps") == 2  # 48 examples by twice 8
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_hidden_layers == 1
