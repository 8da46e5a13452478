"""One process of several data-parallel runs: the child process of test_distributed."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from tests.builders import CLASSES, Images, Tokens, tiny_gpt2, tiny_tokens, tiny_vit, trainer
from tests.processes import be_process

GLOBAL_BATCH = 16
STEPS = 20


class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Images in their order, without a length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        images = Images(48)
        return (images[index] for index in range(len(images)))


class Short(Stream):
    """So many images in their order, without a length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return itertools.islice(super().__iter__(), self.count)


def streamed_images() -> Any:
    """The same from the library datasets."""
    images = Images(48)
    assert images.labels is not None
    columns = {"pixel_values": images.pixels.tolist(), "labels": images.labels.tolist()}
    return datasets.Dataset.from_dict(columns).to_iterable_dataset().with_format("torch")


def _batches(**settings: bool) -> dict[str, Any]:
    return {"accelerator_config": settings}


def divided(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A task loss as transformers' documentation has it."""
    return F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch


TOKENS: dict[str, Any] = {
    "model": tiny_gpt2(),
    "teacher": tiny_gpt2(width=24, seed=1),
    "train_dataset": Tokens(64),
    "eval_dataset": Tokens(19),
}


def named(model: Any) -> Any:
    """The model, with names for its classes."""
    model.config.id2label = dict(enumerate("abcd"))
    return model


@torch.no_grad()
def teacher_and_its_images() -> dict[str, Any]:
    """A teacher, and images whose labels are its answers."""
    teacher, images = named(tiny_vit(width=24, seed=1)), Images(64)
    teacher.classifier.bias -= teacher.eval()(images.pixels).logits.mean(0)  # so that these are of all classes
    images.labels = teacher(images.pixels).logits.argmax(-1)
    return {"teacher": teacher, "train_dataset": images}


# Two groups of examples are centered, whether by one process or each by its own.
DEFAULTS: dict[str, Any] = {
    **{"model": named(tiny_vit()), "gradient_accumulation_steps": 1, "per_device_train_batch_size": 32},
    **{"kd_weight": "auto", "relational_weight": "auto", "balance_losses": True, "student_projection": "centered"},
    **teacher_and_its_images(),
}

# Of each: changes to what `settings_of` gives, and the greatest number of processes that can run it.
SCENARIOS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 4),
    "the last batch is short on one process": (
        {
            "train_dataset": Images(44),
            "eval_dataset": Images(32, seed=5),  # the Trainer's own evaluation needs as many batches on each
            "gradient_accumulation_steps": 1,
            "bank_size": 32,  # less than the set, which would be the bank
            **_batches(even_batches=False),
        },
        2,
    ),
    "the last batch is dropped": (
        {
            **{"train_dataset": Images(44), "eval_dataset": Images(64, seed=5), "dataloader_drop_last": True},
            "bank_size": 32,
        },
        4,
    ),
    "batches are dispatched": (_batches(dispatch_batches=True), 4),
    "a stream is dispatched": ({"train_dataset": Stream()}, 2),
    "a stream is read by each": ({"train_dataset": Stream(), **_batches(dispatch_batches=False)}, 2),
    "a stream whose pass ends within a step": (
        {"train_dataset": Short(40), "bank_size": 32},
        2,
    ),
    "a stream of the library datasets": ({"train_dataset": streamed_images()}, 2),
    "a stream of the library datasets, read by each": (
        {"train_dataset": streamed_images(), **_batches(dispatch_batches=False)},
        2,
    ),
    "a bank in half precision": ({"teacher": tiny_vit(width=24, seed=1).bfloat16()}, 2),
    "a loss of tokens": (TOKENS, 4),
    "a function that divides by the count of labels": ({**TOKENS, "compute_loss_func": divided}, 2),
    "a loss of tokens that ignores their count": (
        {
            "model": tiny_tokens(),
            "teacher": tiny_tokens(width=24, seed=1),
            "train_dataset": Tokens(64, CLASSES),
            "eval_dataset": Tokens(19, CLASSES),
        },
        2,
    ),
    "no bank": ({"bank_size": 0, "gradient_accumulation_steps": 1}, 2),
    "layers by their states": (
        {
            **{"layer_weight": 2.0, "teacher": tiny_vit(layers=4, seed=1), "projection_dim": 12},
            "ddp_find_unused_parameters": False,
        },
        2,
    ),
    "layers by their relations": ({"layer_weight": 2.0}, 2),
    "the defaults": (DEFAULTS, 2),
    "the defaults by prefixes": ({**DEFAULTS, "matryoshka_dims": [20, 9, 4]}, 2),
    "the defaults with two losses": ({**DEFAULTS, "relational_loss": {"rrd": 1.0, "infonce": 0.5}}, 2),
}


def settings_of(scenario: str, processes: int) -> dict[str, Any]:
    """What a trainer is made of in a scenario."""
    settings: dict[str, Any] = {
        "model": tiny_vit(dropout=0.0),
        "train_dataset": Images(64),
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "bank_size": 48,
        "kd_weight": 0.5,
        "teacher_projection": "pca",
        "projection_dim": 20,
        "optim": "sgd",
        "eval_dataset": Images(19, seed=5),
    }
    settings |= SCENARIOS[scenario][0]
    whole = settings.get("per_device_train_batch_size", GLOBAL_BATCH)
    settings["per_device_train_batch_size"] = whole // processes // settings["gradient_accumulation_steps"]
    return settings


class Gradients(TrainerCallback):
    """Keeps the gradients of each step, the head's too."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        self.steps.append(torch.cat([gradient.flatten().clone() for gradient in gradients]))


def run(rank: int, processes: int, port: int, folder: str, scenarios: list[str]) -> None:
    """Run those of the scenarios that so many processes can, and write down what this process ends with."""
    be_process(rank, processes, port)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for scenario in scenarios:
        if processes <= SCENARIOS[scenario][1]:
            results = results_of(scenario, processes, folder)
            save_file(results, Path(folder, f"{scenario}-{rank}-of-{processes}.safetensors"))


def results_of(scenario: str, processes: int, folder: str) -> dict[str, Tensor]:
    """Train and evaluate; also which tensors were gathered in the training's steps."""
    gradients = Gradients()
    distillation = trainer(folder, callbacks=[gradients], **settings_of(scenario, processes))
    gathered: list[tuple[int, ...]] = []
    gather, calibrate = distillation.accelerator.gather, distillation._calibrate

    def noted_gather(tensor: Tensor) -> Tensor:
        gathered.append(tuple(tensor.shape))
        return gather(tensor)

    def calibrate_unnoted() -> None:
        calibrate()
        distillation.accelerator.gather = noted_gather

    distillation._calibrate = calibrate_unnoted  # type: ignore[method-assign]
    examples: list[int] = []
    batches_of_step = distillation.get_batch_samples

    def noted_batches(*args: Any) -> Any:
        batches, items = batches_of_step(*args)
        if batches and distillation._step is not None:
            examples.append(int(distillation._step.total))
        return batches, items

    distillation.get_batch_samples = noted_batches  # type: ignore[method-assign]
    distillation.train()
    distillation.accelerator.gather, distillation._calibrate = gather, calibrate  # type: ignore[method-assign]
    metrics = distillation.evaluate()
    assert distillation.distillation.bank is not None and distillation.distillation.head is not None
    weights = [*distillation.model.parameters(), *distillation.distillation.head.parameters()]
    lines = [line for line in distillation.state.log_history if "loss" in line]
    names = [name for name in ("task_loss", "kd_loss", "relational_loss", "layer_loss") if f"eval_{name}" in metrics]
    terms = {name: torch.tensor(metrics[f"eval_{name}"]) for name in names}
    return {
        "student": torch.cat([weight.detach().flatten() for weight in weights]),
        "gradients": torch.stack(gradients.steps),
        "bank": distillation.distillation.bank.filled,
        "log": torch.tensor([[line[name] for name in sorted(line) if "loss" in name] for line in lines]),
        "eval": torch.tensor([metrics[f"eval_{name}"] for name in names[1:]]),
        "eval_total": torch.tensor([metrics["eval_loss"], distillation.distillation.total(terms)]),
        "examples": torch.tensor(sum(examples)),
        "gathered_rows": torch.tensor([shape[0] for shape in gathered if len(shape) == 2]),
        "gathered_numbers": torch.tensor([shape[0] for shape in gathered if len(shape) == 1]),
    }


def run_alone(rank: int, processes: int, port: int, folder: str, case: str) -> None:
    """Run one of the functions below as this process of several, and write down what it returns or raises."""
    be_process(rank, processes, port)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        found = CASES[case](rank, folder)
    except ValueError as error:
        found = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def other_lengths(rank: int, folder: str) -> None:
    """A training set that is shorter on one process."""
    trainer(folder, train_dataset=Images(48 - 4 * rank))


def other_lengths_of_evaluation_sets(rank: int, folder: str) -> None:
    """The same of one of two evaluation sets."""
    trainer(folder, eval_dataset={"a": Images(8), "b": Images(8 - rank)})


def other_lengths_of_streams(rank: int, folder: str) -> None:
    """A stream that ends within the calibration on one process."""
    trainer(folder, train_dataset=Short(48 - 40 * rank)).train()


def other_seeds(rank: int, folder: str) -> list[list[float]]:
    """A seed for each process, as for its dropout: the bank, and the projection of the teacher, after some steps."""
    images = Images(48)
    assert images.labels is not None
    columns = {"pixel_values": images.pixels.tolist(), "labels": images.labels.tolist()}
    data = datasets.Dataset.from_dict(columns | {"teacher_embedding": images.pixels[:, 0, 0].tolist()})
    settings: dict[str, Any] = {"teacher_projection": "orthogonal", "projection_dim": 6}
    run = trainer(folder, teacher=None, train_dataset=data.with_format("torch"), seed=rank, **settings)
    run.train()
    found = run.distillation
    assert found.projection is not None and found.projection.matrix is not None and found.bank is not None
    return [*found.projection.matrix.tolist(), *found.bank.filled.tolist()]


def evaluated_before(rank: int, folder: str) -> list[list[float]]:
    """The log of two trainings, the second of them after an evaluation, and the students' weights."""
    found = []
    for evaluates in (False, True):
        run = trainer(folder, eval_dataset=Images(16))
        if evaluates:
            run.evaluate()
        run.train()
        weights = torch.cat([weight.detach().flatten() for weight in run.model.parameters()])
        found.append([*(line["loss"] for line in run.state.log_history if "loss" in line), *weights.tolist()])
    return found


def embedding_model(rank: int, folder: str) -> list[float]:
    """What an evaluator says of the student, and a row of it as rank 0 saved it, read by each."""
    from sentence_transformers import SentenceTransformer

    from tests.sentences import embedder, headless, texts, tokenized, tokenizer

    place = Path(folder)
    words = tokenizer(place / str(rank))
    run = trainer(
        folder,
        model=headless(),
        teacher=embedder(place / str(rank) / "teacher"),
        task_weight=0.0,
        train_dataset=tokenized(words, texts(48)),
        eval_dataset=tokenized(words, texts(9, seed=2)),
        processing_class=words,
        student_format="sentence_transformers",
        evaluators=lambda model, **_: float(model.encode("a cat sits").sum()),
        teacher_projection="center",
    )
    run.train()
    metrics = run.evaluate()
    run.save_model()
    run.accelerator.wait_for_everyone()
    saved = SentenceTransformer(folder, device="cpu").encode("a cat sits")
    return [metrics["eval_function"], float(saved.sum())]


def layers_alone(rank: int, folder: str, processes: int = 2) -> list[float]:
    """The weights of a student that learns its last layer's relations and nothing else."""
    none = dict.fromkeys(("task_weight", "kd_weight", "relational_weight"), 0.0)
    steps = {"per_device_train_batch_size": 8 // processes, "optim": "sgd", "learning_rate": 10.0}
    run = trainer(folder, layer_weight=1.0, ddp_find_unused_parameters=False, **none, **steps)
    run.train()
    weights: list[float] = torch.cat([weight.detach().flatten() for weight in run.model.parameters()]).tolist()
    return weights


def answers_in_texts(rank: int, folder: str) -> list[float]:
    """Weights of question answering by a teacher that knows the answers, and by one that does not."""
    from hf_rrd.training.evidence import _asked
    from tests.training.test_evidence_places import asked, examples_of, run_of

    def pad(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {name: torch.stack([each[name] for each in examples]) for name in examples[0]}
        pad = torch.nn.functional.pad  # as if the second process had longer texts
        return {name: pad(rows, (0, 2 * rank)) if rows.dim() == 2 else rows for name, rows in batch.items()}

    found: list[float] = []
    for knows in (True, False):
        teacher, batch = asked("spans", knows)
        how = {"data_collator": pad, "per_device_eval_batch_size": 2, "per_device_train_batch_size": 4}
        run = run_of(Path(folder), "spans", teacher, examples_of(batch), **how)
        kept = _asked(run.train_dataset, run)
        assert kept is not None and kept[1][1:].sum() == 16 and (kept[1][0] == 16) == knows  # two labels a text
        run.train()
        weights = run.distillation.weights()
        found += [weights["kd_weight"], weights["relational_weight"]]
    return found


def other_tokens_in_one_batch(rank: int, folder: str) -> list[float]:
    """Weights by a teacher of other tokens, which the masks of the second process alone show in the first batch."""
    from tests.training.test_evidence_places import asked, examples_of, run_of

    teacher, batch = asked("words", True)
    batch |= {f"teacher_{name}": batch[name].clone() for name in ("input_ids", "attention_mask")}
    run = run_of(Path(folder), "words", teacher, examples_of(batch), per_device_eval_batch_size=4)
    for example in list(run.train_dataset):
        example["teacher_attention_mask"] = torch.ones(7, dtype=torch.long) * (rank == 1)
        example["attention_mask"] = torch.zeros(7, dtype=torch.long)
        example["attention_mask"][:4] = 1
        if rank == 0:
            example["teacher_attention_mask"] = example["attention_mask"]
    run.train()
    weights = run.distillation.weights()
    return [weights["kd_weight"], weights["relational_weight"]]


CASES = {
    case.__name__: case
    for case in (
        other_lengths,
        other_lengths_of_evaluation_sets,
        other_lengths_of_streams,
        other_seeds,
        evaluated_before,
        embedding_model,
        layers_alone,
        answers_in_texts,
        other_tokens_in_one_batch,
    )
}
