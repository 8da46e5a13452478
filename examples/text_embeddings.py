"""Distil an embedding model without labels: the student answers in its teacher's space.

    python examples/text_embeddings.py \
        --train_file data/sst2/train.csv --validation_file data/sst2/test.csv --text_column_name sentence \
        --label_column_name label --sts_file data/sentences/stsb_test.csv --max_length 64 \
        --teacher_model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --student_num_layers 2 \
        --output_dir out/text_embeddings --num_train_epochs 3 --per_device_train_batch_size 64 --learning_rate 2e-4 \
        --per_device_eval_batch_size 64 --warmup_steps 50 --save_strategy no --cache_teacher

The teacher is a model of sentence-transformers, read with its own pooling, layers and prompt, or a plain transformers
model. The student is pretrained (`--student_model_name_or_path`), or new (`--student_config_name`), or has some of the
teacher's layers (`--student_num_layers`). It is saved as a model of sentence-transformers, whose embeddings can be
looked for among the teacher's (`--student_format transformers` saves its layers alone). docs/guides/text_embeddings.md
says what is printed. Labels and scores are there to evaluate with and have no part in the training.

Every field of `RelationalDistillationConfig` is a flag, too. Flags may come from a YAML or JSON file, too (`--config
file.yaml`); those beside it win. `accelerate launch` instead of `python` runs it on several devices.

Needs `pip install 'hf_rrd[demo,sentence-transformers]'`.
"""

import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import DatasetDict, load_dataset
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.modules import Pooling
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoTokenizer, set_seed

from hf_rrd import (
    RelationalDistillationConfig,
    RelationalDistillationTrainer,
    cache_teacher_outputs,
    relational_alignment,
    student_from_teacher,
)
from hf_rrd.models.embedding import Embedder
from hf_rrd.models.sentence_transformers import default_prompt, kind_of, opened
from hf_rrd.results.alignment import teacher_retrieval
from hf_rrd.results.sentence_transformers import POOLINGS
from hf_rrd.training.arguments import parse_arguments

DEFAULTS = {"student_format": "sentence_transformers"}


@dataclass
class ModelArguments:
    """The teacher, and where the student comes from."""

    teacher_model_name_or_path: str = field(metadata={"help": "Hub name or folder of the teacher."})
    student_model_name_or_path: str | None = field(default=None, metadata={"help": "The same for the student."})
    student_config_name: str | None = field(default=None, metadata={"help": "A new student: model type or config."})
    student_num_layers: int | None = field(default=None, metadata={"help": "Of the teacher's layers. Unset: all."})
    student_config_overrides: str = field(default="", metadata={"help": "Changes to either: 'hidden_size=128'."})
    card_teacher: str | None = field(default=None, metadata={"help": "For the card: what to call the teacher."})


@dataclass
class DataArguments:
    """The sentences: a data set on the Hub or in a folder, or files."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or folder of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which of its configurations."})
    train_file: str | None = field(default=None, metadata={"help": "A csv, json or parquet file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    text_column_name: str = field(default="text", metadata={"help": "The column with the sentences."})
    label_column_name: str | None = field(default=None, metadata={"help": "Labels, to evaluate with."})
    sts_file: str | None = field(
        default=None, metadata={"help": "Pairs to evaluate with: sentence1, sentence2, score."}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens of a sentence, at most."})
    cache_teacher: bool = field(default=False, metadata={"help": "Run the teacher once, before the training."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many only, drawn at random."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many only, drawn at random."})
    report: bool = field(default=False, metadata={"help": "Compare student and teacher at the end, also in speed."})
    card_dataset: str | None = field(default=None, metadata={"help": "For the card: the Hub name of files' data set."})


def read(file: str, **others: str) -> DatasetDict:
    """Files as splits, the first as `train`."""
    kind = Path(file).suffix.removeprefix(".").replace("jsonl", "json")
    return load_dataset(kind, data_files={"train": file} | others)


def load(args: DataArguments) -> DatasetDict:
    """The sentences to train on and those to evaluate on, cut to size."""
    if args.dataset_name:
        data = load_dataset(args.dataset_name, args.dataset_config_name)
    elif args.train_file and args.validation_file:
        data = read(args.train_file, validation=args.validation_file)
    else:
        raise SystemExit("Give --dataset_name, or --train_file and --validation_file.")
    columns = data["train"].column_names
    if absent := {args.text_column_name, args.label_column_name or args.text_column_name} - set(columns):
        raise SystemExit(
            f"No column {sorted(absent)} among {columns}: set --text_column_name and --label_column_name."
        )
    splits = {"train": data["train"], "validation": data["validation" if "validation" in data else "test"]}
    for split, rows in splits.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        splits[split] = rows.shuffle(seed=0).select(range(limit)) if limit and limit < len(rows) else rows
    return DatasetDict(splits)


def pairs_of(file: str) -> EmbeddingSimilarityEvaluator:
    """How well the similarity of the sentences in a file's pairs follows their score."""
    pairs = read(file)["train"]
    if absent := sorted({"sentence1", "sentence2", "score"} - {*pairs.column_names}):
        raise SystemExit(f"--sts_file: no column {absent} among {pairs.column_names}.")
    columns = (list(pairs[name]) for name in ("sentence1", "sentence2", "score"))
    return EmbeddingSimilarityEvaluator(*columns, name="sts", main_similarity="cosine", write_csv=False)


def with_pooling(folder: str, pooling: str) -> SentenceTransformer:
    """A plain transformers model by name or folder, as an encoder with one of our poolings."""
    first = Transformer(folder)
    name = Embedder(first.auto_model, pooling).pooling
    if name not in POOLINGS:
        raise SystemExit(f"sentence-transformers has no pooling {name!r}. Set it to one of {sorted(POOLINGS)}.")
    return SentenceTransformer(modules=[first, Pooling(first.get_embedding_dimension(), POOLINGS[name])], device="cpu")


def measure(rows: dict[str, torch.Tensor], teacher: torch.Tensor, labels: dict[str, list[Any]]) -> dict[str, float]:
    """Retrieval, and with labels a linear probe and k-NN, as shares from 0 to 1.

    Args:
        rows: Embeddings of the `validation` sentences, and with labels of the `train` ones, (sentences, width).
        teacher: The teacher's of the validation sentences.
        labels: Of both, or empty.
    """
    own = rows["validation"]
    results = teacher_retrieval(own, teacher) if own.shape == teacher.shape else {}
    results = {name.replace("teacher_retrieval", "recall"): share for name, share in results.items()}
    results["neighbours"] = relational_alignment(own, teacher)["neighbor_overlap"]
    probes = {"linear_probe": LogisticRegression(max_iter=1000), "knn": KNeighborsClassifier(10, metric="cosine")}
    for name, probe in probes.items() if labels else ():
        probe.fit(rows["train"].numpy(), labels["train"])
        results[name] = float(probe.score(own.numpy(), labels["validation"]))
    return results


def main() -> None:
    """Load, build, train, evaluate, print."""
    model_args, data_args, args = parse_arguments(
        ModelArguments, DataArguments, RelationalDistillationConfig, **DEFAULTS
    )
    args.task_weight = 0.0  # no labels, no task
    set_seed(args.seed)
    with args.main_process_first():
        data = load(data_args)
        scorer = pairs_of(data_args.sts_file) if data_args.sts_file else None
    column = data_args.label_column_name
    labels = {split: data[split][:][column] for split in data} if column else {}
    texts = {split: data[split][:][data_args.text_column_name] for split in labels or ["validation"]}

    # The teacher, as an encoder of texts and as the transformers model inside, and the student.
    teacher_name, student_name = model_args.teacher_model_name_or_path, model_args.student_model_name_or_path
    kind = kind_of(teacher_name, {}) if args.teacher_pooling == "auto" else None
    if kind not in (None, "SentenceTransformer"):
        raise SystemExit(f"--teacher_model_name_or_path has to be an embedding model: {teacher_name} is a {kind}.")
    pooling = args.teacher_pooling
    encoder = SentenceTransformer(teacher_name, device="cpu") if kind else with_pooling(teacher_name, pooling)
    teacher, teacher_tokenizer = opened(encoder, "teacher") if kind else encoder[0].auto_model, encoder.tokenizer
    tokenizer = AutoTokenizer.from_pretrained(student_name) if student_name else teacher_tokenizer
    for each in (teacher_tokenizer, tokenizer):
        each.model_max_length = min(each.model_max_length, data_args.max_length)
    overrides = yaml.safe_load(f"{{{model_args.student_config_overrides.replace('=', ': ')}}}")  # YAML knows numbers
    if student_name:
        student = AutoModel.from_pretrained(student_name)
    elif model_args.student_config_name:
        name = model_args.student_config_name
        settings = {"vocab_size": teacher.config.vocab_size, "pad_token_id": tokenizer.pad_token_id} | overrides
        config = (AutoConfig.for_model if name in CONFIG_MAPPING else AutoConfig.from_pretrained)(name, **settings)
        if unknown := [field for field in overrides if not hasattr(type(config)(), field)]:
            raise SystemExit(f"--student_config_overrides: a {type(config).__name__} has no {unknown}.")
        student = AutoModel.from_config(config)
    else:
        student = student_from_teacher(teacher, num_hidden_layers=model_args.student_num_layers, **overrides)

    # What each of them reads: the teacher has columns of its own only where its tokens are others.
    def tokens(batch: dict[str, list[Any]], shared: bool = False) -> dict[str, list[Any]]:
        sentences = batch[data_args.text_column_name]
        asked = [default_prompt(teacher) + sentence for sentence in sentences]
        its = {} if shared else teacher_tokenizer(asked, truncation=True)
        return dict(tokenizer(sentences, truncation=True)) | {f"teacher_{name}": each for name, each in its.items()}

    sample = tokens(data["train"][:100])
    shared = tokenizer.get_vocab() == teacher_tokenizer.get_vocab()
    shared &= all(sample.get(name.removeprefix("teacher_")) == each for name, each in sample.items())
    raw = data["train"].column_names
    if data_args.cache_teacher:
        how = {"text_column": data_args.text_column_name, "pooling": pooling, "with_logits": False}
        how |= {"batch_size": args.per_device_eval_batch_size, "processing_class": teacher_tokenizer}
        data = cache_teacher_outputs(data, teacher, **how)
    with args.main_process_first():
        data = data.map(partial(tokens, shared=shared), batched=True, remove_columns=raw)

    # The embeddings of the student as it starts; in this part of the work the main process is alone.
    rows, results = {}, {}

    def evaluate(name: str, model: SentenceTransformer) -> None:
        how = {"convert_to_tensor": True, "normalize_embeddings": True, "device": str(args.device)}
        rows[name] = {split: model.encode(texts[split], **how).float().cpu() for split in texts}
        size = {
            "parameters": sum(each.numel() for each in model.parameters()),
            "width": rows[name]["validation"].shape[1],
        }
        score = {"sts": scorer(model)["sts_spearman_cosine"]} if scorer else {}
        results[name] = size | score | measure(rows[name], rows["teacher"]["validation"], labels)

    if args.process_index == 0:
        evaluate("teacher", encoder)
        with tempfile.TemporaryDirectory() as folder:
            student.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            evaluate("student before", with_pooling(folder, args.student_pooling))

    trainer = RelationalDistillationTrainer(
        model=student,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        teacher=None if data_args.cache_teacher else teacher,
        teacher_processing_class=teacher_tokenizer,
        evaluators=scorer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    metrics = trainer.evaluate()

    # Evaluate the student as it was saved, with its head and without; print.
    if trainer.is_world_process_zero():
        has_head = args.student_format == "sentence_transformers"
        if has_head:
            evaluate("student after", SentenceTransformer(args.output_dir))
        evaluate(
            "its layers alone" if has_head else "student after", with_pooling(args.output_dir, args.student_pooling)
        )
        table = Table("", *results, title=f"{len(texts['validation'])} sentences")
        for name in results["teacher"]:
            cells = [found.get(name, "") for found in results.values()]
            table.add_row(name, *(f"{100 * cell:.1f} %" if isinstance(cell, float) else f"{cell}" for cell in cells))
        Console().print(table)
        shares = {name: each for name, each in results["student after"].items() if isinstance(each, float)}
        metrics |= {f"eval_{name}": share for name, share in shares.items()}
        trainer.log(metrics)
    trainer.save_metrics("eval", metrics)

    # Describe the student, and push it if asked.
    report = trainer.report(teacher=teacher) if data_args.report else None
    if report is not None:
        Console().print(report.table())
    card = {"dataset_tags": data_args.dataset_name or data_args.card_dataset, "teacher_name": model_args.card_teacher}
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
