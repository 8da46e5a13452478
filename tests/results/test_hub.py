"""A student's life on a Hub: distilled from a teacher by name, pushed with its card, loaded without this package."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hf_rrd.results import hub as hub_files
from hf_rrd.results.hub import model_files, published_files
from tests.builders import tiny_vit
from tests.loopback_hub import LoopbackHub, header_errors, run_script

WEIGHTS = {"config.json", "model.safetensors"}
PICTURES = {f"figures/{name}.png" for name in ("losses", "similarities", "embeddings", "reliability")}
STUDENT = WEIGHTS | {"preprocessor_config.json", "README.md"} | PICTURES

# What each process begins with: a teacher on the Hub, and a trainer of a student under it.
SETUP = """
import sys
import torch
import transformers
from safetensors.torch import save_file
from transformers import ViTImageProcessor
import hf_rrd.results.report
from tests.builders import Images, tiny_vit, trainer

transformers.logging.set_verbosity_warning()
hf_rrd.results.report.MOST = 3
data = Images(24)
processor = ViTImageProcessor(size={"height": 16, "width": 16})

def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

def new_trainer(folder="student", **given):
    given = {"teacher": tiny_vit(width=24, seed=1), "processing_class": processor, "eval_dataset": data} | given
    return trainer(folder, train_dataset=data, compute_metrics=accuracy, **given)

def logits(model):
    with torch.no_grad():
        return model.eval()(pixel_values=data.pixels).logits
"""


def run(hub: LoopbackHub, source: str, home: Path, *args: str, **how: Any) -> str:
    done = run_script(hub, SETUP + source, *args, home=home, **how)
    assert done.returncode == 0, done.stderr
    return done.stderr


def header_of(files: dict[str, bytes]) -> Any:
    card = files["README.md"].decode()
    assert header_errors(card) == []
    return ModelCard(card).data


def texts_of(files: dict[str, bytes]) -> str:
    return "\n".join(data.decode() for name, data in files.items() if not name.endswith((".png", ".safetensors")))


@pytest.mark.slow
def test_the_whole_life_of_a_student(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        run(
            hub,
            """
tiny_vit(width=24, seed=1).push_to_hub("teacher")
processor.push_to_hub("teacher")
""",
            tmp_path / "publisher",
        )
        run(
            hub,
            """
run = new_trainer(teacher="tester/teacher")
run.train()
run.evaluate(metric_key_prefix="test")
run.report()
run.push_to_hub(dataset_tags="org/images", license="apache-2.0")
run.train()
run.evaluate(metric_key_prefix="test")
run.report()
run.push_to_hub("Once more", dataset_tags="org/images", license="apache-2.0")
save_file({"logits": logits(run.model), "pixels": data.pixels}, "expected.safetensors")
""",
            tmp_path / "student",
        )
        files = hub.files("tester/student")
        assert files.keys() == STUDENT
        assert hub.commits("tester/student") == ["initial commit", "End of training", "Once more"]
        header = header_of(files)
        assert header.base_model == header.distilled_from == "tester/teacher"
        assert header.eval_results[0].metric_type == "accuracy" and header.datasets == ["org/images"]
        revision = hub.shas("tester/teacher")[-1]
        assert f"[tester/teacher](https://huggingface.co/tester/teacher) at revision `{revision[:12]}`" in texts_of(
            files
        )
        assert str(tmp_path) not in texts_of(files) and hub.token not in texts_of(files)

        usage = re.search(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)[1]  # type: ignore[index]
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


@pytest.mark.slow
def test_pushes_from_checkpoints_hold_the_student_and_resume(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        run(
            hub,
            """
settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "push_to_hub": True}
secret = sys.argv[1]
for strategy in ("every_save", "checkpoint", "all_checkpoints"):
    how = {"hub_strategy": strategy, "hub_always_push": True, "save_total_limit": 1}
    run = new_trainer(strategy, hub_token=secret, **how, **settings)
    run.train()
    run._finish_current_push()
    assert all(job.exception() is None for job in run.push_in_progress.jobs)
""",
            tmp_path / "student",
            hub.token,
            token=False,
        )
        assert list((tmp_path / "student").glob("*/_push-*")) == [], "what was kept for a push is gone after it"
        every = hub.files("tester/every_save")
        assert every.keys() == WEIGHTS | {"preprocessor_config.json"}
        progress = [f"Training in progress, step {step}" for step in (1, 2, 3)]
        assert hub.commits("tester/every_save") == ["initial commit", *progress]
        last = hub.files("tester/checkpoint")
        inside = {name.removeprefix("last-checkpoint/") for name in last if name.startswith("last-checkpoint/")}
        assert {"optimizer.pt", "trainer_state.json", "_relational_distillation.safetensors"} | WEIGHTS <= inside
        folders = {name.split("/")[0] for name in hub.files("tester/all_checkpoints") if "/" in name}
        assert folders == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
        for repo in ("every_save", "checkpoint", "all_checkpoints"):
            for name, data in hub.files(f"tester/{repo}").items():
                assert hub.token.encode() not in data, f"the token is in {repo}/{name}"

        run(
            hub,
            """
from huggingface_hub import snapshot_download
folder = snapshot_download("tester/checkpoint", allow_patterns="last-checkpoint/*", local_dir="there")
run = new_trainer("resumed", save_strategy="no", max_steps=5)
run.train(resume_from_checkpoint="there/last-checkpoint")
assert run.state.global_step == 5
run.push_to_hub()
""",
            tmp_path / "resumed",
        )
        assert hub.files("tester/resumed").keys() == WEIGHTS | {
            "preprocessor_config.json",
            "README.md",
            "figures/losses.png",
        }
        assert hub.unhandled == []


@pytest.mark.slow
def test_without_a_token_or_a_network_all_but_the_push_works(tmp_path: Path) -> None:
    source = """
import os
saves = {"save_strategy": "steps", "save_steps": 2, "hub_strategy": "every_save"}
run = new_trainer("student", push_to_hub=sys.argv[1] == "on", **saves)
run.train()
run.save_model()
print(run.evaluate()["eval_accuracy"])
try:
    run.push_to_hub()
except OSError as error:
    print(error)
loaded = transformers.AutoModelForImageClassification.from_pretrained("student")
assert torch.equal(logits(loaded), logits(run.model)) and os.path.exists("student/README.md")
"""
    for name, token, environment in (
        ("no token", False, {}),
        ("offline", True, {"HF_HUB_OFFLINE": "1"}),
        ("down", True, {}),
    ):
        with LoopbackHub() as hub:
            if name == "down":
                hub.down()
            switch = "on" if name == "down" else "off"
            done = run_script(hub, SETUP + source, switch, home=tmp_path / name, token=token, env=environment)
            assert done.returncode == 0, done.stderr
            accuracy, failure = done.stdout.strip().splitlines()[-2:]
            assert 0 <= float(accuracy) <= 1
            assert failure.startswith("the student is in student, and not on the Hub: ")
            assert failure.endswith("(`hf auth login`, or hub_token=), and call trainer.push_to_hub().")
            assert "\n" not in failure
            assert hub.token not in failure
            warned = "`push_to_hub` is on, and the student has no place on the Hub yet" in done.stderr
            assert warned == (switch == "on")


@pytest.mark.slow
def test_a_private_student_on_a_branch_with_its_own_name(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        run(
            hub,
            """
run = new_trainer("here", hub_model_id="tester/there", hub_private_repo=True, max_steps=1)
run.train()
run.push_to_hub(blocking=False).result()
""",
            tmp_path,
        )
        assert hub.is_private("tester/there")
        files = hub.files("tester/there")
        assert (
            'from_pretrained("tester/there")' in files["README.md"].decode()
            and "# there\n" in files["README.md"].decode()
        )
        assert hub.unhandled == []


def test_only_the_student_its_processor_card_and_pictures_are_published(tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path)
    for name in (
        *("README.md", "training_args.bin", "trainer_state.json", "all_results.json", "model_card.json", "notes.txt"),
        *("distillation_report.json", "pytorch_model.bin", "optimizer.pt", "code.py", "figures/losses.png"),
        *(
            "figures/mine.png",
            "teacher/model.safetensors",
            "teacher/config.json",
            "runs/events",
            "_push-1/config.json",
        ),
        *("checkpoint-3/model.safetensors", "vocab.txt"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    expected = {"config.json", "model.safetensors", "README.md", "figures/losses.png"}
    assert set(published_files(str(tmp_path), None)) == expected

    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            Path(folder, "vocab.txt").write_text("")
            Path(folder, "not_there.txt").write_text("")

    assert set(published_files(str(tmp_path), Tokenizer())) == expected | {"vocab.txt"}


def test_shards_and_code_of_its_own_are_published(tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path, max_shard_size="20KB")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "code.Model"}}))
    (tmp_path / "code.py").write_text("")
    found = set(published_files(str(tmp_path), None))
    shards = {file.name for file in tmp_path.glob("model-*.safetensors")}
    assert len(shards) > 1 and found == shards | {"config.json", "model.safetensors.index.json", "code.py"}
    assert sum(len(load_file(tmp_path / shard)) for shard in shards) == len(tiny_vit().state_dict())


def test_a_push_has_links_of_a_checkpoint_or_copies_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"weights")
    hub_files.link(source, tmp_path / "linked")
    assert (tmp_path / "linked").stat().st_ino == source.stat().st_ino

    def refuse(*paths: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(hub_files.os, "link", refuse)
    hub_files.link(source, tmp_path / "copied")
    assert (tmp_path / "copied").read_bytes() == b"weights"
    assert (tmp_path / "copied").stat().st_ino != source.stat().st_ino


def test_adapters_are_published_without_a_base_that_lies_beside_them(tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors", "lora/adapter_config.json", "lora/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert model_files(str(tmp_path), ["default"]) == ["adapter_config.json", "adapter_model.safetensors"]
    assert model_files(str(tmp_path), ["lora"]) == ["lora/adapter_config.json"]


def test_an_index_of_an_earlier_run_is_not_published(tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert set(model_files(str(tmp_path))) == WEIGHTS


def test_any_failure_on_the_way_is_one_sentence_with_its_cause_and_what_to_do() -> None:
    cause = ValueError("Invalid metadata:\n- bad")
    failures = [
        (ConnectionError("refused"), "refused. See that"),
        (RuntimeError("upload"), "upload: Invalid metadata: - bad. Then"),
    ]
    for error, expected in failures:
        error.__cause__ = cause if isinstance(error, RuntimeError) else None
        with (
            pytest.raises(hub_files.PushError, match=re.escape(f"it failed: {expected}")),
            hub_files.explained_hub_errors("it failed"),
        ):
            raise error
    with pytest.raises(KeyError), hub_files.explained_hub_errors("it failed"):
        raise KeyError("a bug is a bug")


@pytest.mark.slow
def test_an_upload_that_the_hub_refuses_is_a_push_error_and_a_warning_while_saving(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        said = run(
            hub,
            """
import hf_rrd.results.hub
run = new_trainer("student", push_to_hub=True, max_steps=1)
run.train()
for refused in ({"language": "no language"}, {"tags": "fine"}):
    try:
        run.push_to_hub(**refused)
    except hf_rrd.results.hub.PushError as error:
        print(error, file=sys.stderr)
try:
    new_trainer("a name with spaces", push_to_hub=True)
except ValueError as error:
    print("at construction:", error, file=sys.stderr)
""",
            tmp_path,
        )
        assert hub.files("tester/student").keys() >= WEIGHTS
    assert "the student is in student, and not on the Hub: " in said and "language" in said
    assert "at construction: Repo id must" in said
