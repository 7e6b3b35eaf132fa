"""The fused operators. `dwrl_fast.ops.oracle` defines each; the fastest backend that can run a call computes it.

`backend` is "auto" (it logs its choice once), "reference" (the oracle, in plain PyTorch), "cpu" (the C++ extension) or
"triton". UserError is raised if a named backend cannot run. Gradients are differentiable once: a double backward
raises.

    linear_logprob        log pi(target) and entropy, from hidden states, without the logits of all rows
    linear_policy_loss the clipped policy loss from hidden states; gradients are computed while the logits are in memory
    policy_loss           the same from given log-probabilities
    yes_no_logprob        the score s = log p(Yes)
    preference_weights    coefficients and weights of any preference likelihood
    dual_weights          the same for pairs, from the scores of both sides
    tree_attention        attention over a tree of tokens; a shared prefix is stored and read once
    cache_attention       attention of new tokens to a cache of blocks shared by texts
    gumbel_pick           draws from a softmax; the noise depends only on a key and a position
    combine_stats, read_stats, STAT_SUMS, STAT_MAXIMA    the contents of `PolicyLoss.stats`
"""

from dwrl_fast.ops.attention import tree_attention
from dwrl_fast.ops.cache import BLOCK, cache_attention, cache_shapes
from dwrl_fast.ops.clipped import PolicyLoss, linear_policy_loss, policy_loss
from dwrl_fast.ops.gumbel import gumbel_pick
from dwrl_fast.ops.logprob import linear_logprob, yes_no_logprob
from dwrl_fast.ops.oracle import CacheStep
from dwrl_fast.ops.stats import STAT_MAXIMA, STAT_SUMS, combine_stats, read_stats
from dwrl_fast.ops.weights import DualWeights, PreferenceWeights, dual_weights, preference_weights

__all__ = [
    "BLOCK",
    "STAT_MAXIMA",
    "STAT_SUMS",
    "CacheStep",
    "DualWeights",
    "PolicyLoss",
    "PreferenceWeights",
    "cache_attention",
    "cache_shapes",
    "combine_stats",
    "dual_weights",
    "gumbel_pick",
    "linear_logprob",
    "linear_policy_loss",
    "policy_loss",
    "preference_weights",
    "read_stats",
    "tree_attention",
    "yes_no_logprob",
]
