"""A server that imitates vLLM's answers as far as the sampler reads them, and that can be told to fail."""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

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
    """weights: what was loaded last. fault: called with each completion's body before it is answered; it may raise
    `Hang` or `Die`, or give what is to be answered. routes: what every call was for, in order.
    """

    def __init__(self) -> None:
        self.version, self.weights, self.reset = "default", "its file's", True
        self.fault: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda body: None
        self.routes: list[str] = []
        self.config = json.loads(json.dumps(CONFIG))
        self.vllm_version = "0.32.0"
        self.defaults: dict[str, Any] = {}
        self.written: list[str] = []
        self.joined: dict[str, Any] = {}

    def restart(self) -> None:
        self.version, self.weights = "default", "its file's"

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """Token 7, then 8, and so on; labels as of logits that are their ids."""
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
            "/v1/models": {"data": [{"id": "tiny", "max_model_len": 64}]},
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


def hang(body: dict[str, Any]) -> None:
    """Longer than any timeout of the tests."""
    time.sleep(3)
