"""Everything that depends on vLLM's version: names, arguments and results.

Written from the sources of 0.29, 0.30, 0.31 and 0.32; run with 0.32 on a CPU.
"""

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dwrl_fast.errors import SamplerError
from dwrl_fast.sampling.vllm.engine import Answer, Ask, Sent, Weights

Known = tuple[str, torch.dtype, tuple[int, ...]]
OLDEST, BELOW = (0, 29), (0, 34)
LOGPROBS_MODE, GENERATION_CONFIG = "processed_logprobs", "vllm"
EXTENSION = "dwrl_fast.sampling.vllm.worker.Repacking"  # needed by workers on a CPU
SAMPLING: dict[str, Any] = {  # switches off everything that changes the distribution
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def check_version(version: str, where: str) -> None:
    """Raise SamplerError if this file does not support vLLM `version`."""
    parts = version.split("+")[0].split(".")[:2]
    found = tuple(int(part) for part in parts if part.isdigit())
    if not OLDEST <= found < BELOW:
        raise SamplerError(
            f"{where} is vLLM {version}. The interface for sending weights changes between versions: 0.29 to 0.33 are "
            "supported (the code of 0.29 to 0.32 was read, 0.32 was run). Install one of them: pip install "
            "'vllm>=0.29,<0.34'"
        )


def server_command(model: str, *, dtype: str = "bfloat16", cpu: bool = False, port: str = "8000") -> str:
    """The command line of a server with the right settings."""
    words = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"]
    words += ["--port", port, "--dtype", dtype, "--logprobs-mode", LOGPROBS_MODE]
    words += ["--generation-config", GENERATION_CONFIG]
    words += ["--worker-extension-cls", EXTENSION, "--no-enable-chunked-prefill"] if cpu else []
    return "VLLM_SERVER_DEV_MODE=1 " + shlex.join(words)


# In this process


def make_llm(folder: str, **options: Any) -> Any:
    """vLLM's `LLM` for the config.json in `folder`; its weights are random until weights are loaded."""
    import vllm

    check_version(vllm.__version__, "the installed one")
    return vllm.LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        logprobs_mode=LOGPROBS_MODE,
        generation_config=GENERATION_CONFIG,
        worker_extension_cls=EXTENSION,
        disable_log_stats=True,
        **options,
    )


def check_cpu_heads(config: Any) -> None:
    """Raise SamplerError if vLLM's attention on a CPU does not support the head size of this model."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    taken = CPUAttentionBackend.get_supported_head_sizes()
    if size not in taken:
        raise SamplerError(
            f"vLLM's attention on a CPU supports the head sizes {', '.join(map(str, taken))}, but this model has "
            f"heads of size {size} (so has the model of the embedded task). Leave --use_vllm out, or use another "
            "model."
        )


def sampling_params(ask: Ask) -> Any:
    """vLLM's `SamplingParams` for a request."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=ask.temperature,
        max_tokens=ask.max_tokens,
        seed=ask.seed,
        stop_token_ids=list(ask.stop_ids),
        ignore_eos=True,
        detokenize=False,
        **({"logprob_token_ids": list(ask.labels)} if ask.labels else {"logprobs": 0}),
        **SAMPLING,
    )


def answer_of(output: Any, ask: Ask) -> Answer:
    """The answer in a `CompletionOutput`."""
    ids = list(output.token_ids)
    rows = output.logprobs or []
    labels = tuple(rows[0][label].logprob for label in ask.labels) if rows else ()
    return Answer(ids, [row[token].logprob for row, token in zip(rows, ids, strict=True)], labels)


def load_weights(llm: Any, weights: Weights) -> None:
    """Load every weight, one by one, from this process's memory."""
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})


def set_version(llm: Any, version: str) -> None:
    """Set the value of `weight_versions` in later outputs."""
    llm.llm_engine.set_weight_version(version)


# Over HTTP


def completion_body(ask: Ask, model: str) -> dict[str, Any]:
    """The body of a request to /v1/completions."""
    return {
        "model": model,
        "prompt": ask.prompt,
        "max_tokens": ask.max_tokens,
        "temperature": ask.temperature,
        "seed": ask.seed,
        "stop_token_ids": list(ask.stop_ids),
        "ignore_eos": True,
        "logprobs": 1 if ask.labels else 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "add_special_tokens": False,
        "skip_special_tokens": False,
        **({"logprob_token_ids": list(ask.labels)} if ask.labels else {}),
        **SAMPLING,
    }


def answer_of_body(body: dict[str, Any], ask: Ask) -> Answer:
    """The answer in a response of /v1/completions. Raises LookupError or TypeError for any other content."""
    (choice,) = body["choices"]
    if choice["prompt_token_ids"] != ask.prompt:
        raise LookupError("the prompt came back changed")
    found = choice["logprobs"]
    labels = [found["top_logprobs"][0][f"token_id:{label}"] for label in ask.labels]
    return Answer(list(choice["token_ids"]), [float(p) for p in found["token_logprobs"]], tuple(map(float, labels)))


def unfit(config: dict[str, Any], dtype: str) -> list[str]:
    """The settings in a server's configuration (`/server_info`) that make its thoughts unusable for training."""
    model = config["model_config"]
    wanted = {
        "logprobs_mode": LOGPROBS_MODE,
        "generation_config": GENERATION_CONFIG,
        "dtype": f"torch.{dtype}",
        "override_generation_config": {},
    }
    found = [
        f"{name} is {model.get(name)!r}, not {value!r}" for name, value in wanted.items() if model.get(name) != value
    ]
    if on_cpu(config) and config["parallel_config"].get("worker_extension_cls") != EXTENSION:
        found.append(
            f"worker_extension_cls is not {EXTENSION}, without which a tied head keeps its old weights on a CPU"
        )
    if on_cpu(config) and config["scheduler_config"].get("enable_chunked_prefill"):
        found.append(
            "enable_chunked_prefill is on, which on a CPU makes vLLM crash at the first seeded request that is split "
            "into chunks"
        )
    return found


def on_cpu(config: dict[str, Any]) -> bool:
    """Whether the server computes on a CPU."""
    return str(config["device_config"].get("device")) == "cpu"


def takes_nccl(config: dict[str, Any]) -> bool:
    """Whether the server was started to receive weights by NCCL (--weight-transfer-config '{"backend": "nccl"}')."""
    return (config.get("weight_transfer_config") or {}).get("backend") == "nccl"


def nccl_sender(client: Any, world_size: int, meeting: tuple[str, int], known: Sequence[Known], weights: Sent) -> Any:
    """vLLM's sender, connected to the servers' workers. Its `send_weights` sends the current `weights`. known: their
    names, dtypes and shapes. meeting: the address and port for the connection.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    class Source(WeightSource):  # type: ignore[misc]
        def metadata(self) -> list[Any]:
            return [ParamMeta(*each) for each in known]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(weights())

    address, port = meeting
    info = NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=world_size, rank=0)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=Source())


def load_calls(folder: str, cpu: bool) -> Sequence[tuple[str, dict[str, Any]]]:
    """The calls of /collective_rpc, in order, that make the server load the safetensors in `folder`."""
    reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
    return [("/collective_rpc", reload), *([("/collective_rpc", {"method": "repack_heads"})] if cpu else [])]
