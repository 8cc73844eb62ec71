"""How the workers of a group find each other: over the network by which Ray knows their nodes.

Left to themselves, gloo and NCCL take the address that a machine's own name stands for. On many machines that is a
loopback address, and workers on different machines then look for each other on their own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def interface_of(address: str) -> str | None:
    """Name of this machine's network interface that has an address; None if none has, or if it is loopback."""
    for name, found in psutil.net_if_addrs().items():
        if any(one.address == address for one in found) and not address.startswith("127."):
            return name
    return None


def name_interface() -> None:
    """Tell gloo and NCCL, in this process, which interface to use; what the user has set wins."""
    import ray

    name = interface_of(ray.util.get_node_ip_address())
    for variable in VARIABLES:
        if name is not None:
            os.environ.setdefault(variable, name)


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class GroupConfig(TorchConfig):
    """Ray Train's torch group with the interface named on every worker."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """See `_Backend`."""
        return _Backend
