"""What runs inside vLLM's workers, by `--worker-extension-cls dwrl_fast.sampling.vllm.worker.Repacking`.

On a CPU vLLM computes its head from a packed copy. Where the head is tied to the embedding, reloading weights renews
the embedding and leaves that copy as it was (seen with vLLM 0.32): every sync would leave the head stale.
"""

from typing import Any


class Repacking:
    """Mixed into vLLM's worker. Nothing of this is needed on a GPU, where a tied head is the embedding itself."""

    model_runner: Any

    def repack_heads(self) -> int:
        """Pack every head again from its weights as they are now; how many there are."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        heads = [module for module in self.model_runner.get_model().modules() if isinstance(module, ParallelLMHead)]
        for head in heads:
            head.quant_method.process_weights_after_loading(head)
        return len(heads)
