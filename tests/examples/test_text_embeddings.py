"""The embedding model: without labels, on two processes, under teachers of each kind, and what it measures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel, BertModel

from hf_rrd import embed
from hf_rrd.results.alignment import teacher_retrieval
from hf_rrd.training.arguments import parse_arguments
from tests.examples.scripts import QUIET, WORDS, load_script, start_process

FILES = "--train_file {}/train.csv --validation_file {}/validation.csv --text_column_name sentence "


@pytest.fixture(scope="module")
def library(folder: Path) -> Path:
    """A model of sentence-transformers with CLS pooling, a Dense layer and a prompt; pairs with a score."""
    torch.manual_seed(0)
    modules = [Transformer(str(folder / "embedder")), Pooling(16, "cls"), Dense(16, 12), Normalize()]
    prompts: dict[str, Any] = {"prompts": {"query": "cold story "}, "default_prompt_name": "query"}
    SentenceTransformer(modules=modules, device="cpu", **prompts).save(str(folder / "library"))
    words = [" ".join(WORDS[place % 10] for place in range(start, start + 4)) for start in range(20)]
    pairs = {"sentence1": words, "sentence2": words[1:] + words[:1], "score": [place / 4 for place in range(20)]}
    Dataset.from_dict(pairs).to_csv(str(folder / "pairs.csv"))
    return folder / "library"


def sentences(folder: Path) -> list[str]:
    return [json.loads(line)["sentence"] for line in (folder / "validation.jsonl").read_text().splitlines()]


def test_text_embeddings_run_on_two_processes_and_print_what_the_saved_student_is_worth(
    folder: Path, tmp_path: Path
) -> None:
    line = (
        f"{FILES} --label_column_name verdict --teacher_model_name_or_path {{}}/embedder --student_num_layers 1 "
        f"--num_train_epochs 1 {QUIET} --output_dir OUT"
    )
    printed = start_process("text_embeddings", line, folder, tmp_path, processes=2)
    assert [printed.count(name) for name in ("student before", "student after", "its layers alone")] == [1, 1, 1]
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 3  # 48 sentences by twice 8
    metrics = json.loads((tmp_path / "eval_results.json").read_text())
    for name in ("recall@1", "recall@10", "neighbours", "linear_probe", "knn"):
        assert 0 <= metrics[f"eval_{name}"] <= 1
        assert f"{100 * metrics[f'eval_{name}']:.1f} %" in printed
    texts = sentences(folder)
    saved, teacher = SentenceTransformer(str(tmp_path), device="cpu"), SentenceTransformer(str(folder / "embedder"))
    found = teacher_retrieval(*(torch.tensor(each.encode(texts)) for each in (saved, teacher)))
    assert found["teacher_retrieval@10"] == pytest.approx(metrics["eval_recall@10"])
    student = AutoModel.from_pretrained(tmp_path)
    assert type(student) is BertModel and student.config.num_hidden_layers == 1


def test_pairs_score_the_student_at_each_evaluation_and_as_it_was_saved(
    library: Path, start: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (
        f"{FILES} --sts_file {{}}/pairs.csv --teacher_model_name_or_path {{}}/library --student_num_layers 1 "
        f"--num_train_epochs 1 --eval_strategy epoch {QUIET} --output_dir OUT"
    )
    trainer = start("text_embeddings", line)
    metrics = json.loads((tmp_path / "eval_results.json").read_text())
    rows = Dataset.from_csv(str(folder / "pairs.csv"), cache_dir=str(tmp_path / "cache"))
    columns = [list(rows[name]) for name in ("sentence1", "sentence2", "score")]
    saved = SentenceTransformer(str(tmp_path), device="cpu")
    expected = EmbeddingSimilarityEvaluator(*columns, main_similarity="cosine", write_csv=False)(saved)
    assert metrics["eval_sts"] == pytest.approx(expected["spearman_cosine"])
    logged = [line["eval_sts_spearman_cosine"] for line in trainer.state.log_history if "eval_loss" in line]
    assert logged[-1] == pytest.approx(metrics["eval_sts"], abs=1e-6)
    assert f"{100 * metrics['eval_sts']:.1f} %" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["", "--cache_teacher"])
def test_a_teacher_of_the_library_is_read_with_its_own_layers_and_prompt(
    library: Path, start: Any, folder: Path, flags: str
) -> None:
    line = f"{FILES} --teacher_model_name_or_path {{}}/library --student_num_layers 1 --max_steps 1 {QUIET}"
    trainer = start("text_embeddings", f"{line} --output_dir OUT {flags}")
    encoder = SentenceTransformer(str(library), device="cpu")
    wanted = encoder.encode(sentences(folder), convert_to_tensor=True)  # with the prompt
    if flags:
        rows = torch.tensor(trainer.eval_dataset["teacher_embedding"])
    else:
        rows = []
        for row in trainer.eval_dataset:
            inputs = {name: torch.tensor([row[f"teacher_{name}"]]) for name in ("input_ids", "attention_mask")}
            rows.append(embed(trainer.teacher, inputs)[0])
        rows = torch.stack(rows).detach()
    assert rows.shape == (20, 12)
    assert (rows - wanted).abs().max() < (2e-3 if flags else 1e-5)  # a cache is in half precision


@pytest.mark.parametrize("pooling", ["auto", "cls"])
def test_a_plain_teacher_is_read_by_the_pooling_of_the_settings(start: Any, folder: Path, pooling: str) -> None:
    line = f"{FILES} --teacher_model_name_or_path {{}}/embedder --teacher_pooling {pooling} --student_num_layers 1"
    trainer = start("text_embeddings", f"{line} --cache_teacher --max_steps 1 {QUIET} --output_dir OUT")
    encoder = load_script("text_embeddings").with_pooling(str(folder / "embedder"), pooling)
    wanted = encoder.encode(sentences(folder), convert_to_tensor=True)
    assert (torch.tensor(trainer.eval_dataset["teacher_embedding"]) - wanted).abs().max() < 5e-3
    assert encoder[1].pooling_mode == {"auto": "mean"}.get(pooling, pooling)


def test_text_embeddings_train_without_the_labels_and_save_a_plain_encoder_if_asked(
    start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (
        "--train_file {}/train.jsonl --validation_file {}/validation.jsonl --text_column_name sentence "
        "--label_column_name verdict --teacher_model_name_or_path {}/embedder --student_model_name_or_path {}/other "
        "--student_projection none --teacher_projection pca --projection_dim 8 "  # as wide as that student
        f"--student_format transformers --max_steps 1 {QUIET} --output_dir OUT"
    )
    trainer = start("text_embeddings", line)
    columns = set(trainer.train_dataset.column_names)
    assert {"input_ids", "teacher_input_ids"} <= columns and not columns & {"label", "labels", "verdict"}
    assert trainer.args.task_weight == 0
    assert trainer.distillation.bank.dim == 8
    assert not (tmp_path / "modules.json").exists()
    printed = capsys.readouterr().out
    assert "student after" in printed and "its layers alone" not in printed


def test_settings_come_from_a_file_and_the_library_is_the_default_there_too(start: Any, tmp_path: Path) -> None:
    script = load_script("text_embeddings")
    needed = {"teacher_model_name_or_path": "a", "output_dir": str(tmp_path)}
    found = []
    for suffix in ("yaml", "json"):
        file = tmp_path / f"settings.{suffix}"
        given = {"student_format": "transformers"} if suffix == "yaml" else {"learning_rate": 2e-4}
        file.write_text(json.dumps(needed | given))
        kinds = (script.ModelArguments, script.DataArguments, script.RelationalDistillationConfig)
        args = parse_arguments(*kinds, words=[str(file)], **script.DEFAULTS)[-1]
        found.append((args.student_format, args.learning_rate))
    assert found == [("transformers", 5e-5), ("sentence_transformers", 2e-4)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--teacher_pooling pooler", r"sentence-transformers has no pooling 'pooler'. Set it to one of \['cls', "),
        ("--sts_file {}/train.csv", r"--sts_file: no column \['score', 'sentence1', 'sentence2'\] among \['sentence'"),
    ],
)
def test_a_pooling_and_pairs_that_cannot_be_used_are_refused(start: Any, flags: str, message: str) -> None:
    line = f"{FILES} --teacher_model_name_or_path {{}}/embedder --student_num_layers 1 {QUIET} --output_dir OUT"
    with pytest.raises(SystemExit, match=message):
        start("text_embeddings", f"{line} {flags}")


def test_a_cross_encoder_is_no_teacher(start: Any, folder: Path, tmp_path: Path) -> None:
    CrossEncoder(str(folder / "classifier"), device="cpu").save_pretrained(str(tmp_path / "cross"))
    line = f"{FILES} --teacher_model_name_or_path OUT/cross {QUIET} --output_dir OUT"
    with pytest.raises(SystemExit, match="has to be an embedding model: .*cross is a CrossEncoder"):
        start("text_embeddings", line)


def test_retrieval_and_neighbours_are_those_of_the_package() -> None:
    measure = load_script("text_embeddings").measure
    torch.manual_seed(0)
    teacher, other = torch.randn(40, 6), torch.randn(40, 5)
    alike = {"recall@1": 1.0, "recall@10": 1.0, "neighbours": 1.0}
    assert measure({"validation": teacher}, teacher, {}) == alike
    far = measure({"validation": other}, teacher, {})  # of another width, so they have no space in common
    assert far.keys() == {"neighbours"} and far["neighbours"] < 0.5
