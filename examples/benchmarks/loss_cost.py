"""Time and peak memory of the relational loss, forward and backward, against building both (batch, bank) matrices.

    python examples/benchmarks/loss_cost.py --plot out/loss_cost.png

The rival is the formula in four lines of torch, on a GPU also with its products in bfloat16. Times are medians, all in
turn in one process; memory is by how much a call raises the peak of a fresh process (on a GPU, of its allocator; on a
CPU, only under Linux). Ours includes the own key and the divergence for the log, the rival neither. Operations count
that are neither views nor allocations, of ours as on a GPU: there each is a launch. The floor is what an H100 or H200
needs to read the bank once, and for the products in float32. `--plot` needs `pip install 'hf_rrd[plots]'`.

The last table is of distillation on logits over a vocabulary, against its formula in two lines.
"""

import multiprocessing
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from operations import Operations, as_on_a_gpu
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import HfArgumentParser

from hf_rrd import logit_loss
from hf_rrd.losses import relational

SHAPES = (
    (64, 4096, 384),
    (64, 16_384, 128),
    (64, 16_384, 384),
    (64, 16_384, 768),
    (256, 65_536, 128),
    (256, 65_536, 768),
)
GPU_SHAPES = (
    (64, 4096, 384),
    (256, 16_384, 768),
    (256, 65_536, 128),
    (256, 65_536, 768),
    (1024, 65_536, 768),
    (256, 1_048_576, 128),
)
VOCABULARIES = ((128, 30_522), (512, 50_257), (512, 151_936))  # tokens of a step, words
SPEEDS = {"H100": (3.35e12, 67e12), "H200": (4.8e12, 67e12)}  # bytes and float32 operations a second, by the vendor
GROWTH = tuple(4096 * 4**power for power in range(5))  # to 1,048,576
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Arguments:
    """What the command line may change."""

    rounds: int = field(default=9, metadata={"help": "How many times each is timed."})
    small: bool = field(default=False, metadata={"help": "Tiny shapes, to try the script."})
    plot: str | None = field(default=None, metadata={"help": "Where to save a picture of the growth with the bank."})


def ours(student: Tensor, teacher: Tensor, bank: Tensor) -> Tensor:
    """The loss as the trainer computes it."""
    return relational.relational_terms(student, teacher, bank, 0.1, 0.02, include_own=True)[0].mean()


def rival(student: Tensor, teacher: Tensor, bank: Tensor) -> Tensor:
    """The formula, from both matrices."""
    student_log_probs = F.log_softmax(student @ bank.T / 0.1, dim=-1)
    teacher_probs = F.softmax(teacher @ bank.T / 0.02, dim=-1)
    return -(teacher_probs * student_log_probs).sum(-1).mean()


def rival_in_bfloat16(student: Tensor, teacher: Tensor, bank: Tensor) -> Tensor:
    """The same, with its products in bfloat16."""
    with torch.autocast(DEVICE, torch.bfloat16):
        return rival(student, teacher, bank)


def logits(student: Tensor, teacher: Tensor, bank: Tensor) -> Tensor:
    """Distillation on logits as the trainer computes it; there is no bank."""
    return logit_loss(student, teacher, 4.0)


def logits_by_formula(student: Tensor, teacher: Tensor, bank: Tensor) -> Tensor:
    """The same by its formula."""
    student_log_probs, teacher_probs = F.log_softmax(student / 4.0, -1), F.softmax(teacher / 4.0, -1)
    return 4.0**2 * F.kl_div(student_log_probs, teacher_probs, reduction="batchmean")


def operations(loss: Callable[..., Tensor], shape: tuple[int, int, int]) -> int:
    """How many a forward and backward has, of ours as it is on a GPU."""
    inputs = rows(*shape)
    with as_on_a_gpu() if DEVICE == "cpu" else nullcontext():
        loss(*inputs).backward()
        with Operations() as counted:
            loss(*inputs).backward()
    return len(counted.names)


def floor(shape: tuple[int, int, int]) -> str:
    """The milliseconds for the bank's bytes, and for the arithmetic of both sides' products in float32."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else ""
    speeds = next((speeds for key, speeds in SPEEDS.items() if key in name), None)
    batch, bank, dim = shape
    work = (4 * bank * dim, 8 * batch * bank * dim)
    return "" if speeds is None else "; ".join(f"{1e3 * n / speed:.3f}" for n, speed in zip(work, speeds, strict=True))


def rows(batch: int, bank: int, dim: int) -> list[Tensor]:
    """Random unit rows of student, teacher and bank."""
    torch.manual_seed(0)
    made = [torch.randn(count, dim, device=DEVICE) for count in (batch, batch, bank)]
    made = [each.div_(each.norm(dim=-1, keepdim=True)) for each in made]
    return [made[0].requires_grad_(), *made[1:]]


def seconds_of(loss: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Of one forward and backward."""
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    loss(*inputs).backward()
    wait()
    return time.perf_counter() - start


def times(losses: list[Callable[..., Tensor]], shape: tuple[int, int, int], rounds: int) -> list[float]:
    """The median time of each, in seconds."""
    inputs = rows(*shape)
    runs = [[seconds_of(loss, inputs) for loss in losses] for _ in range(rounds + 1)][1:]
    return [median(each) for each in zip(*runs, strict=True)]


def peak(loss: Callable[..., Tensor], shape: tuple[int, int, int]) -> float:
    """By how many MiB a forward and backward raises the peak of memory."""
    if DEVICE == "cuda":
        inputs = rows(*shape)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        loss(*inputs).backward()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return multiprocessing.get_context("spawn").Pool(1).apply(_peak_of_process, (loss, shape, torch.get_num_threads()))


def _peak_of_process(loss: Callable[..., Tensor], shape: tuple[int, int, int], threads: int) -> float:
    torch.set_num_threads(threads)
    inputs = rows(*shape)
    loss(*rows(4, 64, shape[2])).backward()  # what torch itself needs is there now
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is there
    before = _peak_so_far()
    loss(*inputs).backward()
    return _peak_so_far() - before


def _peak_so_far() -> float:
    """Of this process's memory, in MiB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def plot(sizes: list[int], seconds: list[float], mebibytes: list[float], path: str) -> None:
    """Time and memory over the size of the bank, on doubly logarithmic axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install 'hf_rrd[plots]'.") from error
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, values, title in zip(
        figure.subplots(1, 2), (seconds, mebibytes), ("seconds", "MiB of memory"), strict=True
    ):
        axes.loglog(sizes, values, "o-", base=2, label="one forward and backward")
        axes.set(xlabel="rows in the bank", title=title)
    straight = [seconds[-1] * size / sizes[-1] for size in sizes]
    figure.axes[0].loglog(sizes, straight, ":", base=2, color="gray", label="in proportion to the bank")
    figure.axes[0].legend()
    figure.axes[1].set(yscale="linear", ylim=(0, max(64, 2 * max(mebibytes))))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, plot."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    console = Console(width=120)
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    console.print(
        f"{where}, float32, torch {torch.__version__}, median of {args.rounds}", highlight=False, soft_wrap=True
    )

    losses = {"both matrices": rival, "ours": ours} | (
        {"bf16 products": rival_in_bfloat16} if DEVICE == "cuda" else {}
    )
    table = Table("batch x bank x dim", *losses, "ours / better", *("floor",) * (DEVICE == "cuda"), "operations")
    for column in ("MiB of both", "ours", "ratio"):
        table.add_column(column)
    for shape in ((8, 100, 4),) if args.small else GPU_SHAPES if DEVICE == "cuda" else SHAPES:
        taken = dict(zip(losses, times([*losses.values()], shape, args.rounds), strict=True))
        ours_peak, rival_peak = peak(ours, shape), peak(rival, shape)
        better = min(seconds for name, seconds in taken.items() if name != "ours")
        figures = [f"{1e3 * seconds:.2f} ms" for seconds in taken.values()] + [f"{taken['ours'] / better:.2f}"]
        figures += [floor(shape)] * (DEVICE == "cuda") + [f"{operations(rival, shape)}; {operations(ours, shape)}"]
        figures += [f"{rival_peak:.1f}", f"{ours_peak:.1f}", f"{ours_peak / max(rival_peak, 1e-3):.3f}"]
        table.add_row(" x ".join(f"{number:,}" for number in shape), *figures)
    console.print(table)

    sizes = [64, 128] if args.small else list(GROWTH)
    grown = [(times([ours], (256, size, 128), args.rounds)[0], peak(ours, (256, size, 128))) for size in sizes]
    table = Table("bank, at batch 256, dim 128", "time", "per row", "bytes of the bank a second", "memory of the call")
    for size, (seconds, mebibytes) in zip(sizes, grown, strict=True):
        rate = f"{size * 128 * 4 / seconds / 1e9:.2f} GB/s"
        table.add_row(
            f"{size:,}", f"{1e3 * seconds:.1f} ms", f"{1e9 * seconds / size:.0f} ns", rate, f"{mebibytes:.1f} MiB"
        )
    console.print(table)
    table = Table("tokens x vocabulary", "the formula", "ours", "ratio", "MiB of the formula", "ours", "ratio")
    for tokens, words in ((8, 100),) if args.small else VOCABULARIES:
        shape, both = (tokens, 1, words), (logits_by_formula, logits)
        formula, mine = times([*both], shape, args.rounds)
        memory = [peak(loss, shape) for loss in both]
        figures = [f"{1e3 * formula:.1f} ms", f"{1e3 * mine:.1f} ms", f"{mine / formula:.2f}"]
        figures += [*(f"{each:.1f}" for each in memory), f"{memory[1] / max(memory[0], 1e-3):.3f}"]
        table.add_row(f"{tokens:,} x {words:,}", *figures)
    console.print(table)
    if args.plot:
        plot(sizes, [each[0] for each in grown], [each[1] for each in grown], args.plot)


if __name__ == "__main__":
    main()
