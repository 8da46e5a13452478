"""What holds for every script of the folder: its flags, its card, its errors."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from hf_rrd.training.arguments import parse_arguments
from tests.examples.scripts import CLASSIFY, LIBRARY, QUIET, SCRIPTS, TOKENIZER, load_script, start_process
from tests.loopback_hub import LoopbackHub, header_errors

write_cards = load_script("benchmarks/write_cards")


@pytest.mark.parametrize("student", ["--student_num_layers 1", "--student_model_name_or_path {}/other"])
@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("name", "line", "processor"),
    [
        pytest.param("quickstart", "--num_train_epochs 0.4 --seeds 1", set(), marks=pytest.mark.slow),
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
            f"--teacher_model_name_or_path {{}}/embedder --student_num_layers 1 --logging_steps 1 {QUIET}",
            TOKENIZER | LIBRARY,
        ),
        (
            "image_embeddings",
            "--train_file {}/train.parquet --validation_file {}/validation.parquet "
            f"--teacher_model_name_or_path {{}}/vit --student_num_layers 1 --logging_steps 1 {QUIET}",
            {"preprocessor_config.json"},
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
        **dict.fromkeys(("text_embeddings", "image_embeddings"), "losses similarities embeddings"),  # without classes
    }.get(name, "losses similarities embeddings reliability")
    assert files.keys() == stock | {f"figures/{picture}.png" for picture in pictures.split()}
    card = files["README.md"].decode()
    assert header_errors(card) == [] and "hf-rrd" in card and str(tmp_path) not in card and str(folder) not in card
    report = json.loads(next(tmp_path.rglob("distillation_report.json")).read_text())
    assert {"latency_ms", "parameters", "bytes", "flops"} <= report["student"].keys() & report["teacher"].keys()


@pytest.mark.parametrize(
    ("name", "page"),
    [
        *((name, "") for name in SCRIPTS),
        *((name, f"docs/guides/{name}.md") for name in ("text_embeddings", "image_embeddings")),
    ],
)
def test_the_command_in_the_docstring_or_on_the_page_is_understood(name: str, page: str) -> None:
    text = (Path(__file__).parents[2] / page).read_text().replace("\\\n", "") if page else load_script(name).__doc__
    words = shlex.split(next(line for line in text.splitlines() if line.strip().startswith("python")))
    assert words[:2] == ["python", f"examples/{name}.py"]
    assert settings_of(name, words[2:]).output_dir == f"out/{name}"


needs_sampling = pytest.mark.skipif(
    not hasattr(TrainingArguments, "train_sampling_strategy"), reason="commands of cards group by length, as is new"
)


@needs_sampling
@pytest.mark.parametrize("student", write_cards.RUNS)
def test_the_commands_of_the_model_cards_are_understood(student: str) -> None:
    script, *words = shlex.split(write_cards.RUNS[student])
    assert settings_of(Path(script).stem, words).output_dir == "out/mine"


@needs_sampling
def test_the_same_student_without_distillation_is_trained_for_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[str] = []
    (tmp_path / write_cards.REPORT_FILE).write_text('{"student": {"accuracy": 0.5}}')
    monkeypatch.setattr(write_cards, "train", lambda name, command: commands.append(command) or tmp_path)
    assert set(write_cards.ALONE) <= set(write_cards.RUNS)
    for name in write_cards.ALONE:
        script, *words = shlex.split(f"{write_cards.RUNS[name]} {write_cards.alone(name, write_cards.RUNS[name])}")
        given = [getattr(each, "card_baseline", None) for each in all_settings_of(Path(script).stem, words)]
        assert '{"accuracy": 0.5}' in given
        without = settings_of(Path(script).stem, shlex.split(commands[-1])[1:])
        assert (float(without.relational_weight), float(without.kd_weight)) == (0, 0)


def test_a_card_has_only_the_teacher_of_its_own_command_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = load_script("benchmarks/comparison_tasks")
    monkeypatch.setitem(sys.modules, "comparison_tasks", tasks)
    monkeypatch.setattr(tasks, "minilm_folder", lambda: tmp_path)
    monkeypatch.setattr(tasks, "regnet", lambda: pytest.fail("CIFAR-10's teacher is made"))
    monkeypatch.setattr(tasks, "_cifar_images", lambda *_: (None, None))
    monkeypatch.chdir(tmp_path)
    write_cards.prepare(write_cards.RUNS["digits-vit-2x32"])
    assert not Path("out").exists()
    write_cards.prepare(write_cards.RUNS["half-of-minilm"])
    assert Path("out/minilm").resolve() == tmp_path
    with pytest.raises(pytest.fail.Exception, match="is made"):
        write_cards.prepare(write_cards.RUNS["cifar10-vit-4x128"])


def test_the_scripts_use_one_set_of_names() -> None:
    """A flag of a script of its own is called as in the others and in the settings."""
    shared = {"num_train_epochs", "per_device_train_batch_size", "learning_rate", "output_dir", "seed", "bank_size"}
    strange = {"epochs", "batch_size", "lr", "out", "data", "dataset", "teacher", "student"}
    for name in (*SCRIPTS, "quickstart"):
        script = load_script(name)
        own = {field.name for kind in kinds_of(script) for field in dataclasses.fields(kind)}
        assert own & strange == set(), name
        assert {"output_dir", "num_train_epochs"} <= own, name
        assert name != "own_training_loop" or shared <= own


def kinds_of(script: Any) -> list[Any]:
    kinds = [getattr(script, kind, None) for kind in ("Arguments", "ModelArguments", "DataArguments")]
    return [kind for kind in kinds if kind] + ([] if kinds[0] else [script.RelationalDistillationConfig])


def all_settings_of(name: str, words: list[str]) -> tuple[Any, ...]:
    return parse_arguments(*kinds_of(load_script(name)), words=["--output_dir", "out/mine", *words])


def settings_of(name: str, words: list[str]) -> Any:
    return all_settings_of(name, words)[-1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_file_that_is_not_there_is_named(name: str, start: Any) -> None:
    models = "--teacher_model_name_or_path {}/classifier --student_num_layers 1 --output_dir OUT"
    files = "--train_file {}/nowhere.csv --validation_file {}/validation.csv"
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        start(name, f"{models} {files}")


@pytest.mark.parametrize("name", SCRIPTS[:4])
def test_a_run_without_data_says_which_flags_it_needs(name: str, start: Any) -> None:
    with pytest.raises(SystemExit, match="Give .*--dataset_name.*--train_file"):
        start(name, "--teacher_model_name_or_path {}/classifier --output_dir OUT")


@pytest.mark.parametrize("name", ["text_classification", "text_embeddings"])
def test_a_field_that_the_students_config_has_not_is_refused(name: str, start: Any) -> None:
    files = "--train_file {}/train.csv --validation_file {}/validation.csv --text_column_name sentence"
    files += " --label_column_name verdict" * (name == "text_classification")
    new = "--student_config_name bert --student_config_overrides hidden_size=8,hiden_layers=1 --output_dir OUT"
    teacher = {"text_classification": "classifier", "text_embeddings": "embedder"}[name]
    with pytest.raises(SystemExit, match=r"a BertConfig has no \['hiden_layers'\]"):
        start(name, f"{files} {new} --teacher_model_name_or_path {{}}/{teacher}")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_column_that_is_not_there_is_named_with_the_flags(name: str, start: Any) -> None:
    files = "--train_file {}/train.csv --validation_file {}/validation.csv --label_column_name nothing"
    with pytest.raises(
        SystemExit, match=r"No column \['(image|nothing)'.* among \[.*'verdict'\]: set --.*_column_name"
    ):
        start(name, f"--teacher_model_name_or_path {{}}/classifier --student_num_layers 1 --output_dir OUT {files}")
