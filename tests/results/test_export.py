"""A model as an ONNX file: its numbers, what it leaves untouched, and what the checks refuse."""

import copy
import importlib.util
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertForTokenClassification, BertModel, ModernBertConfig, ModernBertForSequenceClassification

from hf_rrd.models.head import HEAD, WITH_EMBEDDING, attach_head, head_of
from hf_rrd.results import export
from hf_rrd.results.export import OnnxModel, check_onnx, check_quantized, export_onnx
from tests.builders import Images, Texts, tiny_bert, tiny_vit, trainer

PACKAGES = ("transformers.exporters", "onnx", "onnxruntime", "onnxscript")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]

needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install -U 'hf_rrd[onnx]'")


def images(count: int, seed: int = 1) -> dict[str, Tensor]:
    return {"pixel_values": Images(count, seed).pixels}


def texts(count: int, length: int = 9, seed: int = 1) -> dict[str, Tensor]:
    """Texts of so many tokens, each second one padded to half."""
    tokens = torch.randint(2, 50, (count, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    mask[1::2, length // 2 + 1 :] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def headless() -> Any:
    return BertModel(tiny_bert(dropout=0.1).config)


STUDENTS: dict[str, tuple[Callable[[], Any], Callable[[int], dict[str, Tensor]]]] = {
    "vit": (lambda: tiny_vit(dropout=0.1), images),
    "bert": (lambda: tiny_bert(dropout=0.1), texts),
    "headless": (headless, texts),
}


def run_alone(path: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a file by name, from ONNX Runtime alone."""
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return {output.name: torch.from_numpy(value) for output, value in zip(session.get_outputs(), values, strict=True)}


QUICK = "vit"  # of the fast tests: each export takes seconds


@pytest.fixture(
    scope="module", params=[pytest.param(each, marks=[] if each == QUICK else pytest.mark.slow) for each in STUDENTS]
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A student with a head, in training mode, as it was, its file, the difference and inputs of another seed."""
    if MISSING:
        pytest.skip(f"needs {', '.join(MISSING)}: pip install -U 'hf_rrd[onnx]'")
    build, batch = STUDENTS[request.param]
    student = build()
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(10 if weight.dim() > 1 else 1)  # or untrained ones give all examples almost the same
    attach_head(student, dim=6)
    student.train()
    before = copy.deepcopy(student)
    path = tmp_path_factory.mktemp("onnx") / "folder" / "student.onnx"
    random_state = torch.get_rng_state()
    difference = export_onnx(student, path, batch(3))
    assert torch.equal(torch.get_rng_state(), random_state)
    return student, before, path, difference, batch


def test_the_file_gives_the_outputs_of_the_model_for_other_numbers_of_examples(exported: Any) -> None:
    _, before, path, difference, batch = exported
    assert 0 <= difference < 1e-5
    before.eval()
    for count in (1, 2, 7):
        inputs = batch(count, seed=2)
        with torch.no_grad():
            expected = before(**inputs)
        found = run_alone(path, inputs)
        assert list(found) == list(expected)
        assert count == 1 or expected[0].std(dim=0).max() > 0.1
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("exported", ["bert", "headless"], indirect=True)
def test_a_text_may_have_any_length_that_the_model_takes(exported: Any) -> None:
    _, before, path, _, _ = exported
    before.eval()
    for count, length in ((1, 1), (5, 4), (2, 32)):
        inputs = texts(count, length)
        with torch.no_grad():
            expected = before(**inputs)[0]
        torch.testing.assert_close(next(iter(run_alone(path, inputs).values())), expected, atol=1e-5, rtol=0)


def test_the_model_stays_as_it_was(exported: Any) -> None:
    student, before, _, _, batch = exported
    assert student.training and all(module.training for module in student.modules())
    assert student.config.to_dict() == before.config.to_dict()
    assert vars(student).keys() == vars(before).keys()
    for (name, weight), (same, expected) in zip(
        student.state_dict().items(), before.state_dict().items(), strict=True
    ):
        assert name == same and torch.equal(weight, expected)
    assert head_of(student) is not None
    student.eval()
    assert student(**batch(2), **{WITH_EMBEDDING: True}).relational_embedding.shape == (2, 6)
    student.train()


def test_the_head_is_not_in_the_file(exported: Any) -> None:
    _, _, path, _, _ = exported
    graph = pytest.importorskip("onnx").load(str(path)).graph
    assert [tensor.name for tensor in graph.initializer if HEAD in tensor.name] == []
    assert [output.name for output in graph.output if "relational" in output.name] == []


def test_nothing_but_the_file_is_left_in_the_folder(exported: Any) -> None:
    path = exported[2]
    assert [file.name for file in path.parent.iterdir()] == ["student.onnx"]


def test_the_file_runs_where_neither_torch_nor_hf_rrd_is_loaded(exported: Any) -> None:
    _, _, path, _, batch = exported
    feeds = {name: (list(value.shape), str(value.numpy().dtype)) for name, value in batch(2).items()}
    code = (
        "import sys, numpy, onnxruntime\n"
        f"session = onnxruntime.InferenceSession({str(path)!r}, providers=['CPUExecutionProvider'])\n"
        f"feeds = {{name: numpy.ones(shape, dtype) for name, (shape, dtype) in {feeds!r}.items()}}\n"
        "print(session.run(None, feeds)[0].shape[0], {'torch', 'transformers', 'hf_rrd'} & set(sys.modules))\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split("\n")[0] == "2 set()"


def test_a_file_fails_the_check_once_the_weights_have_changed(exported: Any) -> None:
    _, before, path, _, batch = exported
    changed = copy.deepcopy(before)
    assert check_onnx(path, changed, batch(3)) < 1e-5
    with torch.no_grad():
        for name, weight in changed.named_parameters():
            if name.endswith("bias"):
                weight.add_(0.25)
    with pytest.raises(ValueError, match=r"must give what \w+ gives to 0\.0001, got differences up to \d"):
        check_onnx(path, changed, batch(3))
    assert check_onnx(path, changed, batch(3), atol=100) > 0.1


def test_weights_that_are_no_numbers_fail_the_check(exported: Any) -> None:
    _, before, path, _, batch = exported
    changed = copy.deepcopy(before)
    with torch.no_grad():
        next(changed.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="got differences up to nan"):
        check_onnx(path, changed, batch(3))


@needs_onnx
def test_what_is_no_onnx_file_fails_the_check(tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    path.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="the ONNX file does not run on `pixel_values`"):
        check_onnx(path, tiny_vit(), images(2))


@needs_onnx
def test_a_wrong_file_leaves_the_old_one_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.exporters import OnnxExporter

    export = OnnxExporter.export

    def wrong(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.classifier.bias.add_(1)
        return export(self, broken, *args, **kwargs)

    monkeypatch.setattr(OnnxExporter, "export", wrong)
    path = tmp_path / "student.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="got differences up to 1"):
        export_onnx(tiny_vit(), path, images(2))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@needs_onnx
@pytest.mark.slow
def test_a_length_that_the_exporter_fixed_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.exporters import OnnxExporter

    export = OnnxExporter.export

    def fixed(self: Any, model: Any, inputs: Any, config: Any) -> Any:
        config.dynamic_shapes = {name: {0: torch.export.Dim.AUTO} for name in inputs}
        return export(self, model, inputs, config)

    monkeypatch.setattr(OnnxExporter, "export", fixed)
    with pytest.raises(ValueError, match=r"does not run on `input_ids` \(1, 8\) int64"):
        export_onnx(tiny_bert(), tmp_path / "student.onnx", texts(2))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def quantized(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A student in eval mode, its file rounded to int8 and 40 inputs."""
    _, before, path, _, batch = exported
    rounded = shutil.copy(path, tmp_path_factory.mktemp("int8") / "student.onnx")
    handlers = list(logging.root.handlers)
    export._quantize(rounded)
    assert logging.root.handlers == handlers  # a bare logging.warning of onnxruntime would add one
    return copy.deepcopy(before).eval(), rounded, batch(40)


def test_what_int8_lost_is_counted_on_the_inputs(quantized: Any) -> None:
    student, path, inputs = quantized
    figures = check_quantized(path, student, inputs, min_agreement=0.5)
    found = run_alone(path, inputs)
    with torch.no_grad():
        expected = student(**inputs)
    assert figures.pop("difference") == pytest.approx(max((found[k] - expected[k]).abs().max().item() for k in found))
    if "logits" in expected:
        pairs = list(zip(found["logits"], expected.logits, strict=True))
        same = sum(int(one.argmax() == other.argmax()) for one, other in pairs) / 40
        largest = max(float((one.softmax(0) - other.softmax(0)).abs().max()) for one, other in pairs)
        assert figures == pytest.approx({"agreement": same, "probability_difference": largest}, abs=1e-6)
        assert same >= 0.9 and 0 < largest < 0.2
    else:
        means = [
            [rows[mask == 1].mean(0) for rows, mask in zip(states, inputs["attention_mask"], strict=True)]
            for states in (found["last_hidden_state"], expected.last_hidden_state)
        ]
        cosines = [float(torch.cosine_similarity(one, other, dim=0)) for one, other in zip(*means, strict=True)]
        assert figures == pytest.approx({"cosine": min(cosines)}, abs=1e-5)
        assert 0.98 < min(cosines) < 1


def test_weights_and_words_are_integers_of_8_bits_and_those_of_products_have_7(quantized: Any) -> None:
    onnx = pytest.importorskip("onnx")
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(str(quantized[1])).graph.initializer}
    floats = [
        name for name, value in weights.items() if value.dtype.kind == "f" and value.ndim > 1 and value.size > 99
    ]
    assert [name for name in floats if "cls_token" not in name and "position_embeddings" not in name] == []
    integers = {name: value for name, value in weights.items() if value.dtype.name == "int8" and value.ndim == 2}
    assert len(integers) >= 12
    for name, value in integers.items():
        assert abs(value.astype(int)).max() <= (128 if "embeddings" in name else 64)


def test_int8_that_differs_too_much_is_refused_with_its_figures(quantized: Any) -> None:
    student, path, inputs = quantized
    with pytest.raises(
        ValueError, match=r"be like \w+: (agreement|cosine) of 1\.01 or more, got difference \d.*, \1 "
    ):
        check_quantized(path, student, inputs, min_agreement=1.01)
    student = copy.deepcopy(student)
    with torch.no_grad():
        for weight in student.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)))
    with pytest.raises(ValueError, match=r"of 0\.95 or more, got difference \d"):
        check_quantized(path, student, inputs)


@needs_onnx
@pytest.mark.slow
def test_an_export_in_int8_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, student, inputs = tmp_path / "student.onnx", tiny_bert(layers=1), texts(40)
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"agreement of 1\.01 or more, got difference \S+, agreement \S+, prob"):
        export_onnx(student, path, inputs, quantize="int8", min_agreement=1.01)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    figures = export_onnx(student, path, inputs, quantize="int8", min_agreement=0)
    assert figures == check_quantized(path, student, inputs, min_agreement=0)
    assert list(tmp_path.iterdir()) == [path]


def given_outputs(monkeypatch: pytest.MonkeyPatch, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    monkeypatch.setattr(export, "_outputs", lambda *_: (found, wanted))


def test_tokens_that_are_padding_are_no_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = torch.zeros(2, 9, 3)
    wanted[..., 0] = 2.0
    found = wanted.clone()
    found[1, 6:] = torch.tensor([0.0, 9.0, 0.0])  # the second text ends there
    given_outputs(monkeypatch, {"logits": found}, {"logits": wanted})
    tagger = BertForTokenClassification(tiny_bert(layers=1).config)
    assert check_quantized("file", tagger, texts(2)) == {
        "difference": 9.0,
        "agreement": 1.0,
        "probability_difference": 0,
    }
    found[0, 0] = torch.tensor([0.0, 1.0, 0.0])
    assert check_quantized("file", tagger, texts(2), 0.9)["agreement"] == pytest.approx(13 / 14)


def test_several_labels_at_once_are_predictions_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny_bert(layers=1)
    student.config.problem_type = "multi_label_classification"
    wanted = torch.tensor([[3.0, 1.0, -1.0]]).repeat(2, 1)
    given_outputs(monkeypatch, {"logits": wanted * torch.tensor([1.0, -1.0, 1.0])}, {"logits": wanted})
    figures = check_quantized("file", student, texts(2), 0.5)
    assert figures["agreement"] == pytest.approx(2 / 3)
    assert figures["probability_difference"] == pytest.approx(0.7310586 - 0.2689414, abs=1e-6)


def test_scores_are_compared_as_one_row_and_no_number_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    student, wanted = tiny_bert(layers=1, classes=1), torch.tensor([[1.0], [2.0]])
    given_outputs(monkeypatch, {"logits": torch.tensor([[2.0], [1.0]])}, {"logits": wanted})
    assert check_quantized("file", student, texts(2), 0.5)["cosine"] == pytest.approx(4 / 5)
    given_outputs(monkeypatch, {"logits": wanted * torch.nan}, {"logits": wanted})
    with pytest.raises(ValueError, match="got difference nan, cosine nan"):
        check_quantized("file", student, texts(2), 0.5)


@needs_onnx
def test_another_kind_of_numbers_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`quantize` must be None or 'int8', got 'int4'"):
        export_onnx(tiny_bert(), tmp_path / "student.onnx", texts(2), quantize="int4")  # type: ignore[call-overload]


@needs_onnx
def test_a_file_as_a_module_takes_what_it_needs_of_a_batch(exported: Any) -> None:
    _, _, path, _, batch = exported
    found = OnnxModel(path)(**batch(2), other=torch.ones(2))
    for name, value in run_alone(path, batch(2)).items():
        assert torch.equal(found[name], value)


@pytest.mark.slow
@needs_onnx
def test_a_student_trained_in_bf16_is_exported_from_its_trainer_in_float32(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=tiny_bert(), teacher=tiny_bert(24, seed=1), train_dataset=Texts(), bf16=True)
    run.train()
    forward = run.model.forward
    export_onnx(run.model, tmp_path / "student.onnx", texts(1))
    assert run.model.forward == forward  # still with the trainer's autocast around it
    run.save_model(str(tmp_path / "saved"))
    loaded = type(run.model).from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        expected = loaded(**texts(4)).logits
    torch.testing.assert_close(run_alone(tmp_path / "student.onnx", texts(4))["logits"], expected, atol=1e-6, rtol=0)


@pytest.mark.slow
@needs_onnx
def test_a_text_of_one_token_in_its_padding_does_for_a_model_that_pools_by_the_mean(tmp_path: Path) -> None:
    settings = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "local_attention": 4}
    tokens = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    config = ModernBertConfig(vocab_size=50, hidden_size=16, classifier_pooling="mean", **settings, **tokens)
    inputs = texts(2)
    inputs["attention_mask"][:, 1:] = 0
    assert export_onnx(ModernBertForSequenceClassification(config), tmp_path / "student.onnx", inputs) < 1e-5


@pytest.mark.slow
@needs_onnx
def test_weights_in_bf16_and_kernels_of_attention_are_replaced_in_the_file_alone(tmp_path: Path) -> None:
    student = tiny_bert().to(torch.bfloat16)
    student.config._attn_implementation = "flex_attention"
    assert export_onnx(student, tmp_path / "student.onnx", texts(2)) < 1e-5
    assert student.dtype == torch.bfloat16
    assert student.config._attn_implementation == "flex_attention"


@needs_onnx
@pytest.mark.parametrize(
    ("inputs", "came"),
    [
        ({}, "no columns at all"),
        (["a text"], "a list in place of a dict of columns"),
        ({"input_ids": [[1, 2]]}, r"`input_ids` \(list\)"),
        ({"attention_mask": torch.ones(2, 9)}, r"`attention_mask` \(2, 9\)"),
        (texts(2) | {"labels": torch.zeros(2)}, r"`labels` \(2,\)"),
        (texts(2, length=1), r"`input_ids` \(2, 1\)"),
        (texts(0), r"`input_ids` \(0, 9\)"),
        (texts(2) | {"token_type_ids": torch.zeros(3, 9)}, r"`token_type_ids` \(3, 9\)"),
        (texts(2) | {"return_dict": True}, r"`return_dict` \(bool\)"),
    ],
)
def test_inputs_that_do_not_suit_are_named(tmp_path: Path, inputs: dict[str, Any], came: str) -> None:
    with pytest.raises(ValueError, match=rf"among them `input_ids`.*got .*{came}"):
        export_onnx(tiny_bert(), tmp_path / "student.onnx", inputs)
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_a_saved_student_is_exported_by_its_folder(tmp_path: Path) -> None:
    tiny_bert(layers=1).save_pretrained(tmp_path / "student")
    assert export_onnx(str(tmp_path / "student"), tmp_path / "student.onnx", texts(2)) < 1e-5
    with pytest.raises(ValueError, match="`model` '.*nowhere' cannot be loaded"):
        export_onnx(tmp_path / "nowhere", tmp_path / "student.onnx", texts(2))


@needs_onnx
def test_what_is_no_transformers_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be a PreTrainedModel, got Linear"):
        export_onnx(torch.nn.Linear(2, 2), tmp_path / "student.onnx", images(2))  # type: ignore[arg-type]


@needs_onnx
def test_a_model_that_does_not_fit_in_one_file_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        student = tiny_bert(width=8192, layers=4)
    with pytest.raises(ValueError, match=r"less than 2 GiB of weights in float32, got 8\.3 in BertFor"):
        export_onnx(student, tmp_path / "student.onnx", texts(2))


@pytest.mark.parametrize("missing", PACKAGES)
def test_a_missing_package_is_named_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else found(name, *rest)
    )
    with pytest.raises(ImportError, match=rf"transformers 5\.13 or newer.*Missing: .*{missing}.*hf_rrd\[onnx\]"):
        export_onnx(tiny_bert(), tmp_path / "student.onnx", texts(2))
