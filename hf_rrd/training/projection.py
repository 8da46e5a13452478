"""From the teacher's embedding to the rows that are compared."""

import torch
from torch import Tensor
from transformers.utils import logging

from hf_rrd.losses.relational import SAME_COSINE
from hf_rrd.losses.rows import no_autocast, principal_directions

logger = logging.get_logger(__name__)

TEACHER_PROJECTIONS = ("none", "center", "pca", "orthogonal")  # the values of `teacher_projection=`
MEASURED_PROJECTIONS = ("center", "pca")  # those that are measured on the teacher's embeddings before the first step


class TeacherProjection:
    """`(embedding - mean) @ matrix / scale`, frozen.

    Args:
        width, dim: Of the teacher's embedding, and of the result; None keeps the width.
        kind: "none"; "center": less the mean; "pca": less the mean, onto the `dim` directions of largest variance;
            both over one scale for all, so that an entry of a row is 1 in the quadratic mean; "orthogonal": a random
            projection with orthonormal columns.
        seed: Of the random projection.
    """

    def __init__(self, width: int, dim: int | None, kind: str, seed: int) -> None:
        self.kind = kind
        self.width = width
        self.dim = width if dim is None else dim
        self.mean: Tensor | None = None  # (width,)
        self.scale: Tensor | None = None  # (1,)
        self.matrix: Tensor | None = None  # (width, dim), contiguous: as it comes out of a checkpoint, to the bit
        if kind in ("none", "center") and self.dim != width:
            raise ValueError(
                f"`projection_dim` must be the teacher's width, {width}, with teacher_projection={kind!r}, got "
                f"{dim}. Leave it out, or set teacher_projection='pca'."
            )
        if self.dim > width:
            raise ValueError(f"`projection_dim` must be at most the teacher's width, {width}, got {dim}.")
        if kind == "orthogonal":
            generator = torch.Generator().manual_seed(seed)
            # In float64 so that the columns are orthonormal to the last bit of float32.
            square = torch.randn(width, self.dim, generator=generator, dtype=torch.float64)
            self.matrix = torch.linalg.qr(square).Q.float().contiguous()

    @property
    def is_ready(self) -> bool:
        """Whether nothing is left to measure."""
        return self.kind not in MEASURED_PROJECTIONS or self.mean is not None

    def fit(self, embedding: Tensor) -> None:
        """Measure the mean and, for "pca", the directions on the teacher's embeddings, (examples, width)."""
        rows = embedding.detach().cpu().double()
        if len(rows) == 0:
            raise ValueError(f"teacher_projection={self.kind!r} needs training examples to measure, got 0.")
        mean = rows.mean(0)
        if self.kind == "pca":
            if len(rows) <= self.dim:
                raise ValueError(
                    f"teacher_projection='pca' with `projection_dim` {self.dim} needs more than {self.dim} training "
                    f"examples to measure, got {len(rows)}. Lower it, or set teacher_projection='center'."
                )
            directions = principal_directions((rows - mean).T @ (rows - mean), self.dim)
            self.matrix = directions.float().contiguous()
        projected = rows - mean if self.matrix is None else (rows - mean) @ self.matrix.double()
        scale = projected.square().mean().sqrt()
        self.mean, self.scale = mean.float(), torch.where(scale > 0, scale, 1).float().view(1)

    def state_dict(self) -> dict[str, Tensor]:
        """All there is to save, as far as there is: `mean`, (width,), `scale`, (1,), and `matrix`, (width, dim)."""
        tensors = {"mean": self.mean, "scale": self.scale, "matrix": self.matrix}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what was saved; a ValueError if it is of another kind or another width."""
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        expected: dict[str, tuple[int, ...]] = (
            {"mean": (self.width,), "scale": (1,)} if self.kind in MEASURED_PROJECTIONS else {}
        )
        expected |= {"matrix": (self.width, self.dim)} if self.kind in ("pca", "orthogonal") else {}
        if shapes != expected:
            raise ValueError(
                f"the saved teacher projection has {shapes}, teacher_projection={self.kind!r} has {expected}. It was "
                "saved with another teacher or other settings."
            )
        self.mean, self.scale, self.matrix = (state.get(name) for name in ("mean", "scale", "matrix"))

    def __call__(self, embedding: Tensor) -> Tensor:
        """From (batch, width) to rows in float32, (batch, dim)."""
        if not self.is_ready:
            raise ValueError(
                f"teacher_projection={self.kind!r} is measured on training examples before the first step. Give the "
                "trainer a `train_dataset`, or set teacher_projection='none'."
            )
        if embedding.shape[1:] != (self.width,):
            raise ValueError(
                f"`teacher_embedding` must be {self.width} wide, as that of the first example or of the teacher, got "
                f"the shape {tuple(embedding.shape)}."
            )
        for name, tensor in self.state_dict().items():
            setattr(self, name, tensor.to(embedding.device))
        embedding = embedding.detach()
        with no_autocast(embedding.device.type):
            embedding = (embedding if self.mean is None else embedding - self.mean).float()
            embedding = embedding if self.matrix is None else embedding @ self.matrix
            return embedding if self.scale is None else embedding / self.scale


def prefixes_of(dims: list[int] | None, width: int) -> list[int]:
    """The widths of `matryoshka_dims`, the widest first; a ValueError for one beyond the rows that are compared."""
    prefixes = sorted(dims or [], reverse=True)
    if prefixes and prefixes[0] > width:
        raise ValueError(f"`matryoshka_dims` must be at most the width that is compared, {width}, got {dims}.")
    if prefixes and prefixes[0] < width:
        logger.warning(
            f"`matryoshka_dims` {dims} leaves out the full width, {width}: the student learns nothing in what "
            f"comes after the first {prefixes[0]} dimensions. Add {width} to use whole embeddings, too."
        )
    return prefixes


def check_variety(embeddings: Tensor, rows: Tensor) -> None:
    """Raise a ValueError where a teacher tells no example from another, so that a student would have nothing to learn.

    From its embeddings, (examples, width), and the same projected, unit, (examples, dim).
    """
    spread = torch.linalg.vector_norm(embeddings - embeddings.mean(0))
    alike = spread <= 1e-5 * torch.linalg.vector_norm(embeddings)  # also where all are 0
    if len(rows) > 1 and bool(alike | (rows.mean(0).square().sum() >= SAME_COSINE)):
        raise ValueError(
            f"the teacher's embeddings of {len(rows)} training examples are all alike (cosines of {SAME_COSINE} or "
            f"more) in the {rows.shape[1]} dimensions that are compared, so there is no relation to learn. Set "
            "another teacher_pooling or teacher_projection='center', or take another teacher."
        )
