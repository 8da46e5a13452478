"""Each kind of head: what is logged and where a step leads, against plain loops over the formulas."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from hf_rrd import RelationalDistillationTrainer
from hf_rrd.results.callback import in_use
from tests.builders import log_of, trainer
from tests.processes import ROOT
from tests.test_documentation import blocks_of

EXAMPLES, RATE, TEMPERATURE = 8, 0.1, 3.0
SIZE = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
EARS: dict[str, Any] = {
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
}
EARS |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
EARS |= dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)
EARS |= {"final_dropout": 0.0, "layerdrop": 0.0, "apply_spec_augment": False}


def bert(head: str, width: int, **more: Any) -> Any:
    config = hf.BertConfig(vocab_size=20, hidden_size=width, max_position_embeddings=16, **SIZE, **DROPOUT, **more)
    return getattr(hf, f"BertFor{head}")(config)


def model_of(kind: str, width: int) -> Any:
    """A model whose logits differ by some units from those of another width."""
    torch.manual_seed(width)
    model: Any
    if kind == "next words":
        shape = {"vocab_size": 20, "n_positions": 16, "n_embd": width, "n_layer": 1, "n_head": 2}
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**shape, **GPT2_DROPOUT, bos_token_id=1, eos_token_id=1))
    elif kind == "letters":
        model = hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(hidden_size=width, vocab_size=6, **SIZE, **EARS))
    elif kind == "target words":
        parts: dict[str, Any] = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
        parts |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
        parts |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 16)
        config = hf.BartConfig(vocab_size=20, d_model=width, max_position_embeddings=16, dropout=0.0, **parts)
        model = hf.BartForConditionalGeneration(config)
    else:
        head, labels, problem = {
            "one label": ("SequenceClassification", 3, "single_label_classification"),
            "several labels": ("SequenceClassification", 4, "multi_label_classification"),
            "number": ("SequenceClassification", 1, "regression"),
            "tokens": ("TokenClassification", 3, None),
            "spans": ("QuestionAnswering", 2, None),
            "words": ("MaskedLM", 2, None),
            "choices": ("MultipleChoice", 2, None),
        }[kind]
        model = bert(head, width, num_labels=labels, problem_type=problem)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape), alpha=0.3)
    return model.eval()


def batch_of(kind: str) -> dict[str, Tensor]:
    """Eight examples with padding, and labels of which some are missing."""
    torch.manual_seed(0)
    lengths = torch.randint(4, 8, (EXAMPLES, 1))
    mask = (torch.arange(7) < lengths).long()
    batch = {"input_ids": torch.randint(2, 20, (EXAMPLES, 7)) * mask, "attention_mask": mask}
    some = torch.randint(0, 3, (EXAMPLES, 7)).masked_fill((mask == 0) | (torch.rand(EXAMPLES, 7) < 0.5), -100)
    some[:, 1] = 2  # each has one at least
    if kind == "one label":
        return batch | {"labels": torch.arange(EXAMPLES) % 3}
    if kind == "several labels":
        return batch | {"labels": torch.randint(0, 2, (EXAMPLES, 4)).float()}
    if kind == "number":
        return batch | {"labels": torch.randn(EXAMPLES)}
    if kind == "tokens":
        some[0] = -100  # but for this one, of which the teacher alone tells
    if kind in ("tokens", "words", "next words"):
        return batch | {"labels": some}
    if kind == "target words":
        written = torch.where(some == -100, 1, some).roll(1, 1)
        return batch | {"labels": some, "decoder_input_ids": written}
    if kind == "spans":
        return batch | {"start_positions": torch.arange(EXAMPLES) % 4, "end_positions": torch.full((EXAMPLES,), 3)}
    if kind == "choices":
        texts = {name: torch.stack([each, each.roll(1, 0)], 1) for name, each in batch.items()}
        return texts | {"labels": torch.arange(EXAMPLES) % 2}
    samples = torch.randint(200, 401, (EXAMPLES, 1))
    mask = (torch.arange(400) < samples).long()
    letters = torch.randint(1, 6, (EXAMPLES, 4))
    letters[::2, 2:] = -100
    return {"input_values": torch.randn(EXAMPLES, 400) * mask, "attention_mask": mask, "labels": letters}


def frames_of(samples: int) -> int:
    return ((samples - 10) // 5 + 1 - 3) // 2 + 1  # by kernels and strides


def divergence(mine: Tensor, theirs: Tensor) -> Tensor:
    """`T**2 * KL` of two rows of logits."""
    total = torch.zeros(())
    q, p = (torch.exp(row / TEMPERATURE) / torch.exp(row / TEMPERATURE).sum() for row in (mine, theirs))
    for k in range(len(p)):
        total = total + p[k] * torch.log(p[k] / q[k])
    return TEMPERATURE**2 * total


def yes_or_no(mine: Tensor, theirs: Tensor) -> Tensor:
    """The same of each class on its own: the class against its absence, the mean over the classes."""
    zero = torch.zeros(())
    pairs = [divergence(torch.stack([a, zero]), torch.stack([b, zero])) for a, b in zip(mine, theirs, strict=True)]
    return torch.stack(pairs).mean()


def kd_of(kind: str, mine: Any, theirs: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean over the examples, of each the mean over its places that count."""
    each = []
    for i in range(EXAMPLES):
        mask, labels = batch["attention_mask"][i], batch.get("labels", [None] * EXAMPLES)[i]
        if kind == "spans":
            real = mask == 1
            sides = [(mine[name][i][real], theirs[name][i][real]) for name in ("start_logits", "end_logits")]
            each.append(sum(divergence(*side) for side in sides) / 2)
            continue
        a, b = mine.logits[i], theirs.logits[i]
        if kind in ("one label", "choices"):
            each.append(divergence(a, b))
        elif kind == "several labels":
            each.append(yes_or_no(a, b))
        elif kind == "number":
            each.append((a[0] - b[0]) ** 2)
        else:
            places = range(frames_of(int(mask.sum()))) if kind == "letters" else range(7)
            if kind == "tokens" and i == 0:
                places = [at for at in places if mask[at]]
            elif kind == "next words":
                places = [at for at in places if at < 6 and mask[at] and labels[at + 1] != -100]
            elif kind != "letters":
                places = [at for at in places if labels[at] != -100]
            each.append(sum(divergence(a[at], b[at]) for at in places) / len(places))
    return torch.stack(each).mean()


def pooled(kind: str, model: Any, batch: dict[str, Tensor], is_student: bool) -> Tensor:
    """An example's embedding: a mean over its tokens, frames or choices; the last token; what the classifier reads."""
    inputs = {name: each for name, each in batch.items() if name in ("input_ids", "input_values", "attention_mask")}
    choices = kind == "choices"
    if choices:
        inputs = {name: each.flatten(0, 1) for name, each in inputs.items()}
    body = model.base_model
    states = body(**inputs).last_hidden_state
    rows = []
    for i, mask in enumerate(inputs["attention_mask"]):
        length = frames_of(int(mask.sum())) if kind == "letters" else int(mask.sum())
        if kind == "next words":
            rows.append(states[i, length - 1])
        elif is_student and kind in ("one label", "several labels", "number"):
            rows.append(torch.tanh(body.pooler.dense.weight @ states[i, 0] + body.pooler.dense.bias))
        else:
            rows.append(sum(states[i, at] for at in range(length)) / length)
    if choices:
        rows = [(rows[2 * i] + rows[2 * i + 1]) / 2 for i in range(EXAMPLES)]
    return torch.stack(rows)


def relation_of(student: Tensor, teacher: Tensor, of_student: float = 0.1, of_teacher: float = 0.02) -> Tensor:
    """The cross-entropy of an example's similarities to all rows of the teacher, its own among them."""
    student, teacher = (rows / rows.norm(dim=1, keepdim=True) for rows in (student, teacher))
    each = []
    for i in range(EXAMPLES):
        q, p = (torch.exp(rows[i] @ teacher.T / tau) for rows, tau in ((student, of_student), (teacher, of_teacher)))
        each.append(-sum(p[k] / p.sum() * torch.log(q[k] / q.sum()) for k in range(EXAMPLES)))
    return torch.stack(each).mean()


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The examples of a batch."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: each[index] for name, each in self.batch.items()}


KINDS = ["one label", "several labels", "number", "tokens", "spans", "words", "next words", "choices", "letters"]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("kind", [*KINDS, "target words"])
def test_what_is_logged_and_a_step_equal_plain_loops(kind: str, micro_batches: int, tmp_path: Path) -> None:
    student, teacher, batch = model_of(kind, 16), model_of(kind, 24), batch_of(kind)
    mine = copy.deepcopy(student)
    relational = float(kind != "target words")  # an encoder-decoder that writes has no embedding
    run = trainer(
        tmp_path,
        model=student,
        teacher=teacher,
        train_dataset=Rows(batch),
        eval_dataset=Rows(batch),
        kd_weight=0.7,
        kd_temperature=TEMPERATURE,
        relational_weight=0.5 * relational,
        per_device_train_batch_size=EXAMPLES // micro_batches,
        gradient_accumulation_steps=micro_batches,
        max_steps=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
    )
    head = run.distillation.head
    projection = None if head is None else copy.deepcopy(head.projection)
    metrics = run.evaluate()
    run.train()

    outputs = mine(**batch)
    inputs = {name: each for name, each in batch.items() if name != "labels" and not name.endswith("_positions")}
    with torch.no_grad():
        theirs = teacher(**inputs)
    terms = {"task_loss": outputs.loss, "kd_loss": kd_of(kind, outputs, theirs, batch)}
    loss = terms["task_loss"] + 0.7 * terms["kd_loss"]
    if projection is not None:
        with torch.no_grad():
            target = pooled(kind, teacher, batch, is_student=False)
        terms["relational_loss"] = relation_of(projection(pooled(kind, mine, batch, is_student=True)), target)
        loss = loss + 0.5 * terms["relational_loss"]
    for name, term in terms.items():
        assert log_of(run, name) == [pytest.approx(term.item(), rel=1e-4)], name
        assert metrics[f"eval_{name}"] == pytest.approx(term.item(), rel=1e-4), name
    assert terms["kd_loss"] > 0.05
    loss.backward()
    trained = dict(student.named_parameters())
    for name, weight in mine.named_parameters():
        stepped = weight if weight.grad is None else weight - RATE * weight.grad
        torch.testing.assert_close(
            trained[name], stepped, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    if projection is not None and head is not None:
        stepped = projection.weight - RATE * projection.weight.grad
        torch.testing.assert_close(head.projection.weight, stepped, rtol=1e-4, atol=1e-5)


PAGE = (ROOT / "docs" / "guides" / "heads.md").read_text(encoding="utf-8")
EXAMPLES_OF = {block.section.removeprefix("heads: "): block for block in blocks_of(PAGE, "heads")}


@pytest.mark.parametrize("heading", EXAMPLES_OF)
def test_an_example_of_the_guide_runs_as_it_is_and_learns_all_three_terms(
    heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = []

    class Kept(RelationalDistillationTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            trainers.append(self)
            self.args.logging_steps = 1
            return super().train(*args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_rrd.RelationalDistillationTrainer", Kept)
    exec(compile(EXAMPLES_OF[heading].code, heading, "exec"), {})
    assert trainers[0].state.global_step == 2
    for term in ("task_loss", "kd_loss", "relational_loss"):
        assert len(log_of(trainers[0], term)) == 2 and min(log_of(trainers[0], term)) > 0, term


def test_the_guide_has_an_example_of_each_kind_of_head() -> None:
    assert len(EXAMPLES_OF) == len(KINDS) + 1  # few labels


@pytest.mark.parametrize("kind", [*KINDS, "target words"])
def test_an_automatic_temperature_is_1_of_words_and_4_of_all_else(kind: str, tmp_path: Path) -> None:
    expected, logs = 1.0 if kind.endswith("words") else 4.0, []
    for given in ({}, {"kd_temperature": expected}):
        relational = float(kind != "target words")
        settings: dict[str, Any] = {"kd_weight": 0.7, "relational_weight": relational, "max_steps": 1, **given}
        rows = Rows(batch_of(kind))
        run = trainer(tmp_path, model=model_of(kind, 16), teacher=model_of(kind, 24), train_dataset=rows, **settings)
        run.train()
        logs.append(log_of(run, "kd_loss"))
        assert in_use(run.distillation)["kd_temperature"] == expected
    assert logs[0] == logs[1] and logs[0][0] > 0
