"""Sends weights to servers by NCCL with vLLM's own sender, from the first rank's GPU to the GPUs of all servers at
once.

Written from the sources of vLLM 0.32. It has never been run, because it needs several processes with GPUs.
"""

import itertools
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from dwrl_fast.ranks import Ranks
from dwrl_fast.sampling.vllm import adapter
from dwrl_fast.sampling.vllm.engine import Sent
from dwrl_fast.sampling.vllm.server import Server, TroubleError


class Client:
    """The calls of vLLM's sender to the servers. Each call goes to all servers at the same time, because they wait for
    each other. Workers of all servers are numbered consecutively; the sender has number 0.
    """

    def __init__(self, servers: Sequence[Server]):
        self.servers = servers
        sizes = [int(server.call("GET", "/get_world_size")["world_size"]) for server in servers]
        *self.offsets, self.world_size = itertools.accumulate(sizes, initial=1)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let the workers of each server join the group with their numbers."""
        self._all(
            "/init_weight_transfer_engine", [{"init_info": init_info | {"rank_offset": at}} for at in self.offsets]
        )

    def shutdown_weight_transfer_engine(self) -> None:
        """Let the workers leave the group."""
        self._all("/shutdown_weight_transfer_engine", [None] * len(self.servers))

    def start_weight_update(self) -> None:
        """Announce weights."""
        self._all("/start_weight_update", [None] * len(self.servers))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive the weights; returns after the last one."""
        self._all("/update_weights", [{"update_info": update_info}] * len(self.servers))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End the transfer. The version is set later, after the cache has been reset."""
        self._all("/finish_weight_update", [None] * len(self.servers))

    def _all(self, path: str, bodies: Sequence[Any]) -> None:
        def post(server: Server, body: Any) -> None:
            try:
                server.call("POST", path, body)
            except TroubleError as error:
                raise server.failed(str(error)) from error

        with ThreadPoolExecutor(len(self.servers)) as pool:
            for _ in pool.map(post, self.servers, bodies):
                pass


class Nccl:
    """The NCCL transfer to `servers`. ranks: the ranks that hold the weights; the first one sends."""

    def __init__(self, servers: Sequence[Server], ranks: Ranks):
        self.servers, self.ranks = servers, ranks
        self.known: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
        self.sender: Any = None
        self.weights: Sent = list  # the weights that are sent now

    def send(self, weights: Sent) -> None:
        """Send all weights. All ranks call this together. Before the first transfer they iterate over the weights once
        more, because servers need names and sizes in advance. Raises SamplerError if a server fails.
        """
        if not self.known:
            self.known = [(name, weight.dtype, tuple(weight.shape)) for name, weight in weights()]
        if not self.ranks.first:
            for _ in weights():
                pass
            return
        self.weights = weights
        if self.sender is None:
            client, now = Client(self.servers), lambda: self.weights()
            self.sender = adapter.nccl_sender(client, client.world_size, _meeting(self.servers), self.known, now)
        self.sender.send_weights()

    def close(self) -> None:
        """Leave the group."""
        if self.sender is not None:
            self.sender.client.shutdown_weight_transfer_engine()
            self.sender = None


def _meeting(servers: Sequence[Server]) -> tuple[str, int]:
    """An address of this machine that all servers can reach, and a free port. Loopback if all servers are on this
    machine.
    """
    own = []
    for server in servers:
        url = server.client.base_url
        with socket.create_connection((url.host, url.port or 80), timeout=server.timeout) as found:
            own.append(found.getsockname()[0])
    address = next((each for each in own if not each.startswith("127.")), own[0])
    with socket.socket() as found:
        found.bind((address, 0))
        return address, int(found.getsockname()[1])
