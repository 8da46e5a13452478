"""Several processes: who has how many examples, everybody's rows, and a teacher that is shared out among them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from datasets import IterableDataset
from torch import Tensor, nn
from transformers.utils import logging

from hf_rrd.errors import named_errors
from hf_rrd.models.teacher import Teacher
from hf_rrd.training.data import cached_embeddings, has_cached_embeddings


class StepExamples:
    """How many examples an optimizer step has, on this process and on all of them, and how many labels in all.

    The processes tell each other how many are in each of their micro-batches when the step begins, and the numbers are
    on the host by the time it ends: nobody waits for the device.
    """

    def __init__(
        self, accelerator: Accelerator, micro_batches: list[int], labels: Sequence[Tensor | None] = (None,)
    ) -> None:
        self.accelerator = accelerator
        self.processes = accelerator.num_processes
        self.total: int | Tensor = sum(micro_batches)  # of all processes; on the device where there are several
        self.is_one = self.processes == len(micro_batches) == 1
        known = [each for each in labels if each is not None]
        self.labels = None if len(known) < len(labels) else known[0] if len(known) == 1 else torch.stack(known).sum()
        self._counts = torch.tensor(micro_batches).unsqueeze(0)  # (processes, micro-batches), on the host
        self._copied: torch.cuda.Event | None = None
        if self.processes > 1:
            # Filled one by one: a copy to the device would wait for it.
            own = [torch.full((1,), count, device=accelerator.device) for count in micro_batches]
            own += [torch.zeros_like(own[0]) if self.labels is None else self.labels.view(1).to(own[0].device)]
            gathered = accelerator.gather(torch.cat(own)).view(self.processes, -1)
            counts, self.labels = gathered[:, :-1], None if self.labels is None else gathered[:, -1].sum()
            self.total = counts.sum()
            self._counts = counts
            if counts.is_cuda:
                self._counts = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
                self._counts.copy_(counts, non_blocking=True)
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._copied.record()

    def share(self, examples: int) -> float | Tensor:
        """A micro-batch's part of the step, times the processes, because gradients are averaged over them."""
        return examples * self.processes / self.total

    def summed(self, sums: Tensor) -> Tensor:
        """The sums of all processes, of those of this one."""
        return sums if self.processes == 1 else self.accelerator.reduce(sums, "sum")

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, (total, dim), from those of this one, (own, dim), by one all-gather.

        In the order in which one process would have had them: the first micro-batch of each process, then the second
        of each, and so on.
        """
        if self.processes == 1:
            return rows
        if self._copied is not None:
            self._copied.synchronize()
        counts = self._counts.tolist()
        totals = [sum(micro_batches) for micro_batches in counts]
        said = totals[self.accelerator.process_index]
        if len(rows) != said:
            raise ValueError(
                f"the teacher gave {len(rows)} embeddings for {said} examples: a pooling or a collator changes their "
                "number. It has to be one for each row of the batch's first tensor."
            )
        longest = max(totals)  # each sends as many
        if len(rows) < longest:
            rows = torch.cat([rows, rows.new_zeros(longest - len(rows), rows.shape[1])])
        gathered = self.accelerator.gather(rows.contiguous()).split(longest)
        # By micro-batch: [process][micro-batch], of unequal lengths, turned round.
        parts = [part[:total].split(own) for part, total, own in zip(gathered, totals, counts, strict=True)]
        return torch.cat([part for micro_batch in zip(*parts, strict=True) for part in micro_batch])


def check_same_lengths(name: str, dataset: Any) -> None:
    """Raise a ValueError, on all processes, where a data set has another length on one: they would wait for ever."""
    everyone = gather_object([_length(dataset)])
    given = [length for length in everyone if length is not None]
    if any(length != given[0] for length in given):
        raise ValueError(
            f"`{name}` must have one length on all processes, got {everyone}. Give each of them the whole set: they "
            "share it out."
        )


def _length(dataset: Any) -> Any:
    """Of a data set, of each of several; None of none, and a text of a stream."""
    if dataset is None:
        return None
    if isinstance(dataset, Mapping):
        return {str(name): _length(part) for name, part in dataset.items()}
    return len(dataset) if hasattr(dataset, "__len__") else "unknown"


def read_all(examples: Any, trainer: Any, description: str) -> Any:
    """Their batches, as many on each process, and no example is left out, unlike a training's may; with a bar."""
    settings, args = trainer.accelerator.dataloader_config, trainer.args
    even_batches, drop_last = settings.even_batches, args.dataloader_drop_last
    settings.even_batches, args.dataloader_drop_last = True, False
    try:
        loader = trainer.get_test_dataloader(examples)
    finally:
        settings.even_batches, args.dataloader_drop_last = even_batches, drop_last
    trainer.accelerator._dataloaders.remove(loader)  # or it is kept, with its examples and workers, as the run lasts
    is_silent = args.disable_tqdm or not trainer.accelerator.is_main_process
    return logging.tqdm(loader, desc=description, disable=is_silent)


@torch.no_grad()
def embed_all(dataset: Any, trainer: Any) -> Tensor:
    """The teacher's embeddings of some training examples, (examples, width), on all processes; cached ones as read."""
    accelerator = trainer.accelerator
    if isinstance(dataset, IterableDataset) and not has_cached_embeddings(dataset):
        dataset = list(dataset)
    check_same_lengths("train_dataset", dataset)  # of streams that end early
    if has_cached_embeddings(dataset):
        return cached_embeddings(dataset).to(trainer.args.device)
    # None twice: a stream's length has to be known.
    batches, parts = read_all(dataset, trainer, "Measuring the teacher"), []
    with named_errors("reading examples of `train_dataset`"):
        for batch in batches:
            with named_errors("calibration on `train_dataset`", batch), accelerator.autocast():
                embedding = trainer._teacher.read(trainer._prepare_inputs(batch), logits=False).embedding
                if embedding is None:
                    raise ValueError("there is no teacher, and the batch has no `teacher_embedding`.")
                parts.append(accelerator.gather_for_metrics(embedding.float()))
    return torch.cat(parts) if parts else torch.empty(0, 0)  # of an empty stream


def calibrate(trainer: Any) -> None:
    """`Distillation.calibrate` on the training set, on all processes."""

    def of_main_process(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(broadcast({name: tensor.to(trainer.accelerator.device) for name, tensor in state.items()}))

    trainer.distillation.calibrate(trainer.train_dataset, lambda sample: embed_all(sample, trainer), of_main_process)


def place_teacher(teacher: Teacher, accelerator: Accelerator) -> None:
    """Move the teacher to the process's device, or share it out as the student is, unless it has a place already."""
    if teacher.model is None or teacher.is_placed:
        return
    state = accelerator.state
    if accelerator.is_fsdp2:
        _shard(teacher.model, accelerator)
    elif getattr(state, "deepspeed_plugin", None) is not None and state.deepspeed_plugin.zero_stage == 3:
        teacher.forward = _partitioned(teacher.model, state.deepspeed_plugin, state.mixed_precision)
    else:
        teacher.place(accelerator.device)


def train_together(model: nn.Module, accelerator: Accelerator) -> None:
    """Let the processes average their gradients also where an evaluation came before the training.

    It marks the model as prepared, so that no DistributedDataParallel is put around it, and each process would train
    its own (transformers 5.23 with accelerate 1.15).
    """
    if accelerator.distributed_type.startswith("MULTI_"):  # neither FSDP nor DeepSpeed
        model.__dict__.pop("_is_accelerate_prepared", None)


def mend_wrap_policy(model: nn.Module, accelerator: Accelerator) -> None:
    """Leave a model's input embedding out of what FSDP2 wraps; without FSDP2 there is nothing to do.

    accelerate shards it on its own, and then fails on one that is in a wrapped module already, as with ViT's and
    BERT's `_no_split_modules`, which are its default: `TypeError: Invariant encountered` (accelerate 1.15).
    """
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    names = plugin.transformer_cls_names_to_wrap
    if names is None:
        names = list(getattr(model, "_no_split_modules", None) or [])
    plugin.transformer_cls_names_to_wrap = _without_embedding(model, names)


def _without_embedding(model: nn.Module, names: list[str]) -> list[str]:
    """The class names whose modules do not hold the input embedding."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    holders = {type(module).__name__ for module in model.modules() if embedding in list(module.modules())}
    return [name for name in names if name not in holders]


def _shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Shard a model in place by the student's FSDP2 settings, but by its own layers."""
    from accelerate.utils import fsdp2_prepare_model

    student_plugin = accelerator.state.fsdp_plugin
    plugin = copy.copy(student_plugin)
    present = {type(module).__name__ for module in model.modules()}
    layers = [name for name in getattr(model, "_no_split_modules", None) or [] if name in present]
    plugin.transformer_cls_names_to_wrap = _without_embedding(model, layers)
    accelerator.state.fsdp_plugin = plugin
    try:
        sharded: Any = fsdp2_prepare_model(accelerator, model)
    finally:
        accelerator.state.fsdp_plugin = student_plugin
    sharded.set_reshard_after_forward(True)  # root and tail would stay whole for a backward pass, which never comes


def _partitioned(model: nn.Module, plugin: Any, mixed_precision: str) -> nn.Module:
    """A ZeRO-3 engine around a model that is not trained: its weights are fetched layer by layer."""
    import deepspeed

    zero = plugin.deepspeed_config["zero_optimization"].items()
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants one; nothing depends on it
        "zero_optimization": {key: value for key, value in zero if key != "offload_optimizer" and value != "auto"},
        "bf16": {"enabled": mixed_precision == "bf16"},
        "fp16": {"enabled": mixed_precision == "fp16"},
    }
    engine: nn.Module = deepspeed.initialize(model=model, config=settings)[0]
    engine.eval()  # which returns nothing there
    return engine
