"""What the logits of a model are of, and distillation on them: in which order the classes are, and what counts."""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from hf_rrd.losses.logits import NUMBERS, ONE, SEVERAL, dist_loss, logit_terms
from hf_rrd.models.body import is_headless, unwrapped
from hf_rrd.models.columns import TEACHER_PREFIX

logger = logging.get_logger(__name__)

# What a model's logits are of, by the name of its class; the first that matches.
LAYOUTS = {
    "frames": "AudioFrameClassification",  # (batch, frames, classes)
    "letters": "ForCTC",  # (batch, frames, vocabulary)
    "tokens": "TokenClassification",  # (batch, length, classes)
    "words": "ForMaskedLM|(XLM|Flaubert)WithLMHead|XLNetLMHead|BeitForMasked",  # (batch, length, vocabulary)
    "next words": "ForCausal|LMHead|ForConditionalGeneration|MTModel|EncoderDecoderModel|GenerationDecoder",
    "pixels": "SemanticSegmentation",  # (batch, classes, height, width)
    "spans": "ForQuestionAnswering",  # `start_logits` and `end_logits`, here in one: (batch, 2, length)
    "choices": "MultipleChoice|NextSentencePrediction",  # (batch, choices)
    "classes": "Classification|VisualReasoning",  # (batch, classes)
}
NAMED = ("frames", "tokens", "pixels", "classes", None)  # of classes that `id2label` names; None is not known
WORDS = ("words", "next words", "target words")
BY_PLACE = (*WORDS, "spans", "choices")  # these classes have no names: on both sides their places mean the same
TEXTS = ("tokens", *WORDS)
DIMENSIONS = {"pixels": 4, "choices": 2, "classes": 2}  # all others have 3

OF_CLASSES, OF_WORDS = 4.0, 1.0  # temperatures: among many words a higher one hides the few that matter

Names = list[str] | None  # of classes, in the order of the logits


def layout_of(model: Any) -> str | None:
    """What a model's logits are of, a key of `LAYOUTS`; None where no name of its classes tells."""
    for each in type(unwrapped(model)).__mro__:
        layout = next((layout for layout, names in LAYOUTS.items() if re.search(names, each.__name__)), None)
        if layout is not None:
            decodes = getattr(_config_of(model), "is_encoder_decoder", False)
            return "target words" if layout == "next words" and decodes else layout
    return None


def has_one_answer(model: Any) -> bool:
    """Whether a model's head has one for an example, not one for each token, frame or pixel; or it has no head."""
    return is_headless(model) or layout_of(model) in ("classes", None)


def logits_of(outputs: Any) -> Tensor | None:
    """The logits among a model's outputs, or None. Of question answering both in one: (batch, 2, length).

    A module that is none of transformers may return the logits themselves.
    """
    if not isinstance(outputs, dict):
        return outputs if isinstance(outputs, Tensor) else None
    spans = [outputs[name] for name in ("start_logits", "end_logits") if outputs.get(name) is not None]
    return torch.stack(spans, 1) if len(spans) == 2 else outputs.get("logits")


def names_of(model: Any) -> Names:
    """The names of a model's classes, as its config has them, or None."""
    names = getattr(_config_of(model), "id2label", None)
    return [str(names[number]) for number in sorted(names)] if names else None


def class_order(own: Names, others: Names, of_data: Names = None) -> list[int] | None:
    """Where each class of a model is among those of another, by their names; None where there are none.

    Case and spaces do not matter. Names that only count, as LABEL_0 does, are none; then those of the labels in the
    data stand in for the model's `own`, if they are the others'. A ValueError where both have names, and other ones.
    """
    mine, theirs = _plain(own), _plain(others)
    place = {name: number for number, name in enumerate(theirs)}
    if mine and mine == theirs:
        return list(range(len(mine)))
    if mine and len(mine) == len(theirs) == len(place) and place.keys() == set(mine):
        return [place[name] for name in mine]
    if _only_count(mine) or _only_count(theirs):
        return class_order(of_data, others) if of_data and set(_plain(of_data)) == set(theirs) else None
    short = [f"{names[:8]}{' and so on' if len(names) > 8 else ''}" for names in (others or [], own or [])]
    raise ValueError(
        f"the teacher names its classes {short[0]}, the student {short[1]}: these cannot be matched. If they mean the "
        "same, in one order, give both configs one `id2label`; otherwise set kd_weight=0."
    )


def _plain(names: Names) -> list[str]:
    return [re.sub(r"[\s_-]+", " ", name).strip().casefold() for name in names or ()]


def _only_count(names: list[str]) -> bool:
    return all(name in (f"label {number}", str(number)) for number, name in enumerate(names))


def _config_of(model: Any) -> Any:
    return getattr(unwrapped(model), "config", None)


def _refusal(problem: str, instead: str = "Set") -> ValueError:
    return ValueError(f"`kd_weight` is above 0, and {problem}. {instead} kd_weight=0.")


class LogitPair:
    """How the logits of a student are compared with those of its teacher.

    Args:
        student: Its model.
        teacher: Its model; None where its logits are cached.
        cached: Of cached logits what `cache_teacher_outputs` noted, `classes` and `problem_type` of their teacher; and
            their `width`.
        of_data: The names of the labels' classes, for a student whose config has none.
        own_loss: Whether the task loss is the student's own, which reads labels as transformers does.
        same_classes: Whether both sides must have as many classes, which may be the same. `is_known` says whether they
            are: by their names, or because cached logits of unknown names are as many. Of the layouts `BY_PLACE` only
            the teacher's answers tell.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        cached: Mapping[str, Any],
        of_data: Names,
        own_loss: bool,
        same_classes: bool = False,
    ) -> None:
        models = [unwrapped(student)] if teacher is None else [unwrapped(student), unwrapped(teacher)]
        self.student, self.own_loss = models[0], own_loss
        self._configs, self._cached = [*map(_config_of, models)], cached
        self._same_tokens = False  # until that is seen
        for side, model in zip(("student", "teacher"), models, strict=False):
            name = type(model).__name__
            if is_headless(model):
                load = "Load it with an AutoModelFor... class, or set"
                raise _refusal(f"the {side} needs logits: {name} has no head", load)
            if layout_of(model) is None and type(model).__module__.startswith("transformers."):
                raise _refusal(f"the {side}'s outputs, of {name}, have no classes in a common order to compare")
        layouts, sizes = ([each for each in map(of, models) if each is not None] for of in (layout_of, _size_of))
        if teacher is None and cached.get("classes"):
            sizes.append(len(cached["classes"]))
        if len(set(layouts)) == 2:
            raise _refusal(f"the student's logits are of {layouts[0]}, the teacher's of {layouts[1]}")
        if len(set(sizes)) == 2:
            raise _refusal(f"both sides need the same classes: the teacher has {sizes[1]}, the student {sizes[0]}")
        self.layout: Any = layouts[0] if layouts else None
        own, others = names_of(student), cached.get("classes") or (teacher and names_of(teacher))
        self.is_known = True
        self.is_asked = False  # whether its answers were compared with labels
        if same_classes:
            of_names = self.layout in NAMED and others and class_order(own, others, of_data) is not None
            of_width = self.layout in NAMED and not others and cached.get("width") in [(size,) for size in sizes]
            self.is_known = bool(of_names or of_width)
            as_many = self.layout in NAMED and len(own or ()) == len(others or ())
            if not (self.is_known or as_many or self.layout in BY_PLACE):
                raise _refusal("nothing tells that both sides have the same classes")
        self._given_problem_type()
        self._order: Tensor | None = None  # where each of the student's classes is among the teacher's
        if self.layout in NAMED:
            self._match(own, others or None, of_data)
        elif self.layout == "letters":  # of which the inputs, samples of sound, do not tell
            logger.warning_once("`kd_weight`: both sides are taken to number letters alike, by an equal `vocab.json`.")

    def _match(self, own: Names, others: Names, of_data: Names) -> None:
        order = class_order(own, others, of_data)
        self._order = None if order is None or order == sorted(order) else torch.tensor(order)
        if class_order(own, others) is None and len(own or others or "?") > 1:
            unnamed = [side for side, names in (("student", own), ("teacher", others)) if _only_count(_plain(names))]
            taken = "both sides are taken to have them in one order" if order is None else f"{of_data} are taken"
            (logger.warning_once if len(unnamed) == 1 else logger.info)(
                f"`kd_weight`: the classes of the {' and the '.join(unnamed)} have no names: {taken}. If that is "
                "wrong, give both configs an `id2label`."
            )

    def in_order(self, teacher: Tensor) -> Tensor:
        """The teacher's logits with the classes, the last dimension, in the student's order."""
        if self._order is None:
            return teacher
        self._order = self._order.to(teacher.device)
        return teacher.index_select(-1, self._order)

    def fit(self, student: Tensor | None, teacher: Tensor) -> bool:
        """Whether logits can be compared by place: prompt tuning adds tokens, and a fused loss makes no logits."""
        return student is not None and (self.layout == "pixels" or student.shape == teacher.shape)

    def kind_of(self, logits: Tensor, inputs: Mapping[str, Any]) -> str:
        """What logits of a batch are: of `ONE` class, of `SEVERAL` at once, or `NUMBERS`."""
        return self._problem_type(self.layout or _layout_in(logits, inputs), logits, inputs)

    def temperature(self, given: float | str) -> float:
        """The one that is given, or where it is automatic that of words or of classes."""
        return (OF_WORDS if self.layout in WORDS else OF_CLASSES) if isinstance(given, str) else given

    def terms(
        self, student: Tensor, teacher: Tensor, inputs: Mapping[str, Any], temperature: float, loss: str = "kl"
    ) -> Tensor:
        """`logit_loss` of each example, (batch,): the mean over those of its tokens, frames or pixels that count.

        From logits as `logits_of` gives them, and the batch, whose labels and masks say what counts. A ValueError if
        the logits are not of the same shape, or of one that has no meaning. With `loss="dist"` a scalar: `dist_loss`
        over the same.
        """
        layout = self.layout or _layout_in(student, inputs)
        if {student.dim(), teacher.dim()} != {DIMENSIONS.get(layout, 3)}:
            came = f"got {tuple(student.shape)} of the student and {tuple(teacher.shape)} of the teacher"
            raise _refusal(f"logits of {layout} must have {DIMENSIONS.get(layout, 3)} dimensions, {came}")
        if layout == "pixels":
            if teacher.shape[2:] != student.shape[2:]:
                teacher = F.interpolate(teacher.float(), student.shape[2:], mode="bilinear", align_corners=False)
            student, teacher = student.movedim(1, -1), teacher.movedim(1, -1)
        teacher = self.in_order(teacher)
        problem_type, counted = self._problem_type(layout, student, inputs), self.counted(layout, student, inputs)
        if loss == "dist":
            if problem_type != ONE or layout in ("spans", "choices"):
                raise ValueError(
                    "kd_loss='dist' compares the probabilities of classes, one label for each example or token, and "
                    f"these are logits of {layout}, {problem_type}. Set kd_loss='kl'."
                )
            if counted is not None:
                student, teacher = student[counted], teacher[counted]
            return dist_loss(student, teacher, temperature) if len(student) else student.sum()
        if layout == "spans":
            among = None if counted is None else counted.unsqueeze(1)  # the softmax is over what counts
            return logit_terms(student, teacher, temperature, candidates=among).mean(1)
        terms = logit_terms(student, teacher, temperature, problem_type)  # (batch, ...)
        if counted is None:
            return terms.reshape(len(terms), -1).mean(1)
        return terms.masked_fill(~counted, 0).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)

    def _given_problem_type(self) -> str | None:
        """As the configs have it: there a model of transformers writes how it reads its first labels."""
        given = [getattr(config, "problem_type", None) for config in self._configs]
        kinds = [kind for kind in [*given, self._cached.get("problem_type")] if kind is not None]
        if len(set(kinds)) > 1:
            raise _refusal(f"the student's `problem_type` is {kinds[0]!r}, the teacher's {kinds[-1]!r}")
        return kinds[0] if kinds else None

    def _problem_type(self, layout: str, logits: Tensor, inputs: Mapping[str, Any]) -> str:
        given = self._given_problem_type() if layout in NAMED else ONE
        if given is not None:
            return given
        if logits.shape[-1] == 1:  # Segformer and its like decide one class of pixels by a sigmoid
            return {"classes": NUMBERS, "pixels": SEVERAL}.get(layout, ONE)
        if layout != "classes" or getattr(inputs.get("labels"), "shape", None) != logits.shape:
            return ONE
        if not self.own_loss or self._configs[0] is None:
            how = f"Set the student's config.problem_type, to {SEVERAL!r} or to {ONE!r}, or set"
            raise _refusal("float labels may be several labels at once, or probabilities of one", how)
        return SEVERAL

    def counted(self, layout: str, logits: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        """Which tokens, frames or pixels have something to learn, (batch, ...); None for all of them."""
        labels = inputs.get("labels")
        if layout in ("classes", "choices"):
            return None
        if layout == "pixels":
            if not isinstance(labels, Tensor) or labels.dim() != 3:
                return None
            nearest = F.interpolate(labels.unsqueeze(1).float(), logits.shape[1:3]).squeeze(1)
            return (nearest >= 0) & (nearest != getattr(self._configs[0], "semantic_loss_ignore_index", 255))
        shape, counted = (len(logits), logits.shape[2 if layout == "spans" else 1]), []
        if layout in TEXTS and isinstance(labels, Tensor) and labels.shape == shape:
            # The logits at a token are those of the next one.
            labels = F.pad(labels[:, 1:], (0, 1), value=-100) if layout == "next words" else labels
            known = labels != -100
            # A text of a tagger that has no label at all is one that the teacher alone tells about.
            counted.append(known | ~known.any(1, keepdim=True) if layout == "tokens" else known)
        name = "decoder_attention_mask" if layout == "target words" else "attention_mask"
        mask, other = inputs.get(name), inputs.get(TEACHER_PREFIX + name)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            if layout in ("frames", "letters"):
                mask = _in_frames(self.student, mask, shape[1])
            elif not self._same_tokens:  # two tokenizers: in texts padded to one length no shape shows it
                self._same_tokens = True
                if isinstance(other, Tensor) and not torch.equal(other != 0, mask != 0):
                    raise _refusal("student and teacher read other tokens, so their logits have no common order")
            if mask.shape == shape:
                counted.append(mask != 0)
            elif not counted:
                raise _refusal(f"the attention mask, {tuple(mask.shape)}, does not fit logits at {shape}")
        return torch.stack(counted).all(0) if counted else None


def _size_of(model: Any) -> int | None:
    """How many classes the config tells, where the logits are known to be of these."""
    layout, config = layout_of(model), _config_of(model)
    if layout in (None, "spans", "choices"):
        return None
    if layout not in NAMED and hasattr(config, "get_text_config"):  # a module of one's own may have another config
        config = config.get_text_config(decoder=True)
    size = getattr(config, "num_labels" if layout in NAMED else "vocab_size", None)
    return size if isinstance(size, int) else None


def _layout_in(logits: Tensor, inputs: Mapping[str, Any]) -> str:
    """What logits of an unknown model are of, by the shapes of a batch."""
    labels, mask = (getattr(inputs.get(name), "shape", ()) for name in ("labels", "attention_mask"))
    if logits.dim() == 2:
        return "classes"
    if logits.dim() == 3 and logits.shape[:2] in (labels, mask):
        return "tokens"
    if logits.dim() == 4 and len(labels) == 3:
        return "pixels"
    came = f"nothing tells which dimension of logits of shape {tuple(logits.shape)} has the classes"
    raise _refusal(f"{came}: the student is of an unknown class, and neither labels nor mask have such a shape")


def _in_frames(model: Any, mask: Tensor, frames: int) -> Tensor:
    """A mask over samples of sound as one over frames, (batch, frames), by the model's own arithmetic."""
    if mask.shape[1] != frames and hasattr(model, "_get_feature_vector_attention_mask"):
        mask = model._get_feature_vector_attention_mask(frames, mask)
    elif mask.shape[1] != frames and hasattr(model, "_get_output_attention_mask"):
        mask = model._get_output_attention_mask(mask, target_length=frames)
    return mask
