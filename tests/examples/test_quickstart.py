"""The quickstart runs, in a tiny mode, as a user starts it."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageClassification

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_quickstart_saves_a_student_that_loads_without_this_package(tmp_path: Path) -> None:
    arguments = ["--num_train_epochs", "0.1", "--seeds", "2", "--output_dir", str(tmp_path)]
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), *arguments]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert "loads with AutoModelForImageClassification, without hf_rrd, and has the same accuracy" in printed
    assert "1198 training digits, 100 of them labelled; 599 held out" in printed
    for row in ("teacher", "student alone", "student distilled"):
        assert row in printed
    student, alone = (
        AutoModelForImageClassification.from_pretrained(tmp_path / name) for name in ("distilled", "alone")
    )
    assert student.num_parameters() == alone.num_parameters() == 18_218
