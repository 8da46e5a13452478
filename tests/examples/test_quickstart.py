"""The examples run, in a tiny mode, as a user starts them."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoModelForImageClassification

ROOT = Path(__file__).parents[2]


def test_the_quickstart_saves_a_student_that_loads_without_this_package(tmp_path: Path) -> None:
    arguments = ["--teacher_epochs", "0.1", "--epochs", "0.1", "--output_dir", str(tmp_path)]
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), *arguments]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert "loads with AutoModelForImageClassification, without hf_rrd, and has the same accuracy" in printed
    for column in ("accuracy", "parameters", "on disk", "ms/image", "CKA*", "neighbors*"):
        assert column in printed
    student, alone = (
        AutoModelForImageClassification.from_pretrained(tmp_path / name) for name in ("distilled", "alone")
    )
    assert student.num_parameters() == alone.num_parameters() == 18_218


def test_the_exactness_report_finds_no_error_above_its_bounds(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "benchmarks" / "exactness.py"), "--output_dir", str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert "missed" not in printed
    assert printed.count("held") == 16


@pytest.mark.parametrize(
    ("name", "arguments", "printed"),
    [
        ("loss_cost", "--small --rounds 1 --plot picture.png", ["8 x 100 x 4", "memory of the call"]),
        ("caching_cost", "--kind images --examples 65 --width 64", ["65 images", "ratio"]),
        ("caching_cost", "--kind texts --examples 65 --width 64", ["65 texts", "ratio"]),
        (
            "step_time",
            "--student vit --image_size 32 --batch_size 2 --bank_size 64 --steps 2 --rounds 1 --student_width 64 "
            "--teacher_width 64 --cached_widths 32",
            ["cached, 32 wide", "online, 64 wide", "plain + teacher"],
        ),
        (
            "step_time",
            "--student bert --length 4 --batch_size 2 --bank_size 64 --steps 2 --rounds 1 --student_width 64 "
            "--cached_widths 32 --online False",
            ["cached, 32 wide", "4 tokens"],
        ),
        ("import_time", "--rounds 1", ["import hf_rrd after it", "median of 1"]),
        ("kill_test", "--kills 4", ["4 kills over", "bitwise equal", "checkpoint write"]),
        (
            "communication",
            "--batch_size 3 --student_width 32 --widths 8 --steps 2",
            ["2 processes, 2 x 3 examples each", "1 a step", "192"],
        ),
    ],
)
def test_a_benchmark_prints_its_figures(name: str, arguments: str, printed: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "benchmarks" / f"{name}.py"), *arguments.split()]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert [each for each in printed if each not in output] == []
    if "--plot" in arguments:
        assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_settings_whole(path: Path) -> None:
    read = load_config_from_file(str(path)).to_dict()
    written = yaml.safe_load(path.read_text())
    assert {name: read[name] for name in written} == written
