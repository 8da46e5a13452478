"""How much smaller MiniLM is with the vocabulary of some sentences, and whether its outputs stay bitwise the same.

    python examples/benchmarks/vocabulary.py --data_dir data

The texts are those of the task `sentences` of `compare_losses.py`, SST-2's among them: nothing is trained here.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from comparison_tasks import Texts, minilm_folder
from rich.console import Console
from rich.table import Table
from transformers import AutoModel

from hf_rrd import prune_vocabulary, student_from_teacher

TRAINED_ON = {"sst2/train": ["sentence"], "sentences/stsb_train": ["sentence1", "sentence2"]}
TRAINED_ON |= {"sentences/trec_train": ["text"], "sentences/mr_train": ["text"]}
TESTED_ON = {"sentences/stsb_test": ["sentence1", "sentence2"], "sentences/trec_test": ["text"]}
TESTED_ON |= {"sentences/mr_test": ["text"]}


@dataclasses.dataclass
class Arguments:
    """What the command line may change."""

    data_dir: str = dataclasses.field(default="data", metadata={"help": "Holds the folders sst2/ and sentences/."})
    min_counts: list[int] = dataclasses.field(
        default_factory=lambda: [1, 2, 3, 5, 8, 10], metadata={"help": "A row of the table for each."}
    )
    num_hidden_layers: int = dataclasses.field(default=2, metadata={"help": "Layers of the small student, of 6."})
    compared: int = dataclasses.field(default=1000, metadata={"help": "Texts whose outputs are compared."})


def bytes_of(model: Any) -> int:
    """The size of a model's saved weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def keeping(tokenizer: Any, pruned: Any, texts: list[str]) -> list[str]:
    """The texts whose tokens are all in the pruned vocabulary."""
    names, kept = tokenizer.get_vocab(), pruned.get_vocab().keys()
    ids = {number for token, number in names.items() if token in kept}
    read = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [text for text, row in zip(texts, read, strict=True) if ids.issuperset(row)]


@torch.no_grad()
def equal(one: tuple[Any, Any], other: tuple[Any, Any], texts: list[str]) -> int:
    """How many texts have bitwise the same hidden states in two models, each with its tokenizer."""
    count = 0
    for start in range(0, len(texts), 50):
        batch = texts[start : start + 50]
        states = [
            model(**tokenizer(batch, padding=True, truncation=True, return_tensors="pt")).last_hidden_state
            for model, tokenizer in (one, other)
        ]
        count += sum(torch.equal(*pair) for pair in zip(*states, strict=True))
    return count


def main(args: Arguments) -> None:
    """Prune, measure, print."""
    data = Texts(Path(args.data_dir))
    corpus, *tests = (
        [
            *dict.fromkeys(
                text for table, names in tables.items() for name in names for text in data.column(table, name)
            )
        ]
        for tables in (TRAINED_ON, *({table: names} for table, names in TESTED_ON.items()))
    )
    model, tokenizer = AutoModel.from_pretrained(minilm_folder()).eval(), data.tokenizer
    parameters, size = model.num_parameters(), bytes_of(model)
    title = f"MiniLM: {len(tokenizer):,} tokens, {parameters:,} parameters, {size / 1e6:.1f} MB; {len(corpus):,} texts"
    table = Table(title=title)
    for column in ("min_count", "tokens", "parameters", "of all", "MB", "of all", f"{args.num_hidden_layers} layers"):
        table.add_column(column)
    table.add_column("texts that keep their tokens")
    table.add_column("bitwise equal")
    for name in TESTED_ON:
        table.add_column(f"{Path(name).name} keeps its tokens")
    for min_count in args.min_counts:
        smaller, pruned = prune_vocabulary(model, tokenizer, corpus, min_count=min_count)
        student = student_from_teacher(smaller, num_hidden_layers=args.num_hidden_layers)
        kept, count = keeping(tokenizer, pruned, corpus), bytes_of(smaller)
        compared = kept[:: max(1, len(kept) // args.compared)]
        shares = [f"{len(keeping(tokenizer, pruned, texts))} of {len(texts)}" for texts in tests]
        table.add_row(
            *(str(min_count), f"{len(pruned):,}", f"{smaller.num_parameters():,}"),
            *(f"{smaller.num_parameters() / parameters:.3f}", f"{count / 1e6:.1f}", f"{count / size:.3f}"),
            *(f"{bytes_of(student) / size:.3f}", f"{len(kept)} of {len(corpus)}"),
            *(f"{equal((model, tokenizer), (smaller, pruned), compared)} of {len(compared)}", *shares),
        )
    Console(width=max(160, Console().width)).print(table)


if __name__ == "__main__":
    from transformers import HfArgumentParser
    from transformers.utils import logging

    logging.set_verbosity_error()
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
