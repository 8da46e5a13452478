"""The scripts in `examples/` run in a tiny mode: from flags, from YAML and JSON, and with `accelerate launch`."""

import importlib.util
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
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
)

from tests.builders import tiny_vit
from tests.loopback_hub import LoopbackHub, header_errors
from tests.processes import free_port, run_script

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("text_classification", "image_classification", "text_embeddings", "own_training_loop")
WORDS = ["fine", "warm", "bright", "dull", "cold", "grey", "film", "story", "scene", "ending"]
QUIET = "--disable_tqdm True --save_strategy no --use_cpu True --per_device_train_batch_size 8 --learning_rate 0.01"


def load_script(name: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the dataclasses look their types up there
    spec.loader.exec_module(module)
    return module


def save_text_model(folder: Path, words: list[str], head: bool, width: int = 16, layers: int = 3) -> None:
    """A BERT and a tokenizer of these words."""
    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *words])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(width)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
    )
    (BertForSequenceClassification if head else BertModel)(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data, all local."""
    folder = tmp_path_factory.mktemp("scripts")
    save_text_model(folder / "embedder", WORDS, head=False)
    save_text_model(folder / "classifier", WORDS, head=True)
    save_text_model(folder / "other", WORDS[::-1], head=False, width=8, layers=1)
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 48), ("validation", 20), ("test", 12)):
        drawn = torch.randint(0, len(WORDS), (count, 5), generator=generator).tolist()
        texts = [" ".join(WORDS[place] for place in places) for places in drawn]
        good = [int(places[0] < 5) for places in drawn]
        rows = {"sentence": texts, "label": good, "verdict": [("bad", "good")[each] for each in good]}
        datasets.Dataset.from_dict(rows).to_csv(str(folder / f"{split}.csv"))
        datasets.Dataset.from_dict(rows).to_json(str(folder / f"{split}.jsonl"))
        pixels = torch.randint(0, 256, (count, 20, 24, 3), generator=generator, dtype=torch.uint8).numpy()
        kind = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a", "d", "c"])})
        images = {"image": list(pixels), "label": [place % 4 for place in range(count)]}
        datasets.Dataset.from_dict(images, features=kind).to_parquet(str(folder / f"{split}.parquet"))
    for name, mean in (("vit", 0.5), ("other_vit", 0.25)):
        size = {"height": 16, "width": 16}
        ViTImageProcessor(size=size, image_mean=[mean] * 3).save_pretrained(folder / name)
        tiny_vit(width=16 if name == "vit" else 8).save_pretrained(folder / name)
    return folder


@pytest.fixture
def start(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs an example's `main` in this process with the arguments of a line; `{}` in it is the folder of the data."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def start(name: str, line: str) -> Any:
        script = load_script(name)
        script.main_trainers = []
        if hasattr(script, "RelationalDistillationTrainer"):

            class Kept(script.RelationalDistillationTrainer):  # type: ignore[misc]
                def __init__(self, *args: Any, **kwargs: Any) -> None:
                    super().__init__(*args, **kwargs)
                    script.main_trainers.append(self)

            monkeypatch.setattr(script, "RelationalDistillationTrainer", Kept)
        arguments = shlex.split(line.replace("{}", str(folder)).replace("OUT", str(tmp_path)))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        script.main()
        return script.main_trainers[0] if script.main_trainers else None

    return start


def start_process(
    name: str, line: str, folder: Path, out: Path, processes: int = 1, hub: LoopbackHub | None = None
) -> str:
    """Runs an example as a user starts it; what it printed."""
    arguments = shlex.split(line.replace("{}", str(folder)).replace("OUT", str(out)))
    environment = {"COLUMNS": "200"} | ({} if hub is None else hub.environment(out / "home"))
    path = EXAMPLES / f"{name}.py"
    return run_script(path, *arguments, folder=out, environment=environment, processes=processes).out


@torch.no_grad()
def text_accuracy(student: Path, file: Path, column: str) -> float:
    """The share of a file's texts that a saved student gets right, one text at a time."""
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(student),
        AutoTokenizer.from_pretrained(student),
    )
    right = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        found = model(**tokenizer(row["sentence"], return_tensors="pt")).logits.argmax().item()
        right.append(model.config.id2label[found] == str(row[column]))
    return sum(right) / len(right)


TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
CLASSIFY = (
    "--train_file {}/train.csv --validation_file {}/validation.csv --test_file {}/test.csv "
    f"--text_column_name sentence --label_column_name verdict --num_train_epochs 1 {QUIET} "
)


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


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_one_file_says_what_flags_say(suffix: str, start: Any, folder: Path, tmp_path: Path) -> None:
    flags = "--teacher_model_name_or_path {}/classifier --student_num_layers 2 --max_steps 2 --max_train_samples 20"
    start("text_classification", f"{CLASSIFY} {flags} --output_dir OUT/flags")
    line = shlex.split(f"{CLASSIFY} {flags} --output_dir OUT/file".replace("{}", str(folder)))
    values = {
        name.removeprefix("--"): yaml.safe_load(value.replace("OUT", str(tmp_path)))
        for name, value in zip(line[::2], line[1::2], strict=True)
    } | {"save_strategy": "no"}
    file = tmp_path / f"settings.{suffix}"
    file.write_text((yaml.safe_dump if suffix == "yaml" else json.dumps)(values))
    trainer = start("text_classification", str(file))
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


def test_image_classification_saves_a_student_of_the_printed_accuracy(folder: Path, tmp_path: Path) -> None:
    line = (
        "--train_file {}/train.parquet --validation_file {}/validation.parquet --teacher_model_name_or_path {}/vit "
        "--student_config_name vit --student_config_overrides "
        '"patch_size=8,hidden_size=8,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16" '
        f"--max_train_samples 24 --max_eval_samples 10 --kd_weight 1 --num_train_epochs 1 {QUIET} --output_dir OUT"
    )
    printed = start_process("image_classification", line, folder, tmp_path)
    student = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert (student.config.image_size, student.config.hidden_size) == (16, 8)
    assert student.config.id2label == {0: "b", 1: "a", 2: "d", 3: "c"}
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    rows = datasets.Dataset.from_parquet(str(folder / "validation.parquet"), cache_dir=str(tmp_path / "cache"))
    rows = rows.shuffle(seed=0).select(range(10))
    found = student(processor(rows[:]["image"], return_tensors="pt")["pixel_values"]).logits.argmax(-1)
    saved = json.loads((tmp_path / "validation_results.json").read_text())["validation_accuracy"]
    assert saved == pytest.approx((found == torch.tensor(rows[:]["label"])).float().mean().item())
    assert f"{100 * saved:.1f} %" in printed and "teacher" in printed


def test_two_image_processors_see_one_view(start: Any) -> None:
    line = (
        "--train_file {}/train.parquet --test_file {}/test.parquet --teacher_model_name_or_path {}/vit "
        f"--student_model_name_or_path {{}}/other_vit --max_steps 1 {QUIET} --output_dir OUT"
    )
    rows = start("image_classification", line).train_dataset[:16]
    own, given = (torch.stack(list(rows[name])) for name in ("pixel_values", "teacher_pixel_values"))
    assert own.shape == given.shape == (16, 3, 16, 16)
    assert (own * 0.5 + 0.25 - (given * 0.5 + 0.5)).abs().max() < 1e-5  # the deviation is 0.5, the means 0.25 and 0.5


@pytest.mark.parametrize("student", ["--student_num_layers 1", "--student_model_name_or_path {}/other"])
def test_texts_train_from_the_teachers_cached_outputs_as_under_the_teacher(start: Any, student: str) -> None:
    line = "--train_file {}/train.csv --validation_file {}/validation.csv --text_column_name sentence "
    line += f"{student} --num_train_epochs 1 --logging_steps 1 --optim sgd {QUIET} --output_dir OUT"
    for script, given, terms in (
        (
            "text_classification",
            "{}/classifier --label_column_name verdict --kd_weight 1",
            ["relational_loss", "kd_loss"],
        ),
        ("text_embeddings", "{}/embedder", ["relational_loss"]),
    ):
        runs = [
            start(script, f"{line} --teacher_model_name_or_path {given} {flag}") for flag in ("", "--cache_teacher")
        ]
        assert [run.teacher is None for run in runs] == [False, True]
        for term in terms:
            online, cached = ([entry[term] for entry in run.state.log_history if "loss" in entry] for run in runs)
            assert len(online) >= 6
            assert cached == pytest.approx(online, rel=2e-3, abs=2e-3)
        assert runs[1].evaluate().keys() >= {f"eval_{term}" for term in terms}


@pytest.mark.parametrize("student", ["--student_num_layers 1", "--student_model_name_or_path {}/other_vit"])
def test_the_student_sees_the_views_whose_embeddings_are_cached(start: Any, folder: Path, student: str) -> None:
    line = (
        "--train_file {}/train.parquet --test_file {}/test.parquet --teacher_model_name_or_path {}/vit "
        f"{student} --num_train_epochs 2 --cached_views 3 {QUIET} --output_dir OUT"
    )
    run = start("image_classification", line)
    assert run.teacher is None
    assert (len(run.train_dataset), run.state.global_step) == (3 * 48, 12)  # 2 epochs of 48 images, 8 a step
    rows = [run.train_dataset[number] for number in (0, 50, 100, 143)]
    pixels = torch.stack([row.get("teacher_pixel_values", row["pixel_values"]) for row in rows])
    teacher = AutoModelForImageClassification.from_pretrained(folder / "vit").eval()
    expected = teacher.vit(pixels).last_hidden_state[:, 0]
    assert (torch.tensor([row["teacher_embedding"] for row in rows]) - expected).abs().max() < 2e-3


@pytest.mark.parametrize("smallest", [0.1, 0.5, 0.99])
def test_a_random_view_keeps_its_share_of_an_image(smallest: float) -> None:
    from PIL import Image

    script = load_script("image_classification")
    torch.manual_seed(0)
    views = [script.random_view(Image.new("RGB", (64, 48)), smallest) for _ in range(200)]
    assert all(view.width <= 64 and view.height <= 48 for view in views)
    # Less only where a wide view did not fit in.
    assert min(view.width * view.height for view in views) >= smallest * 64 * 48 * 0.7
    assert len({view.size for view in views}) > 3


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


@pytest.mark.parametrize(
    ("name", "line", "processor"),
    [
        ("quickstart", "--teacher_epochs 0.2 --epochs 0.5", set()),
        (
            "text_classification",
            f"{CLASSIFY} --teacher_model_name_or_path {{}}/classifier --logging_steps 1",
            TOKENIZER,
        ),
        (
            "image_classification",
            "--train_file {}/train.parquet --test_file {}/test.parquet "
            f"--teacher_model_name_or_path {{}}/vit --logging_steps 1 {QUIET}",
            {"preprocessor_config.json"},
        ),
        (
            "text_embeddings",
            "--train_file {}/train.csv --validation_file {}/validation.csv --text_column_name sentence "
            "--teacher_model_name_or_path {}/embedder --student_num_layers 1 --student_projection none "
            f"--logging_steps 1 {QUIET}",
            TOKENIZER,
        ),
        (
            "own_training_loop",
            "--train_file {}/train.csv --validation_file {}/validation.csv --text_column_name sentence "
            "--teacher_model_name_or_path {}/classifier --student_num_layers 1 --num_train_epochs 1",
            TOKENIZER,
        ),
    ],
)
def test_a_script_reports_and_pushes_by_flags(
    name: str, line: str, processor: set[str], folder: Path, tmp_path: Path
) -> None:
    with LoopbackHub() as hub:
        flags = "--report --push_to_hub --hub_model_id tester/pushed --output_dir OUT"
        printed = start_process(name, f"{line} {flags}", folder, tmp_path, hub=hub)
        files = hub.files("tester/pushed")
        assert hub.unhandled == []
    assert "CKA with the teacher" in printed and "p95" in printed
    stock = {"README.md", "config.json", "model.safetensors"} | processor
    pictures = {
        "quickstart": "similarities embeddings reliability",  # its tiny run ends before its first log line
        "text_embeddings": "losses similarities embeddings",  # without classes
        "own_training_loop": "similarities embeddings reliability",
    }.get(name, "losses similarities embeddings reliability")
    assert files.keys() == stock | {f"figures/{picture}.png" for picture in pictures.split()}
    card = files["README.md"].decode()
    assert header_errors(card) == [] and "hf-rrd" in card and str(tmp_path) not in card and str(folder) not in card
    report = json.loads(next(tmp_path.rglob("distillation_report.json")).read_text())
    assert {"latency_ms", "parameters", "bytes", "flops"} <= report["student"].keys() & report["teacher"].keys()


def test_retrieval_counts_the_teachers_nearest_among_the_ten_nearest() -> None:
    measure = load_script("text_embeddings").measure
    angles = torch.arange(40) * 0.01 * torch.arange(40)  # gaps grow: each one's nearest is the one before it
    teacher = torch.stack([angles.mul(0.05).cos(), angles.mul(0.05).sin()], dim=1)  # (40, 2)
    assert measure({"validation": teacher}, teacher, {}) == {"retrieval": 1.0}
    # Shuffled by 20 places, the nearest of each is far away, except around the cut.
    far = measure({"validation": teacher[torch.arange(40).mul(7) % 40]}, teacher, {})["retrieval"]
    assert far < 0.5


def test_the_own_loop_runs_on_two_processes_and_saves_a_student_of_the_printed_accuracy(
    folder: Path, tmp_path: Path
) -> None:
    line = (
        "--train_file {}/train.csv --validation_file {}/validation.csv --text_column_name sentence --batch_size 8 "
        "--teacher_model_name_or_path {}/classifier --student_num_layers 1 --kd_weight 1 --bank_size 30 "
        "--learning_rate 0.01 --output_dir OUT"
    )
    printed = start_process("own_training_loop", line, folder, tmp_path, processes=2)
    assert printed.count("epoch 2: loss") == 1
    assert printed.count("in 3 steps") == 2  # 48 examples by twice 8
    saved = json.loads((tmp_path / "results.json").read_text())
    for name, model in (("student", tmp_path), ("teacher", folder / "classifier")):
        rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
        network, tokenizer = (
            AutoModelForSequenceClassification.from_pretrained(model),
            AutoTokenizer.from_pretrained(model),
        )
        found = [network(**tokenizer(row["sentence"], return_tensors="pt")).logits.argmax().item() for row in rows]
        assert saved[name] == pytest.approx(
            sum(a == row["label"] for a, row in zip(found, rows, strict=True)) / len(rows)
        )
        assert f"{name} {100 * saved[name]:.1f} %" in printed
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.num_hidden_layers == 1


@pytest.mark.slow
def test_accelerate_launch_starts_a_script_as_two_processes(folder: Path, tmp_path: Path) -> None:
    # `--cpu` would start one process, whatever the number; ACCELERATE_USE_CPU is set in conftest.
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    line = (
        f"{launcher} --dynamo_backend no --main_process_port {free_port()} {EXAMPLES}/own_training_loop.py "
        f"--train_file {folder}/train.csv --validation_file {folder}/validation.csv --text_column_name sentence "
        f"--batch_size 8 --teacher_model_name_or_path {folder}/classifier --student_num_layers 1 --output_dir out"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    printed = subprocess.run(
        [sys.executable, *shlex.split(line)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment,
    ).stdout
    assert printed.count("in 3 steps") == 2  # 48 examples by twice 8
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_hidden_layers == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_command_in_the_docstring_is_understood(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script(name)
    command = next(line for line in script.__doc__.splitlines() if line.startswith("    python"))
    words = shlex.split(command)
    assert words[:2] == ["python", f"examples/{name}.py"]
    monkeypatch.setattr(sys, "argv", words[1:])
    parsed = script.parse()
    settings = parsed[-1] if isinstance(parsed, tuple) else parsed
    assert settings.output_dir == f"out/{name}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_file_that_is_not_there_is_named(name: str, start: Any) -> None:
    models = "--teacher_model_name_or_path {}/classifier --student_num_layers 1 --output_dir OUT"
    files = "--train_file {}/nowhere.csv --validation_file {}/validation.csv"
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        start(name, f"{models} {files}")


@pytest.mark.parametrize("name", SCRIPTS[:3])
def test_a_run_without_data_says_which_flags_it_needs(name: str, start: Any) -> None:
    with pytest.raises(SystemExit, match="Give .*--dataset_name.*--train_file"):
        start(name, "--teacher_model_name_or_path {}/classifier --output_dir OUT")
