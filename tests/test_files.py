"""A file is written whole or not at all."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_rrd.files import write_json, written_whole


def test_the_new_file_takes_the_place_of_the_old_one_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with written_whole(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), written_whole(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_error_before_anything_is_written_is_that_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no ink"), written_whole(tmp_path / "a.txt"):
        raise ValueError("no ink")
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file_have_a_temporary_file_each(tmp_path: Path) -> None:
    with written_whole(tmp_path / "a.txt") as first, written_whole(tmp_path / "a.txt") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a.txt").read_text() == "first", "the one that ended last"


def test_the_permissions_are_those_of_open_and_missing_folders_are_made(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with written_whole(str(tmp_path / "deep" / "er" / "a.txt")) as temporary:
        temporary.write_text("")
    assert os.stat(tmp_path / "deep" / "er" / "a.txt").st_mode == os.stat(tmp_path / "plain").st_mode


def test_json_is_indented_and_takes_scalars_of_numpy_and_torch(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", {"a": np.float32(0.5), "b": [np.int64(2), torch.tensor(3)], "c": "ü"})
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [2, 3], "c": "ü"}
    assert path.read_text().startswith('{\n  "a": 0.5,') and path.read_text().endswith("}\n")


@pytest.mark.parametrize(
    ("value", "error"),
    [(float("nan"), ValueError), (np.float32("inf"), ValueError), ({1, 2}, TypeError), (Path("a"), TypeError)],
)
def test_what_json_cannot_say_is_an_error_and_nothing_is_written(
    tmp_path: Path, value: object, error: type[Exception]
) -> None:
    with pytest.raises(error):
        write_json(tmp_path / "a.json", {"a": value})
    assert list(tmp_path.iterdir()) == []
