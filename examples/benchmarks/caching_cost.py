"""What caching a teacher's outputs costs beyond the teacher's own forwards.

    python examples/benchmarks/caching_cost.py --kind images
    python examples/benchmarks/caching_cost.py --kind texts

Half of the forwards alone, then the caching, then the other half: batches that lie in memory, of the same examples in
the same order. The total of the caching has reading, collating, sorting, hashing, casting and writing in it. On a CPU
the forwards are also timed within the caching, so that a drift of the machine cancels. Models are random: a forward
takes as long.
"""

import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from rich.console import Console
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    ViTConfig,
    ViTForImageClassification,
)

from hf_rrd import cache_teacher_outputs
from hf_rrd.training.caching import SHARD_EXAMPLES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Arguments:
    """What the command line may change."""

    kind: str = field(default="images", metadata={"help": "What the teacher reads.", "choices": ["images", "texts"]})
    examples: int = field(default=50_000, metadata={"help": "How many."})
    batch_size: int = field(default=64, metadata={"help": "Examples of one forward."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read ahead, of the caching."})
    width: int = field(default=192, metadata={"help": "Of the teacher, which has 6 layers."})


def images(args: Arguments) -> tuple[Any, datasets.Dataset, list[dict[str, Any]]]:
    """A ViT on 32 x 32 images in patches of 4, and its batches."""
    size = {"hidden_size": args.width, "num_hidden_layers": 6, "num_attention_heads": args.width // 64}
    shape = {"image_size": 32, "patch_size": 4, "intermediate_size": 4 * args.width, "num_labels": 10}
    pixels = np.random.default_rng(0).standard_normal((args.examples, 3, 32, 32), dtype=np.float32)
    kept = datasets.Features({"pixel_values": datasets.Array3D((3, 32, 32), "float32")})
    data = datasets.Dataset.from_dict({"pixel_values": pixels}, features=kept)
    batches = [{"pixel_values": part} for part in torch.from_numpy(pixels).split(args.batch_size)]
    return ViTForImageClassification(ViTConfig(**size, **shape)), data, batches


def texts(args: Arguments) -> tuple[Any, datasets.Dataset, list[dict[str, Any]]]:
    """A BERT on texts of 5 to 60 tokens, and its batches, sorted by length within a file of the cache."""
    size = {"hidden_size": args.width, "num_hidden_layers": 6, "num_attention_heads": args.width // 64}
    model = BertForSequenceClassification(BertConfig(**size, intermediate_size=4 * args.width))
    random = np.random.default_rng(0)
    tokens = [random.integers(1, 30_000, length) for length in random.integers(5, 61, args.examples)]
    data = datasets.Dataset.from_dict({"input_ids": tokens})
    batches = []
    for start in range(0, args.examples, SHARD_EXAMPLES):
        shard = sorted(tokens[start : start + SHARD_EXAMPLES], key=len, reverse=True)
        for first in range(0, len(shard), args.batch_size):
            part = [torch.from_numpy(each) for each in shard[first : first + args.batch_size]]
            padded = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
            batches.append({"input_ids": padded, "attention_mask": (padded > 0).long()})
    return model, data, batches


@torch.no_grad()
def seconds_alone(teacher: Any, batches: list[dict[str, Any]]) -> float:
    """Of the forwards."""
    start = time.perf_counter()
    for batch in batches:
        outputs = teacher(**{name: value.to(DEVICE) for name, value in batch.items()})
    outputs.logits.cpu()
    return time.perf_counter() - start


def pad(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of texts."""
    rows = [torch.as_tensor(example["input_ids"]) for example in examples]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": padded, "attention_mask": (padded > 0).long()}


def main() -> None:
    """Measure, print."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    teacher, data, batches = images(args) if args.kind == "images" else texts(args)
    teacher = teacher.eval().to(DEVICE)
    data = data.with_format("numpy")
    seconds_alone(teacher, batches[:3])
    half = len(batches) // 2
    alone = seconds_alone(teacher, batches[:half])
    marks: list[float] = []
    for register in (teacher.register_forward_pre_hook, teacher.register_forward_hook):
        register(lambda *_: marks.append(time.perf_counter()))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cached = cache_teacher_outputs(
            data,
            teacher,
            args.batch_size,
            pad if args.kind == "texts" else None,
            num_workers=args.num_workers,
            cache_dir=folder,
        )
        total = time.perf_counter() - start
        within = sum(marks[1::2]) - sum(marks[::2])
        start = time.perf_counter()
        cache_teacher_outputs(data, teacher, args.batch_size, pad if args.kind == "texts" else None, cache_dir=folder)
        again = time.perf_counter() - start
    alone += seconds_alone(teacher, batches[half:])
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    line = (
        f"{args.examples:,} {args.kind}, teacher {args.width} wide with 6 layers, batch {args.batch_size}, {where}: "
    )
    line += (
        f"forwards alone {alone:.1f} s, caching {total:.1f} s, ratio {total / alone:.3f}; a second call {again:.1f} s"
    )
    if DEVICE == "cpu":
        line += f"; forwards within the caching {within:.1f} s, ratio {total / within:.3f}"
    Console(width=110).print(line, highlight=False, soft_wrap=True)
    assert len(cached) == args.examples


if __name__ == "__main__":
    main()
