"""Half of MiniLM: three of its six layers and fewer words, distilled without labels; then an int8 file for any CPU.

    python examples/half_of_minilm.py --teacher_model_name_or_path sentence-transformers/all-MiniLM-L6-v2

docs/stories/half_of_minilm.md tells it step by step. Scores and labels of `data/` are there to measure with.
Needs `pip install 'hf_rrd[demo,onnx,sentence-transformers]'`.
"""

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from datasets import Dataset, load_dataset
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, cuda
from transformers import AutoModel

import hf_rrd
from hf_rrd.results.alignment import teacher_retrieval
from hf_rrd.results.export import OnnxModel, export_onnx
from hf_rrd.training.arguments import parse_arguments

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass
class Arguments:
    """What the command line may change."""

    teacher_model_name_or_path: str = field(default=MINILM, metadata={"help": "Hub name or folder of MiniLM."})
    data_dir: str = field(default="data", metadata={"help": "Holds the folders sst2/ and sentences/."})
    output_dir: str = field(default="out/half_of_minilm", metadata={"help": "Where the student goes."})
    num_hidden_layers: int = field(default=3, metadata={"help": "Of the teacher's."})
    min_count: int = field(default=3, metadata={"help": "A token stays that the texts use so often."})
    max_steps: int = field(default=600, metadata={"help": "Steps of the training, of 64 sentences."})
    learning_rate: float = field(default=5e-4, metadata={"help": "The highest, after the warm-up."})


def column(folder: str, table: str, *names: str) -> list[Any]:
    """Columns of a table such as "sst2/train", one behind the other."""
    rows = load_dataset("csv", data_files=f"{folder}/{table}.csv", split="train")
    return [value for name in names for value in rows[name]]


def rows_of(model: SentenceTransformer, texts: list[str]) -> Tensor:
    """Unit embeddings, (texts, width)."""
    return model.encode(texts, convert_to_tensor=True, normalize_embeddings=True, batch_size=32)


def probe(model: SentenceTransformer, folder: str, task: str) -> float:
    """The accuracy of a linear classifier of embeddings on a test split; it has seen 4,000 of the training split."""
    known, new = (column(folder, f"sentences/{task}_{split}", "text")[:4000] for split in ("train", "test"))
    labels, wanted = (column(folder, f"sentences/{task}_{split}", "label")[:4000] for split in ("train", "test"))
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, C=0.1))
    return float(linear.fit(rows_of(model, known).numpy(), labels).score(rows_of(model, new).numpy(), wanted))


def main() -> None:
    """Read, prune, train, export, measure, search."""
    (args,) = parse_arguments(Arguments)
    data, folder, pair = args.data_dir, args.output_dir, ("sentence1", "sentence2")
    # The texts
    check, test = (column(data, f"sentences/stsb_{split}", *pair) for split in ("validation", "test"))
    tested = [*check, *test, *column(data, "sentences/trec_test", "text"), *column(data, "sentences/mr_test", "text")]
    found = [*column(data, "sentences/stsb_train", *pair), *column(data, "sst2/train", "sentence")]
    found += [*column(data, "sentences/trec_train", "text"), *column(data, "sentences/mr_train", "text")]
    known = {re.sub(r"\W", "", text.lower()) for text in tested}  # two copies may differ in case, spaces and marks
    texts = [text for text in dict.fromkeys(found) if re.sub(r"\W", "", text.lower()) not in known]
    print(f"{len(texts):,} sentences to learn from; {len(set(found)) - len(texts):,} more stand in a test split")

    # Fewer words, fewer layers
    teacher = SentenceTransformer(args.teacher_model_name_or_path, device="cpu")
    whole = AutoModel.from_pretrained(args.teacher_model_name_or_path, add_pooling_layer=False)
    fewer, tokenizer = hf_rrd.prune_vocabulary(whole, teacher.tokenizer, texts, min_count=args.min_count)
    model = hf_rrd.student_from_teacher(fewer, num_hidden_layers=args.num_hidden_layers)
    for part in (model, tokenizer):
        part.save_pretrained(f"{folder}/start")
    before = SentenceTransformer(f"{folder}/start", device="cpu")  # pools by the mean, as the teacher does
    print(f"{len(tokenizer):,} of {len(teacher.tokenizer):,} tokens, layers {model.initialization.layers}")

    # What the teacher says
    def read(sentences: list[str]) -> Dataset:
        own, its = (each(sentences, truncation=True, max_length=128) for each in (tokenizer, teacher.tokenizer))
        return Dataset.from_dict({"text": sentences, **own} | {f"teacher_{name}": its[name] for name in its})

    train = hf_rrd.cache_teacher_outputs(read(texts), teacher, 64, text_column="text", cache_dir=f"{folder}/teacher")
    print(f"{time.process_time():.0f} s: the teacher has read them")

    # The training
    length = {"max_steps": args.max_steps, "warmup_steps": args.max_steps // 10, "per_device_train_batch_size": 64}
    how = {"learning_rate": args.learning_rate, "bf16": True, "use_cpu": not cuda.is_available()}
    quiet = {"logging_steps": max(1, args.max_steps // 20), "save_strategy": "no", "report_to": "none"}
    how |= {"task_weight": 0, "student_format": "sentence_transformers"}  # no labels; a model of sentence-transformers
    settings = hf_rrd.RelationalDistillationConfig(folder, **length, **how, **quiet)
    both = {"processing_class": tokenizer, "teacher_processing_class": teacher.tokenizer}
    trainer = hf_rrd.RelationalDistillationTrainer(model, settings, train_dataset=train, **both)
    trainer.train()
    trainer.save_model()
    print(f"{time.process_time():.0f} s: the student is saved")

    # In 8 bits
    student, int8 = (SentenceTransformer(folder, device="cpu") for _ in range(2))
    file = f"{folder}/student.onnx"
    inputs = dict(tokenizer(texts[:300], padding=True, return_tensors="pt"))
    print(export_onnx(int8[0].model, file, inputs, quantize="int8"))
    config, int8[0].model = int8[0].model.config, OnnxModel(file)  # pooling and projection stay as they are
    int8[0].model.config = config

    # What is left
    models = {"teacher": teacher, "its layers": before, "student": student, "student, int8": int8}
    seconds, results = {name: [] for name in models}, {}
    for name in 5 * [*models]:
        start = time.process_time()
        rows_of(models[name], test)
        seconds[name].append(time.process_time() - start)
    index = rows_of(teacher, sentences := [*dict.fromkeys(test)])
    pairs = test[: len(test) // 2], test[len(test) // 2 :], column(data, "sentences/stsb_test", "score")
    table = Table("", "MB", "sentences/s", "STS-B", "TREC", "MR", "own row first", "in first 10")
    for name, each in models.items():
        size = 4 * sum(weight.numel() for weight in each.parameters()) + Path(file).stat().st_size * (each is int8)
        found = {"stsb": EmbeddingSimilarityEvaluator(*pairs, write_csv=False)(each)["spearman_cosine"]}
        found |= {f"{task}_probe": probe(each, data, task) for task in ("trec", "mr")}
        results[name] = found | teacher_retrieval(rows_of(each, sentences), index)
        figures = (f"{100 * figure:.1f}" for figure in results[name].values())
        table.add_row(name, f"{size / 1e6:.1f}", f"{len(test) / median(seconds[name]):.0f}", *figures)
    Console(width=100).print(table)

    # Three queries
    for query in ("a musician on a stage", "the stock market went down", "how do I learn a language?"):
        best = (rows_of(int8, [query]) @ index.T)[0].topk(2)
        print(query, *(f"  {value:.2f} {sentences[row]}" for value, row in zip(*best, strict=True)), sep="\n")

    # The card
    trainer.log({f"test_{name}": figure for name, figure in results["student"].items()} | {"test_runtime": 0.0})
    trainer.report(read(check), teacher=teacher)
    names = {"dataset": "sentences of SST-2, STS-B, TREC and movie reviews", "model_name": "half-of-minilm"}
    trainer.create_model_card(teacher_name=MINILM, baseline=results["its layers"], **names)


if __name__ == "__main__":
    main()
