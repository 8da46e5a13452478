"""The benchmarks run, in a tiny mode, and print what they are to print."""

from pathlib import Path

import pytest

from tests.processes import run_script

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.mark.slow
def test_the_exactness_report_finds_no_error_above_its_bounds(tmp_path: Path) -> None:
    printed = run_script(BENCHMARKS / "exactness.py", "--output_dir", tmp_path, folder=tmp_path).out
    assert "missed" not in printed
    assert printed.count("held") == 16


@pytest.mark.parametrize(
    ("name", "arguments", "printed"),
    [
        pytest.param(
            "loss_cost",
            "--small --rounds 1 --plot picture.png",
            ["8 x 100 x 4", "memory of the call"],
            marks=pytest.mark.slow,
        ),
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
        pytest.param("import_time", "--rounds 1", ["import hf_rrd after it", "median of 1"], marks=pytest.mark.slow),
        pytest.param(
            "kill_test", "--kills 4", ["4 kills over", "bitwise equal", "checkpoint write"], marks=pytest.mark.slow
        ),
        pytest.param(
            "communication",
            "--batch_size 3 --student_width 32 --widths 8 --steps 2",
            ["2 processes, 2 x 3 examples each", "1 a step", "192"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_benchmark_prints_its_figures(name: str, arguments: str, printed: list[str], tmp_path: Path) -> None:
    output = run_script(BENCHMARKS / f"{name}.py", *arguments.split(), folder=tmp_path).out
    assert [each for each in printed if each not in output] == []
    if "--plot" in arguments:
        assert (tmp_path / "picture.png").stat().st_size > 1000
