"""How much `import hf_rrd` adds to what a user of the Trainer imports anyway.

    python examples/benchmarks/import_time.py

Each round is a fresh process that imports `Trainer` and then `hf_rrd`, which imports `Trainer` itself: so the ratio is
that of both together to the first, measured in one process. The first round is not counted.
"""

import subprocess
import sys
from dataclasses import dataclass, field
from statistics import median

from rich.console import Console
from transformers import HfArgumentParser

TIMED = """
import time
start = time.perf_counter()
import transformers
from transformers import Trainer
between = time.perf_counter()
import hf_rrd
print(between - start, time.perf_counter() - between)
"""


@dataclass
class Arguments:
    """What the command line may change."""

    rounds: int = field(default=11, metadata={"help": "How many processes."})


def main() -> None:
    """Time, print."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    times = []
    for _ in range(args.rounds + 1):
        printed = subprocess.run([sys.executable, "-c", TIMED], check=True, capture_output=True, text=True).stdout
        times.append([float(number) for number in printed.split()[-2:]])
    trainer, ours = (median(each) for each in zip(*times[1:], strict=True))
    ratios = [(first + second) / first for first, second in times[1:]]
    line = f"import Trainer: {trainer:.2f} s, import hf_rrd after it: {ours:.3f} s; together to the first: "
    line += f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), median of {args.rounds}"
    Console(width=110).print(line, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
