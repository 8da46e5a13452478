"""A teacher's outputs, from a forward or from cached columns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from hf_rrd import cache_teacher_outputs
from hf_rrd.models.layers import LayerPairs
from hf_rrd.models.teacher import Teacher, load_teacher
from tests.builders import CLASSES, Images, tiny_bert, tiny_vit, trainer


def teacher_vit() -> Any:
    return tiny_vit(width=24, seed=1)


@pytest.mark.parametrize("cached", [(), ("embedding",), ("logits",), ("embedding", "logits")])
def test_what_is_cached_is_read_and_the_rest_is_computed(cached: tuple[str, ...]) -> None:
    model, pixels = teacher_vit(), Images(3).pixels
    forwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    teacher = Teacher(model, wants_embedding=True, wants_logits=True)
    forwards.clear()
    columns = {"embedding": torch.ones(3, 24), "logits": torch.ones(3, CLASSES)}
    outputs = teacher.read({"pixel_values": pixels} | {f"teacher_{name}": columns[name] for name in cached})
    with torch.no_grad():
        embedding = model.vit(pixels).last_hidden_state[:, 0]
        computed = {"embedding": embedding, "logits": model.classifier(embedding)}
    for name in columns:
        torch.testing.assert_close(getattr(outputs, name), columns[name] if name in cached else computed[name])
    assert len(forwards) == (0 if len(cached) == 2 else 1) and outputs.layers is None
    teacher.layers = LayerPairs(tiny_vit(), model).teacher
    caught = teacher.read({"pixel_values": pixels} | {f"teacher_{name}": columns[name] for name in cached}).layers
    assert caught is not None and [tuple(each.shape) for each in caught] == [(3, 5, 24)] * 3, "of no cache"


def test_without_a_model_what_is_not_cached_is_none() -> None:
    teacher = Teacher(None, wants_embedding=True, wants_logits=True)
    rows = torch.ones(2, 5)
    assert teacher.read({"teacher_embedding": rows}).logits is None
    assert teacher.read({"teacher_embedding": rows}).embedding is rows
    assert not teacher.answers({"input_ids": rows}) and teacher.answers({"teacher_logits": rows})
    assert teacher.columns == [] and not teacher.is_placed


def test_an_evaluation_whose_loss_lacks_a_term_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("hf_rrd.models.teacher.logger.warning_once", warnings.append)
    data = Images(24)
    rows = datasets.Dataset.from_dict({"pixel_values": data.pixels.numpy(), "labels": data.labels.numpy()})
    cached = cache_teacher_outputs(rows.with_format("torch"), teacher_vit())
    run = trainer(tmp_path, teacher=None, train_dataset=cached, kd_weight=1.0)
    run.train()
    run.evaluate(cached)
    run.predict(Images(8, labels=False))
    assert warnings == []
    for lacking in (cached.remove_columns("teacher_logits"), data):
        metrics = run.evaluate(lacking)
        assert len(warnings) == 3 and warnings[0].startswith("An evaluation has neither the teacher nor all of its ca")
        assert "eval_kd_loss" not in metrics
        warnings.clear()


def test_a_teacher_of_many_trainers_has_one_hook(tmp_path: Path) -> None:
    teacher = teacher_vit()
    for _ in range(3):
        trainer(tmp_path, teacher=teacher)
    assert len(teacher.vit._forward_hooks) == 1


def test_the_banks_dtype_is_that_of_the_teachers_embeddings(tmp_path: Path) -> None:
    for settings, weights, expected in (
        ({}, torch.float32, torch.float32),
        ({}, torch.bfloat16, torch.bfloat16),
        ({"bf16": True}, torch.float32, torch.float32),  # the last normalisation is in float32 under autocast
    ):
        run = trainer(tmp_path, teacher=teacher_vit().to(weights), **settings)
        run.train()
        assert run.distillation.bank.filled.dtype == expected


@pytest.mark.parametrize("named", ["AutoTokenizer", "pipeline", "Trainer", "GenerationConfig", "logging", "Absent"])
def test_of_what_a_config_names_only_a_model_class_is_called(tmp_path: Path, named: str) -> None:
    teacher_vit().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"architectures": [named]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert type(load_teacher(str(tmp_path))) is ViTModel  # of the config's type, by AutoModel
    (tmp_path / "config.json").write_text(json.dumps(settings | {"architectures": ["ViTForImageClassification"]}))
    assert type(load_teacher(str(tmp_path))) is ViTForImageClassification


def test_a_compiled_teacher_gives_what_it_gives_eagerly() -> None:
    model, pixels = teacher_vit(), Images(5).pixels
    eager = Teacher(model, True, True).compute({"pixel_values": pixels})
    compiled = Teacher(model, True, True, compile_kwargs={"backend": "aot_eager"})
    for _ in range(2):
        outputs = compiled.compute({"pixel_values": pixels})
        torch.testing.assert_close(outputs.embedding, eager.embedding, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(outputs.logits, eager.logits, rtol=1e-5, atol=1e-6)
    assert isinstance(compiled.forward, torch._dynamo.OptimizedModule)


class Plain(torch.nn.Module):
    """A module that is none of transformers."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.wrap = torch.nn.Linear(3 * 16 * 16, CLASSES), wrap

    def forward(self, pixel_values: Tensor) -> Any:
        return self.wrap(self.layer(pixel_values.flatten(1)))


@pytest.mark.parametrize("wrap", [lambda logits: logits, lambda logits: {"logits": logits}])
def test_a_plain_module_teaches_by_logits_that_it_returns_as_they_are_or_in_a_dict(wrap: Callable[..., Any]) -> None:
    teacher, pixels = Teacher(Plain(wrap), False, True), Images(3).pixels
    logits = teacher.read({"pixel_values": pixels}).logits
    assert torch.equal(logits, teacher.model.layer(pixels.flatten(1)))


def test_a_teacher_that_returns_a_tuple_is_an_error_that_says_what_to_return(tmp_path: Path) -> None:
    run = trainer(tmp_path, teacher=Plain(lambda logits: (logits,)), relational_weight=0.0, kd_weight=1.0)
    with pytest.raises(ValueError, match="the teacher returns no logits.*let a module of your own return them, or a"):
        run.train()
    teacher = teacher_vit()
    teacher.config.return_dict = False
    with pytest.raises(ValueError, match="returns `last_hidden_state`, got tuple. Set return_dict=True."):
        trainer(tmp_path, teacher=teacher)


def test_an_embedding_of_another_width_than_at_first_is_an_error() -> None:
    widths = iter([24, 24, 20])
    teacher = Teacher(
        teacher_vit(), True, False, lambda outputs, mask: outputs.last_hidden_state[:, 0, : next(widths)]
    )
    assert teacher.read({"pixel_values": Images(3).pixels}).embedding.shape == (3, 24)
    with pytest.raises(ValueError, match=r"the teacher's embedding must be 24 wide, got shape \(3, 20\)"):
        teacher.read({"pixel_values": Images(3).pixels})


def test_a_forward_that_fails_leaves_nothing_on_the_teacher() -> None:
    teacher = Teacher(teacher_vit(), True, False)
    with pytest.raises(ValueError, match="the teacher failed"):
        teacher.read({"pixel_values": torch.zeros(1, 5, 16, 16)})
    assert [name for name in teacher.body.__dict__ if "hf_rrd" in name] == []


@pytest.mark.parametrize("headless", [True, False])
def test_a_vit_mae_sees_the_whole_image_as_a_teacher(headless: bool) -> None:
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTMAEConfig(**settings, image_size=16, patch_size=4, decoder_num_hidden_layers=1)
    model, pixels = (ViTMAEModel if headless else ViTMAEForPreTraining)(config), Images(3).pixels
    teacher = Teacher(model, True, False, "mean")
    first, second = (teacher.read({"pixel_values": pixels}).embedding for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    body = model if headless else model.vit
    assert body(pixels).last_hidden_state.shape[1] == 1 + 16  # a quarter of the patches before


def position_models() -> dict[str, Any]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    return {
        "gpt2": GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
        "bert": tiny_bert(dropout=0.0),
        "roberta": RobertaModel(RobertaConfig(vocab_size=50, **sizes, max_position_embeddings=32)),
        "llama": LlamaModel(LlamaConfig(vocab_size=50, **sizes)),
    }


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta", "llama"])
def test_padding_on_the_left_does_not_shift_a_teachers_embedding(family: str) -> None:
    teacher = Teacher(position_models()[family], True, False)
    pad = 1 if family == "roberta" else 0  # which looks for it among the tokens
    tokens = torch.randint(2, 50, (2, 5), generator=torch.Generator().manual_seed(0))
    padded, mask = torch.nn.functional.pad(tokens, (4, 0), value=pad), torch.tensor([[0] * 4 + [1] * 5] * 2)
    alone = teacher.read({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}).embedding
    left = teacher.read({"input_ids": padded, "attention_mask": mask}).embedding
    torch.testing.assert_close(left, alone, rtol=1e-4, atol=1e-5)


def test_a_teacher_from_inside_peft_teaches_with_its_adapters(tmp_path: Path) -> None:
    lora = peft.LoraConfig(target_modules=["query", "q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    inside = peft.get_peft_model(teacher_vit(), lora).get_base_model()
    added = teacher_vit()
    added.add_adapter(lora)
    for teacher in (inside, added):
        run = trainer(tmp_path, teacher=teacher)
        run.train()
        assert run.state.global_step == 3


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_logits_of_a_text_need_that_text_as_the_teachers_decoder_input(family: str, tmp_path: Path) -> None:
    def model() -> Any:
        if family == "t5":
            return T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1))
        size = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 32}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        return BartForConditionalGeneration(
            BartConfig(vocab_size=20, encoder_layers=1, decoder_layers=1, **heads, **size)
        )

    tokens = torch.tensor([5, 6, 7])
    rows = [{"input_ids": tokens, "labels": tokens} for _ in range(8)]
    said = r"the teacher has to read what the student is to write\. Add `decoder_input_ids`, as DataCollatorForSeq2Seq"
    with pytest.raises(ValueError, match=said):  # by the labels BART makes none: it would read the source
        trainer(tmp_path, model=model(), teacher=model(), train_dataset=rows, kd_weight=1.0, relational_weight=0.0)
    rows = [row | {"decoder_input_ids": tokens} for row in rows]
    run = trainer(tmp_path, model=model(), teacher=model(), train_dataset=rows, kd_weight=1.0, relational_weight=0.0)
    run.train()
    assert run.state.global_step == 3


def test_a_folder_of_adapters_says_how_to_load_it(tmp_path: Path) -> None:
    get_peft_model(tiny_vit(), LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"cannot be loaded\. .* It holds adapters: load it with peft, and pass the m"
    ):
        load_teacher(tmp_path)
