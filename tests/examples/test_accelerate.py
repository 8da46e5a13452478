"""The settings for `accelerate launch` in the folder of that name."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_settings_whole(path: Path) -> None:
    read = load_config_from_file(str(path)).to_dict()
    written = yaml.safe_load(path.read_text())
    assert {name: read[name] for name in written} == written
