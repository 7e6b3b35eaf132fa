"""Several vLLM servers as one engine.

Each server has a version of its weights, which is compared before and after every call. A restarted server has the
weights of its files and a version that is not from this run. It gets the latest weights again, and its answers in the
meantime are discarded. All retries are bounded.
"""

import fcntl
import itertools
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dwrl_fast.errors import SamplerError
from dwrl_fast.log import logger
from dwrl_fast.ranks import Ranks
from dwrl_fast.sampling.vllm.engine import Answer, Ask, Sent, VllmSettings
from dwrl_fast.sampling.vllm.folder import write_weights
from dwrl_fast.sampling.vllm.nccl import Nccl
from dwrl_fast.sampling.vllm.server import Server, TroubleError, tried

ATTEMPTS = 3


class Servers:
    """An engine over running servers. at_once: concurrent requests per server. ranks: the ranks that share the servers;
    the first one sends the weights.

    Raises SamplerError if a server does not answer or was started with wrong settings.
    """

    sleeps = False

    def __init__(self, settings: VllmSettings, dtype: torch.dtype, device: torch.device, ranks: Ranks, at_once: int):
        self.ranks, self.at_once = ranks, at_once
        name = str(dtype).removeprefix("torch.")
        self.servers = [Server(url, settings.timeout, name, at_once) for url in settings.base_url]
        for server, said in zip(self.servers, ranks.from_first(self._settled), strict=True):
            server.model, server.longest, server.cpu, server.nccl = said
        joined = {server.nccl for server in self.servers}
        self.nccl = Nccl(self.servers, ranks) if joined == {True} and device.type == "cuda" else None
        logger.info("weights are sent to vLLM's servers by %s", "NCCL" if self.nccl else "a folder of safetensors")
        self.longest = min(server.longest for server in self.servers)
        if settings.max_model_length is not None:
            self.longest = min(self.longest, settings.max_model_length)
        self.folder: Path | None = None
        self.kept = ExitStack()  # removes the folder, on the first rank
        self.wanted = ""  # what the version of every server begins with
        self.restarts = 0

    def _settled(self) -> list[tuple[str, int, bool, bool]]:
        for server in self.servers:
            server.settle()
        return [(server.model, server.longest, server.cpu, server.nccl) for server in self.servers]

    def load(self, weights: Sent, version: str) -> None:
        """See `Engine.load`."""
        if self.nccl is None:
            self._load_folder(weights, version)
            return
        self.wanted = ""
        self.nccl.send(weights)
        self.ranks.from_first(lambda: self._all(partial(_named, version=f"{version}#0")))
        self.wanted = version

    def _load_folder(self, weights: Sent, version: str) -> None:
        """The weights stay in their folder until the next ones arrive or the process ends, in case a server is
        restarted.
        """
        with ExitStack() as failed:
            own = None
            if self.ranks.first:
                made = tempfile.TemporaryDirectory(prefix="dwrl_fast_weights_", ignore_cleanup_errors=True)
                own = Path(failed.enter_context(made))
            write_weights(own, weights())
            self.wanted = ""
            self.folder = self.ranks.from_first(lambda: self._sent(own, version))
            self.wanted = version
            self.kept.close()
            self.kept = failed.pop_all()

    def _sent(self, folder: Path | None, version: str) -> Path:
        assert folder is not None
        self._all(partial(_send, folder=folder, version=f"{version}#0"))
        return folder

    def _all(self, what: Callable[[Server], None]) -> None:
        with ThreadPoolExecutor(len(self.servers)) as pool:
            for _ in pool.map(what, self.servers):
                pass

    def complete(self, asks: Sequence[Ask], done: Callable[[int], None]) -> list[Answer]:
        """See `Engine.complete`. Each server answers a contiguous part of the requests with about the same number of
        tokens.
        """
        sizes = np.array([len(ask.prompt) + ask.max_tokens for ask in asks], dtype=np.int64)
        middle, count = np.cumsum(sizes) - sizes / 2, len(self.servers)
        edges = np.searchsorted(middle, sizes.sum() * np.arange(count + 1) / count).tolist()
        found: list[Answer] = []
        with ThreadPoolExecutor(count) as pool:
            parts = [
                pool.submit(self._complete, server, asks[first:last], partial(_shifted, done, first))
                for server, (first, last) in zip(self.servers, itertools.pairwise(edges), strict=True)
            ]
            for part in parts:
                found += part.result()
        return found

    def _complete(self, server: Server, asks: Sequence[Ask], done: Callable[[int], None]) -> list[Answer]:
        found: dict[int, Answer] = {}
        why = ""
        for _ in range(ATTEMPTS if asks else 0):
            try:
                before = self._ready(server)
                missing = [place for place in range(len(asks)) if place not in found]
                answers, why = self._asked(server, asks, missing, done)
                if server.version() != before:
                    found.clear()
                    why = why or "it was restarted, or another program changed its weights, while it wrote"
                    continue
                found |= answers
                if len(found) == len(asks):
                    break
            except TroubleError as error:
                found.clear()  # it is unknown which weights they come from
                why = str(error)
            logger.warning("the vLLM server %s: %s. Trying again.", server.url, why)
        if len(found) < len(asks):
            raise server.failed(f"{why}; it was asked {ATTEMPTS} times")
        return [found[place] for place in range(len(asks))]

    def _asked(
        self, server: Server, asks: Sequence[Ask], places: Sequence[int], done: Callable[[int], None]
    ) -> tuple[dict[int, Answer], str]:
        """The server's answers for `places` until one fails, and the reason of the failure."""
        found: dict[int, Answer] = {}
        troubles: list[str] = []

        def one(place: int) -> None:
            if troubles:
                return
            try:
                found[place] = server.ask(asks[place])
                done(place)
            except TroubleError as error:
                troubles.append(str(error))

        with ThreadPoolExecutor(self.at_once) as pool:
            for _ in pool.map(one, places):
                pass
        return found, troubles[0] if troubles else ""

    def _ready(self, server: Server) -> str:
        """The version of a running server with the latest weights. If it does not have them, they are sent again."""
        server.wait()
        version = server.version()
        if self._ours(version):
            return version
        if self.nccl is not None:
            raise server.failed(f"it has the weights {version!r} instead of the latest ones, as after a restart")
        if self.folder is None or not self.wanted:
            raise SamplerError(f"the vLLM server {server.url} has weights {version!r}, but none were sent to it")
        with (self.folder / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # only one rank sends, and no other rank asks in the meantime
            version = server.version()
            if self._ours(version):
                return version
            logger.warning(
                "the vLLM server %s has the weights %r instead of the latest ones, as after a restart: the latest "
                "are sent again",
                *(server.url, version),
            )
            self.restarts += 1
            server.settle()
            again = 1 + sum(1 for _ in self.folder.glob("again-*"))
            (self.folder / f"again-{again}").touch()
            server.load(self.folder, f"{self.wanted}#{again}")
            return f"{self.wanted}#{again}"

    def _ours(self, version: str) -> bool:
        return bool(self.wanted) and version.rpartition("#")[0] == self.wanted

    def sleep(self) -> None:
        """Does nothing: a server has its own devices."""

    def close(self) -> None:
        """See `Engine.close`. The servers keep running; their owner stops them."""
        if self.nccl is not None:
            self.nccl.close()
        for server in self.servers:
            server.client.close()
        self.kept.close()


def _shifted(done: Callable[[int], None], first: int, place: int) -> None:
    done(first + place)


def _named(server: Server, version: str) -> None:
    """Set the version of weights received by NCCL, after the cache is reset."""
    tried(lambda: server.take_over(version), server, ATTEMPTS)


def _send(server: Server, folder: Path, version: str) -> None:
    tried(lambda: server.load(folder, version), server, ATTEMPTS)
