"""vLLM in this process, on the training device."""

import gc
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from dwrl_fast.errors import ConfigError, SamplerError
from dwrl_fast.log import logger
from dwrl_fast.ranks import Ranks
from dwrl_fast.sampling.sampler import Limits
from dwrl_fast.sampling.vllm import adapter
from dwrl_fast.sampling.vllm.engine import Answer, Ask, Sent, VllmSettings, wrong

_kept: list[Any] = []


class Colocated:
    """An engine over vLLM's `LLM`. config: of the Hugging Face model; `load` passes its weights from this process's
    memory. limits: of concurrent sequences, and on a CPU of the cache. trains: whether the device is also used for
    training; vLLM then sleeps between calls (not supported on a CPU).

    Raises ConfigError if vLLM is missing or cannot run with these settings.
    """

    def __init__(
        self,
        config: Any,
        settings: VllmSettings,
        dtype: torch.dtype,
        device: torch.device,
        limits: Limits,
        ranks: Ranks,
        *,
        trains: bool,
    ):
        self.cpu = cpu = device.type == "cpu"
        self.among_ranks = ranks.mesh is not None
        self.sleeps, self.lock = trains and not cpu, threading.RLock()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are passed in memory
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer uses the same threads
        options: dict[str, Any] = {"gpu_memory_utilization": settings.gpu_memory_utilization}
        if self.among_ranks:
            options["distributed_executor_backend"] = "external_launcher"  # torchrun has already started the processes
        if cpu:
            options |= {"kv_cache_memory_bytes": int(limits.cache_gib * 2**30), "enforce_eager": True}
            options["enable_chunked_prefill"] = False  # vLLM 0.32 on a CPU fails with it for seeded requests
        self.options = options | {
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": settings.max_model_length,
            "max_num_seqs": limits.batch_size,
            "enable_sleep_mode": self.sleeps,
        }
        self.config, self.restarts = config, 0
        self.loaded: tuple[Sent, str] | None = None
        self._start()
        self.longest = int(self.llm.llm_engine.model_config.max_model_len)

    def _start(self) -> None:
        """Create vLLM's `LLM`. Its weights are random until `load`."""
        threads, set_threads = torch.get_num_threads(), torch.set_num_threads
        with tempfile.TemporaryDirectory() as folder:
            self.config.save_pretrained(folder)
            try:
                if self.cpu:
                    adapter.check_cpu_heads(self.config)
                self.llm = adapter.make_llm(folder, **self.options)
            except ImportError as error:
                raise ConfigError(
                    f"--use_vllm: vLLM cannot be imported ({error}). Install it (pip install 'dwrl_fast[vllm]'; on a "
                    "CPU `make vllm` makes an environment that has it), or leave --use_vllm out."
                ) from error
        torch.set_num_threads = set_threads  # vLLM replaces this function on a CPU
        torch.set_num_threads(threads)
        self.asleep = False

    def complete(self, asks: Sequence[Ask], done: Callable[[int], None]) -> list[Answer]:
        """See `Engine.complete`. If vLLM fails, it is restarted once per call with the weights that were loaded last,
        and all of `asks` are sent again.
        """
        with self.lock:
            found, why = self._complete(asks, done)
            if why:
                self._restart(why, len(asks))
                found, why = self._complete(asks, done)
            if why:
                with suppress(Exception):  # a broken engine may not shut down
                    self._end()
                raise _lost(f"it failed again after a restart ({why})")
        for place, ask in enumerate(asks):
            if why := "no answer came" if place not in found else wrong(ask, found[place]):
                raise SamplerError(
                    f"vLLM in this process returned an incomplete thought: {why}. It was not used for training."
                )
        return [found[place] for place in range(len(asks))]

    def _complete(self, asks: Sequence[Ask], done: Callable[[int], None]) -> tuple[dict[int, Answer], str]:
        """The answers by their index in `asks`, and the reason if vLLM failed, else an empty string."""
        engine = self.llm.llm_engine
        found: dict[int, Answer] = {}
        try:
            for place, ask in enumerate(asks):
                engine.add_request(str(place), {"prompt_token_ids": list(ask.prompt)}, adapter.sampling_params(ask))
            while engine.has_unfinished_requests():
                try:
                    outputs = engine.step()
                except Exception as error:  # only its text is kept, because its frames keep the engine in memory
                    return {}, f"{type(error).__name__}: {error}"[:300]
                for output in outputs:
                    if output.finished:
                        place = int(output.request_id)
                        found[place] = adapter.answer_of(output.outputs[0], asks[place])
                        done(place)
        except BaseException:
            engine.abort_request([str(place) for place in range(len(asks)) if place not in found])
            raise
        return found, ""

    def _restart(self, why: str, requests: int) -> None:
        """Replace the engine by a new one with the weights that were loaded last. Raises SamplerError if this fails."""
        if self.among_ranks:
            raise _lost(f"{why}. With several ranks it is not restarted")
        self.restarts += 1
        logger.warning(
            "vLLM in this process failed (%s). It is restarted, and its %d requests are sampled again with the same "
            "seeds.",
            *(why, requests),
        )
        assert self.loaded is not None
        try:
            with suppress(Exception):
                self._end()
            self._start()
            self.load(*self.loaded)
        except Exception as error:
            raise _lost(f"{why}. It could not be restarted ({error})") from error

    def _end(self) -> None:
        """Shut vLLM down and free its memory."""
        llm = self.__dict__.pop("llm")
        try:
            llm.llm_engine.engine_core.shutdown()
        finally:
            del llm
            gc.collect()
            if not self.cpu:
                torch.cuda.empty_cache()

    def load(self, weights: Sent, version: str) -> None:
        """See `Engine.load`."""
        with self.lock:
            self.loaded = weights, version
            if self.asleep:
                self.llm.wake_up(["weights"])
            adapter.load_weights(self.llm, weights())
            if self.cpu:
                self.llm.collective_rpc("repack_heads")
            if self.asleep:
                self.llm.wake_up(["kv_cache"])
            self.asleep = False
            self.reset()
            adapter.set_version(self.llm, version)

    def reset(self) -> None:
        """Reset the prefix cache. Raises SamplerError if vLLM does not."""
        if not self.llm.reset_prefix_cache():
            raise SamplerError(
                "vLLM in this process did not reset its prefix cache, which holds keys and values of older weights, "
                "so it is not used for sampling. Leave --use_vllm out, or report this with vLLM's version."
            )

    def sleep(self) -> None:
        """See `Engine.sleep`."""
        self.llm.sleep(level=2)  # without a backup of the weights, which are sent again
        self.asleep = True

    def close(self) -> None:
        """See `Engine.close`. With several ranks the engine is kept until the process ends, because on release vLLM
        destroys the process group.
        """
        self.loaded = None
        if "llm" not in self.__dict__:
            return
        if self.among_ranks:
            _kept.append(self.__dict__.pop("llm"))
        else:
            self._end()


def _lost(what: str) -> SamplerError:
    return SamplerError(
        f"vLLM in this process failed: {what}. None of its unfinished output was used for training. Resume the run "
        "with --resume_from_checkpoint latest. If it lacks memory, lower --vllm_gpu_memory_utilization or "
        "--generation_batch_size."
    )
