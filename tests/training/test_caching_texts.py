"""A teacher that reads the texts of a column itself: as its own encode() does, with its prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from transformers import BertForSequenceClassification, BertTokenizer, LlamaConfig, LlamaModel

from hf_rrd import DataCollatorForDistillation, cache_teacher_outputs, embed
from hf_rrd.training import caching, reading
from hf_rrd.training.hashing import hash_of
from tests.builders import trainer
from tests.processes import be_process, context, free_port, run_script
from tests.sentences import embedder, headless, texts, tokenized, tokenizer

PROMPTS = {"query": "the big ", "passage": "", "long": "a cat sits over the old house "}
PROBED = 4
SEVERAL = [*texts(17, seed=4), "THE CAT RUNS", "a " * 40, ""]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "SHARD_EXAMPLES", 7)
    monkeypatch.setattr(reading, "PROBED_EXAMPLES", PROBED)


def asked(folder: Path, pooling: str = "mean", include: bool = True, lower: bool = True, **how: Any) -> Any:
    """A SentenceTransformer with prompts that reads 11 tokens, of a tokenizer that knows no capitals by itself."""
    headless(24, seed=1).save_pretrained(folder)
    vocabulary = tokenizer(folder).vocab
    plain = BertTokenizer(vocabulary, do_lower_case=False, model_max_length=32)
    plain.save_pretrained(folder)
    torch.manual_seed(2)
    first = Transformer(str(folder), max_seq_length=11, do_lower_case=lower)
    modules = [first, Pooling(24, pooling, include_prompt=include), Dense(24, 6), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu", prompts=dict(PROMPTS), **how)


def data(several: list[str] = SEVERAL) -> Dataset:
    return Dataset.from_dict({"sentence": several, "number": list(range(len(several)))})


def cached(teacher: Any, folder: Path, dataset: Any = None, **how: Any) -> Any:
    how = {"dtype": "float32", "cache_dir": folder / "cache", "text_column": "sentence", **how}
    return cache_teacher_outputs(data() if dataset is None else dataset, teacher, 3, **how)


def rows(dataset: Any) -> Tensor:
    return torch.tensor([list(example["teacher_embedding"]) for example in dataset])


def encoded(teacher: Any, prompt_name: str | None = None) -> Tensor:
    found: Tensor = teacher.encode(SEVERAL, prompt_name=prompt_name, convert_to_tensor=True)
    return found


# ---- What it reads ----


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken", "weightedmean"])
@pytest.mark.parametrize("include", [True, False])
def test_texts_are_read_as_encode_reads_them_with_each_prompt(pooling: str, include: bool, tmp_path: Path) -> None:
    teacher = asked(tmp_path, pooling, include)
    found = {name: rows(cached(teacher, tmp_path, prompt_name=name)) for name in (None, "query", "passage")}
    for name, each in found.items():
        assert (each - encoded(teacher, name)).abs().max() < 1e-5
    assert torch.equal(found[None], found["passage"]) and (found[None] - found["query"]).abs().max() > 1e-3


def test_the_prompt_is_out_of_the_mean_only_where_the_pooling_leaves_it_out(tmp_path: Path) -> None:
    without, whole = (rows(cached(asked(tmp_path, include=each), tmp_path, prompt_name="query")) for each in (0, 1))
    assert (without - whole).abs().max() > 1e-3


def test_a_teacher_by_name_is_asked_with_its_default_prompt(tmp_path: Path) -> None:
    teacher = asked(tmp_path / "parts", "cls", default_prompt_name="query")
    teacher.save(str(tmp_path / "whole"))
    loaded = SentenceTransformer(str(tmp_path / "whole"), device="cpu")
    found = cached(str(tmp_path / "whole"), tmp_path)
    assert (rows(found) - encoded(loaded)).abs().max() < 1e-5
    assert (rows(found) - encoded(loaded, "passage")).abs().max() > 1e-3
    assert found.column_names == ["sentence", "number", "teacher_embedding"] and found["sentence"][:] == SEVERAL


def test_what_truncates_the_rows_of_encode_truncates_the_cached_ones(tmp_path: Path) -> None:
    teacher = asked(tmp_path, truncate_dim=4)
    assert (rows(cached(teacher, tmp_path)) - encoded(teacher)).abs().max() < 1e-5
    assert encoded(teacher).shape == (20, 4)


def test_a_plain_model_reads_with_the_tokenizer_that_is_given(tmp_path: Path) -> None:
    model, own = BertForSequenceClassification(headless(24).config), tokenizer(tmp_path)
    own.model_max_length = int(1e30)  # as of many tokenizers; the model has 32 positions
    found = cached(model, tmp_path, processing_class=own)
    inputs = own(SEVERAL, padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        expected, outputs = embed(model, dict(inputs), return_outputs=True)
    assert (rows(found) - expected).abs().max() < 1e-5
    assert (torch.tensor(found["teacher_logits"][:]) - outputs.logits).abs().max() < 1e-5


CHAT = "{% for each in messages %}{{ each['role'] }} : {{ each['content'] }} {% endfor %}"


@pytest.mark.parametrize("template", [None, CHAT])
@pytest.mark.parametrize("include", [True, False])
def test_a_decoder_that_pads_on_the_left_or_has_a_template_of_chats_is_read_as_encode_reads_it(
    template: str | None, include: bool, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaModel(LlamaConfig(vocab_size=30, max_position_embeddings=64, pad_token_id=0, **size)).save_pretrained(
        tmp_path
    )
    own = tokenizer(tmp_path)
    own.chat_template = template
    own.save_pretrained(tmp_path)
    first = Transformer(str(tmp_path))
    first.tokenizer.padding_side = "left"
    modules = [first, Pooling(24, ("lasttoken", "mean"), include_prompt=include), Normalize()]
    teacher = SentenceTransformer(modules=modules, device="cpu", prompts=dict(PROMPTS))
    assert ("message" in teacher.modalities) == (template is not None)
    for name in (None, "query"):
        assert (rows(cached(teacher, tmp_path, prompt_name=name)) - encoded(teacher, name)).abs().max() < 1e-5
    assert (encoded(teacher) - encoded(teacher, "query")).abs().max() > 0.01


def test_a_tokenizer_that_is_given_takes_the_place_of_the_teachers(tmp_path: Path) -> None:
    teacher, own = asked(tmp_path, include=False), tokenizer(tmp_path / "other")
    own.model_max_length = 8
    encoded(teacher, "long")  # its own tokenizer's length of the prompt is known
    found = rows(cached(teacher, tmp_path, processing_class=own, prompt_name="long"))
    assert teacher[0].tokenizer is not own and teacher[0].max_seq_length == 11
    teacher[0].processor = own
    teacher[0]._prompt_length_mapping.clear()
    assert (found - encoded(teacher, "long")).abs().max() < 1e-5


def test_streams_dicts_transforms_workers_and_shuffled_rows_are_read_alike(tmp_path: Path) -> None:
    teacher = asked(tmp_path, default_prompt_name="query")
    expected = encoded(teacher)
    parts = cached(teacher, tmp_path, DatasetDict(train=data(), test=data(SEVERAL[:5])), num_workers=2)
    assert (rows(parts["train"]) - expected).abs().max() < 1e-5
    assert (rows(parts["test"]) - expected[:5]).abs().max() < 1e-5
    assert (rows(cached(teacher, tmp_path, data().to_iterable_dataset())) - expected).abs().max() < 1e-5
    shuffled = cached(teacher, tmp_path, data().shuffle(seed=1))
    assert (rows(shuffled) - expected[shuffled["number"][:]]).abs().max() < 1e-5
    made = Dataset.from_dict({"raw": SEVERAL}).with_transform(lambda batch: {"sentence": batch["raw"]})
    assert (rows(cached(teacher, tmp_path, made)) - expected).abs().max() < 1e-5
    projected = cached(teacher, tmp_path, teacher_projection="center")
    centered = expected - expected.mean(0)
    torch.testing.assert_close(rows(projected), centered / centered.square().mean().sqrt(), rtol=1e-4, atol=1e-5)


# ---- When it is computed again ----


def longer(teacher: Any) -> None:
    teacher.max_seq_length = 12


def other_prompt(teacher: Any) -> None:
    teacher.prompts["query"] = "the small "


def other_default(teacher: Any) -> None:
    teacher.default_prompt_name = "long"


def moved_words(teacher: Any) -> None:
    teacher[0].tokenizer.backend_tokenizer.normalizer = None


def used(teacher: Any) -> None:
    teacher.encode(SEVERAL[:3], prompt_name="long")


@pytest.mark.parametrize(
    ("change", "computed"),
    [(used, PROBED), (longer, 20), (other_prompt, 20), (other_default, 20), (moved_words, 20)],
)
def test_only_another_prompt_tokenizer_or_length_is_read_anew(
    change: Callable[[Any], None], computed: int, tmp_path: Path
) -> None:
    teacher = asked(tmp_path, default_prompt_name="query")
    cached(teacher, tmp_path)
    change(teacher)
    read: list[int] = []
    teacher[0].auto_model.register_forward_hook(
        lambda module, args, kwargs, output: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    cached(teacher, tmp_path)
    assert sum(read) == 1 + computed  # one is blank, and says how wide an embedding is


def fingerprint(folder: str) -> str:
    """What a cache and a checkpoint know of how a teacher reads."""
    teacher = asked(Path(folder), include=False, default_prompt_name="query")
    model = caching.load_teacher(teacher)
    read = caching.Texts(model)
    return f"{hash_of(caching.Teacher(model, True, False).pooling)} {hash_of(read.rules)}"


@pytest.mark.slow
def test_another_process_knows_a_teacher_by_the_same_hashes(tmp_path: Path) -> None:
    module = "tests.training.test_caching_texts"
    code = f"import sys; from {module} import fingerprint; print(fingerprint(sys.argv[1]))"
    printed = run_script("-c", code, str(tmp_path / "other"), folder=tmp_path)
    assert fingerprint(str(tmp_path / "here")) == printed.out.split("\n")[-2]


def test_what_the_tokenizer_remembers_of_a_call_is_no_rule(tmp_path: Path) -> None:
    read = caching.Texts(caching.load_teacher(asked(tmp_path)))
    before = read.rules
    read.tokenizer(SEVERAL, padding="max_length", truncation=True, max_length=5)
    assert read.rules == before


def test_what_reads_texts_has_no_weights_and_does_not_hold_the_model(tmp_path: Path) -> None:
    teacher = asked(tmp_path)
    model = caching.load_teacher(teacher)
    read = caching.Texts(model)
    assert read.first is not None and list(read.first.parameters()) == []
    assert model not in vars(read.first.model).values() and teacher[0].auto_model is model
    assert (rows(cached(teacher, tmp_path)) - encoded(teacher)).abs().max() < 1e-5


def share(rank: int, port: int, folder: Path) -> None:
    """One process of two, each with a teacher of its own making."""
    be_process(rank, 2, port)
    torch.set_num_threads(1)
    caching.SHARD_EXAMPLES = 7
    teacher = asked(folder / f"{rank}", include=False, default_prompt_name="query")
    found = rows(cached(teacher, folder))
    assert (found - encoded(teacher)).abs().max() < 1e-5


@pytest.mark.slow
def test_two_processes_share_the_texts_among_them(tmp_path: Path) -> None:
    port = free_port()
    children = [context().Process(target=share, args=(rank, port, tmp_path)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=120)
    assert [child.exitcode for child in children] == [0, 0]
    assert len(list((tmp_path / "cache").glob("*"))) == 1  # both knew the files of both


# ---- What is refused ----


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt_name": "qurey"}, r"must be one of the teacher's \['document', 'long', 'passage', 'query'\], got 'q"),
        (
            {"teacher": headless(24), "prompt_name": "query"},
            "'query' is for a Sent.*, a BertModel, has no prompts",
        ),
        ({"teacher": headless(24)}, "`text_column` needs the teacher's tokenizer as `processing_class`, got None"),
        ({"prompt_name": "query", "text_column": None}, "`prompt_name` 'query' needs a `text_column`"),
        ({"text_column": "text"}, r"'text' must be a column of texts, and `dataset` has the columns \['number', 'se"),
        ({"text_column": "number"}, "'number' must be a column of texts, and `dataset` has a int there"),
        ({"data_collator": DataCollatorForDistillation()}, "'sentence' is read without a `data_collator`"),
        ({"dataset": Dataset.from_dict({"sentence": ["a cat", None]})}, "needs a text in `text_column`, got None"),
    ],
)
def test_what_cannot_be_read_is_refused_at_the_call(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments = {"teacher": asked(tmp_path), "dataset": data(), "text_column": "sentence", "cache_dir": tmp_path}
    with pytest.raises(ValueError, match=message):
        cache_teacher_outputs(**(arguments | given))


@pytest.mark.parametrize("column", ["text", "number"])
def test_a_stream_among_several_sets_is_looked_at_before_it_is_read(column: str, tmp_path: Path) -> None:
    streams = IterableDatasetDict({name: data().to_iterable_dataset() for name in ("train", "test")})
    with pytest.raises(ValueError, match=rf"`text_column` '{column}' must be .*, and dataset\['train'\] has"):
        cached(asked(tmp_path), tmp_path, streams, text_column=column)


# ---- Columns of tokens ----


def run_of(folder: Path, teacher: Any, **given: Any) -> Any:
    own = tokenizer(folder / "student")
    settings = {"model": headless(), "task_weight": 0.0, "teacher": teacher, "processing_class": own}
    return trainer(folder / "run", **(settings | {"train_dataset": tokenized(own, texts(24))} | given))


def test_a_default_prompt_is_told_once_where_columns_of_tokens_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = embedder(tmp_path / "parts", prompts=dict(PROMPTS), default_prompt_name="query")
    caplog.set_level("WARNING")

    def told() -> list[str]:
        found = [each.getMessage() for each in caplog.records if "is asked with" in each.getMessage()]
        caplog.clear()
        return found

    run_of(tmp_path, teacher).train()
    (message,) = told()
    assert "with the prompt 'the big ' by default" in message and "text_column=" in message
    how = {"cache_dir": tmp_path / "cache"}
    made = cache_teacher_outputs(tokenized(tokenizer(tmp_path), texts(24)), teacher, 5, **how)
    assert told() == [message]
    run_of(tmp_path, None, train_dataset=made).train()
    run_of(tmp_path, teacher, train_dataset=made).train()
    cached(teacher, tmp_path)
    teacher.default_prompt_name = "passage"  # which is empty
    run_of(tmp_path, teacher).train()
    assert told() == []


def test_a_default_prompt_that_the_pooling_leaves_out_is_refused_in_columns_of_tokens(tmp_path: Path) -> None:
    teacher = asked(tmp_path, include=False, default_prompt_name="query")
    with pytest.raises(ValueError, match=r"leaves out its prompt 'the big ', .*text_column=.*`default_prompt_name`"):
        run_of(tmp_path, teacher)
    teacher.default_prompt_name = None
    run_of(tmp_path, teacher).train()


def test_the_teachers_own_tokenizer_pads_its_columns(tmp_path: Path) -> None:
    teacher = embedder(tmp_path / "parts")
    own = tokenized(tokenizer(tmp_path), SEVERAL[:16])
    columns = {f"teacher_{name}": own[name][:] for name in own.column_names}
    dataset = tokenized(tokenizer(tmp_path), texts(16), **columns)
    made = cache_teacher_outputs(dataset, teacher, 3, dtype="float32", cache_dir=tmp_path / "cache")
    expected = teacher.encode(SEVERAL[:16], convert_to_tensor=True)
    assert (torch.tensor(made["teacher_embedding"][:]) - expected).abs().max() < 1e-5
    run = run_of(tmp_path, teacher, train_dataset=dataset)
    assert run.data_collator.processors[1] is teacher.tokenizer
    run.train()
    without = DataCollatorForDistillation(tokenizer(tmp_path))
    with pytest.raises(ValueError, match="could not be collated"):
        run_of(tmp_path, teacher, train_dataset=dataset, data_collator=without).train()
