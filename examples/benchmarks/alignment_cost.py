"""Time and peak memory of `relational_alignment`, and the error of its path for large sets.

    python examples/benchmarks/alignment_cost.py

Each call has a fresh process; its peak counts all of it, torch and the float32 inputs included (on a CPU, only under
Linux; on a GPU, what its allocator gave out). The error is against the path for small sets, which is in float64 and
ranks every pair. "Narrow" sets lie far from 0, so that all their cosines are nearly the same.
"""

import multiprocessing
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import HfArgumentParser

from hf_rrd.results import alignment

SIZES = (1000, 4096, 10_000, 50_000)
COMPARED = (1000, 4096, 10_000)
TEACHER_WIDTH = 768
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Arguments:
    """What the command line may change."""

    small: bool = field(default=False, metadata={"help": "Tiny sets, to try the script."})


def sets(examples: int, student_width: int, offset: float = 0.3) -> tuple[Tensor, Tensor]:
    """A student and a teacher that share a part of their relations; a large offset makes all cosines alike."""
    torch.manual_seed(0)
    teacher = torch.randn(examples, TEACHER_WIDTH, device=DEVICE)
    student = teacher @ torch.randn(TEACHER_WIDTH, student_width, device=DEVICE) / TEACHER_WIDTH**0.5
    student += torch.randn(examples, student_width, device=DEVICE)
    return student.add_(offset), teacher.add_(offset)


def cost(examples: int, student_width: int, threads: int) -> tuple[float, float]:
    """Seconds of one call and the MiB that its process had at most."""
    torch.set_num_threads(threads)
    alignment.relational_alignment(*sets(64, student_width))  # what torch itself needs is there now
    student, teacher = sets(examples, student_width)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is there
    start = time.perf_counter()
    alignment.relational_alignment(student, teacher)
    return time.perf_counter() - start, _peak_so_far()


def _peak_so_far() -> float:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def errors(examples: int, offset: float) -> dict[str, float]:
    """By how much blocks miss what whole matrices give, and how far apart the cosines of the teacher are."""
    measured = []
    student, teacher = sets(examples, TEACHER_WIDTH // 2, offset)
    for alignment.EXACT_EXAMPLES in (1, examples):
        measured.append(alignment.relational_alignment(student, teacher))
    unit = torch.nn.functional.normalize(teacher[:1000].double())
    spread = (unit @ unit.T)[torch.ones(len(unit), len(unit), dtype=torch.bool).triu(1)].std()
    return {name: measured[0][name] - measured[1][name] for name in measured[0]} | {"spread": float(spread)}


def main() -> None:
    """Measure and print."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    console = Console(width=120)
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    console.print(f"{where}, float32, torch {torch.__version__}", highlight=False, soft_wrap=True)

    table = Table("examples", "student", "teacher", "path", "time", "a pair", "peak memory")
    for examples in (100, 5000) if args.small else SIZES:
        for width in (TEACHER_WIDTH // 2, TEACHER_WIDTH):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, mebibytes = pool.apply(cost, (examples, width, torch.get_num_threads()))
            path = "at once" if examples <= alignment.EXACT_EXAMPLES else "in blocks"
            per_pair = f"{2e9 * seconds / examples / (examples - 1):.0f} ns"
            table.add_row(
                f"{examples:,}",
                f"{width}",
                f"{TEACHER_WIDTH}",
                path,
                f"{seconds:.2f} s",
                per_pair,
                f"{mebibytes:,.0f} MiB",
            )
    console.print(table)

    table = Table("examples", "sets", "spread of cosines", "rank correlation", "neighbour overlap", "cka")
    for examples in (100,) if args.small else COMPARED:
        for kind, offset in (("wide", 0.3), ("narrow", 10.0)):
            error = errors(examples, offset)
            figures = [f"{error[name]:+.1e}" for name in ("rank_correlation", "neighbor_overlap", "cka")]
            table.add_row(f"{examples:,}", kind, f"{error['spread']:.5f}", *figures)
    table.caption = "error of blocks against whole matrices"
    console.print(table)


if __name__ == "__main__":
    main()
