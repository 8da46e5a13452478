"""A model as an ONNX file: its numbers, what it leaves untouched, and what the checks refuse."""

import copy
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertModel, ModernBertConfig, ModernBertForSequenceClassification

from hf_rrd.models.head import HEAD, WITH_EMBEDDING, attach_head, head_of
from hf_rrd.results.export import check_onnx, export_onnx
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


@pytest.fixture(scope="module", params=STUDENTS)
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
