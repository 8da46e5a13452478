"""The settings: their help, defaults, the ways they come in, and what is refused."""

import copy
import dataclasses
import functools
import io
import json
import pydoc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import HfArgumentParser, TrainingArguments

from hf_rrd import RelationalDistillationConfig
from hf_rrd.config import described

DEFAULTS = {
    "task_weight": 1.0,
    "kd_weight": "auto",
    "kd_temperature": "auto",
    "kd_loss": "kl",
    "relational_weight": "auto",
    "balance_losses": True,
    "relational_loss": "rrd",
    "layer_weight": "auto",
    "layer_pairs": None,
    "student_temperature": 0.1,
    "teacher_temperature": 0.02,
    "bank_size": 4096,
    "projection_dim": None,
    "matryoshka_dims": None,
    "student_projection": "centered",
    "teacher_projection": "center",
    "alignment_examples": 0,
    "student_pooling": "auto",
    "teacher_pooling": "auto",
    "teacher_model_init_kwargs": None,
    "student_format": "transformers",
}
FIELDS = {field.name: field for field in dataclasses.fields(RelationalDistillationConfig)}
OURS = sorted(FIELDS.keys() - {field.name for field in dataclasses.fields(TrainingArguments)})

GIVEN = {
    "kd_weight": 0.25,
    "relational_weight": 0.5,
    "balance_losses": False,
    "relational_loss": {"rrd": 1.0, "mse": 0.5},
    "layer_weight": 2.0,
    "layer_pairs": [[0, 1], [1, 3]],
    "bank_size": 128,
    "projection_dim": 64,
    "matryoshka_dims": [64, 16],
    "teacher_projection": "orthogonal",
    "teacher_pooling": "mean",
    "student_format": "sentence_transformers",
    "teacher_model_init_kwargs": {"revision": "main", "trust_remote_code": False},
}
"""Settings of every type, none of them the default."""


def settings(folder: Path, **changes: Any) -> RelationalDistillationConfig:
    return RelationalDistillationConfig(output_dir=str(folder), **changes)


def parsed(*arguments: str) -> RelationalDistillationConfig:
    (config,) = HfArgumentParser(RelationalDistillationConfig).parse_args_into_dataclasses(list(arguments))
    return config


@pytest.mark.parametrize("name", OURS)
def test_every_field_of_ours_has_help_of_some_words_without_a_percent_sign(name: str) -> None:
    text = FIELDS[name].metadata["help"]
    assert len(text.split()) >= 5
    assert text.endswith(".")
    assert "%" not in text  # argparse would read it


def test_the_fields_of_ours_have_the_defaults_of_the_design(tmp_path: Path) -> None:
    config = settings(tmp_path)
    assert {name: getattr(config, name) for name in OURS} == DEFAULTS


def test_the_command_line_without_our_arguments_gives_the_defaults_too(tmp_path: Path) -> None:
    config = parsed("--output_dir", str(tmp_path))
    assert {name: getattr(config, name) for name in OURS} == DEFAULTS


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--bank_size", "128"], "bank_size", 128),
        (["--bank_size", "0"], "bank_size", 0),
        (["--teacher_pooling", "mean"], "teacher_pooling", "mean"),
        (["--student_pooling", "cls"], "student_pooling", "cls"),
        (["--relational_weight", "0.5"], "relational_weight", 0.5),
        (["--relational_weight", "auto"], "relational_weight", "auto"),
        (["--kd_weight", "0.5"], "kd_weight", 0.5),
        (["--kd_weight", "auto"], "kd_weight", "auto"),
        (["--kd_loss", "dist"], "kd_loss", "dist"),
        (["--layer_weight", "2"], "layer_weight", 2.0),
        (["--layer_weight", "auto"], "layer_weight", "auto"),
        (["--layer_pairs", "[[0, 1], [1, 3]]"], "layer_pairs", [[0, 1], [1, 3]]),
        (["--no_balance_losses"], "balance_losses", False),
        (["--balance_losses", "False"], "balance_losses", False),
        (["--relational_loss", "own_space"], "relational_loss", "own_space"),
        (["--relational_loss", '{"rrd": 1, "mse": 0.5}'], "relational_loss", {"rrd": 1.0, "mse": 0.5}),
        (["--teacher_temperature", "5e-2"], "teacher_temperature", 0.05),
        (["--projection_dim", "64"], "projection_dim", 64),
        (["--matryoshka_dims", "[384, 256, 128, 64]"], "matryoshka_dims", [384, 256, 128, 64]),
        (["--student_projection", "linear"], "student_projection", "linear"),
        (["--teacher_projection", "orthogonal"], "teacher_projection", "orthogonal"),
        (
            ["--teacher_model_init_kwargs", '{"revision": "v2", "dtype": "bfloat16"}'],
            "teacher_model_init_kwargs",
            {"revision": "v2", "dtype": "bfloat16"},
        ),
    ],
)
def test_a_setting_comes_from_the_command_line(tmp_path: Path, arguments: list[str], name: str, value: Any) -> None:
    config = parsed("--output_dir", str(tmp_path), *arguments)
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)
    assert {other: getattr(config, other) for other in OURS if other != name} == {
        other: default for other, default in DEFAULTS.items() if other != name
    }


def test_there_are_no_more_settings_of_ours_than_can_be_read_at_once() -> None:
    assert len(OURS) == 21


@pytest.mark.parametrize("weight", ["5e-1", 0.5, np.float32(0.5), torch.tensor(0.5)], ids=repr)
def test_the_weight_of_a_relational_loss_may_come_in_another_type(tmp_path: Path, weight: Any) -> None:
    config = settings(tmp_path, relational_loss={"rrd": weight}, kd_weight=weight, relational_weight=weight)
    assert config.relational_loss == {"rrd": 0.5} and (config.kd_weight, config.relational_weight) == (0.5, 0.5)
    assert config.to_json_string().count("0.5") >= 3  # and can be written


def test_the_terms_of_one_relational_loss_and_of_several_are_read_alike(tmp_path: Path) -> None:
    assert settings(tmp_path).relational_terms == {"rrd": 1.0}
    several = {"rrd": 1.0, "mse": 0.5}
    for given in (several, json.dumps(several)):
        assert settings(tmp_path, relational_loss=given).relational_terms == several


@pytest.mark.parametrize("name", ["kd_loss", "student_projection", "teacher_projection"])
def test_the_command_line_offers_the_choices_and_refuses_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(SystemExit):
        parsed("--output_dir", str(tmp_path), f"--{name}", "nonsense")
    complaint = capsys.readouterr().err
    assert "invalid choice: 'nonsense'" in complaint
    assert FIELDS[name].metadata["choices"][0] in complaint


def test_the_help_of_the_command_line_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parsed("--help")
    shown = capsys.readouterr().out
    assert [name for name in OURS if f"--{name}" not in shown] == []


def test_settings_come_from_a_json_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"output_dir": str(tmp_path), **GIVEN}), encoding="utf-8")
    (config,) = HfArgumentParser(RelationalDistillationConfig).parse_json_file(str(file))
    assert {name: getattr(config, name) for name in OURS} == DEFAULTS | GIVEN


def test_settings_come_from_a_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        f"output_dir: {tmp_path}\nkd_weight: 25e-2\nrelational_weight: 5e-1\nbalance_losses: false\n"
        "relational_loss:\n  rrd: 1\n  mse: 5e-1\nbank_size: 128\nprojection_dim: 64\n"
        "matryoshka_dims: [64, 16]\n"
        "student_format: sentence_transformers\nlayer_weight: 2\nlayer_pairs: [[0, 1], [1, 3]]\n"
        "teacher_projection: orthogonal\nteacher_pooling: mean\n"
        "teacher_model_init_kwargs:\n  revision: main\n  trust_remote_code: false\n",
        encoding="utf-8",
    )
    (config,) = HfArgumentParser(RelationalDistillationConfig).parse_yaml_file(str(file))
    assert {name: getattr(config, name) for name in OURS} == DEFAULTS | GIVEN


@pytest.mark.parametrize("name", ["task_weight", "kd_temperature", "student_temperature", "teacher_temperature"])
def test_a_number_in_yaml_may_have_an_exponent_and_no_point(tmp_path: Path, name: str) -> None:
    file = tmp_path / "settings.yaml"  # 5e-2 is a string in YAML 1.1, which is what the parser reads
    file.write_text(f"output_dir: {tmp_path}\n{name}: 5e-2\n", encoding="utf-8")
    (config,) = HfArgumentParser(RelationalDistillationConfig).parse_yaml_file(str(file))
    assert getattr(config, name) == 0.05


def test_so_may_any_number_of_the_training_arguments_in_yaml(tmp_path: Path) -> None:
    given = {"learning_rate": "5e-4", "weight_decay": "1e-2", "adam_epsilon": "1e-8", "max_grad_norm": "1e0"}
    given |= {"num_train_epochs": "1e1", "neftune_noise_alpha": "5e0", "label_smoothing_factor": "1e-1"}
    whole = {
        "max_steps": "1e3",
        "save_total_limit": "1e1",
        "bank_size": "4e3",
        "seed": "1.0e+1",
        "projection_dim": "8e0",
    }
    file = tmp_path / "settings.yaml"
    lines = [f"{name}: {value}" for name, value in {**given, **whole}.items()]
    file.write_text(f"output_dir: {tmp_path}\nlr_scheduler_kwargs:\n  min_lr: 1e-6\n" + "\n".join(lines))
    (config,) = HfArgumentParser(RelationalDistillationConfig).parse_yaml_file(str(file))
    assert {name: getattr(config, name) for name in given} == {name: float(value) for name, value in given.items()}
    assert {name: getattr(config, name) for name in whole} == dict(zip(whole, [1000, 10, 4000, 10, 8], strict=True))
    assert {type(getattr(config, name)) for name in whole} == {int}
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-6}


@pytest.mark.parametrize("name", ["bank_size", "alignment_examples", "projection_dim"])
@pytest.mark.parametrize("value", [20.0, "20", "2e1", np.int64(20), np.float32(20), torch.tensor(20)], ids=repr)
def test_a_whole_number_may_come_in_another_type(tmp_path: Path, name: str, value: Any) -> None:
    config = settings(tmp_path, **{name: value})
    assert getattr(config, name) == 20
    assert type(getattr(config, name)) is int


@pytest.mark.parametrize("given", [(8, 4), ["8", 4.0], [8e0, "4e0"], np.array([8, 4]).tolist(), "[8, 4.0]"], ids=repr)
def test_widths_may_come_in_another_type(tmp_path: Path, given: Any) -> None:
    config = settings(tmp_path, matryoshka_dims=given)
    assert config.matryoshka_dims == [8, 4] and {type(each) for each in config.matryoshka_dims} == {int}
    assert json.loads(config.to_json_string())["matryoshka_dims"] == [8, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: value}, f"`{name}` must be positive, from 1e-6 to 1e6, got {value}. Try ")
            for name in ("kd_temperature", "student_temperature", "teacher_temperature")
            for value in (0.0, -0.1, float("nan"), float("inf"))
        ),
        *(
            ({name: value}, f"`{name}` must be 0 or more and finite, got {value}. Set it to 0 to turn the term off")
            for name in ("task_weight", "kd_weight", "relational_weight", "layer_weight")
            for value in (-1.0, float("nan"), float("inf"))
        ),
        (
            {"task_weight": 0.0, "kd_weight": 0.0, "relational_weight": 0.0},
            "`task_weight`, `kd_weight`, `relational_weight`, `layer_weight` are all 0, so there is nothing to train",
        ),
        *(
            ({"layer_pairs": value}, "`layer_pairs` must be a list of pairs of layers, counted from 0, got .* Try .*3")
            for value in ([], 2, "all", [[0]], [[0, 1, 2]], [0, 1], [[0, -1]], [[0, 1.5]], [[0, "1"]], [[True, 1]])
        ),
        ({"layer_pairs": "[[0, 1]"}, r"`layer_pairs` is no JSON: .*got '\[\[0, 1\]'"),
        ({"bank_size": -1}, "`bank_size` must be 0 or more, got -1. Try 4096"),
        ({"bank_size": "auto"}, "`bank_size` must be a whole number, got 'auto'"),
        ({"bank_size": None}, "`bank_size` must be a whole number, got None"),
        ({"bank_size": True}, "`bank_size` must be a whole number, got True"),
        ({"bank_size": 1.5}, "`bank_size` must be a whole number, got 1.5"),
        ({"bank_size": [128]}, r"`bank_size` must be a whole number, got \[128\]"),
        ({"projection_dim": 0}, "`projection_dim` must be 1 or more, got 0. Try 128, or leave it out"),
        ({"projection_dim": -8}, "`projection_dim` must be 1 or more, got -8"),
        *(
            ({"matryoshka_dims": value}, "`matryoshka_dims` must be a list of one width or more, got .* Try .384, 128")
            for value in ([], 64, "64", "384 64", {64: 1}, True)
        ),
        ({"matryoshka_dims": "[384, 64"}, r"`matryoshka_dims` is no JSON: .*got '\[384, 64'"),
        *(
            ({"matryoshka_dims": [8, value]}, f"`matryoshka_dims` must be a whole number, got {value!r}. Try ")
            for value in (True, 1.5, None, "half")
        ),
        *(
            ({"matryoshka_dims": [8, value]}, f"`matryoshka_dims` must be 1 or more, got {value}. Try ")
            for value in (0, -8)
        ),
        ({"matryoshka_dims": [8, 4, 8]}, r"`matryoshka_dims` must name each width once, got \[8, 4, 8\]"),
        (
            {"matryoshka_dims": [8], "relational_loss": "own_space"},
            r"`matryoshka_dims` is \[8\], and relational_loss='own_space' alone compares whole embeddings",
        ),
        ({"kd_weight": "much"}, "`kd_weight` must be a number, got 'much'"),
        ({"task_weight": "auto"}, "`task_weight` must be a number, got 'auto'"),
        ({"kd_loss": "crd"}, r"`kd_loss` must be one of \['kl', 'dist'\], got 'crd'"),
        ({"relational_loss": {"rrd": 1, "crd": 1}}, "`relational_loss` must be one of .*'rrd', .* or a dict .*'crd'"),
        ({"relational_loss": {}}, "`relational_loss` must be one of .*got {}"),
        ({"relational_loss": None}, "`relational_loss` must be one of .*got None"),
        ({"relational_loss": ["rrd"]}, r"`relational_loss` must be one of .*got \['rrd'\]"),
        ({"relational_loss": "{rrd: 1}"}, "`relational_loss` is no JSON: .*got '{rrd: 1}'"),
        ({"relational_loss": {"rrd": "much"}}, r"`relational_loss\['rrd'\]` must be a number, got 'much'"),
        *(
            ({"relational_loss": {"mse": 1, "rrd": value}}, "weights in `relational_loss` must be positive and finite")
            for value in (0, -1, float("nan"), float("inf"))
        ),
        (
            {"relational_loss": {"rrd": 1, "pkt": 1}, "per_device_train_batch_size": 2},
            "'pkt' compares .* `per_device_train_batch_size` is 2: .* always 0. Set it to 3 or more.$",
        ),
        ({"relational_loss": "crd"}, "`relational_loss` must be one of .*'rrd', 'infonce'.*got 'crd'"),
        ({"balance_losses": np.ones(2)}, r"`balance_losses` must be True or False, got array"),
        ({"balance_losses": "off"}, "`balance_losses` must be True or False, got 'off'"),
        (
            {"student_projection": "deep"},
            "`student_projection` must be one of .*'centered', 'linear', 'none'.*got 'deep'",
        ),
        ({"teacher_projection": "lda"}, "`teacher_projection` must be one of .*'none', 'center'.*got 'lda'"),
        ({"teacher_projection": "pca"}, "'pca' needs a `projection_dim`, got None"),
        ({"alignment_examples": 1}, "`alignment_examples` must be 0, or 2 or more to compare, got 1"),
        ({"alignment_examples": -1}, "`alignment_examples` must be 0 or more, got -1"),
        (
            {"alignment_examples": 9, "relational_weight": 0},
            "`alignment_examples` is 9, and without a relational loss",
        ),
        ({"learning_rate": "fast"}, "`learning_rate` must be a number, got 'fast'"),
        ({"max_steps": "1.5"}, "`max_steps` must be a whole number, got '1.5'"),
        ({"bank_size": float("inf")}, "`bank_size` must be a whole number, got inf"),
        (
            {"bank_size": 0, "per_device_train_batch_size": 1},
            "'rrd' compares .* `per_device_train_batch_size` is 1: .* always 0. Set it to 2 or more, or bank",
        ),
        (
            {"relational_loss": "pkt", "per_device_train_batch_size": 2},
            "'pkt' compares .* `per_device_train_batch_size` is 2: .* always 0. Set it to 3 or more.$",
        ),
        (
            {"relational_loss": "rkd_angle", "per_device_eval_batch_size": 1, "eval_strategy": "epoch"},
            "'rkd_angle' compares .* `per_device_eval_batch_size` is 1: .* always 0",
        ),
        ({"student_pooling": "sum"}, r"`student_pooling` must be one of \['auto', 'head', 'cls', .*got 'sum'"),
        ({"teacher_pooling": "sum"}, r"`teacher_pooling` must be one of \['auto', 'head', 'cls', .*got 'sum'"),
        ({"teacher_pooling": None}, r"`teacher_pooling` must be one of \['auto', 'head', 'cls', .*got None"),
        ({"teacher_model_init_kwargs": "{revision}"}, "`teacher_model_init_kwargs`.*revision"),
        ({"teacher_model_init_kwargs": '["main"]'}, "`teacher_model_init_kwargs`.*main"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_with_its_name_and_value(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"task_weight": 0.0},
        {"relational_weight": 0.0},
        {"task_weight": 0.0, "relational_weight": 0.0, "kd_weight": 1.0},
        {"task_weight": 0.0, "relational_weight": 0.0, "kd_weight": 0.0, "layer_weight": 1.0},
        {"layer_pairs": [[0, 0]]},
        {"task_weight": 0.0, "relational_weight": 0.0, "kd_weight": "auto"},
        {"relational_loss": {"rrd": 1e-6, "own_space": 1e6}},
        {"alignment_examples": 2, "relational_weight": "auto"},
        {"bank_size": 0},
        {"bank_size": 1},
        {"projection_dim": 1},
        {"matryoshka_dims": [1]},
        {"matryoshka_dims": [64, 384], "relational_loss": {"own_space": 1.0, "mse": 1.0}},
        {"student_temperature": 0.01},
        {"relational_loss": "mse", "bank_size": 0, "per_device_train_batch_size": 1},
        {"relational_loss": "pkt", "per_device_train_batch_size": 3},
        {"relational_loss": "pkt", "per_device_eval_batch_size": 1},
        {"relational_weight": 0.0, "bank_size": 0, "per_device_train_batch_size": 1},
    ],
)
def test_a_setting_at_the_end_of_its_range_is_taken(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = settings(tmp_path, **changes)
    assert {name: getattr(config, name) for name in changes} == changes


def middle_pool(outputs: Any, attention_mask: Tensor | None) -> Tensor:
    return outputs.last_hidden_state[:, 2]


class Pooling:
    def __call__(self, outputs: Any, attention_mask: Tensor | None) -> Tensor:
        return outputs.last_hidden_state[:, 2]


@pytest.mark.parametrize(
    ("pooling", "shown"),
    [
        (middle_pool, "middle_pool"),
        (Pooling(), "Pooling"),
        (functools.partial(middle_pool), "partial"),
        (lambda outputs, mask: outputs.last_hidden_state[:, 2], "<lambda>"),
    ],
)
def test_a_callable_pooling_is_written_by_its_name_and_kept_by_the_settings(
    tmp_path: Path, pooling: Any, shown: str
) -> None:
    config = settings(tmp_path, student_pooling=pooling, teacher_pooling=pooling)
    written = json.loads(json.dumps(config.to_dict()))
    shared = restored(config)
    for name in ("student_pooling", "teacher_pooling"):
        assert written[name].endswith(shown)
        assert getattr(shared, name).endswith(shown)
        assert getattr(config, name) is pooling
    assert json.loads(config.to_json_string())["student_pooling"].endswith(shown)


def restored(config: RelationalDistillationConfig) -> RelationalDistillationConfig:
    """By the way that `training_args.bin` goes."""
    buffer = io.BytesIO()
    torch.save(config, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_what_is_pickled_has_every_other_setting_unchanged(tmp_path: Path) -> None:
    config = settings(tmp_path, **GIVEN, learning_rate=0.5)
    shared = restored(config)
    changed = {"teacher_model_init_kwargs": {"revision": "main", "trust_remote_code": False}}
    assert {name: getattr(shared, name) for name in OURS} == DEFAULTS | GIVEN | changed
    assert shared.learning_rate == 0.5


SECRET = "hf_abcdefghijklmnop"
SECRETS: dict[str, Any] = {
    "token": SECRET,
    "use_auth_token": SECRET,
    "hf_token": SECRET,
    "proxies": {"https": f"http://someone:{SECRET}@proxy:8080"},
    "storage_options": {"headers": [{"Authorization": f"Bearer {SECRET}"}]},
    "anything_else": SECRET,
}


def test_what_may_be_a_secret_of_the_teachers_stays_with_the_settings_alone(tmp_path: Path) -> None:
    given = SECRETS | {"revision": "main", "dtype": torch.half, "trust_remote_code": False}
    config = settings(tmp_path, teacher_model_init_kwargs=given)
    buffer = io.BytesIO()
    torch.save(config, buffer)
    written = json.dumps(config.to_dict()) + config.to_json_string() + json.dumps(config.to_sanitized_dict())
    assert SECRET not in written + str(config) + repr(config)
    assert SECRET.encode() not in buffer.getvalue()
    shown = config.to_dict()["teacher_model_init_kwargs"]
    assert {name: shown.pop(name) for name in SECRETS} == {name: f"<{name.upper()}>" for name in SECRETS}
    assert shown.pop("dtype") in ("float16", "torch.float16")
    assert shown == {"revision": "main", "trust_remote_code": False}
    assert config.teacher_model_init_kwargs == given


@pytest.mark.parametrize("given", [f'{{"token": "{SECRET}"', f'["{SECRET}"]', {1: SECRET}, SECRET])
def test_arguments_for_the_teacher_are_refused_without_being_shown(tmp_path: Path, given: Any) -> None:
    with pytest.raises(ValueError, match="`teacher_model_init_kwargs` must be a dict .*, got a ") as caught:
        settings(tmp_path, teacher_model_init_kwargs=given)
    assert SECRET not in str(caught.value)


def test_the_help_of_a_field_is_its_text_in_the_docstring() -> None:
    shown = " ".join(
        pydoc.render_doc(RelationalDistillationConfig, renderer=pydoc.plaintext).replace("|", " ").split()
    )
    assert [name for name in OURS if f"{name}: {FIELDS[name].metadata['help']}" not in shown] == []


def test_help_is_found_in_a_docstring_without_its_indentation() -> None:
    @dataclasses.dataclass
    class Settings(TrainingArguments):
        ours: int = 0

    Settings.__doc__ = "One line.\n\nArgs:\n    ours: In two\n        lines.\n    theirs: No field.\n"  # Python 3.13's
    assert described(Settings).__dataclass_fields__["ours"].metadata["help"] == "In two lines."


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_the_settings_keeps_tokens_and_poolings(tmp_path: Path, copied: Any) -> None:
    kwargs = {"token": "hf_abcdefghijklmnop"}
    config = settings(tmp_path, hub_token="hf_abc", teacher_model_init_kwargs=kwargs, student_pooling=middle_pool)
    new = copied(config)
    assert (new.hub_token, new.teacher_model_init_kwargs, new.student_pooling) == ("hf_abc", kwargs, middle_pool)
    new.bank_size = 1
    assert config.bank_size == 4096


@pytest.mark.parametrize("show", [str, repr])
def test_the_teachers_token_is_not_shown_where_the_settings_are_logged(tmp_path: Path, show: Any) -> None:
    secret = "hf_abcdefghijklmnop"  # the Trainer's own scripts log `f"Training parameters {training_args}"`
    assert secret not in show(settings(tmp_path, hub_token=secret))
    assert secret not in show(settings(tmp_path, teacher_model_init_kwargs={"token": secret}))


def test_a_misspelt_setting_is_refused_with_what_may_be_meant(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="has no argument `teacher_temprature`. Did you mean `teacher_temperature`?"):
        settings(tmp_path, teacher_temprature=0.1)
    with pytest.raises(TypeError, match="Config has no argument `xyz`.$"):
        settings(tmp_path, xyz=0.1)
    with pytest.raises(TypeError, match="Config has no argument `include_own`."):
        settings(tmp_path, include_own=False)  # the losses have it still
