"""How much `import hf_rrd` adds to what a user of the Trainer imports anyway.

    python examples/benchmarks/import_time.py

Each import runs in a fresh process, the two in turn, and is timed inside it; the first pair is not counted.
"""

import subprocess
import sys
from dataclasses import dataclass, field
from statistics import median

from rich.console import Console
from transformers import HfArgumentParser

STATEMENTS = ("import transformers; from transformers import Trainer", "import hf_rrd")
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


@dataclass
class Arguments:
    """What the command line may change."""

    rounds: int = field(default=11, metadata={"help": "How many times each is imported."})


def seconds_of(statement: str) -> float:
    """The time of a statement at the start of a process."""
    command = [sys.executable, "-c", TIMED.format(statement)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(printed.split()[-1])


def main() -> None:
    """Time, print."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    pairs = [[seconds_of(statement) for statement in STATEMENTS] for _ in range(args.rounds + 1)][1:]
    console = Console(width=110)
    for statement, times in zip(STATEMENTS, zip(*pairs, strict=True), strict=True):
        console.print(f"{statement}: {median(times):.2f} s ({min(times):.2f} to {max(times):.2f})", highlight=False)
    ratio = median(times[1] for times in pairs) / median(times[0] for times in pairs)
    console.print(f"ratio of the medians of {args.rounds}: {ratio:.3f}", highlight=False)


if __name__ == "__main__":
    main()
