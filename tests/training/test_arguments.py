"""Flags and a file together: which of them wins, and what a file may hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hf_rrd import RelationalDistillationConfig
from hf_rrd.training.arguments import parse_arguments


def from_file(folder: Path, text: str, *words: str, suffix: str = "yaml", **how: Any) -> RelationalDistillationConfig:
    file = folder / f"settings.{suffix}"
    file.write_text(text, encoding="utf-8")
    (config,) = parse_arguments(RelationalDistillationConfig, words=["--config", str(file), *words], **how)
    return config


def test_a_file_and_flags_go_together_and_a_flag_wins(tmp_path: Path) -> None:
    text = "kd_weight: 2\nlearning_rate: 5e-4\nbalance_losses: false\nrelational_loss: {rrd: 1, mse: 0.5}\nseed: 3\n"
    config = from_file(tmp_path, text, "--kd_weight", "3", "--output_dir", str(tmp_path), bank_size=8, seed=9)
    assert (config.kd_weight, config.learning_rate, config.balance_losses) == (3.0, 5e-4, False)
    assert config.relational_loss == {"rrd": 1.0, "mse": 0.5}
    assert (config.bank_size, config.seed) == (8, 3), "a default of the script's, which the file may change"
    assert from_file(tmp_path, text, "--balance_losses", "true", "--seed=4").balance_losses is True


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_a_file_may_be_the_first_word_and_holds_what_is_required(suffix: str, tmp_path: Path) -> None:
    @dataclass
    class Needed:
        teacher: str
        epochs: float = 1.0

    file = tmp_path / f"settings.{suffix}"
    file.write_text('{"teacher": "a", "epochs": 2}', encoding="utf-8")
    (found,) = parse_arguments(Needed, words=[str(file), "--epochs", "3"])
    assert found == Needed("a", 3.0)
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(Needed, words=["--epochs", "3"])


def test_a_plain_no_in_yaml_is_the_choice_and_no_false(tmp_path: Path) -> None:
    config = from_file(tmp_path, "save_strategy: no\neval_strategy: no\nuse_cpu: no\n")
    assert (config.save_strategy, config.eval_strategy, config.use_cpu) == ("no", "no", False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bank_sise: 3\n", r"settings.yaml has \['bank_sise'\], and there are no such flags: --help lists them\."),
        ("- a\n", "settings.yaml must hold lines `name: value`, got a list"),
        ("", "settings.yaml must hold lines `name: value`, got a NoneType"),
    ],
)
def test_a_file_that_holds_no_flags_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_file(tmp_path, text)
    with pytest.raises(FileNotFoundError):
        parse_arguments(RelationalDistillationConfig, words=["nowhere.yaml"])


def test_the_help_says_that_a_file_may_hold_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_arguments(RelationalDistillationConfig, words=["--help"])
    assert "--config FILE reads flags from a YAML or JSON file; those beside it win." in capsys.readouterr().out
