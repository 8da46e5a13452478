"""One process that caches a teacher's outputs, to be killed or to share the work: the child of test_caching."""

import time
from ctypes import c_int

import datasets
import torch
import transformers

from hf_rrd.training import caching, reading
from tests.builders import Images, tiny_vit
from tests.processes import be_process

EXAMPLES = 61
BATCH = 3
SHARD = 8


def images() -> datasets.Dataset:
    """The examples, the same in every process."""
    data = Images(EXAMPLES)
    assert data.labels is not None
    return datasets.Dataset.from_dict({"pixel_values": data.pixels.tolist(), "labels": data.labels.tolist()})


def run(
    rank: int,
    processes: int,
    port: int,
    folder: str,
    forwards: c_int,
    scale: float = 1.0,
    projection: str = "none",
) -> None:
    """Cache into a folder, counting the teacher's forwards, and write the whole data set beside it.

    A hook scales what the teacher's encoder gives.
    """
    be_process(rank, processes, port)
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    caching.SHARD_EXAMPLES, reading.PROBED_EXAMPLES = SHARD, BATCH
    teacher = tiny_vit(width=24, seed=1)
    teacher.vit.layernorm.register_forward_hook(lambda module, args, output: output * scale)

    def count(*_: object) -> None:
        forwards.value += 1  # without a lock, which a killed process would keep for ever: no other counts here
        time.sleep(0.002)  # so that there is time to be killed

    data = images()
    handle = teacher.register_forward_hook(count)
    how = {"teacher_projection": projection, "projection_dim": None if projection == "none" else 5}
    cached = caching.cache_teacher_outputs(data, teacher, BATCH, cache_dir=folder, **how)
    handle.remove()
    cached.select_columns(["teacher_embedding", "teacher_logits", "labels"]).to_parquet(f"{folder}/{rank}.parquet")
