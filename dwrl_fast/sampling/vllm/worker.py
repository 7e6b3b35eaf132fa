"""Code that runs inside vLLM's workers, through `--worker-extension-cls dwrl_fast.sampling.vllm.worker.Repacking`.

On a CPU vLLM computes its head from a packed copy of the weight. If the head is tied to the embedding, reloading
weights updates the embedding but not this copy (seen with vLLM 0.32), so the head would be stale after every sync.
"""

from typing import Any


class Repacking:
    """A mixin for vLLM's worker. It is not needed on a GPU, where a tied head is the embedding itself."""

    model_runner: Any

    def repack_heads(self) -> int:
        """Pack every head again from its current weights. Returns the number of heads."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        heads = [module for module in self.model_runner.get_model().modules() if isinstance(module, ParallelLMHead)]
        for head in heads:
            head.quant_method.process_weights_after_loading(head)
        return len(heads)
