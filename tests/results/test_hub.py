"""A student's life on a Hub: distilled from a teacher by name, pushed with its card, loaded without this package."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import ViTImageProcessor

from hf_rrd.results import hub as hub_module
from hf_rrd.results.hub import (
    PushError,
    explained_hub_errors,
    link,
    model_files,
    module_files,
    published_files,
    push_student,
)
from tests.builders import Images, config, tiny_vit, trainer
from tests.loopback_hub import LoopbackHub, header_errors, run_script
from tests.sentences import embedder, headless, texts, tokenized, tokenizer

WEIGHTS = {"config.json", "model.safetensors"}
PICTURES = {f"figures/{name}.png" for name in ("losses", "similarities", "embeddings", "reliability")}
MODULES = WEIGHTS | {"tokenizer.json", "tokenizer_config.json", "modules.json", "config_sentence_transformers.json"}
MODULES |= {"sentence_bert_config.json", "1_Pooling/config.json", "3_Normalize/config.json"}
MODULES |= {"2_Dense/config.json", "2_Dense/model.safetensors"}
STUDENT = WEIGHTS | {"preprocessor_config.json", "README.md"} | PICTURES

DATA = Images(24)
PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A Hub that this process talks to, with its user's token; the tests run in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    with LoopbackHub() as hub:
        places = {"HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}"}
        quiet = places | {"HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}
        for name, value in {"HF_HUB_OFFLINE": False, "ENDPOINT": hub.url, **quiet}.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        own = getattr(transformers.utils.hub, "hf_api", lambda: huggingface_hub.hf_api.api)  # of newer versions
        for reader in (huggingface_hub.hf_api.api, own()):
            monkeypatch.setattr(reader, "endpoint", hub.url)
        monkeypatch.setattr(hub_module, "HUB", HfApi(endpoint=hub.url, token=hub.token))
        yield hub


def new_trainer(folder: str = "student", **given: Any) -> Any:
    given = {"processing_class": PROCESSOR, "eval_dataset": DATA, "train_dataset": DATA} | given
    return trainer(folder, **given)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=DATA.pixels).logits


def texts_of(files: dict[str, bytes]) -> str:
    return "\n".join(data.decode() for name, data in files.items() if not name.endswith((".png", ".safetensors")))


# ---- A whole life, in processes of its own ----


@pytest.mark.slow
def test_the_whole_life_of_a_student(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        done = run_script(
            hub,
            """
import torch
import hf_rrd.results.measure
from safetensors.torch import save_file
from transformers import ViTImageProcessor
from tests.builders import Images, tiny_vit, trainer

hf_rrd.results.measure.MOST = 3
data = Images(24)
processor = ViTImageProcessor(size={"height": 16, "width": 16})
tiny_vit(width=24, seed=1).push_to_hub("teacher")
processor.push_to_hub("teacher")

def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

how = {"train_dataset": data, "eval_dataset": data, "processing_class": processor, "compute_metrics": accuracy}
run = trainer("student", teacher="tester/teacher", **how)
for message in ("End of training", "Once more"):
    run.train()
    run.evaluate(metric_key_prefix="test")
    run.report()
    run.push_to_hub(message, dataset_tags="org/images", license="apache-2.0")
with torch.no_grad():
    save_file({"logits": run.model.eval()(data.pixels).logits, "pixels": data.pixels}, "expected.safetensors")
""",
            home=tmp_path / "student",
        )
        assert done.returncode == 0, done.stderr
        assert "could not be asked" not in done.stderr  # it was, and the teacher has no modules
        files = hub.files("tester/student")
        assert files.keys() == STUDENT
        assert hub.commits("tester/student") == ["initial commit", "End of training", "Once more"]
        card = files["README.md"].decode()
        header = ModelCard(card).data
        assert header_errors(card) == []
        assert header.base_model == header.distilled_from == "tester/teacher"
        assert header.eval_results[0].metric_type == "accuracy" and header.datasets == ["org/images"]
        revision = hub.shas("tester/teacher")[-1]
        assert f"[tester/teacher](https://huggingface.co/tester/teacher) at revision `{revision[:12]}`" in card
        assert str(tmp_path) not in texts_of(files) and hub.token not in texts_of(files)

        usage = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]  # type: ignore[index]
        assert 'from_pretrained("tester/student")' in usage and len(usage.splitlines()) == 4
        done = run_script(
            hub,
            f"""
import sys, torch
from PIL import Image
from safetensors.torch import load_file
image = Image.new("RGB", (20, 24), "red")
{usage}
expected = load_file(sys.argv[1])
with torch.no_grad():
    found = model.eval()(pixel_values=expected["pixels"]).logits
assert torch.equal(found, expected["logits"]), (found - expected["logits"]).abs().max()
assert logits.shape == (1, 4)
assert [name for name in sys.modules if name.startswith("hf_rrd.")] == []
try:
    import hf_rrd
except ImportError:
    print("bitwise equal")
""",
            str(tmp_path / "student" / "expected.safetensors"),
            home=tmp_path / "user",
            token=False,
            without_hf_rrd=True,
        )
        assert done.stdout.strip() == "bitwise equal", done.stderr
        assert hub.unhandled == []


# ---- Pushes of a trainer ----


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_pushes_from_checkpoints_hold_the_student_in_order_and_resume(hub: LoopbackHub, strategy: str) -> None:
    saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    pushes = {"push_to_hub": True, "hub_strategy": strategy, "hub_always_push": True, "hub_token": hub.token}
    run = new_trainer(strategy, **saves, **pushes)
    run.train()
    run._finish_current_push()
    assert all(job.exception() is None for job in run.push_in_progress.jobs) and hub.unhandled == []
    assert list(Path().glob("*/_push-*")) == [], "what was kept for a push is gone after it"
    files = hub.files(f"tester/{strategy}")
    assert all(hub.token.encode() not in data for data in files.values())
    progress = [f"Training in progress, step {step}" for step in (1, 2, 3)]
    if strategy == "every_save":
        assert files.keys() == WEIGHTS | {"preprocessor_config.json"}
        assert hub.commits("tester/every_save") == ["initial commit", *progress]
        return
    each_twice = [message + end for message in progress for end in ("", ", checkpoint")]
    assert hub.commits(f"tester/{strategy}") == ["initial commit", *each_twice]
    if strategy == "all_checkpoints":
        folders = {name.split("/")[0] for name in files if "/" in name}
        assert folders == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
        return
    inside = {name: data for name, data in files.items() if name.startswith("last-checkpoint/")}
    for name, data in inside.items():
        Path("there", name).parent.mkdir(parents=True, exist_ok=True)
        Path("there", name).write_bytes(data)
    needed = {"optimizer.pt", "trainer_state.json", "_relational_distillation.safetensors"} | WEIGHTS
    assert needed <= {Path(name).name for name in inside}
    resumed = new_trainer("resumed", save_strategy="no", max_steps=5, hub_token=hub.token)
    resumed.train(resume_from_checkpoint="there/last-checkpoint")
    assert resumed.state.global_step == 5
    resumed.push_to_hub()
    expected = WEIGHTS | {"preprocessor_config.json", "README.md", "figures/losses.png"}
    assert hub.files("tester/resumed").keys() == expected


def test_a_push_that_is_not_over_is_not_joined_by_another_unless_asked(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unfinished:
        def done(self) -> bool:
            return False

    pushed: list[str] = []
    monkeypatch.setattr(
        "hf_rrd.trainer.push_checkpoint", lambda repository, folder, *more: pushed.append(folder) or []
    )
    for always, expected in ((False, []), (True, ["a"])):
        run = new_trainer("student", push_to_hub=True, hub_always_push=always, hub_strategy="every_save")
        run.push_in_progress = transformers.utils.PushInProgress([Unfinished()])
        run._push_from_checkpoint("a")
        assert pushed == expected


@pytest.mark.parametrize("failure", ["no token", "offline", "down"])
def test_without_a_token_or_a_network_all_but_the_push_works(
    hub: LoopbackHub, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if failure == "no token":
        monkeypatch.setattr(hub_module, "HUB", HfApi(endpoint=hub.url, token=False))
    elif failure == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        hub.down()
    warnings: list[str] = []
    monkeypatch.setattr("hf_rrd.trainer.logger.warning", warnings.append)
    monkeypatch.setattr("hf_rrd.results.hub.logger.warning", warnings.append)
    for switch in (True, False):
        saves = {"save_strategy": "steps", "save_steps": 2, "hub_strategy": "every_save"}
        run = new_trainer("student", push_to_hub=switch, **saves)
        run.train()
        run.save_model()
        run.evaluate()
        with pytest.raises(OSError) as error:
            run.push_to_hub()
        said = str(error.value)
        assert said.startswith("the student is in student, and not on the Hub: ") and "\n" not in said
        assert said.endswith("(to log in: `hf auth login`, or hub_token=), and call trainer.push_to_hub().")
        assert hub.token not in said
        loaded = transformers.AutoModelForImageClassification.from_pretrained("student")
        assert torch.equal(logits(loaded), logits(run.model)) and os.path.exists("student/README.md")
        found = ["the student has no place on the Hub yet" in warning for warning in warnings]
        assert any(found) == switch
        assert any("is in student, and not on the Hub" in warning for warning in warnings) == switch, "while saving"
        warnings.clear()


def test_a_private_student_on_a_branch_with_its_own_name(hub: LoopbackHub) -> None:
    run = new_trainer("here", hub_model_id="tester/there", hub_private_repo=True, max_steps=1)
    run.train()
    run.push_to_hub(blocking=False).result()
    assert hub.is_private("tester/there")
    card = hub.files("tester/there")["README.md"].decode()
    assert 'from_pretrained("tester/there")' in card and "# there\n" in card
    HfApi(endpoint=hub.url, token=hub.token).create_branch("tester/there", branch="other")
    run.push_to_hub("On a branch", revision="other", tags="other")
    assert hub.commits("tester/there", "other")[-1] == "On a branch"
    assert hub.commits("tester/there")[-1] == "End of training" and hub.unhandled == []


def test_an_upload_that_the_hub_refuses_is_a_push_error_and_a_warning_while_saving(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_trainer("student", push_to_hub=True, max_steps=1)
    run.train()
    with pytest.raises(PushError, match="the student is in student, and not on the Hub: .*language"):
        run.push_to_hub(language="no language")
    run.push_to_hub(tags="fine")
    assert hub.files("tester/student").keys() >= WEIGHTS
    hub.fail(403)
    warnings: list[str] = []
    monkeypatch.setattr("hf_rrd.trainer.logger.warning", warnings.append)
    run.save_model()
    assert len(warnings) == 1 and "not on the Hub" in warnings[0]


def test_a_name_that_the_hub_does_not_take_is_an_error_at_construction(hub: LoopbackHub) -> None:
    with pytest.raises(ValueError, match="Repo id must"):
        new_trainer("a name with spaces", push_to_hub=True)
    assert hub.requests == []


def test_a_folder_without_weights_is_not_pushed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(PushError, match=r"it failed: no weights were found there, among \['notes.txt'\]"):
        push_student("tester/student", None, tiny_vit(), None, config(tmp_path), "it failed")


# ---- A student that is a model of sentence-transformers ----


def embedding_run(folder: str = "student", **given: Any) -> Any:
    """A run whose student is saved as a model of sentence-transformers."""
    words = tokenizer(Path("words"))
    given = {
        "student_format": "sentence_transformers",
        "processing_class": words,
        "train_dataset": tokenized(words, texts(24)),
    } | given
    how = {"model": headless(), "teacher": embedder(Path("teacher")), "task_weight": 0.0, "eval_dataset": None}
    return trainer(folder, **(how | given))


def test_a_student_of_sentence_transformers_is_loaded_by_its_name(hub: LoopbackHub) -> None:
    run = embedding_run()
    run.train()
    run.push_to_hub()
    assert hub.files("tester/student").keys() == MODULES | {"README.md", "figures/losses.png"}
    found = SentenceTransformer("tester/student", device="cpu")
    assert [type(module).__name__ for module in found] == ["Transformer", "Pooling", "Dense", "Normalize"]
    some = texts(9, seed=5)
    assert np.array_equal(found.encode(some), SentenceTransformer("student", device="cpu").encode(some))
    assert hub.unhandled == []


def test_the_code_on_its_card_asks_the_index_of_a_teacher_from_the_hub(hub: LoopbackHub) -> None:
    embedder(Path("inner")).save("there", create_model_card=False)
    hub_module.HUB.create_repo("teacher")
    hub_module.HUB.upload_folder(repo_id="tester/teacher", folder_path="there")
    run = embedding_run(teacher="tester/teacher")
    run.train()
    run.push_to_hub()
    card = hub.files("tester/student")["README.md"].decode()
    assert header_errors(card) == [] and ModelCard(card).data.base_model == "tester/teacher"
    documents, queries = texts(6, seed=5), texts(4, seed=6)
    names: dict[str, Any] = {"documents": documents, "queries": queries}
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(code, names)
    student, teacher = SentenceTransformer("student", device="cpu"), SentenceTransformer("there", device="cpu")
    wanted = student.encode(queries) @ teacher.encode(documents).T
    assert np.abs(names["scores"] - wanted).max() < 1e-6 and names["similarities"].shape == (3, 3)


def test_a_plain_student_is_pushed_without_the_modules_of_an_earlier_run(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("hf_rrd.results.sentence_transformers.logger.warning", warnings.append)
    for form in ("sentence_transformers", "transformers"):
        run = embedding_run(student_format=form, hub_model_id=form)
        run.train()
        run.push_to_hub()
    assert not any("modules" in name or "Dense" in name for name in hub.files("tester/transformers"))
    assert Path("student/modules.json").is_file(), "it may be the user's"
    (warning,) = warnings
    assert warning.startswith("student has the modules.json of an earlier save: SentenceTransformer('student') reads")


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_checkpoints_push_a_whole_model_of_sentence_transformers(hub: LoopbackHub, strategy: str) -> None:
    saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 2}
    run = embedding_run(strategy, push_to_hub=True, hub_strategy=strategy, hub_always_push=True, **saves)
    run.train()
    run._finish_current_push()
    files = hub.files(f"tester/{strategy}").keys()
    assert {name for name in files if not name.startswith("last-checkpoint/")} == MODULES
    for name in MODULES:
        Path("there", name).parent.mkdir(parents=True, exist_ok=True)
        Path("there", name).write_bytes(hub.files(f"tester/{strategy}")[name])
    rows = SentenceTransformer("there", device="cpu").encode(texts(9, seed=5))
    saved = SentenceTransformer(str(Path(strategy, "checkpoint-2").absolute()), device="cpu").encode(texts(9, seed=5))
    assert np.array_equal(rows, saved) and hub.unhandled == []
    if strategy == "checkpoint":
        assert {f"last-checkpoint/{name}" for name in MODULES} <= files


# ---- Files ----


def test_only_the_modules_that_a_model_names_are_published(tmp_path: Path) -> None:
    for name in ("1_Pooling/config.json", "2_Dense/model.safetensors", "3_Normalize/config.json", "config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert module_files(tmp_path) == [], "no model without its mark"
    modules = [{"path": place} for place in ("", "1_Pooling", "3_Normalize")]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    found = {"config.json", "modules.json", "1_Pooling/config.json", "3_Normalize/config.json"}
    assert set(published_files(tmp_path, None, with_modules=True)) == found
    assert published_files(tmp_path, None) == ["config.json"]


def test_only_the_student_its_processor_card_and_pictures_are_published(tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path)
    others = "training_args.bin trainer_state.json all_results.json model_card.json notes.txt optimizer.pt code.py"
    others += " distillation_report.json pytorch_model.bin figures/mine.png teacher/model.safetensors"
    others += " teacher/config.json runs/events _push-1/config.json checkpoint-3/model.safetensors"
    for name in (*others.split(), "README.md", "figures/losses.png", "vocab.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    expected = {"config.json", "model.safetensors", "README.md", "figures/losses.png"}
    assert set(published_files(tmp_path, None)) == expected

    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            Path(folder, "vocab.txt").write_text("")
            Path(folder, "not_there.txt").write_text("")

    assert set(published_files(tmp_path, Tokenizer())) == expected | {"vocab.txt"}


def test_shards_are_published_and_code_is_not(tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path, max_shard_size="20KB")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"auto_map": {"AutoModel": "code.Model"}}))
    (tmp_path / "code.py").write_text("")
    found = set(published_files(tmp_path, None))
    shards = {file.name for file in tmp_path.glob("model-*.safetensors")}
    assert len(shards) > 1 and found == shards | {"config.json", "model.safetensors.index.json"}
    assert sum(len(load_file(tmp_path / shard)) for shard in shards) == len(tiny_vit().state_dict())


def test_a_push_has_links_of_a_checkpoint_or_copies_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"weights")
    link(str(source), str(tmp_path / "linked"))
    assert (tmp_path / "linked").stat().st_ino == source.stat().st_ino

    def refuse(*paths: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(hub_module.os, "link", refuse)
    link(str(source), str(tmp_path / "copied"))
    assert (tmp_path / "copied").read_bytes() == b"weights"
    assert (tmp_path / "copied").stat().st_ino != source.stat().st_ino


@dataclass
class Adapter:
    base_model_name_or_path: str


@dataclass
class Adapters:
    peft_config: dict[str, Adapter]


def test_adapters_are_published_without_a_base_that_lies_beside_them(tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors", "lora/adapter_config.json", "lora/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    default, lora = (Adapters({name: Adapter("org/base")}) for name in ("default", "lora"))
    found = published_files(tmp_path, None, default, with_card=False)
    assert found == ["adapter_config.json", "adapter_model.safetensors"]
    assert published_files(tmp_path, None, lora, with_card=False) == ["lora/adapter_config.json"]


def test_an_adapter_of_a_base_in_a_folder_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(hub_module.logger, "warning_once", warnings.append)
    files = model_files(tmp_path, Adapters({"default": Adapter(str(tmp_path)), "other": Adapter("org/base")}))
    assert files[0] == "adapter_config.json" and files[-1] == "other/adapter_model.safetensors"
    assert len(warnings) == 1 and f"The adapter names the folder {tmp_path} as its base model" in warnings[0]


def test_an_index_of_an_earlier_run_is_not_published(tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert set(published_files(tmp_path, None)) == WEIGHTS


def test_any_failure_on_the_way_is_one_sentence_with_its_cause_and_what_to_do() -> None:
    cause = ValueError("Invalid metadata:\n- bad")
    failures = [
        (ConnectionError("refused"), "refused. Mend"),
        (RuntimeError("upload"), "upload: Invalid metadata: - bad. Mend"),
        (RuntimeError("upload:\nInvalid metadata:\n- bad."), "upload: Invalid metadata: - bad. Mend"),
        (RuntimeError(), "Invalid metadata: - bad. Mend"),
    ]
    for error, expected in failures:
        error.__cause__ = cause if isinstance(error, RuntimeError) else None
        with pytest.raises(PushError, match=re.escape(f"it failed: {expected}")), explained_hub_errors("it failed"):
            raise error
    with pytest.raises(KeyError), explained_hub_errors("it failed"):
        raise KeyError("a bug is a bug")
