"""Many SIGKILLs at random moments over one training run, which then has to end as if nothing had happened.

    python examples/benchmarks/kill_test.py --kills 100 --seed 0

A run caches its teacher's outputs and trains: dropout, two micro-batches a step, distillation of logits too, every
second step an evaluation and a checkpoint, of which two are kept, and the best is loaded at the end. Once it is left
alone. Once it is killed, started again, killed again, and left alone after the last kill. Printed are where the kills
fell, how far the writing of a checkpoint had come where one fell into it, and how much of what the two runs left
differs in a bit: nothing, or the script ends with 1. Times in the log are not compared, nor is its last line, which
sums up the last call of `train` alone.

When a life is killed: most of a life this short is start-up, so moments drawn uniformly from it would miss the rest.
A third of the lives is therefore aimed at writing the cache, which takes a millisecond and is often missed, and a
sixth each at start-up, steps, evaluations and checkpoints: at an occurrence drawn at random (the third checkpoint of
this life, say), and a random time after its beginning, uniform within that phase's mean duration in the run that was
left alone. Nothing is slowed down. Counted is where the kills fell, which the killed process had marked in shared
memory. The cache comes before the training, and so do the kills aimed at it.
"""

import json
import logging
import multiprocessing
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser, PrinterCallback, TrainerCallback, ViTConfig, ViTForImageClassification

from hf_rrd import RelationalDistillationConfig, RelationalDistillationTrainer, cache_teacher_outputs
from hf_rrd.training import caching
from hf_rrd.training.checkpoint import SIDECAR, flaw_in, last_complete_checkpoint

PHASES = (
    "start-up",
    "teacher's forwards",
    "cache write",
    "training step",
    "evaluation",
    "checkpoint write",
    "between",
)

LAST_OCCURRENCE = {"cache write": 4, "training step": 6, "evaluation": 3, "checkpoint write": 3, "start-up": 2}
"""The phases that kills are aimed at, each with the last of its occurrences in a life that a kill may be aimed at."""

FILES = (
    "config.json",
    "model.safetensors",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    SIDECAR,
    "trainer_state.json",
)
"""Of a checkpoint, in the order in which they are written."""

PRELOADED = ["hf_rrd", "hf_rrd.trainer", "transformers.models.vit.modeling_vit", "rich.table"]
"""What a life need not import again."""

SHARD = 2
"""Examples in a file of the cache."""

SAVE_STEPS = 2
"""Steps from one evaluation and checkpoint to the next."""


@dataclass
class Arguments:
    """What the command line may change."""

    kills: int = field(default=100, metadata={"help": "How many; the run is made long enough for them."})
    seed: int = field(default=0, metadata={"help": "Of the moments of the kills, and of the training."})


@dataclass(frozen=True)
class Run:
    """How long a run is, and where it writes."""

    folder: Path
    examples: int
    steps: int
    seed: int


@dataclass(frozen=True)
class Kill:
    """The moment of a kill: some part of a phase's duration after the beginning of one of its occurrences."""

    phase: str
    occurrence: int
    part: float


class Marks:
    """What one life shows its parent, in memory that outlives it: the phase, how often and how long each was."""

    def __init__(self, context: ForkServerContext) -> None:
        self.now = context.RawValue("i", 0)
        self.step = context.RawValue("i", 0)
        self.counts = context.RawArray("i", len(PHASES))
        self.seconds = context.RawArray("d", len(PHASES))
        self.counts[0] = 1
        self.since, self.born = time.perf_counter(), time.time()

    def enter(self, phase: str) -> None:
        """Mark that a phase begins."""
        last, self.since = self.since, time.perf_counter()
        self.seconds[self.now.value] += self.since - last
        self.now.value = PHASES.index(phase)
        self.counts[self.now.value] += 1

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Mark a phase, and then the one before again."""
        before = PHASES[self.now.value]
        self.enter(phase)
        yield
        self.enter(before)

    def mean_seconds(self, phase: str) -> float:
        """Of one occurrence."""
        place = PHASES.index(phase)
        return self.seconds[place] / max(1, self.counts[place])


# ---- The run, in a child process ----


class MarkSteps(TrainerCallback):
    """Marks the training steps, from the first micro-batch to the optimizer."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins."""
        self.marks.enter("training step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step has ended."""
        self.marks.enter("between")


class MarkedTrainer(RelationalDistillationTrainer):
    """Marks evaluations and checkpoints."""

    marks: Marks

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As ever."""
        with self.marks.during("evaluation"):
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.marks.step.value = self.state.global_step
        with self.marks.during("checkpoint write"):
            super()._save_checkpoint(*args, **kwargs)


def vit(width: int, seed: int) -> ViTForImageClassification:
    """A tiny model."""
    torch.manual_seed(seed)
    size = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * width}
    shape = {"image_size": 16, "patch_size": 8, "num_labels": 4}
    return ViTForImageClassification(ViTConfig(**size, **shape, hidden_dropout_prob=0.1))


def images(count: int, seed: int) -> datasets.Dataset:
    """Random images in four classes."""
    chance = np.random.default_rng(seed)
    pixels = chance.standard_normal((count, 3, 16, 16), dtype=np.float32)
    kept = datasets.Features(
        {"pixel_values": datasets.Array3D((3, 16, 16), "float32"), "labels": datasets.Value("int64")}
    )
    data = {"pixel_values": pixels, "labels": chance.integers(0, 4, count)}
    return datasets.Dataset.from_dict(data, features=kept).with_format("torch")


def cached_images(run: Run, marks: Marks) -> datasets.DatasetDict:
    """Training and evaluation images with the teacher's outputs, from files of `SHARD` examples."""
    write = caching._write

    def marked_write(*args: Any) -> None:
        with marks.during("cache write"):
            write(*args)

    caching._write, caching.SHARD_EXAMPLES = marked_write, SHARD
    data = datasets.DatasetDict(train=images(run.examples, run.seed), test=images(12, run.seed + 1))
    with marks.during("teacher's forwards"):
        return cache_teacher_outputs(data, vit(24, seed=1), cache_dir=run.folder / "cache")


def settings_of(run: Run) -> RelationalDistillationConfig:
    """Those of the training."""
    return RelationalDistillationConfig(
        output_dir=str(run.folder),
        max_steps=run.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        kd_weight=0.5,
        bank_size=48,
        teacher_temperature=0.5,
        logging_steps=SAVE_STEPS,  # a line that a kill falls into is of fewer steps afterwards
        eval_strategy="steps",
        eval_steps=SAVE_STEPS,
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_relational_loss",
        greater_is_better=False,
        seed=run.seed,
        report_to="none",
        log_level="error",
        use_cpu=True,
        disable_tqdm=True,
    )


def live(run: Run, marks: Marks) -> None:
    """Go on with the run from what is there, to its end, and write down all that it left."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("hf_rrd").setLevel("ERROR")
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore, which a killed process leaves behind
    data = cached_images(run, marks)
    student, marking = vit(16, seed=0), [MarkSteps(marks)]
    trainer = MarkedTrainer(student, settings_of(run), None, data["train"], data["test"], callbacks=marking)
    trainer.marks = marks
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(str(run.folder)))
    left = {name: value.contiguous() for name, value in trainer.model.state_dict().items()}
    for part, state in trainer.distillation.state_dict().items():  # head and bank
        left |= {f"{part}.{name}": value.contiguous() for name, value in state.items()}
    save_file(left, run.folder / "left.safetensors")
    (run.folder / "log.json").write_text(json.dumps(trainer.state.log_history))


# ---- The kills ----


def planned(kills: int, chance: random.Random) -> list[Kill]:
    """All kills in their order, those of the cache first."""
    targets = [*LAST_OCCURRENCE, "cache write"]
    phases = [targets[index % len(targets)] for index in range(kills)]
    chance.shuffle(phases)
    phases.sort(key=lambda phase: phase != "cache write")
    return [Kill(phase, chance.randint(1, LAST_OCCURRENCE[phase]), chance.random()) for phase in phases]


def life(context: ForkServerContext, run: Run, kill: Kill | None = None, delay: float = 0.0) -> tuple[int, Marks]:
    """Let a child go on with the run, to its end or to a kill; returns its exit code and its marks."""
    marks = Marks(context)
    child = context.Process(target=live, args=(run, marks))
    child.start()
    if kill is not None:
        while marks.counts[PHASES.index(kill.phase)] < kill.occurrence and child.is_alive():
            time.sleep(0.0002)
        time.sleep(delay)
        child.kill()
    child.join()
    return child.exitcode or 0, marks


def interrupted_checkpoint(run: Run, marks: Marks) -> tuple[str, bool]:
    """The last file that a killed life wrote of a checkpoint, and whether that is whole."""
    folder = run.folder / f"checkpoint-{marks.step.value}"
    written = {path.name for path in folder.glob("*") if path.stat().st_mtime > marks.born}
    last = next((name for name in reversed(FILES) if name in written), "none")
    unfinished = any(".tmp" in name for name in written)
    return last + ", then a temporary one" * unfinished, flaw_in(folder) is None


def killed_run(
    context: ForkServerContext, run: Run, plan: list[Kill], undisturbed: Marks
) -> tuple[Counter[str], Counter[tuple[str, bool]]]:
    """Make a run that is killed again and again; returns in which phases, and where in a checkpoint."""
    fell: Counter[str] = Counter()
    checkpoints: Counter[tuple[str, bool]] = Counter()
    for number, kill in enumerate(plan, 1):
        code, marks = life(context, run, kill, kill.part * undisturbed.mean_seconds(kill.phase))
        if code != -9:
            raise SystemExit(
                f"life {number} ended before its kill, {kill}, with exit code {code}. With 0 the run was over, as a "
                "busy machine let lives run on: try again."
            )
        phase = PHASES[marks.now.value]
        fell[phase] += 1
        if phase == "checkpoint write":
            checkpoints[interrupted_checkpoint(run, marks)] += 1
        print(f"\r{number} of {len(plan)} kills", end="", flush=True)
    print()
    left_alone(context, run)
    return fell, checkpoints


def left_alone(context: ForkServerContext, run: Run) -> Marks:
    """Let a run come to its end."""
    code, marks = life(context, run)
    if code != 0:
        raise SystemExit(f"the run failed without a kill: exit code {code}")
    return marks


# ---- The comparison ----


def left_by(run: Run) -> dict[str, dict[str, Any]]:
    """What a run left, by group and name: its cache, what is of its best step and of its last, and its log."""
    last = run.folder / f"checkpoint-{run.steps}"
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    moments = {f"{number}.{name}": value for number, state in optimizer.items() for name, value in state.items()}
    lines = [line for line in json.loads((run.folder / "log.json").read_text()) if "train_runtime" not in line]
    cache = {path.name: path.read_bytes() for path in (run.folder / "cache").glob("*/*.arrow")}
    return {
        "files of the cache": cache,
        "best step: parameters, head and bank": load_file(run.folder / "left.safetensors"),
        "last step: parameters": load_file(last / "model.safetensors"),
        "last step: head, projection and bank": load_file(last / SIDECAR),
        "last step: moments of the optimizer": moments,
        "log lines, without times": {str(number): without_times(line) for number, line in enumerate(lines)},
    }


def without_times(line: dict[str, float]) -> dict[str, float]:
    """A log line without what differs between any two runs."""
    return {name: value for name, value in line.items() if not name.endswith(("_runtime", "_per_second"))}


def differing(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The names under which two groups differ in a bit."""
    return [name for name in expected.keys() | found.keys() if not equal(expected.get(name), found.get(name))]


def equal(expected: Any, found: Any) -> bool:
    """Whether two tensors, files or log lines are the same to the bit."""
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        alike = (expected.dtype, expected.shape) == (found.dtype, found.shape)
        return alike and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (expected, found)))
    return bool(expected == found)


def report_kills(plan: list[Kill], fell: Counter[str], checkpoints: Counter[tuple[str, bool]]) -> None:
    """Print where the kills fell."""
    aimed = Counter(kill.phase for kill in plan)
    table = Table("phase", "kills aimed at it", "kills that fell in it")
    for phase in PHASES:
        table.add_row(phase, str(aimed[phase]), str(fell[phase]))
    table.add_section()
    table.add_row("all", str(len(plan)), str(sum(fell.values())))
    Console(width=110).print(table)
    table = Table("last file written of the checkpoint that a kill fell in", "kills", "checkpoint is whole")
    for (name, whole), count in sorted(checkpoints.items(), key=lambda item: order_of(item[0][0])):
        table.add_row(name, str(count), "yes" if whole else "no")
    Console(width=110).print(table)


def order_of(label: str) -> tuple[int, str]:
    """Sorts by the order of writing."""
    name = label.partition(",")[0]
    return (FILES.index(name) if name in FILES else -1, label)


def report_differences(expected: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> int:
    """Print how many tensors and lines differ, and return it."""
    table = Table("killed run against the one left alone", "compared", "differ", "")
    total = 0
    for group, content in expected.items():
        names = differing(content, found[group])
        total += len(names)
        table.add_row(group, str(len(content)), str(len(names)), ", ".join(sorted(names)[:3]))
    Console(width=110).print(table)
    return total


def main() -> None:
    """Run, kill, compare, and end with 1 where a bit differs."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    start = time.perf_counter()
    plan = planned(args.kills, random.Random(args.seed))
    # A life comes no further than the occurrence that its kill is aimed at; 20 more, as some kills come late.
    shards = sum(kill.occurrence for kill in plan if kill.phase == "cache write")
    checkpoints = sum(kill.occurrence for kill in plan if kill.phase != "cache write")
    size = {"examples": 60 + SHARD * shards, "steps": SAVE_STEPS * (20 + checkpoints), "seed": args.seed}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    warm = context.Process(target=int)  # the first child waits for the imports, which is no life's start-up
    warm.start()
    warm.join()
    with tempfile.TemporaryDirectory() as folder:
        runs = [Run(Path(folder, name), **size) for name in ("alone", "killed")]
        undisturbed = left_alone(context, runs[0])
        report_kills(plan, *killed_run(context, runs[1], plan, undisturbed))
        differences = report_differences(*(left_by(run) for run in runs))
    minutes = (time.perf_counter() - start) / 60
    verdict = "bitwise equal" if differences == 0 else f"NOT equal, {differences} files, tensors or log lines differ"
    print(f"{args.kills} kills over {size['steps']} steps, {minutes:.1f} minutes, seed {args.seed}: {verdict}")
    if differences:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
