// The row functions over a chunk of logits, and the per-token policy loss that they share with `policy_loss`.
//
// C rows of the chunk, V vocabulary. A row's logits z are the head's output after soft-cap and temperature:
// z = cap * tanh(x / cap) / temperature. Every pass overwrites the chunk: afterwards it holds dLoss/dx or scratch values.

#pragma once

#include <cmath>
#include <cstdint>

namespace dwrl_fast {

// One token of -w * (min(g A, clip(g) A) - beta KL), g = exp(logprob - old): its value and its derivative with respect to logprob.
struct PolicyToken {
  double log_ratio, ratio, kl, loss, coefficient;
  bool clipped;
};

struct PolicyRule {
  double clip_low, clip_high, beta;

  bool trains(double advantage, double token_weight) const {
    return token_weight != 0 && (advantage != 0 || beta != 0);
  }

  PolicyToken token(double logprob, double old, double advantage, double token_weight, double ref) const {
    PolicyToken t;
    t.log_ratio = logprob - old;
    t.ratio = std::exp(t.log_ratio);
    t.clipped = (advantage > 0 && t.ratio > 1 + clip_high) || (advantage < 0 && t.ratio < 1 - clip_low);
    t.kl = std::expm1(ref - logprob) - (ref - logprob);
    const double bound = advantage > 0 ? 1 + clip_high : 1 - clip_low;
    const bool still = t.clipped || advantage == 0;  // an infinite ratio must not be multiplied by zero
    t.loss = -token_weight * (still ? bound : t.ratio) * advantage;
    t.coefficient = still ? 0 : -token_weight * t.ratio * advantage;
    if (beta != 0) {
      t.loss += token_weight * beta * t.kl;
      t.coefficient -= token_weight * beta * std::expm1(ref - logprob);
    }
    return t;
  }
};

struct Head {
  double temperature, softcap;  // softcap 0: none
};

// The inputs of one row besides its logits. All per-token arrays are contiguous [C]; `ref` may be null.
template <typename real_t>
struct PolicyRows {
  const int64_t* target;
  const real_t *old, *advantage, *token_weight, *ref;
  PolicyRule rule;
  real_t *logprob, *entropy, *coefficient;
  bool gradient;
};

template <typename real_t>
struct LogprobRows {
  const int64_t* target;
  const real_t *grad_logprob, *grad_entropy;  // null in the forward pass
  real_t *logprob, *entropy;                  // null in the backward pass
};

// One table for each instruction set; `scratch` holds V values, for rows whose dtype is too narrow for the computation.
template <typename scalar_t, typename real_t>
struct RowPass {
  void (*policy)(scalar_t* row, real_t* scratch, int64_t vocabulary, int64_t index, const Head&, const PolicyRows<real_t>&);
  void (*logprob)(scalar_t* row, real_t* scratch, int64_t vocabulary, int64_t index, const Head&, const LogprobRows<real_t>&);
};

}  // namespace dwrl_fast
