"""Which columns of a batch reach the student, and which the teacher."""

from typing import Any

import pytest
from torch import nn

from hf_rrd.models.columns import forward_columns, student_inputs, teacher_inputs
from tests.builders import tiny_bert


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"input_ids": 1, "attention_mask": 2, "labels": 3}, {"input_ids": 1, "attention_mask": 2}),
        ({"input_ids": 1, "special": 2, "label": 3, "label_ids": 4}, {"input_ids": 1}),
        ({"input_ids": 1, "teacher_input_ids": 2}, {"input_ids": 2}),
        ({"input_ids": 1, "attention_mask": 3, "teacher_id": 2}, {"input_ids": 1, "attention_mask": 3}),
        ({"input_ids": 1, "teacher_embedding": 2, "teacher_logits": 3}, {"input_ids": 1}),
        ({"teacher_embedding": 2, "teacher_input_ids": 3}, {"input_ids": 3}),
        ({"input_ids": 1, "start_positions": 2, "end_positions": 3}, {"input_ids": 1}),
        ({"input_ids": 1, "teacher_input_ids": 2, "teacher_start_positions": 3}, {"input_ids": 2}),
        ({"input_ids": 1, "teacher_labels": 2}, {"input_ids": 1}),
        ({"pixel_values": 1}, {}),
    ],
)
def test_the_teacher_sees_its_own_columns_or_what_it_shares_and_never_labels(
    inputs: dict[str, int], expected: dict[str, int]
) -> None:
    accepted = ["input_ids", "attention_mask", "labels", "label", "start_positions", "end_positions"]
    assert teacher_inputs(inputs, accepted) == expected


def test_the_student_sees_the_batch_without_what_is_only_for_the_teacher() -> None:
    inputs = {
        "input_ids": 1,  # both take it
        "labels": 2,  # the student alone
        "token_type_ids": 3,  # the teacher alone
        "num_items": 4,  # neither: left to the student, as in Trainer
        "teacher_input_ids": 5,
        "teacher_embedding": 6,
        "teacher_logits": 7,
    }
    seen = student_inputs(inputs, ["input_ids", "labels"], ["input_ids", "token_type_ids"])
    assert seen == {"input_ids": 1, "labels": 2, "num_items": 4}


def test_the_forward_columns_are_the_arguments_of_the_models_forward() -> None:
    columns = forward_columns(tiny_bert())
    assert columns[:3] == ["input_ids", "attention_mask", "token_type_ids"]
    assert "labels" in columns
    assert "self" not in columns


class Anything(nn.Module):
    """Takes whatever it is given."""

    def forward(self, **inputs: Any) -> Any:
        return inputs


def test_a_forward_of_keywords_alone_takes_anything() -> None:
    accepted = forward_columns(Anything())
    assert accepted is None
    assert teacher_inputs({"x": 1, "labels": 2}, accepted) == {"x": 1}


def test_beside_a_teacher_that_takes_anything_the_student_sees_what_it_knows() -> None:
    assert student_inputs({"input_ids": 1, "token_type_ids": 2}, ["input_ids"], None) == {"input_ids": 1}


def test_beside_no_teacher_the_student_sees_everything() -> None:
    assert student_inputs({"input_ids": 1, "other": 2}, ["input_ids"], []) == {"input_ids": 1, "other": 2}
