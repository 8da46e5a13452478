"""FSDP2 over gloo, for tests alone: accelerate takes no notice of an FSDP plugin on CPUs."""

from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


def enable() -> None:
    """Let `AcceleratorState` keep the plugin that it was given. Before the first trainer of the process."""
    initialise = AcceleratorState.__init__

    def initialise_with_fsdp(self: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin") or self.__dict__.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.__dict__["distributed_type"] = DistributedType.FSDP
            self.__dict__["fsdp_plugin"] = plugin
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = initialise_with_fsdp
