"""What needs no script: `python -m hf_rrd cache`, `report` and `env`, each with flags, a YAML file, or both."""

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer

import hf_rrd
from hf_rrd.config import RelationalDistillationConfig
from hf_rrd.files import written_whole
from hf_rrd.models.body import unwrapped
from hf_rrd.models.sentence_transformers import default_prompt, own_tokenizer
from hf_rrd.models.teacher import load_teacher
from hf_rrd.results.report import compare_models
from hf_rrd.training.arguments import argument_parser, parse_arguments
from hf_rrd.training.caching import cache_teacher_outputs

PROGRAM = "python -m hf_rrd"
PACKAGES = (
    *("torch", "transformers", "accelerate", "datasets", "tokenizers", "huggingface_hub", "safetensors", "numpy"),
    *("pyarrow", "evaluate", "sentence-transformers", "peft", "timm", "deepspeed", "bitsandbytes", "onnx"),
    *("onnxruntime", "onnxscript", "matplotlib"),
)
# Of the environment what changes a run, and holds no path and no secret.
VARIABLES = (
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"),
    *("TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "WORLD_SIZE"),
    *("ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"),
)
PRIVATE = ("_dir", "_token", "_id", "_name", "_kwargs", "_checkpoint")  # ends of settings that env leaves out


@dataclass
class DataArguments:
    """Texts or images: a data set on the Hub or in a folder, or files."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or folder of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which of its configurations."})
    train_file: str | None = field(default=None, metadata={"help": "A csv, json or parquet file."})
    validation_file: str | None = field(default=None, metadata={"help": "The same."})
    test_file: str | None = field(default=None, metadata={"help": "The same."})
    text_column_name: str | None = field(default=None, metadata={"help": "The column with the texts."})
    image_column_name: str | None = field(default=None, metadata={"help": "The column with the images or paths."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Examples of one forward."})
    teacher_pooling: str = field(default="auto", metadata={"help": "As in RelationalDistillationConfig."})


@dataclass
class CacheArguments:
    """The teacher, what to keep of it, and where."""

    teacher_model_name_or_path: str = field(metadata={"help": "Hub name or folder of the teacher."})
    output_dir: str = field(metadata={"help": "Where the data set goes, with the columns, as parquet files."})
    with_logits: bool | None = field(default=None, metadata={"help": "Keep logits. Unset: those of a classifier."})
    prompt_name: str | None = field(default=None, metadata={"help": "Which of a SentenceTransformer's prompts."})
    teacher_projection: str = field(default="none", metadata={"help": "As in RelationalDistillationConfig."})
    projection_dim: int | None = field(default=None, metadata={"help": "The same."})
    dtype: str = field(default="float16", metadata={"help": "float16 or float32, of what is kept."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where a call that was killed is taken up again."})


@dataclass
class ReportArguments:
    """The models, and on what they are compared."""

    student_model_name_or_path: str = field(metadata={"help": "Hub name or folder of the student."})
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "The same of the teacher."})
    label_column_name: str | None = field(default=None, metadata={"help": "The column with the labels, if any."})
    split: str | None = field(default=None, metadata={"help": "Unset: test, else validation, else train."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a text, at most."})
    student_pooling: str = field(default="auto", metadata={"help": "As in RelationalDistillationConfig."})
    onnx: str | None = field(default=None, metadata={"help": "The student as a file of export_onnx, to measure, too."})
    output_dir: str | None = field(default=None, metadata={"help": "Where distillation_report.json goes, if at all."})


def load(args: DataArguments) -> DatasetDict:
    """The splits."""
    given = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    files = {split: file for split, file in given.items() if file}
    if bool(args.dataset_name) == bool(files):
        raise SystemExit("Give either --dataset_name, or --train_file, --validation_file or --test_file.")
    if bool(args.text_column_name) == bool(args.image_column_name):
        raise SystemExit("Give either --text_column_name or --image_column_name.")
    if args.dataset_name:
        data = load_dataset(args.dataset_name, args.dataset_config_name)
    else:
        kind = Path(next(iter(files.values()))).suffix.removeprefix(".").replace("jsonl", "json")
        data = load_dataset(kind, data_files=files)
    columns = next(iter(data.values())).column_names
    column = args.text_column_name or args.image_column_name
    if column not in columns:
        raise SystemExit(f"No column {column!r} among {columns}: set --text_column_name or --image_column_name.")
    return data.cast_column(column, Image()) if args.image_column_name else data


def read_images(batch: dict[str, list[Any]], column: str, processor: Any) -> dict[str, Any]:
    """What a model reads of images."""
    images = [image.convert("RGB") for image in batch[column]]
    return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}


def read_texts(
    batch: dict[str, list[Any]], column: str, processor: Any, prompt: str, max_length: int | None
) -> dict[str, Any]:
    """What a model reads of texts, after its prompt."""
    texts = [prompt + text for text in batch[column]]
    return dict(processor(texts, truncation=True, max_length=max_length))


def cache(words: Sequence[str]) -> None:
    """Compute a teacher's outputs for a data set once, and write both."""
    args, of_data = parse_arguments(CacheArguments, DataArguments, words=words, prog=f"{PROGRAM} cache")
    data, name = load(of_data), args.teacher_model_name_or_path
    teacher = load_teacher(name, pooling=of_data.teacher_pooling)
    tokenizer = None
    if of_data.image_column_name:
        processor = AutoImageProcessor.from_pretrained(name)
        data = data.with_transform(partial(read_images, column=of_data.image_column_name, processor=processor))
    elif own_tokenizer(teacher) is None:
        tokenizer = AutoTokenizer.from_pretrained(name)
    data = cache_teacher_outputs(
        data,
        teacher,
        of_data.per_device_eval_batch_size,
        processing_class=tokenizer,
        text_column=of_data.text_column_name,
        prompt_name=args.prompt_name,
        pooling=of_data.teacher_pooling,
        with_logits=args.with_logits,
        teacher_projection=args.teacher_projection,
        projection_dim=args.projection_dim,
        dtype=args.dtype,
        cache_dir=args.cache_dir,
    ).with_format(None)
    if PartialState().is_main_process:
        for split, rows in data.items():
            with written_whole(Path(args.output_dir, f"{split}.parquet")) as temporary:
                rows.to_parquet(temporary)
            print(f"{split}: {len(rows):,} rows of {', '.join(rows.column_names)}")
        print(f"Read them with load_dataset({args.output_dir!r}).")


def report(words: Sequence[str]) -> None:
    """Compare a student with its teacher, and print the table."""
    args, of_data = parse_arguments(ReportArguments, DataArguments, words=words, prog=f"{PROGRAM} report")
    data = load(of_data)
    split = args.split or next(each for each in ("test", "validation", "train") if each in data)
    if split not in data:
        raise SystemExit(f"No split {split!r} among {list(data)}: set --split.")
    names = {"student": args.student_model_name_or_path, "teacher": args.teacher_model_name_or_path}
    poolings = {"student": args.student_pooling, "teacher": of_data.teacher_pooling}
    models: dict[str, Any] = dict.fromkeys(names)
    processors, readers = dict(models), {}
    for side in [side for side in names if names[side]]:
        models[side] = load_teacher(names[side], argument=side, pooling=poolings[side])
        if column := of_data.image_column_name:
            processors[side] = AutoImageProcessor.from_pretrained(names[side])
            readers[side] = partial(read_images, column=column, processor=processors[side])
        else:
            processors[side] = own_tokenizer(models[side]) or AutoTokenizer.from_pretrained(names[side])
            how = {"prompt": default_prompt(models[side]), "max_length": args.max_length}
            column = of_data.text_column_name
            readers[side] = partial(read_texts, column=column, processor=processors[side], **how)
    ids = label_ids(data[split], args.label_column_name, models["student"]) if args.label_column_name else {}

    def look(batch: dict[str, list[Any]]) -> dict[str, Any]:
        columns = readers["student"](batch)
        if "teacher" in readers:
            columns |= {f"teacher_{name}": values for name, values in readers["teacher"](batch).items()}
        return columns | ({"labels": [ids[value] for value in batch[args.label_column_name]]} if ids else {})

    found = compare_models(
        **models,
        dataset=data[split].with_transform(look),
        batch_size=of_data.per_device_eval_batch_size,
        student_pooling=args.student_pooling,
        teacher_pooling=of_data.teacher_pooling,
        processing_class=processors["student"],
        teacher_processing_class=processors["teacher"],
        onnx=args.onnx,
    )
    print(found)
    if args.output_dir:
        found.save(args.output_dir)


def label_ids(rows: Dataset, column: str, student: nn.Module) -> dict[Any, int]:
    """The student's number of each label in a data set, by the name in its `label2id`; a number may be one itself."""
    if column not in rows.column_names:
        raise SystemExit(f"No column {column!r} among {rows.column_names}: set --label_column_name.")
    config: Any = unwrapped(student).config
    known = {str(name).lower(): int(number) for name, number in (config.label2id or {}).items()}
    feature, values = rows.features[column], rows.unique(column)
    names = {
        value: feature.int2str(value) if isinstance(feature, ClassLabel) and value >= 0 else value for value in values
    }
    ids = {value: known.get(str(names[value]).lower(), value) for value in values}
    strange = [names[value] for value, number in ids.items() if not isinstance(number, int)]
    if strange:
        raise SystemExit(f"The student has no class {strange[0]!r}. Its classes are {list(config.label2id)}.")
    return ids


def env(words: Sequence[str]) -> None:
    """Print what a bug report needs: versions, the machine, and of the settings that are given those of no default.

    No path, no name and no token is among them.
    """
    how: Any = {"strict": False, "prog": f"{PROGRAM} env"}
    (parser, words), (bare, _) = (argument_parser(RelationalDistillationConfig, words=w, **how) for w in (words, []))
    given, defaults = vars(parser.parse_args(words)), vars(bare.parse_args([]))
    facts = {"python": platform.python_version(), "hf_rrd": hf_rrd.__version__}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    facts["platform"] = f"{platform.platform()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    for number in range(torch.cuda.device_count()):
        facts[f"cuda:{number}"] = f"{torch.cuda.get_device_name(number)}, CUDA {torch.version.cuda}"
    if torch.backends.mps.is_available():
        facts["mps"] = "available"
    facts |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    for name, value in given.items():
        text = json.dumps(value, default=str)
        if value != defaults[name] and not name.endswith(PRIVATE) and not set(text) & {"/", "\\"}:
            facts[f"--{name}"] = text
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()))


COMMANDS = {"cache": cache, "report": report, "env": env}


def main() -> None:
    """Run the command that is the first word."""
    name, words = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if name in COMMANDS:
        return COMMANDS[name](words)
    lines = [f"  {each:8}{(command.__doc__ or '').splitlines()[0]}" for each, command in COMMANDS.items()]
    usage = "\n".join([f"usage: {PROGRAM} COMMAND [--config FILE] [flags]; COMMAND --help lists them", *lines])
    if name not in ("-h", "--help"):
        raise SystemExit(f"There is no command {name!r}.\n{usage}")
    print(usage)


if __name__ == "__main__":
    main()
