"""One vLLM server over HTTP: checks of its settings, its weights, and requests."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dwrl_fast.errors import ConfigError, SamplerError
from dwrl_fast.sampling.vllm import adapter
from dwrl_fast.sampling.vllm.engine import Answer, Ask, wrong

PAUSE = 0.5  # seconds between checks of a server that does not answer
PROBED = 16  # number of token ids whose log-probs show how a server samples
TOLERANCE = 0.02  # nats; above the rounding between two requests, below the effect of a changed distribution


class TroubleError(Exception):
    """A server failed in a way for which a retry may help."""


class Server:
    """A server at `url`. timeout: seconds to wait for an answer, and for its start. dtype: its required dtype."""

    def __init__(self, url: str, timeout: float, dtype: str, connections: int):
        try:
            import httpx2 as httpx
        except ImportError as error:
            raise ConfigError("--vllm_mode server: httpx2 is not installed (pip install 'dwrl_fast[vllm]')") from error
        self.url, self.timeout, self.dtype = url.rstrip("/"), timeout, dtype
        self.failures = (httpx.TransportError,)
        self.client = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(timeout, connect=5.0),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=False,  # no proxy for a loopback address
        )
        self.model, self.longest, self.cpu, self.nccl = "", 0, False, False

    def call(self, method: str, path: str, body: Any = None, **query: str) -> dict[str, Any]:
        """The JSON of its answer. Raises TroubleError if it does not answer, SamplerError if it refuses."""
        try:
            answer = self.client.request(method, path, json=body, params=query or None)
        except self.failures as error:
            what = f"no answer within {self.timeout:g} s" if "Timeout" in type(error).__name__ else str(error)
            raise TroubleError(f"{method} {path}: {what or type(error).__name__}") from error
        if answer.status_code == 404:
            raise self.refused(f"it has no route {path}; set VLLM_SERVER_DEV_MODE=1 for it")
        if answer.status_code == 429 or answer.status_code >= 500:
            raise TroubleError(f"{method} {path}: status {answer.status_code}, {answer.text[:300]}")
        if answer.status_code != 200:
            raise self.failed(f"{method} {path}: status {answer.status_code}, {answer.text[:300]}")
        try:
            found = answer.json() if answer.content else {}
        except ValueError as error:
            raise TroubleError(f"{method} {path}: {answer.text[:100]!r} is not JSON") from error
        return found if isinstance(found, dict) else {"content": found}

    def refused(self, why: str) -> SamplerError:
        """The error for a server that was started with wrong settings."""
        return SamplerError(
            f"the vLLM server {self.url} cannot be used for sampling: {why}. Stop it, and start it with\n  "
            f"{self._command()}"
        )

    def failed(self, what: str) -> SamplerError:
        """The error for a server that worked before and has failed."""
        return SamplerError(
            f"the vLLM server {self.url} failed: {what}. None of its unfinished output was used for training. Look at "
            f"its log, and start it again with\n  {self._command()}\nThen resume the run with --resume_from_checkpoint "
            "latest."
        )

    def _command(self) -> str:
        port = self.url.rpartition(":")[2] if self.url.count(":") == 2 else "8000"
        return adapter.server_command(self.model or "MODEL", dtype=self.dtype, cpu=self.cpu, port=port)

    def wait(self) -> None:
        """Wait until it is up. Raises SamplerError if it is not up within `timeout` seconds."""
        until = time.monotonic() + self.timeout
        while True:
            try:
                if self.client.get("/health", timeout=min(self.timeout, 10.0)).status_code == 200:
                    return
                why = "its /health reports a failure"
            except self.failures as error:
                why = str(error) or type(error).__name__
            if time.monotonic() > until:
                raise SamplerError(
                    f"no vLLM server answers at {self.url} within {self.timeout:g} s (--vllm_server_timeout): {why}. "
                    f"Start one with\n  {self._command()}"
                    + "\nThen resume the run with --resume_from_checkpoint latest."
                    * bool(self.model)
                )
            time.sleep(PAUSE)

    def settle(self) -> None:
        """Read its configuration. Raises SamplerError if it was started with wrong settings."""
        self.wait()
        try:
            adapter.check_version(str(self.call("GET", "/version").get("version")), f"the server {self.url}")
            served = self.call("GET", "/v1/models")["data"][0]
            self.model, self.longest = served["id"], int(served["max_model_len"])
            config = self.call("GET", "/server_info", config_format="json")["vllm_config"]
            self.cpu, self.nccl = adapter.on_cpu(config), adapter.takes_nccl(config)
            if found := adapter.unfit(config, self.dtype):
                raise self.refused("; ".join(found))
            self._probe()
        except TroubleError as error:
            raise self.failed(str(error)) from error
        except (LookupError, TypeError, ValueError) as error:
            if isinstance(error, SamplerError):
                raise
            raise self.failed(f"its description of itself cannot be read ({error!r})") from error

    def _probe(self) -> None:
        """Check that its log-probs are those of softmax(logits / temperature), and that its defaults change nothing."""
        labels = tuple(range(1, PROBED + 1))
        body = adapter.completion_body(Ask([1, 2, 3], labels=labels), self.model)
        plain, cold = self._logprobs(body, labels), self._logprobs(body | {"temperature": 0.5}, labels)
        for i, (a, b) in enumerate(zip(plain, cold, strict=True)):
            if abs(2 * (a - plain[0]) - (b - cold[0])) > TOLERANCE * max(1.0, abs(a - plain[0])):
                raise self.refused(
                    f"log-probs at temperature 0.5 are not those of what it samples (token {i + 1}: {b:.3f})"
                )
        altering = {"temperature", *adapter.SAMPLING}
        own = self._logprobs({k: v for k, v in body.items() if k not in altering}, labels)
        if any(not abs(a - b) <= TOLERANCE * max(1.0, abs(a)) for a, b in zip(plain, own, strict=True)):
            raise self.refused("its own defaults change what it samples, for example top-k from a generation_config")

    def _logprobs(self, body: dict[str, Any], labels: tuple[int, ...]) -> tuple[float, ...]:
        return adapter.answer_of_body(
            self.call("POST", "/v1/completions", body), Ask(body["prompt"], labels=labels)
        ).labels

    def version(self) -> str:
        """The version of its weights, set by `load`; "default" for a server that was just started."""
        return str(self.call("GET", "/weight_info").get("weight_version"))

    def load(self, folder: Path, version: str) -> None:
        """Make it load the safetensors in `folder`. After the last weight its prefix cache is reset, and only then
        `version` is set. Raises TroubleError or SamplerError if any of that fails.
        """
        for path, body in adapter.load_calls(str(folder), self.cpu):
            self.call("POST", path, body)
        self.take_over(version)

    def take_over(self, version: str) -> None:
        """Activate the weights that have arrived: reset the prefix cache, and only then set `version`."""
        self.reset()
        self.call("POST", "/update_weight_version", {"new_version": version})

    def reset(self) -> None:
        """Reset its prefix cache. Raises SamplerError if it does not."""
        if self.call("POST", "/reset_prefix_cache").get("success") is not True:
            raise self.failed(
                "it did not reset its prefix cache, which holds keys and values of older weights (another program may "
                "be using it)"
            )

    def ask(self, ask: Ask) -> Answer:
        """One answer. Raises TroubleError if it is incomplete."""
        body = self.call("POST", "/v1/completions", adapter.completion_body(ask, self.model))
        try:
            answer = adapter.answer_of_body(body, ask)
        except (LookupError, TypeError, ValueError) as error:
            raise TroubleError(f"an answer that cannot be read: {error!r}") from error
        if why := wrong(ask, answer):
            raise TroubleError(why)
        return answer


def tried(what: Callable[[], None], server: Server, attempts: int) -> None:
    """Call `what`, up to `attempts` times on TroubleError; then raise SamplerError."""
    for left in range(attempts - 1, -1, -1):
        try:
            return what()
        except TroubleError as error:
            if not left:
                raise server.failed(f"{error}, {attempts} times in all") from error
            server.wait()
