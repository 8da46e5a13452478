"""Counts the operations that a GPU would have to launch: no GPU is needed for that."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

FREE = set(
    "alias as_strided detach diagonal empty empty_like empty_strided expand new_empty select slice split t transpose "
    "permute unbind unsqueeze squeeze view _unsafe_view _reshape_alias lift_fresh _record_function_enter_new "
    "_record_function_exit".split()
)
"""Views, allocations and marks."""


class Operations(TorchDispatchMode):
    """The names of the operations meanwhile, in their order, without those that are free."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
