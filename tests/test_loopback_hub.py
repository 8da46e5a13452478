"""The Hub that the tests push to refuses what the Hub refuses, and gives back what it was given."""

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.loopback_hub import GIT_ATTRIBUTES, LoopbackHub, header_errors, run_script

INDEX = """---
model-index:
- name: student
  results:
  - task: {type: image-classification}
    dataset: {type: uoft-cs/cifar10, name: CIFAR-10}
    metrics: [{type: accuracy, value: 0.5}]
---
"""


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub
        assert hub.unhandled == []


def run(hub: LoopbackHub, source: str, *args: str, home: Path, **given: Any) -> Any:
    """What a script that succeeds prints last, which is JSON."""
    done = run_script(hub, source, *args, home=home, **given)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ask(hub: LoopbackHub, method: str, path: str, body: bytes = b"", token: str | None = None) -> tuple[int, str]:
    """The status and the text of an answer, without the client that checks things itself."""
    address = path if path.startswith("http") else hub.url + path
    request = urllib.request.Request(address, data=body, method=method)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def create(hub: LoopbackHub, name: str = "student", **settings: Any) -> None:
    status, _ = ask(hub, "POST", "/api/repos/create", json.dumps({"name": name} | settings).encode(), hub.token)
    assert status == 200


def commit(hub: LoopbackHub, operation: str, **value: Any) -> tuple[int, str]:
    """Commit one operation to tester/student."""
    lines = [{"key": "header", "value": {"summary": "change"}}, {"key": operation, "value": value}]
    body = b"\n".join(json.dumps(line).encode() for line in lines)
    return ask(hub, "POST", "/api/models/tester/student/commit/main", body, hub.token)


def test_what_a_trainer_pushes_loads_by_name_and_by_commit_where_hf_rrd_is_not_installed(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    push = """
        import json
        from tests.builders import Images, tiny_vit
        from transformers import Trainer, TrainingArguments
        args = TrainingArguments("student", max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
        trainer = Trainer(tiny_vit(), args, train_dataset=Images())
        first = trainer.push_to_hub(commit_message="First").oid
        trainer.train()
        second = trainer.push_to_hub(commit_message="Second").oid
        print(json.dumps([first, second]))
    """
    load = """
        import json, sys
        from pathlib import Path
        import huggingface_hub, transformers
        first, second = sys.argv[1:]
        try:
            import hf_rrd
        except ImportError:
            for place, revision in {"newest": "main", "second": second, "first": first}.items():
                transformers.AutoModel.from_pretrained("tester/student", revision=revision).save_pretrained(place)
            snapshot = Path(huggingface_hub.snapshot_download("tester/student", revision=first))
            info = huggingface_hub.model_info("tester/student")
            print(json.dumps([snapshot.name, sorted(path.name for path in snapshot.iterdir()), info.card_data.tags]))
    """
    shas = run(hub, push, home=tmp_path / "pusher")
    snapshot, names, tags = run(hub, load, *shas, home=tmp_path / "loader", token=False, without_hf_rrd=True)

    assert hub.commits("tester/student") == ["initial commit", "First", "Second"]
    assert hub.shas("tester/student")[1:] == shas
    for place, sha in (("newest", shas[1]), ("second", shas[1]), ("first", shas[0])):
        pushed = safetensors.torch.load(hub.files("tester/student", sha)["model.safetensors"])
        loaded = safetensors.torch.load_file(tmp_path / "loader" / place / "model.safetensors")
        body = {name: weight for name, weight in loaded.items() if "pooler" not in name}  # a head that nobody pushed
        assert body and all(torch.equal(weight, pushed[f"vit.{name}"]) for name, weight in body.items())
    first, second = (hub.files("tester/student", sha)["model.safetensors"] for sha in shas)
    assert first != second
    assert (snapshot, tags) == (shas[0], ["generated_from_trainer"])
    assert names == [".gitattributes", "README.md", "config.json", "model.safetensors", "training_args.bin"]


def test_a_training_run_pushes_its_checkpoints_as_it_goes(hub: LoopbackHub, tmp_path: Path) -> None:
    source = """
        from tests.builders import Images, tiny_vit
        from transformers import Trainer, TrainingArguments
        quiet = dict(max_steps=2, save_steps=1, save_strategy="steps", report_to=[], use_cpu=True)
        for strategy in ("every_save", "checkpoint", "all_checkpoints"):
            args = TrainingArguments(
                strategy, push_to_hub=True, hub_private_repo=True, hub_strategy=strategy, hub_always_push=True, **quiet
            )
            trainer = Trainer(tiny_vit(), args, train_dataset=Images())
            trainer.train()
            trainer.push_to_hub(commit_message="Last")
        print(0)
    """
    run(hub, source, home=tmp_path)

    folders = {name: {path.split("/")[0] for path in hub.files(name) if "/" in path} for name in hub.repos}
    assert folders == {
        "tester/every_save": set(),
        "tester/checkpoint": {"last-checkpoint"},
        "tester/all_checkpoints": {"checkpoint-1", "checkpoint-2"},
    }
    assert all(hub.is_private(name) and hub.commits(name)[-1] == "Last" for name in hub.repos)


def test_branches_tags_folders_and_deletions_are_kept_apart(hub: LoopbackHub, tmp_path: Path) -> None:
    source = """
        import json
        from pathlib import Path
        from huggingface_hub import HfApi, hf_hub_download
        api, name = HfApi(), "tester/student"
        Path("folder/deep").mkdir(parents=True)
        Path("folder/deep/a.txt").write_text("a")
        Path("folder/b.bin").write_bytes(b"b" * 1000)
        api.create_repo(name)
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path="folder", commit_message="One")
        api.create_branch(name, branch="other/branch")
        api.create_tag(name, tag="v1")
        api.upload_folder(repo_id=name, folder_path="folder/deep", path_in_repo="sub", revision="other/branch")
        api.upload_folder(repo_id=name, folder_path="folder/deep", delete_patterns="*.bin", commit_message="Two")
        read = Path(hf_hub_download(name, "deep/a.txt", revision="v1")).read_text()
        refs = api.list_repo_refs(name)
        print(json.dumps({
            "read": read,
            "refs": sorted(ref.name for ref in refs.branches + refs.tags),
            "listed": api.list_repo_files(name, revision="v1"),
            "log": [entry.title for entry in api.list_repo_commits(name)],
            "sizes": {entry.path: entry.size for entry in api.list_repo_tree(name, revision="v1")
                      if hasattr(entry, "size")},
        }))
    """
    told = run(hub, source, home=tmp_path)

    assert told == {
        "read": "a",
        "refs": ["main", "other/branch", "v1"],
        "listed": [".gitattributes", "b.bin", "deep/a.txt"],
        "log": ["Two", "One", "initial commit"],
        "sizes": {".gitattributes": len(GIT_ATTRIBUTES), "b.bin": 1000},
    }
    assert hub.files("tester/student") == {"a.txt": b"a", "deep/a.txt": b"a"}
    assert hub.files("tester/student", "v1") == {"b.bin": b"b" * 1000, "deep/a.txt": b"a"}
    assert sorted(hub.files("tester/student", "other/branch")) == ["b.bin", "deep/a.txt", "sub/a.txt"]


def test_who_lacks_the_token_neither_writes_nor_sees_what_is_private(hub: LoopbackHub, tmp_path: Path) -> None:
    source = """
        import json
        from huggingface_hub import HfApi, hf_hub_download
        api = HfApi()
        def error(function, *args, **given):
            try:
                function(*args, **given)
            except Exception as caught:
                return [type(caught).__name__, getattr(getattr(caught, "response", None), "status_code", 0)]
        file = {"path_or_fileobj": b"x", "path_in_repo": "x.txt"}
        print(json.dumps({
            "create": error(api.create_repo, "tester/new"),
            "write": error(api.upload_file, repo_id="tester/student", **file),
            "public": error(api.model_info, "tester/student"),
            "private": error(api.model_info, "tester/secret"),
            "private file": error(hf_hub_download, "tester/secret", "README.md"),
            "card": error(api.upload_file, repo_id="tester/student", path_or_fileobj=b"x", path_in_repo="README.md"),
            "absent": error(hf_hub_download, "tester/student", "absent.txt"),
            "revision": error(api.model_info, "tester/student", revision="f" * 40),
        }))
    """
    create(hub)
    create(hub, "secret", visibility="private")
    none = run(hub, source, home=tmp_path / "none", token=False)
    wrong = run(hub, source, home=tmp_path / "wrong", token="hf_of_someone_else")
    assert hub.commits("tester/student") == hub.commits("tester/secret") == ["initial commit"]
    right = run(hub, source, home=tmp_path / "right")

    nothing_there = ["RepositoryNotFoundError", 401]
    assert none == {
        "create": ["HfHubHTTPError", 401],
        "write": nothing_there,
        "public": None,
        "private": nothing_there,
        "private file": nothing_there,
        "card": nothing_there,
        "absent": ["RemoteEntryNotFoundError", 404],
        "revision": ["RevisionNotFoundError", 404],
    }
    assert wrong == dict.fromkeys(none, ["HfHubHTTPError", 401])
    assert right == dict.fromkeys(none) | {
        "private file": ["RemoteEntryNotFoundError", 404],
        "absent": ["RemoteEntryNotFoundError", 404],
        "revision": ["RevisionNotFoundError", 404],
    }
    assert list(hub.files("tester/student")) == ["README.md", "x.txt"]


def test_a_name_is_given_once_and_only_below_the_users_own(hub: LoopbackHub) -> None:
    create(hub)
    for asked, expected in (
        ({"name": "student"}, 409),
        ({"name": "x", "organization": "org"}, 403),
        ({"name": "-"}, 400),
    ):
        assert ask(hub, "POST", "/api/repos/create", json.dumps(asked).encode(), hub.token)[0] == expected
    assert list(hub.repos) == ["tester/student"]


def test_an_invalid_card_is_refused_before_the_push_and_at_the_commit(hub: LoopbackHub, tmp_path: Path) -> None:
    source = """
        import json, sys
        from huggingface_hub import HfApi
        try:
            card = sys.argv[1].encode()
            HfApi().upload_file(repo_id="tester/student", path_in_repo="README.md", path_or_fileobj=card)
        except ValueError as error:
            print(json.dumps(str(error)))
    """
    create(hub)
    told = run(hub, source, "---\nlicense: Apache 2.0\n---\n", home=tmp_path)
    assert 'Invalid metadata in README.md.\n- "license" must be one of' in told

    status, text = commit(hub, "file", path="README.md", content="LS0tCmxpY2Vuc2U6IDEKLS0tCg==")  # license: 1
    assert status == 400 and "Invalid metadata in README.md" in text
    assert hub.commits("tester/student") == ["initial commit"]


@pytest.mark.skipif(
    version("huggingface_hub").startswith("1."),
    reason="ModelCard.validate of huggingface_hub 1 asks huggingface.co alone",
)
def test_a_card_validates_itself_and_is_pushed(hub: LoopbackHub, tmp_path: Path) -> None:
    source = """
        import json, sys
        from huggingface_hub import ModelCard
        fine, bad = (ModelCard(card, ignore_metadata_errors=True) for card in sys.argv[1:])
        fine.push_to_hub("tester/student")
        try:
            bad.validate()
        except ValueError as error:
            print(json.dumps(str(error)))
    """
    create(hub)
    told = run(hub, source, INDEX, "---\nlicense: Apache 2.0\n---\n", home=tmp_path)
    assert told.startswith('- Error: "license" must be one of')
    assert list(hub.files("tester/student")) == ["README.md"]


@pytest.mark.parametrize(
    ("card", "error"),
    [
        ("no header", None),
        (INDEX, None),
        ("---\nlanguage: [en, de]\nbase_model: org/name\ndatasets: cifar10\ntags: [a]\n---\n", None),
        ("---\na: [\n---\n", "bad YAML"),
        ("---\n- a\n---\n", "must be of type object"),
        ("---\nmodel-index: {}\n---\n", '"model-index" must be an array'),
        (INDEX.replace("name: student", "other: student"), '"model-index[0].name" is required'),
        (INDEX.replace("task: {type: image-classification}", "a: b"), '"model-index[0].results[0].task" is required'),
        (INDEX.replace("type: uoft-cs/cifar10, ", ""), '"model-index[0].results[0].dataset.type" is required'),
        (INDEX.replace("uoft-cs/cifar10", "CIFAR 10"), "fails to match the required pattern"),
        (INDEX.replace(", name: CIFAR-10", ""), '"model-index[0].results[0].dataset.name" is required'),
        (INDEX.replace(", value: 0.5", ""), '"model-index[0].results[0].metrics[0].value" is required'),
        (INDEX.replace("metrics: [{type: accuracy, value: 0.5}]", "metrics: {}"), 'metrics" must be an array'),
        ("---\nlicense: [mit]\n---\n", '"license" must be a string'),
        ("---\npipeline_tag: 3\n---\n", '"pipeline_tag" must be a string'),
        ("---\ntags: a\n---\n", '"tags" must be an array'),
        ("---\nlanguage: english\n---\n", "ISO 639"),
        ("---\nlanguage: [no]\n---\n", '"language" must be a string'),
        ("---\nbase_model: /home/me/teacher\n---\n", "Use a model id from https://hf.co/models."),
        ("---\ndatasets: [my data]\n---\n", "If possible, use a dataset id"),
    ],
)
def test_a_header_has_the_keys_and_types_that_the_hub_asks_for(card: str, error: str | None) -> None:
    errors = header_errors(card)
    assert errors == [] if error is None else [error in text for text in errors] == [True], errors


def test_a_file_is_kept_by_lfs_only_if_it_was_announced_and_matches_its_sum(hub: LoopbackHub) -> None:
    create(hub)
    data = b"weights"
    oid = hashlib.sha256(data).hexdigest()
    assert ask(hub, "PUT", f"/lfs/{oid}", data)[0] == 403

    announced = json.dumps({"objects": [{"oid": oid, "size": len(data)}]}).encode()
    assert ask(hub, "POST", "/tester/student.git/info/lfs/objects/batch", announced)[0] == 401
    answer = json.loads(ask(hub, "POST", "/tester/student.git/info/lfs/objects/batch", announced, hub.token)[1])
    upload = answer["objects"][0]["actions"]["upload"]["href"]
    assert ask(hub, "PUT", upload, b"others!")[0] == 400
    assert commit(hub, "lfsFile", path="model.safetensors", oid=oid, size=len(data))[0] == 400
    assert ask(hub, "PUT", upload, data)[0] == 200
    assert commit(hub, "lfsFile", path="model.safetensors", oid=oid, size=len(data))[0] == 200
    assert hub.files("tester/student") == {"model.safetensors": data}
    assert commit(hub, "file", path="model.bin", content="eA==")[0] == 400  # not by LFS, as it should be


def test_an_outage_is_an_error_and_is_over_when_the_hub_is_up(hub: LoopbackHub, tmp_path: Path) -> None:
    source = """
        import json
        from huggingface_hub import HfApi
        try:
            HfApi().create_repo("student", exist_ok=True)
            print(json.dumps(["created"]))
        except Exception as error:
            print(json.dumps([kind.__name__ for kind in type(error).__mro__]))
    """
    hub.down()
    assert "ConnectError" in run(hub, source, home=tmp_path)
    hub.up()
    hub.fail(503)
    assert "HfHubHTTPError" in run(hub, source, home=tmp_path)
    hub.up()
    assert run(hub, source, home=tmp_path) == ["created"]


def test_a_metric_loads_from_a_space(hub: LoopbackHub, tmp_path: Path) -> None:
    push = """
        from pathlib import Path
        from huggingface_hub import HfApi
        module = '''
        import datasets
        import evaluate
        class Total(evaluate.Metric):
            def _info(self):
                features = datasets.Features({"predictions": datasets.Value("float32")})
                return evaluate.MetricInfo(description="", citation="", features=features)
            def _compute(self, predictions):
                return {"total": sum(predictions)}
        '''
        import textwrap
        Path("total").mkdir()
        Path("total/total.py").write_text(textwrap.dedent(module))
        Path("total/README.md").write_text("---\\ntitle: Total\\nsdk: gradio\\n---\\n")
        HfApi().create_repo("tester/total", repo_type="space", space_sdk="gradio")
        HfApi().upload_folder(repo_id="tester/total", repo_type="space", folder_path="total")
        print(0)
    """
    load = """
        import evaluate, json
        print(json.dumps(evaluate.load("tester/total").compute(predictions=[1.0, 2.5])))
    """
    run(hub, push, home=tmp_path / "pusher")
    assert sorted(hub.files("spaces/tester/total")) == ["README.md", "total.py"]
    assert run(hub, load, home=tmp_path / "loader", token=False, without_hf_rrd=True) == {"total": 3.5}


def test_hf_rrd_cannot_be_imported_in_a_script_that_leaves_it_out(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "hf_rrd.py").write_text("")  # in the folder that the script runs in
    source = """
        import importlib.util, json, sys
        found = importlib.util.find_spec("hf_rrd") is not None
        try:
            from hf_rrd import RelationalDistillationTrainer
            print(json.dumps([found, sys.argv[1], ""]))
        except ImportError as error:
            print(json.dumps([found, sys.argv[1], type(error).__name__]))
    """
    told = run(hub, source, "argument", home=tmp_path, without_hf_rrd=True)
    assert told == [False, "argument", "ModuleNotFoundError"]


def test_what_no_route_is_for_is_kept() -> None:
    with LoopbackHub() as hub:
        assert ask(hub, "GET", "/api/papers/1")[0] == 404
        assert ask(hub, "POST", "/api/validate-yaml", b"not JSON")[0] == 400
        assert [entry.split(":")[0] for entry in hub.unhandled] == ["GET /api/papers/1", "POST /api/validate-yaml"]
