"""The report against plain counts and loops, and what it leaves as it was."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from transformers import BertTokenizer, ViTForImageClassification

from hf_rrd import DistillationReport, cache_teacher_outputs, compare_models, relational_alignment, write_card
from hf_rrd.results.report import REPORT_FILE
from tests.builders import CLASSES, Images, Texts, tiny_bert, tiny_vit, trainer


@pytest.fixture(autouse=True)
def few_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_rrd.results.measure.MOST", 3)


def columns_of(data: Any, **more: Any) -> datasets.Dataset:
    rows = {"input_ids": data.tokens.tolist(), "attention_mask": data.mask.tolist(), "label": data.labels.tolist()}
    return datasets.Dataset.from_dict(rows | more)


def logits_of(model: Any, data: Images) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=data.pixels).logits


def embedding_of(model: Any, data: Images) -> torch.Tensor:
    with torch.no_grad():
        return model.vit(data.pixels).last_hidden_state[:, 0]


def test_quality_and_agreement_are_shares_of_the_examples() -> None:
    data, student, teacher = Images(50), tiny_vit(), tiny_vit(width=24, seed=1)
    facts = compare_models(student, teacher, data, batch_size=7).facts
    found = {
        name: logits_of(model.eval(), data).argmax(1) for name, model in (("student", student), ("teacher", teacher))
    }
    for name, classes in found.items():
        right = sum(int(guess == label) for guess, label in zip(classes, data.labels, strict=True))
        assert facts[name]["accuracy"] == pytest.approx(right / 50)
    same = sum(int(a == b) for a, b in zip(found["student"], found["teacher"], strict=True))
    assert facts["agreement"] == pytest.approx(same / 50)
    probabilities = logits_of(student, data).softmax(1).amax(1)
    error = 0.0
    for low in range(15):
        inside = (probabilities > low / 15) & (probabilities <= (low + 1) / 15)
        if inside.any():
            right = (found["student"] == data.labels)[inside].float().mean()
            error += float(inside.float().mean() * (right - probabilities[inside].mean()).abs())
    assert facts["student"]["calibration_error"] == pytest.approx(error, abs=1e-6)


def test_alignment_is_that_of_the_two_pooled_embeddings() -> None:
    data, student, teacher = Images(50), tiny_vit().eval(), tiny_vit(width=24, seed=1).eval()
    report = compare_models(student, teacher, data, batch_size=7)
    rows = embedding_of(student, data), embedding_of(teacher, data)
    torch.testing.assert_close(report.tensors["student_embedding"], rows[0])
    assert report.facts["alignment"] == pytest.approx(relational_alignment(*rows), abs=1e-5)
    assert report.facts["aligned_examples"] == 50


def test_examples_without_a_label_do_not_count() -> None:
    data = Images(20)
    data.labels[5:] = -100
    facts = compare_models(tiny_vit(), None, data).facts["student"]
    right = (logits_of(tiny_vit().eval(), data).argmax(1) == data.labels)[:5].float().mean()
    assert facts["accuracy"] == pytest.approx(float(right))


def test_without_labels_or_classes_there_is_no_accuracy() -> None:
    regression = tiny_vit(classes=1)
    for student, data in ((tiny_vit(), Images(8, labels=False)), (regression, Images(8)), (tiny_vit().vit, Images(8))):
        facts = compare_models(student, tiny_vit(width=24, seed=1), data).facts
        assert facts["student"].keys() & {"accuracy", "calibration_error"} == set()
        assert facts["alignment"]["cka"] == facts["alignment"]["cka"]


def test_latency_is_of_one_example_and_of_32_or_all() -> None:
    data = Images(40)
    for count, largest in ((40, "32"), (20, "20"), (2, "2")):
        few = torch.utils.data.Subset(data, range(count))
        facts = compare_models(tiny_vit(), tiny_vit(width=24, seed=1), few).facts
        for name in ("student", "teacher"):
            latency = facts[name]["latency_ms"]
            assert list(latency) == ["1", largest]
            assert all(0 < each["median"] <= each["p95"] for each in latency.values())
            expected = 1000 * int(largest) / latency[largest]["median"]
            assert facts[name]["examples_per_second"] == pytest.approx(expected)


def test_cached_outputs_stand_in_for_a_teacher() -> None:
    data, teacher = Images(40), tiny_vit(width=24, seed=1)
    rows = datasets.Dataset.from_dict({"pixel_values": data.pixels.numpy(), "labels": data.labels.numpy()})
    rows = rows.with_format("torch")
    online = compare_models(tiny_vit(), teacher, rows).facts
    cached_rows = cache_teacher_outputs(rows, teacher, dtype="float32")
    cached = compare_models(tiny_vit(), None, cached_rows).facts
    assert cached["alignment"] == pytest.approx(online["alignment"], abs=1e-4)
    assert cached["agreement"] == online["agreement"]
    assert cached["teacher"] == pytest.approx(
        {name: online["teacher"][name] for name in ("accuracy", "calibration_error")}, abs=1e-4
    )


def loaded(folder: Path, model: Any, classes: int = CLASSES) -> Any:
    """A classifier by `from_pretrained` of the files of a model."""
    model.save_pretrained(folder)
    return ViTForImageClassification.from_pretrained(folder, num_labels=classes)


def test_of_a_teacher_whose_head_is_random_there_are_no_figures(tmp_path: Path) -> None:
    data, student = Images(50), tiny_vit()
    teacher = loaded(tmp_path / "headless", tiny_vit(width=24, seed=1).vit)
    report = compare_models(student, teacher, data)
    assert report.facts["teacher"].keys() & {"accuracy", "calibration_error"} == set()
    assert "agreement" not in report.facts and "teacher_logits" in report.tensors
    assert report.facts["alignment"]["cka"] > 0 and report.facts["teacher"]["latency_ms"]
    text = (write_card(tmp_path / "card", student, teacher=teacher, report=report), (tmp_path / "card" / "README.md"))
    assert "same top class" not in text[1].read_text() and "accuracy" in report.facts["student"]
    assert "agreement" not in compare_models(student, teacher, Images(50, labels=False)).facts

    whole = loaded(tmp_path / "whole", tiny_vit(width=24, seed=1))
    assert {"accuracy", "calibration_error"} <= compare_models(student, whole, data).facts["teacher"].keys()
    assert "agreement" in compare_models(student, whole, Images(50, labels=False)).facts, "its head is from its files"


def test_a_head_that_was_trained_since_is_measured(tmp_path: Path) -> None:
    data, teacher = Images(50), loaded(tmp_path, tiny_vit(width=24, seed=1).vit)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in range(40):
        teacher(pixel_values=data.pixels, labels=data.labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    facts = compare_models(tiny_vit(), teacher, data).facts
    assert facts["teacher"]["accuracy"] > 0.6 and "agreement" in facts


def test_a_teacher_reads_its_own_columns() -> None:
    class Both(Texts):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            example = super().__getitem__(index)
            teacher = {"teacher_input_ids": self.tokens[index].flip(0), "teacher_attention_mask": torch.ones(9).long()}
            return example | teacher

    student, teacher = tiny_bert(), tiny_bert(width=24, seed=1).eval()
    data = Both(12)
    report = compare_models(student, teacher, data)
    with torch.no_grad():
        expected = teacher.bert(data.tokens.flip(1)).last_hidden_state.mean(1)
    torch.testing.assert_close(report.tensors["teacher_embedding"], expected)


def test_models_randomness_and_modes_are_as_they_were() -> None:
    student, teacher = tiny_vit(dropout=0.5), tiny_vit(width=24, seed=1)
    student.train()
    student.vit.layernorm.eval()
    teacher.requires_grad_(True)
    before = torch.random.get_rng_state()
    first = compare_models(student, teacher, Images(8)).facts
    assert torch.equal(torch.random.get_rng_state(), before)
    assert student.training and not student.vit.layernorm.training and student.vit.training
    assert all(weight.requires_grad for model in (student, teacher) for weight in model.parameters())
    assert not student.vit._forward_hooks and not teacher.vit._forward_hooks
    again = compare_models(student, teacher, Images(8)).facts
    assert first["alignment"] == again["alignment"], "dropout was off"


def test_a_module_that_is_no_transformers_model_is_compared_by_its_logits() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3 * 16 * 16, CLASSES)

        def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.linear(pixel_values.flatten(1))}

    facts = compare_models(tiny_vit(), Classifier(), Images(8)).facts
    assert "agreement" in facts and "alignment" not in facts
    assert facts["teacher"]["parameters"] == 3 * 16 * 16 * CLASSES + CLASSES


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            columns_of(Texts(4)).remove_columns(["input_ids", "attention_mask"]),
            r"none of the columns that a model reads .* got \['label'\]. T",
        ),
        (
            datasets.DatasetDict(test=columns_of(Texts(4))),
            r"`dataset` must be .* got a DatasetDict\..*\['test'\]",
        ),
        (columns_of(Texts(4)).to_pandas(), "got a DataFrame.*from_pandas"),
        (columns_of(Texts(4)).to_dict(), "got a dict.*from_dict"),
        (Images(0), "`dataset` is empty, got 0 examples"),
        ("a name", "must be a data set of examples, got a str"),
    ],
)
def test_what_is_no_data_set_that_a_model_reads_is_an_error_that_says_what_to_do(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_models(tiny_bert(), tiny_bert(width=24, seed=1), data)


@pytest.mark.parametrize(("data", "came"), [(iter(()), "got \\w*iterator"), (None, "got NoneType")])
def test_nothing_to_measure_on_is_an_error(data: Any, came: str) -> None:
    with pytest.raises(ValueError, match=f"needs a data set with examples and a length.*{came}"):
        compare_models(tiny_vit(), None, data)


def test_the_trainers_report_is_written_as_json_and_is_of_its_evaluation_set(tmp_path: Path) -> None:
    data = Images(40, seed=3)
    run = trainer(tmp_path, eval_dataset=data)
    run.train()
    report = run.report()
    assert report is run._facts.report is not None
    assert json.loads((tmp_path / REPORT_FILE).read_text()) == report.facts
    expected = (logits_of(run.model.eval(), data).argmax(1) == data.labels).float().mean()
    assert report.facts["student"]["accuracy"] == pytest.approx(float(expected))
    run.train()
    assert run._facts.report is None, "it is of another student now"


def test_one_of_several_evaluation_sets_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset={"first": Images(8), "second": Images(9)})
    assert run.report("second").facts["examples"] == 9  # type: ignore[union-attr]
    for dataset, came in ((None, r"several: \['first', 'second'\]"), ("third", "'third'")):
        with pytest.raises(ValueError, match=rf"`dataset` must be .* one of \['first', 'second'\], got {came}\."):
            run.report(dataset)
    with pytest.raises(ValueError, match=r"one data set, got none, and the trainer has no `eval_dataset`\. Pass one"):
        trainer(tmp_path).report()
    with pytest.raises(ValueError, match=r"`dataset` must be one data set, got several: \['test', 'train'\]\."):
        trainer(tmp_path).report({"train": Images(8), "test": Images(8)})


def test_columns_that_no_model_reads_do_not_matter(tmp_path: Path) -> None:
    data = Images(8)
    rows = datasets.Dataset.from_dict(
        {"pixel_values": data.pixels.numpy(), "labels": data.labels.numpy(), "note": ["a text"] * 8}
    ).with_format("torch")
    assert trainer(tmp_path, eval_dataset=rows).report().facts["examples"] == 8  # type: ignore[union-attr]


def test_a_teacher_may_be_given_to_the_report_alone(tmp_path: Path) -> None:
    data, teacher = Images(24), tiny_vit(width=24, seed=1)
    rows = datasets.Dataset.from_dict({"pixel_values": data.pixels.numpy(), "labels": data.labels.numpy()})
    rows = cache_teacher_outputs(rows.with_format("torch"), teacher)
    run = trainer(tmp_path, teacher=None, train_dataset=rows, eval_dataset=rows)
    assert run.report().facts["teacher"].keys() == {"accuracy", "calibration_error"}  # type: ignore[union-attr]
    facts = run.report(teacher=teacher).facts  # type: ignore[union-attr]
    assert {"parameters", "latency_ms", "accuracy"} <= facts["teacher"].keys()


def test_a_report_that_lacks_the_teacher_of_the_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("hf_rrd.results.report.logger.warning", warnings.append)
    data, teacher = Images(24), tiny_vit(width=24, seed=1)
    rows = datasets.Dataset.from_dict({"pixel_values": data.pixels.numpy()}).with_format("torch")
    run = trainer(tmp_path, teacher=None, task_weight=0.0, train_dataset=cache_teacher_outputs(rows, teacher))
    run.report(run.train_dataset)
    run.report(data, teacher=teacher)
    trainer(tmp_path, teacher=None, relational_weight=0.0).report(data)
    assert warnings == []
    run.report(data)
    assert (
        len(warnings) == 1 and warnings[0].startswith("The report has no teacher: ") and "teacher=..." in warnings[0]
    )


def test_a_teacher_of_other_classes_has_no_accuracy() -> None:
    named = tiny_vit(width=24, seed=1)
    named.config.id2label = {0: "d", 1: "c", 2: "b", 3: "e"}
    student = tiny_vit()
    for teacher in (tiny_vit(width=24, classes=7), named):
        student.config.id2label = {0: "a", 1: "b", 2: "c", 3: "d"}
        facts = compare_models(student, teacher, Images(20)).facts
        assert "accuracy" in facts["student"] and "alignment" in facts
        assert "accuracy" not in facts["teacher"] and "agreement" not in facts
    named.config.id2label = dict(student.config.id2label)
    assert {"accuracy"} <= compare_models(student, named, Images(20)).facts["teacher"].keys()


@pytest.mark.parametrize("cached", [False, True])
def test_a_teachers_classes_are_read_in_the_students_order(cached: bool, tmp_path: Path) -> None:
    student, teacher = tiny_vit(seed=1), tiny_vit(seed=1)  # the same, but for the order of the classes
    order = [2, 0, 3, 1]
    student.config.id2label = {0: "a", 1: "b", 2: "c", 3: "d"}
    teacher.config.id2label = {place: "ABCD"[number] for number, place in enumerate(order)}
    with torch.no_grad():
        teacher.classifier.weight[order] = student.classifier.weight.clone()
    columns = {name: [example[name].tolist() for example in Images(20)] for name in ("pixel_values", "labels")}
    data = datasets.Dataset.from_dict(columns)
    if cached:
        data = cache_teacher_outputs(data, teacher, cache_dir=tmp_path, dtype="float32")
    report = compare_models(student, None if cached else teacher, data)
    assert report.facts["agreement"] == 1.0
    assert report.facts["teacher"]["accuracy"] == report.facts["student"]["accuracy"]
    torch.testing.assert_close(report.tensors["teacher_logits"], report.tensors["student_logits"])


def test_labels_below_zero_are_unknown_and_outputs_that_are_not_finite_are_no_quality() -> None:
    data = Images(20)
    data.labels[:] = -1
    assert "accuracy" not in compare_models(tiny_vit(), None, data).facts["student"]
    broken = tiny_vit()
    broken.classifier.weight.data[:] = torch.nan
    facts = compare_models(broken, tiny_vit(width=24, seed=1), Images(20)).facts
    assert "accuracy" not in facts["student"] and "latency_ms" in facts["student"] and "alignment" in facts


def test_several_labels_at_once_have_no_top_class() -> None:
    student = tiny_vit()
    student.config.problem_type = "multi_label_classification"
    assert "agreement" not in compare_models(student, tiny_vit(width=24, seed=1), Images(20, labels=False)).facts
    several = [{"pixel_values": pixels, "labels": torch.tensor([0.0, 1.0, 0.0, 1.0])} for pixels in Images(20).pixels]
    assert "agreement" not in compare_models(tiny_vit(), tiny_vit(width=24, seed=1), several).facts


def test_of_few_examples_all_are_neighbors_and_that_is_not_told() -> None:
    for count, told in ((11, False), (12, True)):
        alignment = compare_models(tiny_vit(), tiny_vit(width=24, seed=1), Images(count)).facts["alignment"]
        assert ("neighbor_overlap" in alignment) == told


def test_a_stream_of_datasets_is_refused_by_name(tmp_path: Path) -> None:
    stream = datasets.Dataset.from_dict({"pixel_values": Images(2).pixels, "labels": [1, 2]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="needs a data set with examples and a length, got IterableDataset"):
        trainer(tmp_path).report(stream)


def test_without_rich_a_table_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.table", None)
    with pytest.raises(ImportError, match=r"needs rich: pip install 'hf_rrd\[demo\]'"):
        DistillationReport({"examples": 1, "environment": {}}).table()


def test_a_report_prints_its_table() -> None:
    report = compare_models(tiny_vit(), tiny_vit(width=24, seed=1), Images(40))
    title, header, *rows = str(report).splitlines()
    assert title.startswith("40 examples on CPU (") and header.split() == "teacher student student / teacher".split()
    assert rows[0].split() == ["parameters", "14,668", "7,732", "0.527"]
    ends = [row.rindex(end) + len(end) for row, end in zip(rows, ("7,732", "kB", "32"), strict=False)]
    assert ends == [header.index("student") + len("student")] * 2 + [len(rows[2])], "numbers stand under each other"
    assert len(rows) == report.table().row_count


def test_texts_beside_their_tokens_do_not_matter_without_a_trainer_either() -> None:
    texts = Texts(12)
    models = tiny_bert(), tiny_bert(width=24, seed=1)
    plain, beside = columns_of(texts), columns_of(texts, idx=[*range(12)], words=[["a", "text"]] * 12)
    reports = [compare_models(*models, rows) for rows in (plain, beside, beside.with_transform(dict))]
    for report in reports[1:]:
        assert report.facts["alignment"] == reports[0].facts["alignment"]
        assert report.facts["student"]["accuracy"] == reports[0].facts["student"]["accuracy"]


def test_tokens_of_unequal_length_are_padded_by_the_processing_classes(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(45))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    texts = Texts(12)
    lengths = texts.mask.sum(1).tolist()
    ragged = {"input_ids": [row[:length] for row, length in zip(texts.tokens.tolist(), lengths, strict=True)]}
    ragged |= {f"teacher_{name}": value for name, value in ragged.items()}
    rows = datasets.Dataset.from_dict(ragged | {"label": texts.labels.tolist()})
    models = tiny_bert(), tiny_bert(width=24, seed=1)
    report = compare_models(*models, rows, processing_class=tokenizer, teacher_processing_class=tokenizer)
    assert report.facts["alignment"] == pytest.approx(compare_models(*models, texts).facts["alignment"], abs=1e-5)
    with pytest.raises(ValueError, match="^making a batch failed on `input_ids`"):  # of no trainer's `train_dataset`
        compare_models(*models, rows)
    with pytest.raises(ValueError, match="`data_collator` makes the batches, and a processing class beside it"):
        compare_models(*models, texts, data_collator=list, processing_class=tokenizer)


def test_models_are_named_by_their_folders_wherever_one_is_asked_for(tmp_path: Path) -> None:
    student, teacher, data = tiny_vit(), tiny_vit(width=24, seed=1), Images(20)
    student.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    expected = compare_models(student, teacher, data).facts
    named = compare_models(str(tmp_path / "student"), tmp_path / "teacher", data).facts
    run = trainer(tmp_path, teacher=None, relational_weight=0.0, eval_dataset=data)
    reported = run.report(teacher=str(tmp_path / "teacher")).facts  # type: ignore[union-attr]
    for facts in (named, reported):
        assert (facts["alignment"], facts["agreement"]) == (expected["alignment"], expected["agreement"])
        assert facts["teacher"]["class"] == "ViTForImageClassification"
    with pytest.raises(ValueError, match="`student` '.*nowhere' cannot be loaded"):
        compare_models(str(tmp_path / "nowhere"), None, data)
    with pytest.raises(TypeError, match="`teacher` must be a model, a Hub name or a folder, got a int"):
        run.report(teacher=3)


def test_report_and_evaluation_align_the_same_examples(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=Images(50, seed=3), alignment_examples=9)
    metrics, facts = run.evaluate(), run.report().facts  # type: ignore[union-attr]
    assert facts["aligned_examples"] == 9
    for name, value in facts["alignment"].items():
        assert metrics[f"eval_alignment_{name}"] == pytest.approx(value, abs=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs hf_rrd[onnx]")
def test_a_file_of_the_student_is_measured_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers.exporters")
    from hf_rrd.results.export import export_onnx

    data, student, path = Images(40), tiny_vit(), tmp_path / "student.onnx"
    export_onnx(student, path, {"pixel_values": data.pixels[:2]})
    report = compare_models(student, tiny_vit(width=24, seed=1), data, onnx=path)
    facts = report.facts["onnx"]
    assert facts["bytes"] == path.stat().st_size
    assert facts["accuracy"] == report.facts["student"]["accuracy"] and facts["agreement"] == 1
    assert list(facts["latency_ms"]) == ["1", "32"]
    assert "flops" not in facts and "parameters" not in facts
    torch.testing.assert_close(report.tensors["onnx_logits"], report.tensors["student_logits"], atol=1e-5, rtol=0)
    assert "ONNX file: latency, batch of 32, p95" in repr(report)
    alone = compare_models(student, None, data, onnx=path).facts
    assert alone["onnx"]["agreement"] == 1 and "agreement" not in alone and "teacher" not in alone
    path.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"student\.onnx cannot be loaded as an ONNX file"):
        compare_models(student, None, data, onnx=path)
