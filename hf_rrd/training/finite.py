"""What must be finite: the teacher's outputs, the loss, and the weights that go into a checkpoint."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

ADVICE = {
    "the teacher": "Check its columns in that batch, `teacher_embedding` and `teacher_logits`, or what it reads. A "
    "float16 teacher may overflow: load it in bfloat16 or float32.",
    "the loss": "The weights of the step before are in order: go on from the last checkpoint with a lower "
    "learning_rate, with max_grad_norm, or in bf16 instead of fp16, with weights (task_weight, kd_weight, "
    "relational_weight, layer_weight) and temperatures within reason. A `compute_loss_func` that divides by the "
    "number of labels gives nan where there is none: let it divide by 1 at least.",
}


class FiniteCheck:
    """Finds the first step at which something was not finite, without waiting for the device.

    On a GPU `note` only queues work, and `raise_if_found` reads the result: it belongs where the host waits anyway. On
    a CPU there is nothing to wait for, and `note` raises at once.

    Args:
        broken_terms: Gives the names of the loss's terms that are not finite, for the message.
    """

    def __init__(self, broken_terms: Callable[[], list[str]]) -> None:
        self._broken_terms = broken_terms
        self.start()

    def start(self) -> None:
        """Forget what was noted in an earlier training."""
        self._noted: dict[str, tuple[list[int], list[Tensor]]] = {}  # steps, and what stands for their values

    def note(self, step: int, name: str, value: Tensor) -> None:
        """Look at a value of a step, numbered as in the log."""
        if not value.is_floating_point():  # whole numbers, of a quantised teacher
            return
        steps, largest = self._noted.setdefault(name, ([], []))
        value = value.detach()
        steps.append(step)
        # The largest is not finite if anything is not; sums could be too large.
        largest.append((value if value.dim() == 0 else torch.linalg.vector_norm(value, torch.inf)).view(1))
        if value.device.type == "cpu":
            self.raise_if_found()
        elif len(largest) > 1000:
            largest[:] = [torch.cat(largest)]

    def note_teacher(self, step: int, embedding: Tensor | None, logits: Tensor | None) -> None:
        """Look at a teacher's outputs in a step, as far as there are any."""
        for name, value in (("embedding", embedding), ("logits", logits)):
            if value is not None:
                self.note(step, f"the teacher's {name}", value)

    def raise_if_found(self) -> None:
        """Raise a ValueError for what was noted since the last call and is not finite, with its step."""
        noted, self._noted = self._noted, {}  # read once: what comes later may be in order again
        for name, (steps, largest) in noted.items():
            broken = torch.cat(largest).isfinite().logical_not().nonzero()  # of (steps,)
            if len(broken):
                step = steps[int(broken[0])]
                about = "the loss" if name == "the loss" else "the teacher"
                terms = ", ".join(self._broken_terms()) if name == "the loss" else ""
                which = f"{name} ({terms})" if terms else name
                raise ValueError(f"{which} is not finite (nan or inf) at step {step}. {ADVICE[about]}")


@torch.no_grad()
def check_weights(model: nn.Module, consequence: str) -> None:
    """Raise a ValueError, with its consequence, for a student whose trained weights no run could go on from."""
    trained = [named for named in model.named_parameters() if named[1].requires_grad and not named[1].is_meta]
    # Of a sharded one its own part.
    broken = [name for name, weight in trained if not getattr(weight, "_local_tensor", weight).isfinite().all()]
    if broken:
        raise ValueError(
            f"{len(broken)} of the student's weights are not finite (nan or inf), {broken[0]} first: "
            f"{consequence}. Go on from the checkpoint before with a lower learning_rate or with max_grad_norm."
        )
