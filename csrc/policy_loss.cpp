// `policy_loss_rows`: the clipped policy loss from given log-probabilities, its gradient and its statistics, in one pass over the tokens.

#include "row_pass.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <vector>

namespace dwrl_fast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kTokens = 2048;  // one thread sums a block of tokens, so the result does not depend on the number of threads

// The order of `STAT_SUMS` and then `STAT_MAXIMA` in dwrl_fast/ops/oracle.py, and the loss.
struct Totals {
  std::array<double, 8> sums{};
  std::array<double, 2> maxima{};
  double loss = 0;

  void add(const Totals& other) {
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += other.sums[i];
    for (size_t i = 0; i < maxima.size(); ++i) {
      const double x = other.maxima[i];
      maxima[i] = std::isnan(x) ? x : std::max(maxima[i], x);  // std::max keeps a NaN only in its first argument
    }
    loss += other.loss;
  }
};

template <typename real_t>
struct Tokens {
  const real_t *logprob, *old, *advantage, *token_weight, *ref, *entropy;  // ref and entropy may be null
  real_t *kept, *gradient;

  Totals walk(const PolicyRule& rule, int64_t begin, int64_t end) const {
    constexpr double unknown = std::numeric_limits<double>::quiet_NaN();
    Totals t;
    for (int64_t i = begin; i < end; ++i) {
      kept[i] = static_cast<real_t>(unknown);
      gradient[i] = 0;
      if (!rule.trains(advantage[i], token_weight[i])) continue;
      const auto token = rule.token(logprob[i], old[i], advantage[i], token_weight[i], ref ? double(ref[i]) : unknown);
      kept[i] = logprob[i];
      gradient[i] = static_cast<real_t>(token.coefficient);
      t.loss += token.loss;
      t.add({{1, double(token_weight[i]), token.ratio, token.log_ratio, double(token.clipped), token.kl,
              entropy ? double(entropy[i]) : unknown, double(!std::isfinite(logprob[i]))},
             {token.ratio, std::abs(token.log_ratio)}});
    }
    return t;
  }
};

const Tensor& per_token(const Tensor& x, const Tensor& logprob, const char* name) {
  TORCH_CHECK_VALUE(
      x.dim() == 1 && x.is_contiguous() && x.sizes() == logprob.sizes() && x.scalar_type() == logprob.scalar_type(), name,
      " must be a contiguous ", logprob.scalar_type(), " ", logprob.sizes(), ", not ", x.scalar_type(), " ", x.sizes());
  return x;
}

// -> loss [], logprob with NaN where untrained [T], dLoss/dlogprob [T], stats [10] float64.
std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss_rows(
    const Tensor& logprob, const Tensor& old_logprob, const Tensor& advantage, const Tensor& token_weight,
    const OptionalTensor& ref_logprob, const OptionalTensor& entropy, double clip_low, double clip_high, double beta) {
  per_token(logprob, logprob, "logprob");
  const int64_t n = logprob.size(0), blocks = (n + kTokens - 1) / kTokens;
  Tensor kept = at::empty_like(logprob), gradient = at::empty_like(logprob);
  std::vector<Totals> partial(blocks);
  const auto run = [&](auto real) {
    using real_t = decltype(real);
    const auto pointer = [&](const OptionalTensor& x, const char* name) -> const real_t* {
      return x ? per_token(*x, logprob, name).template const_data_ptr<real_t>() : nullptr;
    };
    const Tokens<real_t> tokens{
        logprob.const_data_ptr<real_t>(), pointer(old_logprob, "old_logprob"), pointer(advantage, "advantage"),
        pointer(token_weight, "token_weight"), pointer(ref_logprob, "ref_logprob"), pointer(entropy, "entropy"),
        kept.mutable_data_ptr<real_t>(), gradient.mutable_data_ptr<real_t>()};
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        partial[b] = tokens.walk({clip_low, clip_high, beta}, b * kTokens, std::min(n, (b + 1) * kTokens));
    });
  };
  if (logprob.scalar_type() == at::kDouble) {
    run(double());
  } else {
    TORCH_CHECK_TYPE(logprob.scalar_type() == at::kFloat, "logprob must be float32 or float64, not ", logprob.scalar_type());
    run(float());
  }
  Totals totals;
  for (const auto& t : partial) totals.add(t);
  Tensor stats = at::empty({10}, logprob.options().dtype(at::kDouble));
  double* s = stats.mutable_data_ptr<double>();
  std::copy(totals.maxima.begin(), totals.maxima.end(), std::copy(totals.sums.begin(), totals.sums.end(), s));
  return {at::scalar_tensor(totals.loss, logprob.options()), kept, gradient, stats};
}

TORCH_LIBRARY_FRAGMENT(dwrl_fast, m) {
  m.def(
      "policy_loss_rows(Tensor logprob, Tensor old_logprob, Tensor advantage, Tensor token_weight, Tensor? ref_logprob, "
      "Tensor? entropy, float clip_low, float clip_high, float beta) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dwrl_fast, CPU, m) { m.impl("policy_loss_rows", policy_loss_rows); }

}  // namespace
}  // namespace dwrl_fast
