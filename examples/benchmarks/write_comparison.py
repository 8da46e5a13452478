"""The figures of the comparison of losses as a page: `examples/benchmarks/comparison/cells.md`.

    python examples/benchmarks/write_comparison.py

Reads `cells.csv`, which `compare_losses.py` has written to the same output folder.
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path

from hf_rrd.results.table import markdown

REGIMES = {"all": "all labels", "few": "few labels (500; of digits 100), all examples distilled", "none": "no labels"}

SUBJECTS = {
    "sst2": "SST-2 (`stanfordnlp/sst2`). Teacher: all-MiniLM-L6-v2 (6 layers, 384 wide), fine-tuned on all labels "
    "for 2 epochs; 88.0 % on the test split. Student: BERT, 2 layers, 128 wide, from fresh weights.",
    "cifar10": "CIFAR-10 (`uoft-cs/cifar10`). Teacher: RegNet (825,000 parameters), trained on 45,000 images for 6 "
    "epochs; 79.9 % on the test split. Student: ViT, 3 layers, 64 wide, patches of 8, from fresh weights, on 10,000 "
    "of those images.",
    "sst2_raw": "SST-2 again, the same student, and as teacher MiniLM as it comes, which never saw the labels.",
    "sentences": "31,000 sentences of STS-B, TREC, MR and SST-2 without labels. Teacher: MiniLM as it comes. Student: "
    "the same BERT without a head. The score is the mean of two correlations (Spearman's, in percent) with people's "
    "scores of STS-B's test pairs: of the student's own embedding and of the projected one. TREC and MR: linear "
    "probes of the own embedding.",
    "digits": "The quickstart's digits, teacher and student, with 100 labels of 1,000: none of the nine cells.",
}


@dataclass
class Arguments:
    """What the command line may change."""

    output_dir: str = field(default="out/compare", metadata={"help": "Where the comparison's results are."})
    page: str = field(default="examples/benchmarks/comparison/cells.md", metadata={"help": "The file to write."})


def section(task: str, regime: str, rows: list[dict[str, str]]) -> str:
    """A cell's table: the score and its difference to plain, and whatever else was measured."""
    common = ("task", "regime", "row", "settings", "seeds", "score", "deviation", "difference", "half_interval")
    more = [name for name in rows[0] if name not in (*common, "accuracy", "seconds") and rows[0][name]]
    lines = []
    for row in rows:
        difference = f"{float(row['difference']):+.1f} ± {float(row['half_interval']):.1f}"
        line = [row["row"], f"{float(row['score']):.1f} ± {float(row['deviation']):.1f}"]
        line.append("" if row["row"] == "plain" or "nan" in difference else difference)
        line += [f"{float(row[name]):.{2 if name == 'cka' else 1}f}" for name in more]
        lines.append([*line, row["seeds"], f"`{row['settings']}`"])
    header = ["", "score", "difference", *(name.replace("_", " ") for name in more), "seeds", "settings"]
    return f"## {task}, {REGIMES[regime]}\n\n{SUBJECTS[task]}\n\n{markdown(header, lines)}"


def page(rows: list[dict[str, str]]) -> str:
    """The tables of all cells."""
    cells = dict.fromkeys((row["task"], row["regime"]) for row in rows)
    sections = [section(*cell, [row for row in rows if (row["task"], row["regime"]) == cell]) for cell in cells]
    return (
        "# The losses compared on nine cells\n\n"
        "Test split; mean and standard deviation over seeds, and the difference to the student alone (`plain`; "
        "without labels to the one of 500 labels), paired by seed, with its 95 % interval. The score is the accuracy "
        "in percent, without labels that of a linear probe. CKA (not debiased) and neighbor overlap (how many of an "
        "example's 10 nearest are the teacher's, in percent) say how near the student's relations are to the "
        "teacher's. Made by `compare_losses.py` and `write_comparison.py`.\n\n" + "\n\n".join(sections) + "\n"
    )


def main(args: Arguments) -> None:
    """Read, write."""
    with (Path(args.output_dir) / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    Path(args.page).parent.mkdir(parents=True, exist_ok=True)
    Path(args.page).write_text(page(rows))


if __name__ == "__main__":
    from transformers import HfArgumentParser

    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
