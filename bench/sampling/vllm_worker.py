"""The worker of `vllm_peer`: vLLM in a separate virtual environment, which reads requests in JSON, one per line.

It needs vLLM's Python and this checkout as working folder. It does not import dwrl_fast.
"""

import json
import os
import sys
from typing import Any

from bench.harness import peak_memory, timed


def serve(folder: str, longest: int) -> None:
    """Load the model of `folder` once; then answer every input line with one output line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that output of vLLM does not mix with the answers
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that its memory belongs to this process
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype="float32",
        enable_prefix_caching=True,
        max_model_len=longest,
        disable_log_stats=True,
    )

    def run(prompts: list[list[int]], n: int, tokens: int) -> list[int]:
        """The lengths of the thoughts."""
        asked = SamplingParams(n=n, temperature=1.0, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False)
        found = llm.generate([{"prompt_token_ids": each} for each in prompts], asked, use_tqdm=False)
        return [len(output.token_ids) for request in found for output in request.outputs]

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        llm.reset_prefix_cache()  # in training, earlier entries would belong to other weights
        written: list[list[int]] = []
        asked = request["prompts"], request["n"], request["tokens"]
        if request["peak"]:
            return {"peak": peak_memory(lambda: run(*asked))}
        seconds = timed(lambda: written.append(run(*asked)))
        return {"seconds": seconds, "lengths": written[0]}

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
