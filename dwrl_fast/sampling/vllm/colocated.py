"""vLLM in this process, on the training device."""

import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dwrl_fast.errors import ConfigError, SamplerError
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
        self.sleeps, self.lock = trains and not cpu, threading.Lock()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are passed in memory
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer uses the same threads
        options: dict[str, Any] = {"gpu_memory_utilization": settings.gpu_memory_utilization}
        if self.among_ranks:
            options["distributed_executor_backend"] = "external_launcher"  # torchrun has already started the processes
        if cpu:
            options |= {"kv_cache_memory_bytes": int(limits.cache_gib * 2**30), "enforce_eager": True}
            options["enable_chunked_prefill"] = False  # vLLM 0.32 on a CPU fails with it for seeded requests
        threads, set_threads = torch.get_num_threads(), torch.set_num_threads
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            try:
                if cpu:
                    adapter.check_cpu_heads(config)
                self.llm = adapter.make_llm(
                    folder,
                    dtype=str(dtype).removeprefix("torch."),
                    max_model_len=settings.max_model_length,
                    max_num_seqs=limits.batch_size,
                    enable_sleep_mode=self.sleeps,
                    **options,
                )
            except ImportError as error:
                raise ConfigError(
                    f"--use_vllm: vLLM cannot be imported ({error}). Install it (pip install 'dwrl_fast[vllm]'; on a "
                    "CPU `make vllm` makes an environment that has it), or leave --use_vllm out."
                ) from error
        torch.set_num_threads = set_threads  # vLLM replaces this function on a CPU
        torch.set_num_threads(threads)
        self.longest = int(self.llm.llm_engine.model_config.max_model_len)
        self.asleep = False

    def complete(self, asks: Sequence[Ask], done: Callable[[int], None]) -> list[Answer]:
        """See `Engine.complete`."""
        engine = self.llm.llm_engine
        found: dict[int, Answer] = {}
        with self.lock:
            for place, ask in enumerate(asks):
                prompt = {"prompt_token_ids": list(ask.prompt)}
                engine.add_request(str(place), prompt, adapter.sampling_params(ask))
            try:
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        if output.finished:
                            place = int(output.request_id)
                            found[place] = adapter.answer_of(output.outputs[0], asks[place])
                            done(place)
            finally:
                if left := [str(place) for place in range(len(asks)) if place not in found]:
                    engine.abort_request(left)
        for place, ask in enumerate(asks):
            if why := "no answer came" if place not in found else wrong(ask, found[place]):
                raise SamplerError(
                    f"vLLM in this process returned an incomplete thought: {why}. It was not used for training."
                )
        return [found[place] for place in range(len(asks))]

    def load(self, weights: Sent, version: str) -> None:
        """See `Engine.load`."""
        with self.lock:
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
        if (llm := self.__dict__.pop("llm", None)) is None:
            return
        if self.among_ranks:
            _kept.append(llm)
        else:
            llm.llm_engine.engine_core.shutdown()
