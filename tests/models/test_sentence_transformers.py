"""Teachers of sentence-transformers: equal to their own encode(), however they are given."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

import hf_rrd.models.sentence_transformers
from hf_rrd import cache_teacher_outputs, embed, student_from_teacher
from hf_rrd.models.sentence_transformers import default_prompt, kind_of, opened, own_pooling
from hf_rrd.models.teacher import Teacher, load_teacher
from tests.builders import tiny_bert, trainer
from tests.sentences import embedder, headless, texts, tokenized, tokenizer

SEVERAL = texts(7, seed=3)


def cached(teacher: Any, folder: Path, **how: Any) -> torch.Tensor:
    """The teacher's embeddings of `SEVERAL`, (7, width)."""
    data = tokenized(tokenizer(folder), SEVERAL)
    how = {"dtype": "float32", "cache_dir": folder / "cache", "processing_class": tokenizer(folder), **how}
    return torch.tensor(cache_teacher_outputs(data, teacher, 3, **how)["teacher_embedding"][:])


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"])
@pytest.mark.parametrize("dense", [None, 6])
def test_object_and_folder_are_read_as_encode_reads_them(pooling: str, dense: int | None, tmp_path: Path) -> None:
    teacher = embedder(tmp_path / "parts", pooling, dense)
    teacher.save(str(tmp_path / "whole"))
    expected = teacher.encode(SEVERAL, convert_to_tensor=True)
    for given in (teacher, str(tmp_path / "whole")):
        assert (cached(given, tmp_path) - expected).abs().max() < 1e-5
    inputs = tokenizer(tmp_path)(SEVERAL, padding=True, return_tensors="pt")
    assert (embed(teacher, dict(inputs)) - expected).abs().max() < 1e-5
    assert Teacher(load_teacher(teacher), True, False).width == (dense or 24)


def test_a_pooling_of_the_users_own_takes_the_place_of_the_models(tmp_path: Path) -> None:
    teacher = embedder(tmp_path / "parts", "cls", 6)
    teacher.save(str(tmp_path / "whole"))
    rows = cached(teacher, tmp_path, pooling="mean")
    assert torch.equal(rows, cached(str(tmp_path / "whole"), tmp_path, pooling="mean"))
    assert rows.shape == (7, 24)


def test_another_dense_layer_is_another_teacher(tmp_path: Path) -> None:
    teacher = embedder(tmp_path / "parts", dense=6)
    first = cached(teacher, tmp_path)
    with torch.no_grad():
        teacher[2].linear.weight.mul_(-2.0)
    second = cached(teacher, tmp_path)
    assert not torch.allclose(first, second)
    columns = {"teacher_embedding": first.tolist()}
    data = tokenized(tokenizer(tmp_path), SEVERAL, **columns)
    assert len({run_of(tmp_path, teacher=each)._identity["teacher_embedding"] for each in both(tmp_path)}) == 2
    assert data.column_names[-1] == "teacher_embedding"


def both(folder: Path) -> list[Any]:
    """Two teachers that differ in a Dense layer alone."""
    found = [embedder(folder / "parts", dense=6) for _ in range(2)]
    with torch.no_grad():
        found[1][2].linear.weight.mul_(-2.0)
    return found


def run_of(folder: Path, **given: Any) -> Any:
    """A trainer of a headless student on some texts."""
    data = tokenized(tokenizer(folder), texts(24))
    settings = {"model": headless(), "task_weight": 0.0, "teacher_projection": "center", "train_dataset": data}
    return trainer(folder / "run", **(settings | {"processing_class": tokenizer(folder)} | given))


def test_a_trainer_learns_of_it_online_as_from_its_cache(tmp_path: Path) -> None:
    teacher = embedder(tmp_path / "parts", "cls", 6)
    data = tokenized(tokenizer(tmp_path), texts(24))
    how = {"dtype": "float32", "cache_dir": tmp_path / "cache", "processing_class": tokenizer(tmp_path)}
    logs = []
    for given in (
        {"teacher": teacher},
        {"teacher": None, "train_dataset": cache_teacher_outputs(data, teacher, **how)},
    ):
        run = run_of(tmp_path, **given)
        run.train()
        logs.append([line["loss"] for line in run.state.log_history if "loss" in line])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5) and len(logs[0]) > 1
    assert run.distillation.projection.width == 6


def test_the_library_is_named_where_it_is_missing_and_a_pooling_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder(tmp_path / "parts", "cls").save(str(tmp_path / "whole"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"hf_rrd\[sentence-transformers\].*or set `teacher_pooling`"):
        load_teacher(str(tmp_path / "whole"), pooling="auto")
    assert type(load_teacher(str(tmp_path / "whole"), pooling="cls")).__name__ == "BertModel"


def test_what_a_folder_holds_is_known_by_its_files(tmp_path: Path) -> None:
    tiny_bert(classes=1).save_pretrained(tmp_path / "plain")
    tokenizer(tmp_path).save_pretrained(tmp_path / "plain")
    assert kind_of(tmp_path / "plain", {}) is None
    CrossEncoder(str(tmp_path / "plain"), device="cpu").save_pretrained(str(tmp_path / "pairs"))
    assert kind_of(tmp_path / "pairs", {}) == "CrossEncoder"
    embedder(tmp_path / "parts").save(str(tmp_path / "whole"))
    assert kind_of(tmp_path / "whole", {}) == "SentenceTransformer"
    (tmp_path / "whole" / "config_sentence_transformers.json").unlink()  # as early versions wrote it
    assert kind_of(tmp_path / "whole", {}) == "SentenceTransformer"
    assert kind_of(tmp_path / "whole", {"subfolder": "1_Pooling"}) is None


def test_what_gives_no_embedding_of_tokens_is_refused_at_construction(tmp_path: Path) -> None:
    tiny_bert(classes=1).save_pretrained(tmp_path / "plain")
    tokenizer(tmp_path).save_pretrained(tmp_path / "plain")
    scorer = CrossEncoder(str(tmp_path / "plain"), device="cpu")
    with pytest.raises(ValueError, match="got the library's CrossEncoder. A cross-encoder scores pairs"):
        run_of(tmp_path, teacher=scorer)
    with pytest.raises(ValueError, match="is a cross-encoder, which scores pairs"):
        run_of(tmp_path, teacher=str(tmp_path / "plain-scorer") if saved(scorer, tmp_path) else None)
    words = SentenceTransformer(
        modules=[StaticEmbedding(tokenizer(tmp_path)._tokenizer, embedding_dim=4), Normalize()]
    )
    with pytest.raises(ValueError, match="no hidden states of tokens, got StaticEmbedding"):
        run_of(tmp_path, teacher=words)
    with pytest.raises(ValueError, match=r"`model\[0\].auto_model`"):
        run_of(tmp_path, model=embedder(tmp_path / "parts"))


def saved(scorer: Any, folder: Path) -> bool:
    """Whether a cross-encoder was saved."""
    scorer.save_pretrained(str(folder / "plain-scorer"))
    return True


def test_opening_leaves_the_users_object_as_it_is(tmp_path: Path) -> None:
    teacher = embedder(tmp_path / "parts", dense=6)
    before = teacher.encode(SEVERAL, convert_to_tensor=True)
    names = list(teacher.state_dict())
    inner = opened(teacher, "teacher")
    assert inner is teacher[0].auto_model and list(teacher.state_dict()) == names
    assert list(inner.state_dict()) == list(headless(24).state_dict())
    assert torch.equal(teacher.encode(SEVERAL, convert_to_tensor=True), before)
    student = student_from_teacher(teacher, num_hidden_layers=1)
    assert student.config.num_hidden_layers == 1 and embed(student, {"input_ids": torch.ones(1, 3).long()}).shape == (
        1,
        24,
    )


@pytest.mark.parametrize("by_hand", [True, False])
def test_adapters_of_the_model_inside_are_read_with_the_modules_around_it(by_hand: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    teacher = embedder(tmp_path / "parts", "cls", 6)
    adapters = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    before = teacher.encode(SEVERAL, convert_to_tensor=True)
    if by_hand:
        teacher[0].model = peft.get_peft_model(teacher[0].auto_model, adapters)
    else:
        teacher.add_adapter(adapters)
    expected = teacher.encode(SEVERAL, convert_to_tensor=True)
    assert (cached(teacher, tmp_path) - expected).abs().max() < 1e-5
    assert (expected - before).abs().max() > 1e-4


def test_a_copy_of_the_model_inside_is_a_plain_model(tmp_path: Path) -> None:
    teacher = embedder(tmp_path / "parts", "cls", 6, default_prompt_name="query", prompts={"query": "a "})
    inner = load_teacher(teacher)
    assert own_pooling(inner) is not None and default_prompt(inner) == "a "
    copied = copy.deepcopy(inner)
    assert (own_pooling(copied), default_prompt(copied)) == (None, "")
    run = run_of(tmp_path, model=copied, teacher=embedder(tmp_path / "parts", "cls"))
    assert run.distillation.head.embedder.pooling == "mean"
    assert (cached(copy.deepcopy(teacher), tmp_path) - teacher.encode(SEVERAL, prompt="")).abs().max() < 1e-5


def test_a_student_that_was_read_as_one_before_is_compared_by_its_own_pooling(tmp_path: Path) -> None:
    measured = embedder(tmp_path / "student", dense=10)
    embed(measured, dict(tokenizer(tmp_path)(["a cat"], return_tensors="pt")))
    how: dict[str, Any] = {"task_weight": 0.0, "train_dataset": tokenized(tokenizer(tmp_path), texts(8))}
    run = trainer(tmp_path / "run", model=measured[0].auto_model, teacher=embedder(tmp_path / "teacher"), **how)
    assert (run.distillation.head.embedder.pooling, run.distillation.head.embedder.width) == ("mean", 24)


@pytest.mark.parametrize(("kept", "told"), [(None, 1), (object(), 0)])
def test_where_the_hub_cannot_be_asked_a_warning_says_so(
    kept: Any, told: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = hf_rrd.models.sentence_transformers
    said: list[str] = []
    monkeypatch.setattr(module, "cached_file", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "try_to_load_from_cache", lambda *args, **kwargs: kept)  # an object: it has none
    monkeypatch.setattr(module.logger, "warning", said.append)
    assert kind_of("user/name", {}) is None and kind_of(tmp_path, {}) is None
    assert len(said) == told and all("the Hub could not be asked" in each for each in said)
