"""Triton's kernels against what they stand for, in PyTorch: on a GPU, and without one by Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_rrd.losses import relational
from hf_rrd.losses.rows import unit

ROOT = Path(__file__).parents[2]
STAND_INS = run_path(str(ROOT / "examples" / "benchmarks" / "operations.py"))["STAND_INS"]

# Examples, rows of the bank and their width, over the blocks of the kernels and under them.
SIZES = [(1, 1, 1), (9, 50, 16), (5, 300, 33), (3, 2500, 7), (2, 9000, 130), (70, 129, 1030)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(device: str, size: tuple[int, int, int], dtype: torch.dtype, bank_is_unit: bool) -> None:
    from hf_rrd.losses import kernels

    batch, count, dim = size
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(batch, dim + 1)[:, 1:], torch.randn(dim, batch).T  # neither is contiguous
    bank = torch.cat([torch.randn(count, dim), teacher[:2]])  # with copies of own rows
    if batch > 3:
        student[1], teacher[2], bank[0] = 0, 0, 0
    bank = (unit(bank) if bank_is_unit else bank).to(dtype)
    given = [each.to(device) for each in (student, teacher, bank)]
    expected = STAND_INS.unit_rows(student, teacher, bank, bank_is_unit)
    for one, other in zip(kernels.unit_rows(*given, bank_is_unit), expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-6)
    rows, norms = expected[0].double(), expected[2]
    for temperatures in ((0.1, 0.02), (0.05, 1e-7)):
        logits = rows[: 2 * batch] @ rows.T
        given_logits = logits.float().to(device)
        losses = kernels.compare(given_logits, norms.to(device), *temperatures, relational.SAME_COSINE)
        expected = STAND_INS.compare(logits, norms.double(), *temperatures, relational.SAME_COSINE)
        for one, other in zip((*losses, given_logits[:batch]), (*expected, logits[:batch]), strict=True):
            torch.testing.assert_close(
                one.cpu().double(), other, rtol=1e-4, atol=1e-6 + 1e-4 * float(other.abs().max())
            )


@pytest.mark.gpu
@pytest.mark.parametrize("bank_is_unit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_kernels_do_what_they_stand_for(size: Any, dtype: torch.dtype, bank_is_unit: bool) -> None:
    check("cuda", size, dtype, bank_is_unit)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
def test_the_kernels_do_what_they_stand_for_by_the_interpreter() -> None:
    code = """
from tests.losses.test_kernels import DTYPES, SIZES, check
for number, size in enumerate(SIZES):
    check("cpu", size, DTYPES[number % 3], bool(number % 2))
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)


def test_without_triton_the_loss_runs_in_more_launches_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hf_rrd.losses.kernels", None)  # an import fails
    with pytest.warns(UserWarning, match="without Triton's kernels, in more launches. ModuleNotFoundError: "):
        assert relational._working_kernels(torch.device("cuda", 99)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relational._working_kernels(torch.device("cuda", 99)) is None


@pytest.mark.parametrize("name", ["unit_rows", "compare"])
def test_kernels_that_give_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def otherwise(*args: Any) -> tuple[torch.Tensor, ...]:
        return tuple(1.1 * each for each in getattr(STAND_INS, name)(*args))

    cpu = torch.device("cpu")
    monkeypatch.setitem(sys.modules, "hf_rrd.losses.kernels", STAND_INS)
    monkeypatch.setattr("hf_rrd.losses.kernels", STAND_INS, raising=False)
    assert relational._working_kernels.__wrapped__(cpu) is STAND_INS
    broken = SimpleNamespace(**vars(STAND_INS) | {name: otherwise})
    monkeypatch.setitem(sys.modules, "hf_rrd.losses.kernels", broken)
    monkeypatch.setattr("hf_rrd.losses.kernels", broken)
    with pytest.warns(UserWarning, match="AssertionError: Tensor-likes are not close"):
        assert relational._working_kernels.__wrapped__(cpu) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_first_look_at_the_kernels_is_neither_under_autocast_nor_in_another_default_dtype(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setitem(sys.modules, "hf_rrd.losses.kernels", STAND_INS)
    monkeypatch.setattr("hf_rrd.losses.kernels", STAND_INS, raising=False)
    torch.set_default_dtype(dtype)
    try:
        with torch.autocast("cpu", dtype):
            assert relational._working_kernels.__wrapped__(torch.device("cpu")) is STAND_INS
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kernels", [STAND_INS, None])
def test_what_is_held_at_the_peak_counts_the_batchs_own_columns(monkeypatch: pytest.MonkeyPatch, kernels: Any) -> None:
    monkeypatch.setattr(relational, "_is_accelerator", lambda device: True)
    monkeypatch.setattr(relational, "_kernels", lambda student: kernels)
    matrices, own = (1, 2) if kernels else (2, 1)
    for batch in (1, 256, 8192):
        student = torch.empty(batch, 1)
        columns = relational.LOGITS_MEMORY // (matrices * 2 * batch * 4)
        most = columns + columns // 64 - own * batch
        assert [relational._fits(student, torch.empty(1, 1).expand(n, 1)) for n in (most, most + 1)] == [True, False]
    assert relational._fits(torch.empty(256, 1), torch.empty(1, 1).expand(2**20 // matrices, 1))  # as documented


def test_only_float32_on_cuda_is_for_the_kernels() -> None:
    assert relational._kernels(torch.zeros(2, 3)) is None
    if torch.cuda.is_available():
        assert relational._kernels(torch.zeros(2, 3, device="cuda")) is not None
        assert relational._kernels(torch.zeros(2, 3, device="cuda", dtype=torch.float64)) is None
