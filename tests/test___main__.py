"""`python -m hf_rrd`: what each command writes and prints, and that it names what is missing."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, BertForSequenceClassification, ViTForImageClassification

import hf_rrd
from hf_rrd import RelationalDistillationTrainer, cache_teacher_outputs
from hf_rrd.__main__ import COMMANDS, VARIABLES, label_ids, main
from tests.builders import config, tiny_bert
from tests.examples.conftest import folder as folder  # models and data, all local
from tests.processes import ROOT, run_script
from tests.sentences import embedder


@pytest.fixture(autouse=True)
def few_forwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hf_rrd.results.measure.MOST", 3)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def start(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Runs a command line in this process; `{}` is the folder of the data, OUT that of the test. What it printed."""

    def start(line: str) -> str:
        words = shlex.split(line.replace("{}", str(folder)).replace("OUT", str(tmp_path)))
        monkeypatch.setattr(sys, "argv", ["hf_rrd", *words])
        main()
        return str(capsys.readouterr().out)

    return start


def test_the_commands_are_listed_and_another_is_named(start: Any) -> None:
    for line in ("", "--help"):
        printed = start(line)
        assert [name for name in COMMANDS if f"\n  {name} " not in printed] == []
    with pytest.raises(SystemExit, match="There is no command 'cash'.\nusage: python -m hf_rrd COMMAND"):
        start("cash")


def test_a_cache_of_texts_is_what_the_function_gives_and_trains_a_student(
    start: Any,
    folder: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "run.yaml").write_text("dtype: float16\ntext_column_name: sentence\noutput_dir: nowhere\n")
    files = "--train_file {}/train.csv --validation_file {}/validation.csv"
    line = f"cache --config OUT/run.yaml --teacher_model_name_or_path {{}}/classifier {files} --dtype float32"
    printed = start(f"{line} --output_dir OUT/cached")
    assert "train: 48 rows of sentence, label, verdict, teacher_embedding, teacher_logits\n" in printed
    assert f"Read them with load_dataset({str(tmp_path / 'cached')!r})." in printed
    data = datasets.load_dataset(str(tmp_path / "cached"))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 48, "validation": 20}
    teacher = BertForSequenceClassification.from_pretrained(folder / "classifier")
    words = AutoTokenizer.from_pretrained(folder / "classifier")
    texts = datasets.load_dataset("csv", data_files={"train": str(folder / "train.csv")})["train"]
    how: dict[str, Any] = {"processing_class": words, "text_column": "sentence", "dtype": "float32"}
    wanted = cache_teacher_outputs(texts, teacher, cache_dir=tmp_path / "other", **how)
    for column in ("teacher_embedding", "teacher_logits"):
        assert torch.equal(*(torch.tensor(each[column][:]) for each in (data["train"], wanted)))
    rows = data.map(lambda batch: words(batch["sentence"]), batched=True).rename_column("label", "labels")
    args = config(tmp_path / "run", max_steps=1, kd_weight=1.0)
    student = tiny_bert(classes=2)
    RelationalDistillationTrainer(student, args, train_dataset=rows["train"], processing_class=words).train()
    with pytest.raises(ValueError, match="the cached columns of `train_dataset` are of another teacher"):
        other = BertForSequenceClassification(teacher.config)
        RelationalDistillationTrainer(
            student, args, train_dataset=rows["train"], processing_class=words, teacher=other
        )


def test_a_sentence_transformer_reads_its_texts_as_it_encodes_them(start: Any, tmp_path: Path) -> None:
    model = embedder(tmp_path / "teacher", prompts={"query": "the cat "})
    model.save(str(tmp_path / "teacher"))
    line = "cache --teacher_model_name_or_path OUT/teacher --train_file {}/train.csv --text_column_name sentence"
    start(f"{line} --prompt_name query --dtype float32 --output_dir OUT/cached")
    rows = datasets.load_dataset(str(tmp_path / "cached"))["train"]
    wanted = torch.tensor(model.encode(rows["sentence"][:], prompt_name="query"))
    assert (torch.tensor(rows["teacher_embedding"][:]) - wanted).abs().max() < 1e-5
    assert "teacher_logits" not in rows.column_names


def test_a_cache_of_images_keeps_them_and_the_teachers_logits(start: Any, tmp_path: Path, folder: Path) -> None:
    line = "cache --teacher_model_name_or_path {}/vit --train_file {}/train.parquet --image_column_name image"
    start(f"{line} --dtype float32 --output_dir OUT/cached")
    rows = datasets.load_dataset(str(tmp_path / "cached"))["train"]
    assert rows.features["label"].names == ["b", "a", "d", "c"] and rows[0]["image"].size == (24, 20)
    pixels = AutoImageProcessor.from_pretrained(folder / "vit")(rows["image"][:], return_tensors="pt")
    with torch.no_grad():
        wanted = ViTForImageClassification.from_pretrained(folder / "vit")(**pixels).logits
    assert (torch.tensor(rows["teacher_logits"][:]) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("teacher", ["classifier", "other"])
def test_a_report_is_of_each_models_own_tokens(teacher: str, start: Any, tmp_path: Path, folder: Path) -> None:
    line = "report --student_model_name_or_path {}/classifier --test_file {}/test.csv --text_column_name sentence"
    line += f" --label_column_name label --teacher_model_name_or_path {{}}/{teacher}"
    printed = start(f"{line} --student_pooling mean --output_dir OUT")
    facts = json.loads((tmp_path / "distillation_report.json").read_text())
    model = BertForSequenceClassification.from_pretrained(folder / "classifier")
    words = AutoTokenizer.from_pretrained(folder / "classifier")
    rows = [json.loads(row) for row in (folder / "test.jsonl").read_text().splitlines()]
    with torch.no_grad():
        found = [model(**words(row["sentence"], return_tensors="pt")).logits.argmax().item() for row in rows]
    right = sum(one == row["label"] for one, row in zip(found, rows, strict=True)) / len(rows)
    assert facts["student"]["accuracy"] == pytest.approx(right) and facts["examples"] == 12
    assert printed.startswith("12 examples on CPU") and f"{100 * right:.1f} %" in printed
    if teacher == "classifier":
        assert facts["alignment"]["cka"] == pytest.approx(1.0) and facts["agreement"] == 1.0
    else:
        assert facts["alignment"]["cka"] < 0.99 and facts["teacher"]["class"] == "BertModel"


def test_a_report_of_images_takes_labels_by_their_names(start: Any, tmp_path: Path, folder: Path) -> None:
    student = ViTForImageClassification.from_pretrained(folder / "vit")
    student.config.id2label = dict(enumerate("ABCD"))
    student.config.label2id = {name: number for number, name in student.config.id2label.items()}
    student.save_pretrained(tmp_path / "student")
    processor = AutoImageProcessor.from_pretrained(folder / "vit")
    processor.save_pretrained(tmp_path / "student")
    data = "--test_file {}/test.parquet"
    line = f"report --student_model_name_or_path OUT/student {data} --image_column_name image"
    start(f"{line} --label_column_name label --teacher_model_name_or_path {{}}/other_vit --output_dir OUT")
    facts = json.loads((tmp_path / "distillation_report.json").read_text())
    rows = datasets.load_dataset("parquet", data_files={"test": str(folder / "test.parquet")})["test"]
    with torch.no_grad():
        found = student.eval()(**processor(rows["image"][:], return_tensors="pt")).logits.argmax(1).tolist()
    assert label_ids(rows, "label", student) == {0: 1, 1: 0, 2: 3, 3: 2}
    names = rows.features["label"].int2str(rows["label"][:])
    right = sum("abcd"[one] == name for one, name in zip(found, names, strict=True)) / len(rows)
    assert facts["student"]["accuracy"] == pytest.approx(right) and "accuracy" in facts["teacher"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--text_column_name sentence", "Give either --dataset_name, or --train_file"),
        ("--test_file {}/test.csv", "Give either --text_column_name or --image_column_name"),
        (
            "--test_file {}/test.csv --text_column_name text",
            "No column 'text' among .*: set --text_column",
        ),
        ("--test_file {}/test.csv --text_column_name sentence --split train", r"No split 'train' among \['test'\]"),
        (
            "--test_file {}/test.csv --text_column_name sentence --label_column_name lable",
            "No column 'lable' among .*: set --label_column_name",
        ),
        (
            "--test_file {}/test.csv --text_column_name sentence --label_column_name verdict",
            r"The student has no class '(good|bad)'. Its classes are \['LABEL_0', 'LABEL_1'\]",
        ),
    ],
)
def test_what_is_missing_is_named_with_its_flag(line: str, message: str, start: Any) -> None:
    with pytest.raises(SystemExit, match=message):
        start(f"report --student_model_name_or_path {{}}/classifier {line}")


def test_env_tells_versions_machine_and_settings_and_no_path_or_token(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_" + "s" * 30
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_TOKEN", secret)
    (tmp_path / "run.yaml").write_text(
        f"output_dir: {tmp_path}\nhub_token: {secret}\nkd_weight: 2\nteacher_model_name_or_path: {tmp_path}\n"
        f"teacher_model_init_kwargs: {{token: {secret}}}\nbf16: true\nlogging_steps: 500\n"
    )
    lines = start("env --config OUT/run.yaml --bank_size 64 --run_name mine --fsdp_config OUT/fsdp.json").splitlines()
    told = dict(line.removeprefix("- ").split(": ", 1) for line in lines)
    assert {name: value for name, value in told.items() if name.startswith("--")} == {
        "--kd_weight": "2",
        "--bank_size": "64",
        "--bf16": "true",
    }, "what is no default, and neither a path nor a name"
    assert (told["torch"], told["hf_rrd"], told["OMP_NUM_THREADS"]) == (torch.__version__, hf_rrd.__version__, "3")
    assert {"python", "transformers", "accelerate", "datasets", "platform"} <= told.keys()
    text = "\n".join(lines)
    assert secret not in text and str(tmp_path) not in text and os.path.expanduser("~") not in text
    assert [name for name in VARIABLES if name.endswith(("HOME", "TOKEN", "PATH", "DIR"))] == []


@pytest.mark.slow
def test_two_processes_share_a_cache_and_one_writes_it(folder: Path, tmp_path: Path) -> None:
    line = f"cache --teacher_model_name_or_path {folder}/classifier --train_file {folder}/train.csv "
    line += "--text_column_name sentence --dtype float32"
    logits = []
    for count in (1, 2):
        out = [f"--output_dir=of-{count}", f"--cache_dir=files-of-{count}"]
        script = ROOT / "hf_rrd" / "__main__.py"
        printed = run_script(script, *line.split(), *out, folder=tmp_path, processes=count).out
        assert printed.count("train: 48 rows of ") == 1
        rows = datasets.load_dataset(str(tmp_path / f"of-{count}"))["train"]
        logits.append(torch.tensor(rows["teacher_logits"][:]))
    assert (logits[0] - logits[1]).abs().max() < 1e-6


@pytest.mark.slow
def test_the_module_is_run_by_python(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hf_rrd", "env"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert f"- hf_rrd: {hf_rrd.__version__}\n" in printed.stdout
