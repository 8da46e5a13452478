"""One finished run for all tests that only read it."""

from collections.abc import Iterator

import pytest

from hf_rrd import RelationalDistillationTrainer
from tests.results.runs import finished


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelationalDistillationTrainer]:
    """A run with alignment and logits, that was compared with its teacher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_rrd.results.measure.MOST", 3)
        done = finished(tmp_path_factory.mktemp("run") / "student", alignment_examples=40, kd_weight=0.5)
    yield done
