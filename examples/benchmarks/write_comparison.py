"""The figures of the comparison of losses as pages: `examples/benchmarks/comparison/`.

    python examples/benchmarks/write_comparison.py --task sst2
    python examples/benchmarks/write_comparison.py --task cifar10

Reads `summary.csv` and the picture that `compare_losses.py` has written to the same output folder.
"""

import csv
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from hf_rrd.results.table import markdown

REGIMES = {"all": "All labels", "few": "500 labels, all examples distilled", "none": "No labels"}

SUBJECTS = {
    "sst2": "SST-2 (`stanfordnlp/sst2`). Teacher: all-MiniLM-L6-v2 (6 layers, 384 wide), fine-tuned on all labels "
    "for 2 epochs; 88.0 % on the test split. Student: BERT, 2 layers, 128 wide, from fresh weights.",
    "cifar10": "CIFAR-10 (`uoft-cs/cifar10`). Teacher: RegNet (825,000 parameters), trained on 45,000 images for 6 "
    "epochs; 79.9 % on the test split. Student: ViT, 3 layers, 64 wide, patches of 8, from fresh weights, on 10,000 "
    "of those images.",
}


@dataclass
class Arguments:
    """What the command line may change."""

    task: str = field(metadata={"help": "The data set.", "choices": list(SUBJECTS)})
    output_dir: str = field(default="out/compare", metadata={"help": "Where the comparison's results are."})
    pages_dir: str = field(default="examples/benchmarks/comparison", metadata={"help": "Where the page goes."})


def figures(row: dict[str, str]) -> list[str]:
    """The cells of one row of `summary.csv`."""
    seeds = int(row["seeds"])
    score, spread = float(row["score"]), float(row["deviation"])
    difference, half = float(row["difference"]), float(row["half_interval"])
    return [
        row["method"],
        f"{score:.1f} ± {spread:.1f}" if seeds > 1 else f"{score:.1f}",
        "" if row["method"] == "plain" else f"{difference:+.1f} ± {half:.1f}" if seeds > 1 else f"{difference:+.1f}",
        f"{float(row['probe_few']):.1f}" if row["probe_few"] else "",
        f"{float(row['cka']):.2f}",
        f"{float(row['neighbor_overlap']):.0f}",
        str(seeds),
    ]


def page(task: str, rows: list[dict[str, str]]) -> str:
    """A task's tables, one for each regime."""
    sections = []
    for regime, title in REGIMES.items():
        own = [figures(row) for row in rows if row["regime"] == regime]
        score = "linear probe, %" if regime == "none" else "accuracy, %"
        header = ["", score, "difference", "probe of 500", "CKA", "neighbours, %", "seeds"]
        sections.append(f"## {title}\n\n{markdown(header, own)}")
    return (
        f"# The losses compared on {task}\n\n{SUBJECTS[task]}\n\n"
        "Test split; mean and standard deviation over seeds, and the difference to the student alone (`plain`; "
        "without labels to the one of 500 labels), paired by seed, with its 95 % interval. CKA (not debiased) and "
        "neighbours (how many of an example's 10 nearest are the teacher's, in percent) say how near the student's "
        "relations are to the teacher's. Made by `compare_losses.py` and `write_comparison.py`; what the rows set "
        f"stands in the former.\n\n![Differences of all losses]({task}.png)\n\n" + "\n\n".join(sections) + "\n"
    )


def main(args: Arguments) -> None:
    """Read, write, copy the picture."""
    results, pages = Path(args.output_dir) / args.task, Path(args.pages_dir)
    with (results / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pages.mkdir(parents=True, exist_ok=True)
    (pages / f"{args.task}.md").write_text(page(args.task, rows))
    shutil.copyfile(results / "comparison.png", pages / f"{args.task}.png")


if __name__ == "__main__":
    from transformers import HfArgumentParser

    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
