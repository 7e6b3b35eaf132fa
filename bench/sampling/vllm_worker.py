"""The far end of `vllm_peer`: vLLM in a virtual environment of its own, which obeys requests, one a line, in JSON.

It needs vLLM's Python and this checkout as the working folder; nothing of dwrl_fast is imported.
"""

import json
import os
import sys
from typing import Any

from bench.harness import peak_memory, timed


def serve(folder: str, longest: int) -> None:
    """Load the model of `folder` once; then answer every line of the input by one of the output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints must not come between the answers
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its memory is then that of this process
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
        llm.reset_prefix_cache()  # what an earlier run left there was of other weights, where a model is trained
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
