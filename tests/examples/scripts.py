"""What the tests of the scripts share: how they are started, and small models."""

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

from tests.loopback_hub import LoopbackHub
from tests.processes import run_script

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("text_classification", "image_classification", "text_embeddings", "image_embeddings", "own_training_loop")
WORDS = ["fine", "warm", "bright", "dull", "cold", "grey", "film", "story", "scene", "ending"]
QUIET = "--disable_tqdm True --save_strategy no --use_cpu True --per_device_train_batch_size 8 --learning_rate 0.01"

TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
LIBRARY = {"modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"}
LIBRARY |= {"2_Dense/config.json", "2_Dense/model.safetensors", "3_Normalize/config.json"}
CLASSIFY = (
    "--train_file {}/train.csv --validation_file {}/validation.csv --test_file {}/test.csv "
    f"--text_column_name sentence --label_column_name verdict --num_train_epochs 1 {QUIET} "
)


def load_script(name: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the dataclasses look their types up there
    spec.loader.exec_module(module)
    return module


def save_text_model(folder: Path, words: list[str], head: bool, width: int = 16, layers: int = 3) -> None:
    """A BERT and a tokenizer of these words."""
    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *words])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(width)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
    )
    (BertForSequenceClassification if head else BertModel)(config).save_pretrained(folder)


def start_process(
    name: str, line: str, folder: Path, out: Path, processes: int = 1, hub: LoopbackHub | None = None
) -> str:
    """Runs an example as a user starts it; what it printed."""
    arguments = shlex.split(line.replace("{}", str(folder)).replace("OUT", str(out)))
    environment = {"COLUMNS": "200"} | ({} if hub is None else hub.environment(out / "home"))
    path = EXAMPLES / f"{name}.py"
    return run_script(path, *arguments, folder=out, environment=environment, processes=processes).out


@torch.no_grad()
def text_accuracy(student: Path, file: Path, column: str) -> float:
    """The share of a file's texts that a saved student gets right, one text at a time."""
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(student),
        AutoTokenizer.from_pretrained(student),
    )
    right = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        found = model(**tokenizer(row["sentence"], return_tensors="pt")).logits.argmax().item()
        right.append(model.config.id2label[found] == str(row[column]))
    return sum(right) / len(right)
