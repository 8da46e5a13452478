"""Students as models of sentence-transformers: what is saved gives the rows of training, in the teacher's space."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from torch import Tensor
from transformers import AutoModel, BertModel, BertTokenizer

from hf_rrd import cache_teacher_outputs, embed, save_sentence_transformer
from hf_rrd.models.head import head_of
from tests.builders import Images, tiny_bert, tiny_vit, trainer
from tests.sentences import WORDS, embedder, headless, texts, tokenized, tokenizer

SEVERAL = texts(9, seed=5)


def run_of(folder: Path, **given: Any) -> Any:
    """A trainer of a headless student under a SentenceTransformer."""
    words = tokenizer(folder)
    settings: dict[str, Any] = {
        **{"model": headless(), "teacher": embedder(folder / "teacher"), "task_weight": 0.0, "balance_losses": True},
        **{"student_projection": "centered", "teacher_projection": "center", "processing_class": words},
        **{"train_dataset": tokenized(words, texts(40)), "eval_dataset": tokenized(words, texts(12, seed=1))},
        **{"student_format": "sentence_transformers", "learning_rate": 1e-3},
    }
    return trainer(folder / "run", **(settings | given))


def expected(run: Any, words: Any) -> Tensor:
    """Unit rows of the plain student in the teacher's space, by the formula, (texts, width)."""
    inputs = words(SEVERAL, padding=True, return_tensors="pt")
    student = AutoModel.from_pretrained(run.args.output_dir)
    head, teacher = run.distillation.head.eval(), run.distillation.projection
    with torch.no_grad():
        rows = head(embed(student, dict(inputs), run.args.student_pooling))
    if teacher.scale is not None:
        rows = rows * teacher.scale * teacher.dim**0.5 / run.distillation.balance.measured[2].sqrt()
    rows = rows if teacher.matrix is None else rows @ teacher.matrix.T
    return F.normalize(rows if teacher.mean is None else rows + teacher.mean, dim=-1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"student_projection": "linear"},
        {"teacher_projection": "none", "student_pooling": "cls"},
        {"teacher_projection": "pca", "projection_dim": 8, "student_pooling": "max"},
        {"teacher_projection": "orthogonal", "projection_dim": 8, "student_pooling": "last_token"},
        {"teacher_projection": "pca", "projection_dim": 16, "student_projection": "none"},
        {"relational_loss": {"rrd": 1.0, "mse": 1.0}, "bf16": True},
    ],
)
def test_encode_gives_the_rows_of_training_in_the_teachers_space(settings: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(tmp_path, **settings)
    run.train()
    run.save_model()
    saved = SentenceTransformer(run.args.output_dir, device="cpu")
    rows = saved.encode(SEVERAL, convert_to_tensor=True)
    assert (rows - expected(run, tokenizer(tmp_path))).abs().max() < 1e-5
    assert rows.shape[1] == run.distillation.projection.width == 24
    assert saved.similarity_fn_name == "cosine"


def test_a_save_that_fails_leaves_the_one_before_and_one_that_does_not_leaves_none_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = run_of(tmp_path), tmp_path / "a" / "saved"
    save_sentence_transformer(run, folder)
    before = SentenceTransformer(str(folder), device="cpu").encode(SEVERAL, convert_to_tensor=True)
    run.train()
    with monkeypatch.context() as patch:
        patch.setattr(SentenceTransformer, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            save_sentence_transformer(run, folder)
    assert torch.equal(SentenceTransformer(str(folder), device="cpu").encode(SEVERAL, convert_to_tensor=True), before)
    stale = [folder / name for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json")]
    for path in stale:
        path.write_text("{}")
    save_sentence_transformer(run, folder)
    after = SentenceTransformer(str(folder), device="cpu").encode(SEVERAL, convert_to_tensor=True)
    assert (after - before).abs().max() > 1e-3 and not any(path.exists() for path in stale)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_of_one_width_and_nothing_taken_off_there_is_no_dense_layer(tmp_path: Path) -> None:
    run = run_of(tmp_path, model=headless(24), student_projection="none", teacher_projection="none")
    run.train()
    run.save_model()
    saved = SentenceTransformer(run.args.output_dir, device="cpu")
    assert [type(module).__name__ for module in saved] == ["Transformer", "Pooling", "Normalize"]
    assert (saved.encode(SEVERAL, convert_to_tensor=True) - expected(run, tokenizer(tmp_path))).abs().max() < 1e-5


def test_a_student_that_is_its_teacher_gives_its_teachers_rows(tmp_path: Path) -> None:
    teacher = embedder(tmp_path / "teacher")
    run = run_of(tmp_path, model=headless(24, seed=1), teacher=teacher, student_projection="linear", max_steps=1)
    run.train()
    head, projection = run.distillation.head, run.distillation.projection
    inputs = tokenizer(tmp_path)(texts(200, seed=8), padding=True, return_tensors="pt")
    wanted = projection(embed(teacher, dict(inputs)))
    run.model.load_state_dict(headless(24, seed=1).state_dict())
    with torch.no_grad():  # the head that turns this student's embedding into the teacher's row, as far as a line can
        own = embed(run.model.eval(), dict(inputs))
        fitted = torch.linalg.lstsq(torch.cat([own, torch.ones(len(own), 1)], 1), wanted).solution
        head.projection.weight.copy_(fitted[:-1].T), head.projection.bias.copy_(fitted[-1])
        run.distillation.balance.measured[2] = head.eval()(own).square().sum(-1).mean()
    save_sentence_transformer(run, tmp_path / "saved")
    rows = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(SEVERAL, convert_to_tensor=True)
    assert (rows * teacher.encode(SEVERAL, convert_to_tensor=True)).sum(-1).min() > 0.999


def test_checkpoints_have_it_and_a_run_that_is_resumed_ends_as_the_whole_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = run_of(tmp_path, model=headless(dropout=0.1), **settings)
    whole.train()
    half = tmp_path / "run" / "checkpoint-2"
    rows = SentenceTransformer(str(half), device="cpu").encode(SEVERAL, convert_to_tensor=True)
    again = run_of(tmp_path, model=headless(dropout=0.1), **settings)
    again.train(resume_from_checkpoint=str(half))
    ends = []
    for run in (whole, again):
        run.save_model()
        ends.append(SentenceTransformer(run.args.output_dir, device="cpu").encode(SEVERAL, convert_to_tensor=True))
    assert torch.equal(*ends) and not torch.equal(rows, ends[0])


def test_length_prompts_and_truncation_are_saved_with_it(tmp_path: Path) -> None:
    words = tokenizer(tmp_path)
    run = run_of(tmp_path, train_dataset=tokenized(words, texts(40, longest=5)), student_format="transformers")
    run.train()
    prompts = {"query": "find a ", "document": ""}
    save_sentence_transformer(run, tmp_path / "saved", prompts=prompts, default_prompt_name="query", truncate_dim=6)
    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert saved.max_seq_length == 7 and saved.prompts["query"] == "find a " and saved.default_prompt_name == "query"
    assert saved.encode("a cat").shape == (6,)
    assert saved.tokenizer.get_vocab() == words.get_vocab()
    with pytest.raises(ValueError, match=r"`default_prompt_name` must be one of .*'query'.*, got 'other'"):
        save_sentence_transformer(run, tmp_path / "saved", default_prompt_name="other")


def test_the_plain_format_writes_nothing_of_it(tmp_path: Path) -> None:
    run = run_of(tmp_path, student_format="transformers", max_steps=1)
    run.train()
    run.save_model()
    assert not (tmp_path / "run" / "modules.json").exists()


def scorer(**how: Any) -> Any:
    """An evaluator of 20 pairs, called `pairs`."""
    one, other = texts(20, seed=6), texts(20, seed=7)
    return EmbeddingSimilarityEvaluator(one, other, [i / 20 for i in range(20)], name="pairs", write_csv=False, **how)


def test_evaluators_ask_the_student_as_it_will_be_saved(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    run = run_of(tmp_path, evaluators=scorer(), student_format="transformers", **settings)
    run.train()
    logged = [line["eval_pairs_spearman_cosine"] for line in run.state.log_history if "eval_loss" in line]
    save_sentence_transformer(run, tmp_path / "saved")
    after = scorer()(SentenceTransformer(str(tmp_path / "saved"), device="cpu"))["pairs_spearman_cosine"]
    assert len(logged) == 2 and logged[-1] == pytest.approx(after, abs=1e-6)
    assert "eval_pairs_spearman_cosine" in run.evaluate() and head_of(run.model) is None
    assert not any("pairs" in name for name in run.predict(run.eval_dataset).metrics)


@pytest.mark.parametrize("pooling", ["auto", "cls"])
def test_a_report_is_of_the_rows_that_the_saved_student_gives(pooling: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, student_projection="linear", student_pooling=pooling)
    run.train()
    run.save_model()
    inputs = dict(tokenizer(tmp_path)(SEVERAL, padding=True, return_tensors="pt"))
    before = embed(run.model.eval(), inputs)
    report = run.report()
    rows = SentenceTransformer(run.args.output_dir, device="cpu").encode(texts(12, seed=1), convert_to_tensor=True)
    assert (report.tensors["student_embedding"] - rows).abs().max() < 1e-5
    dense = 16 * 24 + 24
    assert report.facts["student"]["parameters"] == headless().num_parameters() + dense
    assert torch.equal(embed(run.model.eval(), inputs), before)  # the student itself is as it was


def test_a_teacher_that_is_given_to_the_report_alone_reads_its_own_columns(tmp_path: Path) -> None:
    teacher, words = embedder(tmp_path / "teacher"), tokenizer(tmp_path)
    own = tokenized(words, texts(12, seed=1))
    others = {f"teacher_{name}": [row[::-1] for row in own[name]] for name in own.column_names}  # it has other numbers
    train = cache_teacher_outputs(tokenized(words, texts(40)), teacher, cache_dir=tmp_path / "cache")
    run = run_of(tmp_path, teacher=None, train_dataset=train, teacher_processing_class=words)
    report = run.report(Dataset.from_dict({**own[:], **others}), teacher=teacher)
    alone = Dataset.from_dict({name.removeprefix("teacher_"): rows for name, rows in others.items()})
    wanted = [embed(teacher, {name: torch.tensor([row[name]]) for name in row})[0] for row in alone]
    assert (report.tensors["teacher_embedding"] - torch.stack(wanted)).abs().max() < 1e-5


def test_a_teacher_that_is_given_to_the_report_alone_is_not_given_another_tokenizers_numbers(tmp_path: Path) -> None:
    teacher = embedder(tmp_path / "teacher")
    file = tmp_path / "other.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[::-1]]))
    words = BertTokenizer(str(file))
    data = tokenized(words, texts(40), text=texts(40))
    train = cache_teacher_outputs(data, teacher, text_column="text", cache_dir=tmp_path / "cache")
    run = run_of(tmp_path, teacher=None, train_dataset=train, eval_dataset=data, processing_class=words)
    with pytest.raises(ValueError, match="student and teacher have different processors.*pass it as `teacher_proc"):
        run.report(teacher=teacher)
    both = {"processing_class": words, "teacher_processing_class": tokenizer(tmp_path)}
    its = both["teacher_processing_class"](texts(40))
    run = run_of(tmp_path, teacher=None, train_dataset=train, **both)
    run.report(Dataset.from_dict({**data[:], **{f"teacher_{name}": its[name] for name in its}}), teacher=teacher)


def test_an_evaluation_with_evaluators_changes_nothing_in_a_training(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "model": None}
    ends = []
    for evaluators in (None, [scorer(), lambda model, **_: 0.5]):
        run = run_of(tmp_path, **(settings | {"model": headless(dropout=0.1)}), evaluators=evaluators)
        run.train()
        ends.append(torch.cat([weight.detach().flatten() for weight in run.model.parameters()]))
    assert torch.equal(*ends)
    assert run.evaluate()["eval_function"] == 0.5


def test_of_several_evaluation_sets_the_first_asks_the_evaluators(tmp_path: Path) -> None:
    words = tokenizer(tmp_path)
    sets = {name: tokenized(words, texts(8, seed=seed)) for name, seed in (("one", 3), ("two", 4))}
    metrics = run_of(tmp_path, eval_dataset=sets, evaluators=[scorer()]).evaluate()
    assert [name for name in metrics if "spearman_cosine" in name] == ["eval_one_pairs_spearman_cosine"]


def test_the_best_model_may_be_chosen_by_an_evaluator(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings |= {"max_steps": 3, "load_best_model_at_end": True, "metric_for_best_model": "pairs_spearman_cosine"}
    run = run_of(tmp_path, evaluators=scorer(), greater_is_better=True, **settings)
    run.train()
    scores = [line["eval_pairs_spearman_cosine"] for line in run.state.log_history if "eval_loss" in line]
    assert run.evaluate()["eval_pairs_spearman_cosine"] == pytest.approx(max(scores), abs=1e-6)


def test_an_adapted_student_is_saved_with_its_adapters(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    headless().save_pretrained(tmp_path / "base")
    student = get_peft_model(AutoModel.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["query"], r=2))
    run = run_of(tmp_path, model=student, learning_rate=1e-2)
    run.train()
    run.save_model()
    saved = SentenceTransformer(run.args.output_dir, device="cpu")
    inputs = tokenizer(tmp_path)(SEVERAL, padding=True, return_tensors="pt")
    with torch.no_grad():
        rows = run.distillation.head.eval()(embed(run.model.eval(), dict(inputs)))
    length = run.distillation.projection.scale * 24**0.5 / run.distillation.balance.row_norm
    wanted = F.normalize(rows * length + run.distillation.projection.mean, dim=-1)
    assert (saved.encode(SEVERAL, convert_to_tensor=True) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": tiny_bert(), "task_weight": 1.0}, r"needs a pooling .* one of \['cls', .*got 'head'"),
        ({"student_pooling": lambda outputs, mask: outputs.last_hidden_state[:, 1]}, "needs a pooling"),
        ({"student_pooling": "pooler"}, "needs a pooling that the library has, .*got 'pooler'"),
        ({"processing_class": None}, "needs its tokenizer or processor: pass `processing_class`, got None"),
        ({"evaluators": "sts"}, r"`evaluators` must be evaluators of sentence-transformers, got \['str'\]"),
        ({"evaluators": EmbeddingSimilarityEvaluator}, r"must be evaluators of sentence-transformers, got \['.*'\]"),
        ({"student_format": "onnx"}, r"`student_format` must be one of \['transformers', 'sentence_transformers'\]"),
    ],
)
def test_what_cannot_become_one_is_refused_at_construction(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = tokenized(tokenizer(tmp_path), texts(8), labels=[i % 4 for i in range(8)])
    with pytest.raises(ValueError, match=message):
        run_of(tmp_path, train_dataset=data, eval_dataset=None, **given)


def test_what_the_library_has_against_a_student_is_said_at_construction(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, folder: str) -> None:
            """Write what no tokenizer can be read from."""
            Path(folder, "tokenizer_config.json").write_text("{")

    data = tokenized(tokenizer(tmp_path), texts(8))
    with pytest.raises(ValueError, match="a BertModel cannot become a model of sentence-transformers: "):
        run_of(tmp_path, train_dataset=data, eval_dataset=None, data_collator=list, processing_class=Broken())


def test_the_best_student_has_its_own_projection_or_is_refused(tmp_path: Path) -> None:
    often: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    often |= {"load_best_model_at_end": True, "learning_rate": 0.05, "greater_is_better": True}  # the first is best
    run = run_of(tmp_path, **often, metric_for_best_model="minus_step", evaluators=minus_step)
    run.train()
    run.save_model()
    folders = (run.args.output_dir, run.state.best_model_checkpoint)
    rows = [SentenceTransformer(folder, device="cpu").encode(SEVERAL, convert_to_tensor=True) for folder in folders]
    assert torch.equal(*rows) and folders[1].endswith("checkpoint-1")
    with pytest.raises(ValueError, match="with save_only_model no checkpoint has that of the best student"):
        run_of(tmp_path, **often, save_only_model=True)


def minus_step(model: Any, steps: int = 0, **_: Any) -> dict[str, float]:
    return {"minus_step": -float(steps)}


@pytest.mark.parametrize("given", [{"a": "text"}, {"a": {"b": 1.0}}, {"a": torch.ones(2)}, None])
def test_an_evaluator_that_gives_no_numbers_is_named(given: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"each of `evaluators` must give one number, .*, got \{'(a|function)': "):
        run_of(tmp_path, evaluators=lambda model, **_: given).evaluate()


def test_an_evaluator_that_fails_fails_on_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: Any, **_: Any) -> float:
        raise KeyError("no such text")

    run, sent = run_of(tmp_path, evaluators=fails), []
    module = "hf_rrd.results.sentence_transformers.broadcast_object_list"
    monkeypatch.setattr(module, lambda objects: sent.append(objects) or objects)
    with pytest.raises(KeyError, match="no such text"):
        run.evaluate()
    monkeypatch.setattr(run, "is_world_process_zero", lambda: False)
    monkeypatch.setattr(module, lambda objects: sent[0])
    with pytest.raises(RuntimeError, match="one of `evaluators` failed on the main process"):
        run.evaluate()


def test_of_prefixes_the_saved_student_ends_with_the_widest(tmp_path: Path) -> None:
    run = run_of(tmp_path, matryoshka_dims=[12, 6], evaluators=lambda model, **_: len(model.encode("a cat")))
    run.train()
    run.save_model()
    rows = SentenceTransformer(run.args.output_dir, device="cpu").encode(SEVERAL, convert_to_tensor=True)
    inputs, teacher = tokenizer(tmp_path)(SEVERAL, padding=True, return_tensors="pt"), run.distillation.projection
    student = run.distillation.head.eval()(embed(run.model.eval(), dict(inputs)))
    student = student * teacher.scale * 24**0.5 / run.distillation.balance.row_norm + teacher.mean
    assert (rows - F.normalize(student[:, :12], dim=-1)).abs().max() < 1e-5
    assert run.evaluate()["eval_function"] == 12


def test_the_weights_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, written = run_of(tmp_path, max_steps=1, evaluators=scorer()), []
    run.train()
    save = BertModel.save_pretrained
    monkeypatch.setattr(BertModel, "save_pretrained", lambda *args, **how: [written.append(1), save(*args, **how)])
    run.evaluate()
    assert written == []
    run.save_model()
    assert written == [1] and SentenceTransformer(run.args.output_dir, device="cpu").encode("a cat").shape == (24,)


def test_without_an_embedding_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has to be compared with its teacher's embedding"):
        trainer(tmp_path, relational_weight=0.0, student_format="sentence_transformers")


def test_a_vision_student_is_saved_as_far_as_the_library_takes_it(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    student, teacher = tiny_vit().vit, tiny_vit(24, seed=1).vit
    settings: dict[str, Any] = {"processing_class": processor, "student_format": "sentence_transformers"}
    run = trainer(tmp_path, model=student, teacher=teacher, task_weight=0.0, train_dataset=Images(16), **settings)
    run.train()
    run.save_model()
    saved = SentenceTransformer(str(tmp_path), device="cpu")
    images = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    rows = saved.encode(images, convert_to_tensor=True)
    with torch.no_grad():
        wanted = run.distillation.head.eval()(embed(run.model.eval(), dict(processor(images, return_tensors="pt"))))
    assert (rows - F.normalize(wanted, dim=-1)).abs().max() < 1e-5


def test_a_data_set_without_tokens_leaves_the_tokenizers_length(tmp_path: Path) -> None:
    from hf_rrd.results.sentence_transformers import longest_text

    assert longest_text(Dataset.from_dict({"text": ["a"]})) is None and longest_text([{"input_ids": [1]}]) is None
    data = Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    assert longest_text(data) == 2 and longest_text(data.select([1])) == 1
    assert longest_text(data.filter(lambda example: len(example["input_ids"]) < 2)) == 1
