"""The card of a run: what is in its files, and that they say the facts of the run and nothing else."""

import json
import os
import re
import socket
import sys
import unicodedata
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ResNetConfig,
    ResNetModel,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from hf_rrd import (
    RelationalDistillationTrainer,
    cache_teacher_outputs,
    compare_models,
    embed,
    student_from_teacher,
    write_card,
)
from hf_rrd.results.card import FACTS_FILE, TEMPLATE, render_card
from hf_rrd.results.facts import CardFacts
from hf_rrd.results.pictures import PICTURES, place_of
from tests.builders import Images, Texts, tiny_bert, tiny_gpt2, tiny_vit, trainer
from tests.loopback_hub import header_errors
from tests.results.runs import card_of, facts_of, finished, numbers_shown, unsaid, usage_of
from tests.results.test_sentence_transformers import run_of as embedding_run
from tests.sentences import embedder, headless, texts, tokenized, tokenizer

LIBRARY = "`hf_rrd`"
DATASET = {"dataset_tags": "org/images", "dataset": "Images"}


def test_the_header_has_what_the_hub_reads(run: RelationalDistillationTrainer) -> None:
    data = card_of(run, license="apache-2.0", language="en", tags="digits", model_name="a-student", **DATASET).data
    assert (data.license, data.language, data.library_name) == ("apache-2.0", "en", "transformers")
    assert data.pipeline_tag == "image-classification"
    ours = {"hf-rrd", "knowledge-distillation", "relational-representation-distillation", "image-classification"}
    assert ours | {"digits"} <= set(data.tags)
    assert data.datasets == ["org/images"] and data.metrics == ["accuracy"]
    (result,) = data.eval_results
    logged = next(entry["test_accuracy"] for entry in run.state.log_history if "test_accuracy" in entry)
    assert (data.model_name, result.task_type) == ("a-student", "image-classification")
    assert (result.dataset_type, result.dataset_name, result.dataset_split) == ("org/images", "org/images", "test")
    assert (result.metric_type, result.metric_value) == ("accuracy", logged)
    assert "base_model" not in data.to_dict(), "neither student nor teacher has a name on the Hub"


def test_only_the_names_of_models_on_the_hub_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(name: str, file: str) -> str | None:
        return file if name in ("org/teacher", "org/small") else None

    monkeypatch.setattr("hf_rrd.results.facts.try_to_load_from_cache", cached)
    teacher, student = tiny_vit(width=24, seed=1), tiny_vit()
    teacher.config._name_or_path, teacher.config._commit_hash = "org/teacher", "0123456789abcdef0123"
    run = trainer(tmp_path, teacher=teacher, model=student)
    card = card_of(run)
    assert card.data.base_model == "org/teacher" and card.data.distilled_from == "org/teacher"
    assert "[org/teacher](https://huggingface.co/org/teacher) at revision `0123456789ab`" in card.text
    student.config._name_or_path = "org/small"
    card = card_of(run)
    assert card.data.base_model == "org/small"
    assert "It started from [org/small](https://huggingface.co/org/small)." in card.text, "its commit is not known"
    assert card_of(run, finetuned_from="org/other").data.base_model == "org/other"
    for name in (str(tmp_path), "runs/moved_since", ""):
        teacher.config._name_or_path = student.config._name_or_path = name
        data = card_of(run, finetuned_from="/home/someone/model").data.to_dict()
        assert "base_model" not in data and "distilled_from" not in data


def test_a_student_of_its_teachers_layers_says_so(tmp_path: Path) -> None:
    teacher = tiny_vit(width=24, layers=3)
    card = card_of(trainer(tmp_path, teacher=teacher, model=student_from_teacher(teacher, num_hidden_layers=2)))
    assert "It started from layers 0, 2 of the teacher" in card.text
    card = card_of(trainer(tmp_path, teacher=teacher, model=student_from_teacher(teacher, 2, hidden_size=8)))
    assert "started from" not in card.text, "nothing was copied"


def test_a_student_of_its_teachers_words_says_so_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_rrd.results.facts.try_to_load_from_cache", lambda name, *_, **__: str(tmp_path))
    teacher = tiny_bert(width=24)
    teacher.config._name_or_path = "org/teacher"  # which the student's config names, too
    student = student_from_teacher(teacher, 1, hidden_size=8, num_attention_heads=1)
    run = trainer(tmp_path, teacher=teacher, model=student, train_dataset=Texts(24))
    card = card_of(run)
    assert "\nIts embeddings of tokens started from the principal components of the teacher's.\n" in card.text
    assert "It started from" not in card.text
    student.initialization = "a word of the user's own"
    assert "Its embeddings of tokens" not in card_of(run).text


def test_no_path_no_token_and_no_home_is_on_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, secret = tmp_path / "student", "hf_" + "s" * 30
    teacher = tmp_path / "teacher"
    tiny_vit(width=24, seed=1).save_pretrained(teacher)
    monkeypatch.setattr(sys, "argv", [__file__, "--output_dir", str(folder), "--hub_token", secret, "--seed", "3"])
    run = finished(
        folder,
        teacher=str(teacher),
        teacher_model_init_kwargs={"token": secret, "proxies": {"https": f"http://me:{secret}@proxy"}},
        hub_token=secret,
        eval_dataset=Images(8),
    )
    run.create_model_card()
    for name in ("README.md", FACTS_FILE, "distillation_report.json"):
        text = (folder / name).read_text()
        assert not any(
            hidden in text for hidden in (str(tmp_path), secret, os.path.expanduser("~"), socket.gethostname())
        )
    assert "command" not in facts_of(run) and "--seed" not in (folder / "README.md").read_text()


def test_an_adapter_is_a_card_of_peft(tmp_path: Path) -> None:
    student = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS"))
    run = trainer(tmp_path, model=student, teacher=tiny_bert(width=24), train_dataset=Texts())
    card = card_of(run, finetuned_from="org/base")
    assert card.data.library_name == "peft" and card.data.base_model == "org/base"
    assert ", num_labels=4)" in usage_of(card), "the base has classes of its own"
    assert "peft" in facts_of(run)["versions"]


def test_nothing_is_fetched_for_a_card(run: RelationalDistillationTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    card_of(run, **DATASET)


def test_without_matplotlib_a_card_has_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(tmp_path, report=False)
    assert "![Loss terms over the steps](figures/losses.png)" in card_of(run).text
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.setitem(sys.modules, module, None)
    assert "![" not in card_of(run).text
    assert not (tmp_path / "figures" / "losses.png").exists(), "a picture of an earlier card is not left"


def test_a_student_without_a_teacher_is_not_called_distilled(tmp_path: Path) -> None:
    card = card_of(trainer(tmp_path, relational_weight=0.0, teacher=None))
    assert "distilled from" not in card.text and "without a teacher" in card.text


def test_a_picture_that_fails_costs_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("hf_rrd.results.pictures.plot_losses", fail)
    run = trainer(tmp_path)
    run.train()
    assert "![" not in card_of(run).text


def test_a_loop_of_ones_own_writes_a_card_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_rrd.results.measure.MOST", 3)
    student, teacher, data = tiny_vit(), tiny_vit(width=24, seed=1), Images(40)
    report = compare_models(student, teacher, data)
    facts = write_card(
        tmp_path / "mine",
        student,
        teacher=teacher,
        teacher_name="a bigger ViT",
        dataset="org/images",
        settings={"task_weight": 1.0, "relational_weight": 10.0, "bank_size": 4096},
        training={"epochs": 2, "seed": 7},
        log_history=[{"loss": 2.0, "step": 1}, {"loss": 1.0, "step": 9}],
        report=report,
        license="mit",
    )
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.eval_results[0].metric_value == report.facts["student"]["accuracy"]
    assert (card.data.model_name, card.data.datasets, card.data.license) == ("mine", ["org/images"], "mit")
    for said in (
        "distilled from a bigger ViT",
        "a bank of 4,096 of",
        "One run, with seed 7",
        "| `loss` | 1 |",
    ):
        assert said in card.text
    assert facts.pictures == [*PICTURES]
    assert all(
        f"({place_of(name)})" in card.text and (tmp_path / "mine" / place_of(name)).is_file() for name in PICTURES
    )
    assert CardFacts.from_json(json.loads((tmp_path / "mine" / FACTS_FILE).read_text())) == facts
    assert header_errors(str(card)) == []


def test_a_card_may_be_of_models_by_their_folders_and_names_no_folder(tmp_path: Path) -> None:
    student, teacher = tiny_vit(), tiny_vit(width=24, seed=1)
    expected = write_card(tmp_path / "mine", student, teacher=teacher)
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(tmp_path / name)
    assert write_card(tmp_path / "mine", tmp_path / "student", teacher=str(tmp_path / "teacher")) == expected
    with pytest.raises(ValueError, match="`teacher` '.*nowhere' cannot be loaded"):
        write_card(tmp_path / "mine", student, teacher=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("value", [float("nan"), "high", None])
def test_a_metric_that_is_no_finite_number_is_an_error(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`metrics` must be finite numbers, got f1 {value!r}"):
        write_card(tmp_path, tiny_vit(), metrics={"f1": value})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"relational_weight": 10.0}, "- the relations that its teacher sees between examples\n"),
        ({"relational_weight": 10.0, "bank_size": 0}, "- the relations that its teacher sees between examples\n"),
        ({"kd_weight": 1.0}, "- its teacher's logits\n"),
        ({"task_weight": 1.0, "kd_weight": 1.0}, "- its task\n- its teacher's logits\n"),
        ({"layer_weight": 1.0, "relational_weight": 1.0}, "sees between examples\n- its teacher's hidden layers\n"),
        ({"relational_weight": 0.0}, "The student learned its task, without a teacher."),
        ({"bank_size": 4096}, f"With {LIBRARY}.\n"),
    ],
)
def test_any_setting_of_a_loop_of_ones_own_may_be_missing(tmp_path: Path, settings: Any, said: str) -> None:
    facts = write_card(tmp_path, tiny_vit(), teacher=tiny_vit(width=24), settings=settings)
    card = ModelCard.load(tmp_path / "README.md").text
    assert said in card
    weights = [settings[name] for name in ("relational_weight", "kd_weight") if name in settings]
    is_distilled = any(weights) or not weights  # a teacher was given
    assert ("distilled from a `ViTForImageClassification` (" in card) == is_distilled
    assert CardFacts.from_json(facts.to_json()) == facts


def test_numbers_of_numpy_and_torch_are_said_as_they_are_saved(tmp_path: Path) -> None:
    given = {"learning_rate": np.float32(1 / 3), "layers": (0, 2)}
    facts = write_card(tmp_path, tiny_vit(), training=given, metrics={"f1": torch.tensor(1 / 3)})
    card = ModelCard.load(tmp_path / "README.md")
    assert "| `learning_rate` | 0.333333 |" in card.text and "| f1 |  | 0.333333 |" in card.text
    saved = json.loads((tmp_path / FACTS_FILE).read_text())
    assert CardFacts.from_json(saved) == facts and str(render_card(facts)).strip() == str(card).strip()


def test_the_least_that_a_card_takes_is_a_student(tmp_path: Path) -> None:
    write_card(tmp_path / "mine", tiny_vit(), dataset="my pictures", metrics={"f1": 0.25})
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert "datasets" not in card.data.to_dict() and " on my pictures. It is a plain transformers model" in card.text
    assert "| f1 |  | 0.25 |" in card.text and f"With {LIBRARY}.\n" in card.text
    for nothing in ("None", "without a teacher", "distilled from", "setting", "![", "## Teacher"):
        assert nothing not in card.text.split("## Citation")[0]


def test_a_card_links_the_package_where_its_metadata_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = Message()
    about["Project-URL"] = "Homepage, https://example.org/hf_rrd"
    monkeypatch.setattr("hf_rrd.results.facts.metadata", lambda name: about)
    write_card(tmp_path, tiny_vit(), settings={"bank_size": 4096})
    assert "With [hf_rrd](https://example.org/hf_rrd).\n" in ModelCard.load(tmp_path / "README.md").text
    assert json.loads((tmp_path / "model_card.json").read_text())["made_with"] == "https://example.org/hf_rrd"


def test_every_number_of_a_card_is_among_the_facts_of_the_run(run: RelationalDistillationTrainer) -> None:
    card = str(card_of(run, **DATASET))
    assert len(numbers_shown(card)) > 60
    assert unsaid(card, facts_of(run)) == [] and header_errors(card) == []
    wrong = card.replace("| accuracy | ", "| accuracy | 99.87 % ", 1)
    assert unsaid(wrong, facts_of(run)) == ["99.87"], "the check sees a number that is not among them"


def test_the_cards_of_our_own_students_say_the_facts_beside_them() -> None:
    folders = sorted(path.parent for path in (Path(__file__).parents[2] / "model_cards").glob(f"*/{FACTS_FILE}"))
    assert len(folders) >= 4
    for folder in folders:
        card, facts = ModelCard.load(folder / "README.md"), json.loads((folder / FACTS_FILE).read_text())
        assert unsaid(str(card), facts) == [], folder.name
        assert header_errors(str(card)) == [], folder.name
        pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", card.text)
        assert len(pictures) >= 2 and all((folder / picture).is_file() for picture in pictures)
        again = render_card(CardFacts.from_json(facts))
        assert str(again).strip() == str(card).strip(), f"{folder.name} was rendered by another version"


def test_a_card_is_a_function_of_its_facts(run: RelationalDistillationTrainer) -> None:
    card = card_of(run, license="mit", tags="mine", language=["en", "de"], finetuned_from="org/base", **DATASET)
    facts = CardFacts.from_json(facts_of(run))
    assert str(render_card(facts)).strip() == str(card).strip()
    assert facts.to_json() == facts_of(run)


def test_what_is_unknown_is_absent(tmp_path: Path) -> None:
    run = trainer(tmp_path / "student", train_dataset=Images(16))
    card = card_of(run)
    header, page = card.data.to_dict(), card.text
    assert header.keys() == {"library_name", "pipeline_tag", "tags"}
    for section in ("Teacher and student", "Results", "How alike", "!["):
        assert section not in page
    for nothing in ("None", "nan", "null", "unknown", "[]", "{}", "More information"):
        assert nothing not in page.split("## Citation")[0]
    assert "\n\n\n" not in page


def test_the_student_is_used_in_four_lines_or_fewer_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "text"]))
    tokenizer = BertTokenizer(str(vocabulary))
    runs = {
        "vit": ({}, "pixel_values = torch.zeros(1, 3, 16, 16)", (1, 4)),
        "bert": (
            {
                "model": tiny_bert(),
                "teacher": tiny_bert(width=24),
                "train_dataset": Texts(),
                "processing_class": tokenizer,
            },
            "",
            (1, 4),
        ),
        "headless": (
            {"model": tiny_vit().vit, "task_weight": 0.0},
            "pixel_values = torch.zeros(1, 3, 16, 16)",
            (1, 16),
        ),
    }
    for name, (given, before, shape) in runs.items():
        run = trainer(tmp_path / name, **given)
        run.save_model()
        code = usage_of(card_of(run))
        assert len(code.strip().splitlines()) <= 4
        result = "embedding" if name == "headless" else "logits"
        names: dict[str, Any] = {"torch": torch}
        exec(f"{before}\n{code}", names)
        assert names[result].shape == shape, name


def as_the_card_says(student: Any, processor: Any, pooling: Any = "auto", **names: Any) -> tuple[Any, str]:
    """What a student's card calls its embedding, run as it is printed; and the code. The student is in `mine`."""
    student.save_pretrained("mine")
    if processor is not None:
        processor.save_pretrained("mine")
    write_card("mine", student, processing_class=processor, pooling=pooling)
    code = usage_of(ModelCard.load("mine/README.md"))
    exec(code, names)
    return names["embedding" if "embedding = " in code else "logits"], code


def difference(found: Any, student: Any, inputs: Any, pooling: Any) -> float:
    wanted = embed(student.eval(), dict(inputs), pooling)
    assert found.shape == wanted.shape and len(found) == 2
    return (found - wanted).abs().max().item()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["auto", "mean", "max", "last_token", "cls", "pooler"])
def test_the_code_for_texts_gives_their_embeddings_also_beside_padding(
    pooling: str, side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, student = tokenizer(tmp_path, padding_side=side), headless()
    found, code = as_the_card_says(student, words, pooling)
    inputs = words(["a text", "a longer text"], padding=True, return_tensors="pt")
    assert inputs["attention_mask"][:, 0 if side == "left" else -1].tolist() == [0, 1], "the first has padding"
    assert difference(found, student, inputs, pooling) < 1e-6
    assert len(code.strip().splitlines()) <= 6
    found, _ = as_the_card_says(student, None, pooling, **inputs)
    assert difference(found, student, inputs, pooling) < 1e-6
    found, _ = as_the_card_says(tiny_bert(), None, **inputs)
    wanted = tiny_bert().eval()(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits
    assert torch.equal(found, wanted), "a classifier's, too"


def test_a_tokenizer_that_cannot_pad_gets_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words, student = tokenizer(tmp_path), tiny_gpt2().transformer
    words.pad_token = None
    found, code = as_the_card_says(student, words)
    assert 'processor("a text", return_tensors="pt")' in code
    wanted = embed(student.eval(), dict(AutoTokenizer.from_pretrained("mine")("a text", return_tensors="pt")))
    assert (found - wanted).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("family", "pooling"),
    [("vit", pooling) for pooling in ("auto", "mean", "max", "cls")]
    + [("resnet", pooling) for pooling in ("auto", "mean", "max", "pooler", "gap")]
    + [("clip", pooling) for pooling in ("auto", "mean", "max", "cls", "pooler")],
)
def test_the_code_for_images_gives_their_embeddings(
    family: str, pooling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    models: dict[str, Any] = {
        "vit": lambda: tiny_vit().vit,
        "resnet": lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])),
        "clip": lambda: CLIPVisionModelWithProjection(
            CLIPVisionConfig(**sizes, intermediate_size=16, patch_size=8, projection_dim=12)
        ),
    }
    processor = ViTImageProcessor(
        size={"height": 64, "width": 64} if family == "resnet" else {"height": 16, "width": 16}
    )
    images, student = [Image.new("RGB", (20, 24), color) for color in ("red", "green")], models[family]()
    inputs = processor(images, return_tensors="pt")
    found, code = as_the_card_says(student, processor, pooling, image=images)
    assert difference(found, student, inputs, pooling) < 1e-6 and len(code.strip().splitlines()) == 4
    found, code = as_the_card_says(student, None, pooling, **inputs)
    assert difference(found, student, inputs, pooling) < 1e-6 and len(code.strip().splitlines()) == 3


@pytest.mark.parametrize("pooling", ["auto", "mean", "max", "last_token", "cls"])
@pytest.mark.parametrize("has_mask", [True, False])
def test_the_code_for_speech_gives_its_embeddings_also_beside_padding(
    has_mask: bool, pooling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    layers: dict[str, Any] = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
    groups = {"num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 4, "intermediate_size": 16}
    student = Wav2Vec2Model(Wav2Vec2Config(**sizes, **layers, **groups, feat_extract_norm="layer"))
    processor = Wav2Vec2FeatureExtractor(return_attention_mask=has_mask)
    waveforms = [np.random.default_rng(0).standard_normal(count).astype(np.float32) for count in (400, 1000)]
    found, code = as_the_card_says(student, processor, pooling, waveforms=waveforms)
    inputs = processor(waveforms, padding=True, return_tensors="pt", sampling_rate=16_000)
    assert ("attention_mask" in inputs) == has_mask
    assert difference(found, student, inputs, pooling) < 1e-6
    assert len(code.strip().splitlines()) <= 7


# ---- A student that is saved as a model of sentence-transformers ----


def test_such_a_student_is_a_card_of_its_library_and_its_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = embedding_run(tmp_path)
    run.train()
    run.save_model()
    card = card_of(run)
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert {"sentence-transformers", "sentence-similarity", "feature-extraction"} <= set(data.tags)
    first, second, third, fourth = usage_of(card).strip().splitlines()
    assert first == "from sentence_transformers import SentenceTransformer"
    assert second == 'model = SentenceTransformer("run")' and third.startswith("embeddings = model.encode([")
    assert fourth == "similarities = model.similarity(embeddings, embeddings)"
    names: dict[str, Any] = {}
    exec(usage_of(card), names)
    assert names["embeddings"].shape == (3, 24) and names["similarities"].shape == (3, 3)
    saved = names["model"]
    more = sum(weight.numel() for weight in saved.parameters()) - facts_of(run)["student"]["parameters"]
    assert (
        f"An embedding has 24 dimensions. Hidden states are pooled by `mean`, and a projection of {more} " in card.text
    )
    assert more == 16 * 24 + 24 and saved.max_seq_length == 11 and saved.similarity_fn_name == "cosine"
    assert "Two are compared by `cosine`. A text is cut after 11 tokens." in card.text
    assert "It is a plain sentence-transformers model" in card.text and ", sentence_transformers 6" in card.text
    assert "It answers in its teacher's space" not in card.text, "the teacher has no name to load it by"
    assert unsaid(str(card), facts_of(run)) == [] and header_errors(str(card)) == []
    again = render_card(CardFacts.from_json(facts_of(run)))
    assert str(again).strip() == str(card).strip()


def test_it_is_asked_for_its_teachers_index_where_it_answers_in_that_space(tmp_path: Path) -> None:
    def code(name: str = "org/teacher", **settings: Any) -> str:
        run = embedding_run(tmp_path, max_steps=1, **settings)
        run.train()
        return card_of(run, teacher_name=name).text

    asked = (
        'teacher = SentenceTransformer("org/teacher")\nindex = teacher.encode(documents, normalize_embeddings=True)'
    )
    assert f"{asked}\nscores = model.encode(queries) @ index.T\n" in code()
    pca: dict[str, Any] = {"teacher_projection": "pca", "projection_dim": 8}
    turned = pca | {"matryoshka_dims": [8, 4]}
    assert asked in code(**pca) and asked in code(matryoshka_dims=[24, 6])
    for others in (turned, {"teacher_pooling": "cls"}, {"teacher": headless(24)}):
        assert "teacher.encode" not in code(**others), "another space, or no model of that library"
    assert "teacher.encode" not in code("a big one")
    untrained = card_of(embedding_run(tmp_path), teacher_name="org/teacher").text
    assert "teacher.encode" not in untrained, "it has not learned that space"


def test_a_teacher_whose_outputs_were_cached_is_known_from_the_report(tmp_path: Path) -> None:
    teacher, words = embedder(tmp_path / "teacher"), tokenizer(tmp_path)
    train = cache_teacher_outputs(tokenized(words, texts(40)), teacher, cache_dir=tmp_path / "cache")
    run = embedding_run(tmp_path, teacher=None, train_dataset=train)
    run.train()
    assert "(" not in card_of(run, teacher_name="org/teacher").text.split("distilled from")[1].split(".")[0]
    run.report(teacher=teacher)
    card = card_of(run, teacher_name="org/teacher").text
    assert f"distilled from org/teacher ({headless(24).num_parameters():,} parameters)" in card
    assert 'teacher = SentenceTransformer("org/teacher")' in card


def test_its_first_dimensions_are_told_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = embedding_run(tmp_path, matryoshka_dims=[24, 12, 6])
    run.train()
    run.save_model()
    card = card_of(run)
    said = re.search(r"Its first 12, 6 are embeddings, too: `(.+)`", card.text)
    assert said is not None and unsaid(str(card), facts_of(run)) == []
    names: dict[str, Any] = {"SentenceTransformer": SentenceTransformer}
    exec(f"rows = {said[1]}.encode(['a cat'])", names)
    assert names["rows"].shape == (1, 6)


def test_a_student_of_images_is_one_of_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    how: dict[str, Any] = {"processing_class": processor, "student_format": "sentence_transformers"}
    student, teacher = tiny_vit().vit, tiny_vit(24, seed=1).vit
    run = trainer("run", model=student, teacher=teacher, task_weight=0.0, train_dataset=Images(16), **how)
    run.save_model()
    card = card_of(run)
    assert card.data.pipeline_tag == "feature-extraction" and "A text is cut" not in card.text
    names: dict[str, Any] = {"images": [Image.new("RGB", (16, 16), color) for color in ("red", "green")]}
    exec(usage_of(card), names)
    assert names["embeddings"].shape == (2, 24) and names["similarities"].shape == (2, 2)


@pytest.mark.parametrize("by", ["object", "folder"])
def test_a_loop_of_ones_own_gives_it_as_it_is(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = embedder(tmp_path / "mine", "cls", dense=8, prompts={"query": "find a "})
    model.save("mine")
    facts = write_card("mine", model if by == "object" else "mine", settings={"matryoshka_dims": ["a", 4]})
    card = ModelCard.load("mine/README.md")
    assert facts.embedder is not None and (facts.embedder.dimensions, facts.embedder.pooling) == (8, "cls")
    assert "Its prompts, by `prompt_name`: `query`." in card.text and "Its first 4 are" in card.text
    names: dict[str, Any] = {}
    exec(usage_of(card), names)
    assert names["embeddings"].shape == (3, 8) and card.data.library_name == "sentence-transformers"


# ---- Classes, settings ----


def test_the_classes_are_named_in_the_order_of_the_logits(tmp_path: Path) -> None:
    student = tiny_vit()
    student.config.id2label = {2: "dog", 0: "cat", 1: "a|b", 3: "fox"}
    facts = write_card(tmp_path, student)
    assert facts.classes == ["cat", "a|b", "dog", "fox"]
    assert (
        "Its classes, in the order of the logits: cat, a&#124;b, dog, fox.\n"
        in Path(tmp_path, "README.md").read_text()
    )
    for other in (tiny_vit(), student.vit):  # without names, or without a head
        write_card(tmp_path, other)
        assert " classes" not in Path(tmp_path, "README.md").read_text()
    many = tiny_vit(classes=21)
    many.config.id2label = {number: f"class {number}" for number in range(21)}
    assert write_card(tmp_path, many).classes[20] == "class 20"
    text = Path(tmp_path, "README.md").read_text()
    assert "The names of its classes are in `model.config`.\n" in text and "class 20" not in text


def test_settings_losses_and_versions_are_folded_and_the_pictures_are_not(run: RelationalDistillationTrainer) -> None:
    text = card_of(run).text
    before, folded, after = re.split(r"\n</?details>\n", text)
    assert folded.startswith("<summary>Settings, losses and versions</summary>\n\n| setting | value |\n")
    assert "| last in the training log | value |" in folded and "\nWith python " in folded
    assert "figures/losses.png" in before and "## Limits" in after


# ---- Without distillation ----


def test_what_the_same_student_scores_without_distillation_stands_beside_it(
    run: RelationalDistillationTrainer,
) -> None:
    card = card_of(run, baseline={"accuracy": 0.125, "f1": 0.5})
    assert "| metric | data | value | without distillation |\n" in card.text, "the report is of another split"
    assert re.search(
        r"\| accuracy \| test \| [\d.]+ \| 0.125 \|\n(?:\|.*\|  \|\n)*\| f1 \|  \|  \| 0.5 \|\n", card.text
    )
    assert "without distillation" not in card_of(run).text


def test_the_teachers_value_stands_beside_them_where_a_report_has_it(tmp_path: Path) -> None:
    student, teacher = tiny_vit(), tiny_vit(width=24, seed=1)
    report = compare_models(student, teacher, Images(40))
    write_card(tmp_path, student, teacher=teacher, report=report, baseline={"accuracy": 0.125})
    own, others = (f"{report.facts[name]['accuracy']:g}" for name in ("student", "teacher"))
    text = ModelCard.load(tmp_path / "README.md").text
    header = "| metric | data | value | without distillation | teacher |\n| --- | ---: | ---: | ---: | ---: |\n"
    assert f"{header}| accuracy |  | {own} | 0.125 | {others} |\n" in text
    with pytest.raises(ValueError, match="`baseline` must be finite numbers, got f1 nan"):
        write_card(tmp_path, student, baseline={"f1": float("nan")})


def test_the_template_has_no_fact_of_its_own() -> None:
    text = TEMPLATE.read_text().split("## Citation")[0].replace("https://arxiv.org/abs/2407.12073", "")
    assert re.findall(r"\d", re.sub(r"{%.*?%}|{{.*?}}", "", text, flags=re.DOTALL)) == []


def test_names_cannot_break_a_table(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=Images(8), compute_metrics=lambda _: {"a|b\nc <i>": 0.5, "flag": True})
    run.train()
    run.evaluate()
    card = card_of(run)
    assert "| a&#124;b c &lt;i> |  | 0.5 |" in card.text and "flag" not in card.text


HOSTILE = "a\n---\n# b\u202e <img src=x onerror=y> [c](http://d) `e` | \x1b[2J\ud800"


def test_no_text_of_somebody_else_is_markup_of_a_card(tmp_path: Path) -> None:
    student = tiny_vit()
    student.config.id2label = dict.fromkeys(range(4), HOSTILE)
    facts = write_card(
        tmp_path,
        student,
        teacher_name=HOSTILE,
        dataset=HOSTILE,
        settings={"relational_weight": 1.0, HOSTILE: HOSTILE},
        training={"seed": 1, "optimizer": HOSTILE, "layers": [HOSTILE]},
        log_history=[{"loss": 1.0, "step": 1}],
        report=compare_models(student, None, Images(8)),
        metrics={HOSTILE: 0.5},
        baseline={HOSTILE + "2": 0.25},
        name=HOSTILE + '"); print("',
        task=HOSTILE,
        license=HOSTILE,
        tags=HOSTILE,
        base_model=HOSTILE,
    )
    card = ModelCard.load(tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    plain = "a --- # b <img src=x onerror=y> [c](http://d) `e` | [2J"
    assert [each for each in text if each != "\n" and unicodedata.category(each) in ("Cc", "Cf", "Cs")] == []
    assert card.data.license == plain and card.data.model_name is None
    page = text.split("---\n", 2)[2].replace(usage_of(card), "")
    assert page.count("<img") == page.count("](http://d") == page.count("`e`") == 0
    assert page.count("&lt;img src=x onerror=y> &#91;c&#93;(http://d) &#96;e&#96; &#124; &#91;2J") == 14
    headings = [line for line in page.splitlines() if line.startswith("#")]
    assert len([line for line in headings if line.startswith("# ")]) == 1 and "## How it was made" in headings
    loaded: list[str] = []
    names = {"ViTForImageClassification": type("Stub", (), {"from_pretrained": lambda name: loaded.append(name)})}
    code = usage_of(card).splitlines()
    exec(code[[line.startswith("model") for line in code].index(True)], names)
    assert loaded == [plain + '"); print("'], "one text of Python"
    assert CardFacts.from_json(json.loads((tmp_path / FACTS_FILE).read_text())) == facts
