"""A server that answers as vLLM's does and an engine in this process, as far as the sampler looks. Both fail as they
are told to.
"""

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from dwrl_fast.sampling.vllm.engine import Ask

CONFIG: dict[str, Any] = {
    "model_config": {
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "override_generation_config": {},
        "dtype": "torch.float32",
    },
    "parallel_config": {"worker_extension_cls": "dwrl_fast.sampling.vllm.worker.Repacking"},
    "scheduler_config": {"enable_chunked_prefill": False},
    "device_config": {"device": "cpu"},
}


NCCL = [f"/{name}_weight_update" for name in ("start", "finish")] + ["/update_weights"]
NCCL += [f"/{name}_weight_transfer_engine" for name in ("init", "shutdown")]


class FakeVllm:
    """weights: loaded last. fault: called with the body of each completion request; it may raise `Hang` or `Die`, or
    return the answer. routes: the routes of all calls, in order.
    """

    def __init__(self) -> None:
        self.version, self.weights, self.reset = "default", "its file's", True
        self.fault: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda body: None
        self.routes: list[str] = []
        self.config = json.loads(json.dumps(CONFIG))
        self.vllm_version = "0.32.0"
        self.defaults: dict[str, Any] = {}
        self.written: list[str] = []
        self.length = 64
        self.gone = False  # it answers nothing any more
        self.joined: dict[str, Any] = {}

    def restart(self) -> None:
        self.version, self.weights = "default", "its file's"

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """Tokens 7, 8, and so on; log-probs of labels as if logits were their ids."""
        changed = self.fault(body)
        if changed is not None:
            return changed
        self.written.append(self.weights)
        size = body["max_tokens"]
        temperature = body.get("temperature", self.defaults.get("temperature", 1.0)) or 1.0
        norm = math.log(sum(math.exp(-k / temperature) for k in range(100)))
        labels = {f"token_id:{k}": -k / temperature - norm for k in body.get("logprob_token_ids", [])}
        ids = [7 + body["seed"] % 3 if body["seed"] is not None else 7] * size
        logprobs = {"token_logprobs": [-1.0] * size, "top_logprobs": [labels] * size}
        return {"choices": [{"prompt_token_ids": body["prompt"], "token_ids": ids, "logprobs": logprobs}]}

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/collective_rpc":
            if body["method"] == "reload_weights":
                self.weights = body["kwargs"]["weights_path"]
            return {"results": [None]}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return {"success": True}
        answers: dict[str, dict[str, Any]] = {
            "/health": {},
            "/version": {"version": self.vllm_version},
            "/v1/models": {"data": [{"id": "tiny", "max_model_len": self.length}]},
            "/server_info": {"vllm_config": self.config},
            "/weight_info": {"weight_version": self.version},
            "/reset_prefix_cache": {"success": self.reset},
            "/get_world_size": {"world_size": 2},
        }
        if path == "/init_weight_transfer_engine":
            self.joined = body["init_info"]
        if path == "/update_weights":
            self.weights = json.dumps(body["update_info"]["names"])
        if path in NCCL:
            return {"message": "done"}
        return answers[path]


class Die(Exception):
    """The connection ends without an answer."""


@contextmanager
def serving(fake: FakeVllm) -> Iterator[str]:
    """The address at which `fake` answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            path = urlsplit(self.path).path
            size = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(size)) if size else {}
            fake.routes.append(path if path != "/collective_rpc" else body["method"])
            try:
                if fake.gone:
                    raise Die
                found = fake.completion(body) if path == "/v1/completions" else fake.answer(path, body)
            except Die:
                self.close_connection = True
                return
            text = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = respond

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class FakeLlm:
    """vLLM's `LLM`, as far as `Colocated` looks: a thought follows weights, prompt and seed. strike: called before each
    step with the number of requests that are finished, over all engines; it may raise, as an engine that dies.
    """

    def __init__(self, words: Sequence[int], finished: list[int], strike: Callable[[int], None]) -> None:
        self.words, self.finished, self.strike = words, finished, strike
        self.weights, self.dead, self.asked = "drawn", False, dict[str, tuple[list[int], Ask]]()
        self.llm_engine = self.engine_core = self
        self.model_config = SimpleNamespace(max_model_len=1024)

    def collective_rpc(self, name: str, kwargs: Any = None) -> None:
        if name == "reload_weights":
            found = hashlib.sha256()
            for _, weight in kwargs["weights_iterator"]:
                found.update(weight.numpy().tobytes())
            self.weights = found.hexdigest()

    def reset_prefix_cache(self) -> bool:
        return True

    def set_weight_version(self, version: str) -> None:
        self.version = version

    def add_request(self, name: str, prompt: Any, ask: Ask) -> None:
        assert not self.dead
        self.asked[name] = prompt["prompt_token_ids"], ask

    def has_unfinished_requests(self) -> bool:
        return bool(self.asked)

    def step(self) -> list[Any]:
        try:
            self.strike(self.finished[0])
        except Exception:
            self.dead = True
            raise
        name, (prompt, ask) = self.asked.popitem()
        self.finished[0] += 1
        drawn = hashlib.sha256(f"{self.weights} {prompt} {ask.seed}".encode()).digest()[: ask.max_tokens]
        ids = [self.words[byte % len(self.words)] for byte in drawn]
        rows = [{token: SimpleNamespace(logprob=-1.0)} for token in ids]
        output = SimpleNamespace(token_ids=ids, logprobs=rows)
        return [SimpleNamespace(finished=True, request_id=name, outputs=[output])]

    def abort_request(self, names: list[str]) -> None:
        assert not self.dead

    def shutdown(self) -> None:
        if self.dead:
            raise RuntimeError("it is too far gone to shut down")
        self.dead = True


def hang(body: dict[str, Any]) -> None:
    """Wait longer than all timeouts of the tests."""
    time.sleep(3)
