"""The bank: the newest teacher embeddings, first in first out."""

import torch
from torch import Tensor


class FeatureBank:
    """A first-in-first-out store of embeddings, of any size, fed with batches of any size.

    Only rows that were put in are ever given out: an empty bank has no rows rather than random ones. A write never
    touches rows that were given out, so that a loss computed before it can still run its backward pass afterwards. It
    is no module: data parallelism would overwrite a buffer with the first process's rows at every forward.

    Args:
        size: How many rows to keep at most; 0 keeps none.
        dim: The width of a row.
        dtype, device: Of the stored rows.

    Raises:
        ValueError: `size` is negative or `dim` is not positive.
    """

    def __init__(
        self, size: int, dim: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        if size < 0 or dim < 1:
            raise ValueError(f"`size` must be 0 or more rows and `dim` at least 1, got {size} and {dim}.")
        self.size, self.dim = size, dim
        self._storage = torch.empty(0, dim, dtype=dtype, device=device)
        self._start = self._end = 0  # of the filled part; behind it is free room

    def __len__(self) -> int:
        return self._end - self._start

    def __repr__(self) -> str:
        return f"FeatureBank(size={self.size}, dim={self.dim}, filled={len(self)})"

    @property
    def filled(self) -> Tensor:
        """The rows in the bank, (len(self), dim), oldest first and newest last. Do not write into it."""
        return self._storage[self._start : self._end]

    @torch.no_grad()
    def enqueue(self, rows: Tensor) -> None:
        """Put rows in, (n, dim), oldest first, dropping the oldest beyond `size`; a ValueError for another width."""
        if rows.dim() != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"`rows` must have the shape (n, {self.dim}), got {tuple(rows.shape)}.")
        rows = rows[max(len(rows) - self.size, 0) :]
        kept = min(len(self), self.size - len(rows))
        if self._end + len(rows) > len(self._storage):
            # Room for a quarter more than the size: a row is moved four times on its way, not at every step. A bank
            # that is far from full takes less.
            newest = self._storage[self._end - kept : self._end]
            self._storage = newest.new_empty(min(self.size * 5 // 4 + 1, 2 * (kept + len(rows))), self.dim)
            self._storage[:kept] = newest
            self._end = kept
        # Through `data`, because autograd counts writes to all of a storage: these are to rows that nobody has seen.
        self._storage.data[self._end : self._end + len(rows)] = rows
        self._end += len(rows)
        self._start = self._end - kept - len(rows)

    def clear(self) -> None:
        """Take all rows out."""
        self._start = self._end

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "FeatureBank":
        """Move the rows to a device or a dtype; returns the bank itself."""
        self._storage = self.filled.to(device=device, dtype=dtype)  # no free room: the next write is elsewhere
        self._start, self._end = 0, len(self._storage)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """All there is to save: `rows`, (len(self), dim). Their order is the bank's only position."""
        return {"rows": self.filled.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over saved rows, of which the newest `size` stay; a ValueError for other names or another width."""
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if shapes.get("rows", ())[1:] != (self.dim,):
            cause = "It was saved with another teacher or another projection."
            raise ValueError(f"the saved bank must hold `rows` of shape (n, {self.dim}), got {shapes}. {cause}")
        self.clear()
        self.enqueue(state["rows"])
