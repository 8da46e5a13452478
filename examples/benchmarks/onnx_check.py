"""Export saved students to ONNX by transformers' own exporter, and print how far the files' outputs are from theirs.

    python examples/benchmarks/onnx_check.py out/cards/sst2-bert-2x128 out/cards/cifar10-vit-4x128

Needs `pip install 'hf_rrd[demo,onnx]'`.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from hf_rrd.models.teacher import load_teacher
from hf_rrd.results.export import export_onnx

TEXTS = ["a film that is as warm as it is bright", "dull from its first scene to its ending, and too long", "fine"]


def inputs_of(folder: str) -> dict[str, torch.Tensor]:
    """Three texts, or three images of random pixels, as the student's processor gives them, where it has one."""
    config = AutoConfig.from_pretrained(folder)
    if not Path(folder, "preprocessor_config.json").is_file() and hasattr(config, "num_channels"):
        return {"pixel_values": torch.randn(3, config.num_channels, config.image_size, config.image_size)}
    if Path(folder, "preprocessor_config.json").is_file():
        pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 40, 3), dtype=np.uint8)
        return dict(
            AutoImageProcessor.from_pretrained(folder)(list(map(Image.fromarray, pixels)), return_tensors="pt")
        )
    return dict(AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt"))


def main(folders: list[str]) -> None:
    """Export, compare, print."""
    table = Table("student", "largest difference", "largest logit", "file", "seconds", title="ONNX against torch")
    for folder in folders:
        student, inputs = load_teacher(folder, argument="student").eval(), inputs_of(folder)
        with torch.no_grad():
            largest = student(**inputs)[0].abs().max().item()
        with tempfile.TemporaryDirectory() as place:
            start = time.perf_counter()
            difference = export_onnx(student, Path(place, "student.onnx"), inputs)
            seconds = time.perf_counter() - start
            megabytes = Path(place, "student.onnx").stat().st_size / 1e6
        table.add_row(
            Path(folder).name, f"{difference:.1e}", f"{largest:.2f}", f"{megabytes:.1f} MB", f"{seconds:.0f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
