"""Small models and data for the scripts, and a way to run them in this process."""

import shlex
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import (
    ViTImageProcessor,
)

from tests.builders import tiny_vit
from tests.examples.scripts import WORDS, load_script, save_text_model


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
