"""How many operations the relational loss adds to a step: on a GPU each is a launch, and a small one no more."""

from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hf_rrd import RelationalDistillationConfig
from hf_rrd.models.head import RelationalHead
from hf_rrd.models.teacher import Teacher
from hf_rrd.training.distillation import Distillation

COUNTING = run_path(str(Path(__file__).parents[2] / "examples" / "benchmarks" / "operations.py"))
Operations, as_on_a_gpu, KERNELS = (COUNTING[name] for name in ("Operations", "as_on_a_gpu", "STAND_INS"))


@pytest.mark.parametrize(
    ("kernels", "dtype", "most"),
    [(KERNELS, torch.float32, 21), (KERNELS, torch.float16, 22), (None, torch.float32, 36), (None, torch.float16, 37)],
)
def test_head_projection_loss_gradient_and_enqueue_are_few_operations_at_64_x_4096_x_384(
    tmp_path: Path, kernels: Any, dtype: torch.dtype, most: int
) -> None:
    batch, rows, width = 64, 4096, 384
    torch.manual_seed(0)
    teacher = Teacher(None, wants_embedding=True, wants_logits=False)
    teacher.width, teacher.dtype = width, dtype
    distillation = Distillation(RelationalDistillationConfig(str(tmp_path), bank_size=rows), teacher)
    assert distillation.projection is not None and distillation.bank is not None
    distillation.projection.fit(torch.randn(1000, width))
    distillation.bank.enqueue(F.normalize(torch.randn(rows, width), dim=-1))
    distillation.bank.enqueue(F.normalize(torch.randn(batch, width), dim=-1))  # makes room for what comes
    head = RelationalHead(SimpleNamespace(width=192, body=None), width, "centered", seed=0)  # type: ignore[arg-type]
    pooled, embedding = torch.randn(batch, 192, requires_grad=True), torch.randn(batch, width).to(dtype)

    def step() -> None:
        head.zero_grad()
        pooled.grad = None
        loss = distillation.relational_terms(head(pooled), embedding, training=True)["relational_loss"].mean()
        loss.backward()
        distillation.update_bank(lambda rows: rows)

    with as_on_a_gpu(kernels):
        step()
        with Operations() as operations:
            step()
    assert len(operations.names) <= most, operations.names
