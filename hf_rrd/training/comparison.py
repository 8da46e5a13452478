"""What student and teacher are compared by, as a checkpoint holds it: head, teacher projection and bank."""

from torch import Tensor

from hf_rrd.losses.bank import FeatureBank
from hf_rrd.models.head import RelationalHead
from hf_rrd.models.teacher import TeacherProjection
from hf_rrd.training.checkpoint import State, load_sidecar


def comparison_state(
    head: RelationalHead | None, projection: TeacherProjection | None, bank: FeatureBank | None
) -> State:
    """Tensors by group and name; a part that is None is left out."""
    parts = {"head": head, "teacher_projection": projection, "bank": bank}
    return {name: dict(part.state_dict()) for name, part in parts.items() if part is not None}


def restore_comparison(
    state: State, head: RelationalHead | None, projection: TeacherProjection | None, bank: FeatureBank | None
) -> None:
    """Take over what was saved; a part that is None stays as it is.

    Raises:
        ValueError: A part is of another shape than the one saved.
    """
    if bank is not None:
        bank.load_state_dict(state.get("bank", {}))
    if projection is not None:
        projection.load_state_dict(state.get("teacher_projection", {}))
    if head is not None:
        saved, own = (_shapes(tensors) for tensors in (state.get("head", {}), head.state_dict()))
        if saved != own:
            raise ValueError(
                f"the saved head has {saved}, this student's has {own}. It was saved with another "
                "student_projection, student or teacher."
            )
        head.load_state_dict(state["head"])


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}


def bank_of(state: State, about: dict[str, str], checkpoint: str, process: int, banks: int) -> dict[str, Tensor]:
    """The bank of a checkpoint that a process goes on with: the one of all processes, or its own.

    Args:
        state: Of the first process's sidecar.
        about: What that says of it.
        checkpoint: The folder.
        process: Which process asks.
        banks: How many this run has: 1, or with `gather_bank=False` one for each process.

    Raises:
        ValueError: The checkpoint has another number of banks, and more than one.
    """
    saved = about.get("banks", "1")
    if saved == "1":
        return state.get("bank", {})
    if saved != str(banks):
        raise ValueError(
            f"{checkpoint} holds a bank for each of {saved} processes (gather_bank=False), and this run has {banks}. "
            "Resume with as many processes and the same `gather_bank`."
        )
    return load_sidecar(checkpoint, process)[0].get("bank", {})
