"""The classifier of texts: its data, its teacher and what it saves."""

import json
import shlex
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tests.examples.scripts import CLASSIFY, QUIET, WORDS, load_script, start_process, text_accuracy


def test_text_classification_tunes_a_teacher_and_saves_a_student_of_the_printed_accuracy(
    folder: Path, tmp_path: Path
) -> None:
    new = "--student_config_name bert "
    new += "--student_config_overrides hidden_size=8,num_hidden_layers=1,num_attention_heads=2"
    teacher = "--teacher_model_name_or_path {}/embedder --teacher_epochs 1 --kd_weight 1"
    printed = start_process("text_classification", f"{CLASSIFY} {new} {teacher} --output_dir OUT", folder, tmp_path)
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (student.config.hidden_size, student.config.num_hidden_layers) == (8, 1)
    assert student.config.vocab_size == 2 + len(WORDS)
    assert student.config.id2label == {0: "bad", 1: "good"}
    for split in ("validation", "test"):
        saved = json.loads((tmp_path / f"{split}_results.json").read_text())[f"{split}_accuracy"]
        assert saved == pytest.approx(text_accuracy(tmp_path, folder / f"{split}.jsonl", "verdict"))
        assert f"{100 * saved:.1f} %" in printed
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher").config.hidden_size == 16


def test_text_classification_takes_the_teacher_of_an_earlier_run(start: Any, tmp_path: Path) -> None:
    teacher = "--teacher_model_name_or_path {}/embedder --teacher_epochs 1"
    line = f"{CLASSIFY} {teacher} --student_num_layers 1 --output_dir OUT"
    start("text_classification", line)
    before = load_file(tmp_path / "teacher" / "model.safetensors")
    first = load_file(tmp_path / "model.safetensors")
    written = (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns
    start("text_classification", line)
    assert (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns == written
    again = load_file(tmp_path / "model.safetensors")
    assert [name for name in first if not torch.equal(first[name], again[name])] == []
    # A part of the teacher as it was after its training: as wide, less deep.
    # Counted, since transformers 5.0 writes the norms of a loaded BERT under their old names.
    assert len(again) < len(before) and again["classifier.weight"].shape == before["classifier.weight"].shape


@pytest.mark.parametrize(("suffix", "beside"), [("yaml", "--max_steps 2"), ("json", "")])
def test_a_file_says_what_flags_say_and_flags_beside_it_win(
    suffix: str, beside: str, start: Any, folder: Path, tmp_path: Path
) -> None:
    flags = "--teacher_model_name_or_path {}/classifier --student_num_layers 2 --max_steps 2 --max_train_samples 20"
    start("text_classification", f"{CLASSIFY} {flags} --output_dir OUT/flags")
    line = shlex.split(f"{CLASSIFY} {flags} --output_dir OUT/file".replace("{}", str(folder)))
    values = {
        name.removeprefix("--"): yaml.safe_load(value.replace("OUT", str(tmp_path)))
        for name, value in zip(line[::2], line[1::2], strict=True)
    } | {"save_strategy": "no"}
    values |= {"max_steps": 5} if beside else {}
    file = tmp_path / f"settings.{suffix}"
    file.write_text((yaml.safe_dump if suffix == "yaml" else json.dumps)(values))
    trainer = start("text_classification", f"--config {file} {beside}" if beside else str(file))
    assert len(trainer.train_dataset) == 20 and trainer.state.global_step == 2
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("flags", "file"))
    assert len(one) > 0 and [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_teacher_has_columns_of_its_own_only_where_its_tokenizer_is_another(start: Any) -> None:
    line = f"{CLASSIFY} --teacher_model_name_or_path {{}}/classifier --max_steps 1 --output_dir OUT"
    shared = start("text_classification", f"{line} --student_num_layers 1").train_dataset.column_names
    assert "input_ids" in shared and "teacher_input_ids" not in shared
    other = start("text_classification", f"{line} --student_model_name_or_path {{}}/other").train_dataset
    # The same words, counted from the other end of the vocabulary.
    assert all(
        own + given == 2 + 2 + len(WORDS) - 1
        for own, given in zip(*(other[0][name] for name in ("input_ids", "teacher_input_ids")), strict=True)
    )


def test_distillation_on_logits_asks_for_a_teacher_with_a_head(start: Any) -> None:
    line = (
        f"{CLASSIFY} --teacher_model_name_or_path {{}}/embedder --student_num_layers 1 --kd_weight 1 --output_dir OUT"
    )
    with pytest.raises(SystemExit, match="try --teacher_epochs 2"):
        start("text_classification", line)


def test_labels_are_numbered_as_the_teacher_numbers_them_whatever_their_case() -> None:
    script, feature = load_script("text_classification"), datasets.ClassLabel(names=["entailment", "neutral"])
    rows = datasets.Dataset.from_dict({"label": [0, 1]}, features=datasets.Features({"label": feature}))
    data = datasets.DatasetDict({"train": rows})
    found = script.label_ids(data, "label", {"NEUTRAL": 0, "ENTAILMENT": 1})
    assert found == ({"entailment": 1, "neutral": 0}, {0: 1, 1: 0, None: -100})
    assert script.label_ids(data, "label", {"LABEL_0": 0, "LABEL_1": 1})[1] == {0: 0, 1: 1, None: -100}


@pytest.mark.parametrize("names", [("bad", "good"), ("0", "1")])
def test_texts_whose_label_is_empty_are_there_to_distil_on(
    names: tuple[str, str], start: Any, folder: Path, tmp_path: Path
) -> None:
    rows = datasets.load_dataset("csv", data_files=str(folder / "train.csv"), split="train")
    labels = [names[verdict == "good"] if place % 4 == 0 else "" for place, verdict in enumerate(rows["verdict"])]
    lines = [f"{text},{label}" for text, label in zip(rows["sentence"], labels, strict=True)]
    (tmp_path / "train.csv").write_text("\n".join(["sentence,verdict", *lines]))
    line = f"--train_file {tmp_path}/train.csv --text_column_name sentence --label_column_name verdict {QUIET} "
    line += "--teacher_model_name_or_path {}/embedder --teacher_epochs 1 --student_num_layers 1 --output_dir OUT"
    start("text_classification", f"{line} --num_train_epochs 1 --logging_steps 1")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.id2label == dict(enumerate(names))
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry for entry in log if "loss" in entry][-1]["step"] == -(-len(rows) // 8)
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    assert all(bool(weight.isfinite().all()) for weight in weights.values())


def test_distillation_on_logits_asks_for_a_teacher_of_these_labels(start: Any, folder: Path, tmp_path: Path) -> None:
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "classifier")
    teacher.config.id2label, teacher.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    teacher.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(folder / "classifier").save_pretrained(tmp_path / "teacher")
    line = f"{CLASSIFY} --teacher_model_name_or_path {tmp_path}/teacher --student_num_layers 1 --output_dir OUT"
    with pytest.raises(
        ValueError, match=r"the teacher names its classes \['no', 'yes'\], the student \['bad', 'good'\]"
    ):
        start("text_classification", f"{line} --kd_weight 1")
