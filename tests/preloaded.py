"""What the processes of the tests find imported: see `tests.processes`."""

import contextlib
import gc
import importlib

import torch
import transformers

for name in (
    *("datasets", "evaluate", "hf_rrd", "huggingface_hub.hf_api", "tests.builders", "torch.distributed.fsdp"),
    *(
        "accelerate.commands.launch",
        "scipy.stats",
        "sklearn.linear_model",
        "matplotlib.figure",
        "PIL.Image",
        "rich.table",
    ),
    *("transformers.models.auto.modeling_auto", "torch.utils.tensorboard"),
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

with contextlib.suppress(ImportError, AttributeError):  # transformers 5.0 has it elsewhere
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("bert")  # compiles a thousand patterns, once for all processes

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
gc.collect()
gc.freeze()  # or a collection in each of the processes copies the pages of all this
