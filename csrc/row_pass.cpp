// Operators over a chunk of logits [C, V]: `policy_rows_`, `logprob_rows_`, `logprob_rows_grad_`. They overwrite the chunk.
// `instruction_set` reports the instruction set that all operators use.

#include "dispatch.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <optional>

#define ROW_PASS_NAMESPACE baseline
#include "row_pass_kernels.h"

namespace dwrl_fast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

const RowPasses& passes() {
  static const RowPasses chosen = [] {
#ifdef DWRL_FAST_X86_VARIANTS
    if (instruction_set() == "AVX512") return row_passes_avx512();
    if (instruction_set() == "AVX2") return row_passes_avx2();
#endif
    return baseline::row_passes();
  }();
  return chosen;
}

at::ScalarType row_dtype(const Tensor& logits) { return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

void check_chunk(const Tensor& logits, const Tensor& targets) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.is_contiguous(), "logits must be a contiguous [C, V], not ", logits.sizes());
  TORCH_CHECK_VALUE(
      targets.dim() == 1 && targets.is_contiguous() && targets.scalar_type() == at::kLong && targets.size(0) == logits.size(0),
      "targets must be a contiguous int64 [C = ", logits.size(0), "], not ", targets.scalar_type(), " ", targets.sizes());
}

template <typename real_t>
const real_t* per_row(const OptionalTensor& x, const Tensor& logits, const char* name) {
  if (!x) return nullptr;
  TORCH_CHECK_VALUE(
      x->dim() == 1 && x->is_contiguous() && x->size(0) == logits.size(0) && x->scalar_type() == row_dtype(logits),
      name, " must be a contiguous ", row_dtype(logits), " [C = ", logits.size(0), "], not ", x->scalar_type(), " ", x->sizes());
  return x->const_data_ptr<real_t>();
}

template <typename real_t, typename F>
void for_rows(const Tensor& logits, const Tensor& targets, F f) {
  const int64_t v = logits.size(1), blocks = v / baseline::kBlock + 1;
  const int64_t* target = targets.const_data_ptr<int64_t>();
  at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<real_t> scratch(v + blocks);
    for (int64_t i = begin; i < end; ++i) {
      TORCH_CHECK_INDEX(0 <= target[i] && target[i] < v, "target ", target[i], " is outside the vocabulary of ", v);
      f(scratch.data(), i);
    }
  });
}

Head head_of(double temperature, std::optional<double> softcap) { return {temperature, softcap.value_or(0)}; }

// -> [3, C]: logprob, entropy, dLoss/dlogprob. With `gradient` the chunk is overwritten by dLoss/d(head output).
Tensor policy_rows(
    Tensor& logits, const Tensor& targets, const Tensor& old_logprob, const Tensor& advantage, const Tensor& token_weight,
    const OptionalTensor& ref_logprob, double clip_low, double clip_high, double beta, double temperature,
    std::optional<double> softcap, bool gradient) {
  check_chunk(logits, targets);
  Tensor out = at::empty({3, logits.size(0)}, logits.options().dtype(row_dtype(logits)));
  const Head head = head_of(temperature, softcap);
  dispatch(passes(), logits, "logits", [&](const auto& pass, auto scalar, auto real) {
    using scalar_t = decltype(scalar);
    using real_t = decltype(real);
    scalar_t* data = logits.mutable_data_ptr<scalar_t>();
    real_t* o = out.mutable_data_ptr<real_t>();
    const int64_t c = logits.size(0), v = logits.size(1);
    const PolicyRows<real_t> rows{
        targets.const_data_ptr<int64_t>(), per_row<real_t>(old_logprob, logits, "old_logprob"),
        per_row<real_t>(advantage, logits, "advantage"), per_row<real_t>(token_weight, logits, "token_weight"),
        per_row<real_t>(ref_logprob, logits, "ref_logprob"), {clip_low, clip_high, beta}, o, o + c, o + 2 * c, gradient};
    for_rows<real_t>(logits, targets, [&](real_t* scratch, int64_t i) { pass.policy(data + i * v, scratch, v, i, head, rows); });
  });
  return out;
}

// -> [2, C]: logprob, entropy.
Tensor logprob_rows(Tensor& logits, const Tensor& targets, double temperature, std::optional<double> softcap) {
  check_chunk(logits, targets);
  Tensor out = at::empty({2, logits.size(0)}, logits.options().dtype(row_dtype(logits)));
  const Head head = head_of(temperature, softcap);
  dispatch(passes(), logits, "logits", [&](const auto& pass, auto scalar, auto real) {
    using scalar_t = decltype(scalar);
    using real_t = decltype(real);
    scalar_t* data = logits.mutable_data_ptr<scalar_t>();
    real_t* o = out.mutable_data_ptr<real_t>();
    const int64_t v = logits.size(1);
    const LogprobRows<real_t> rows{targets.const_data_ptr<int64_t>(), nullptr, nullptr, o, o + logits.size(0)};
    for_rows<real_t>(logits, targets, [&](real_t* scratch, int64_t i) { pass.logprob(data + i * v, scratch, v, i, head, rows); });
  });
  return out;
}

// The chunk is overwritten by d(sum grad_logprob logprob + grad_entropy entropy)/d(head output).
void logprob_rows_grad(
    Tensor& logits, const Tensor& targets, const Tensor& grad_logprob, const OptionalTensor& grad_entropy, double temperature,
    std::optional<double> softcap) {
  check_chunk(logits, targets);
  const Head head = head_of(temperature, softcap);
  dispatch(passes(), logits, "logits", [&](const auto& pass, auto scalar, auto real) {
    using scalar_t = decltype(scalar);
    using real_t = decltype(real);
    scalar_t* data = logits.mutable_data_ptr<scalar_t>();
    const int64_t v = logits.size(1);
    const LogprobRows<real_t> rows{
        targets.const_data_ptr<int64_t>(), per_row<real_t>(grad_logprob, logits, "grad_logprob"),
        per_row<real_t>(grad_entropy, logits, "grad_entropy"), nullptr, nullptr};
    for_rows<real_t>(logits, targets, [&](real_t* scratch, int64_t i) { pass.logprob(data + i * v, scratch, v, i, head, rows); });
  });
}

TORCH_LIBRARY_FRAGMENT(dwrl_fast, m) {
  m.def("instruction_set() -> str", instruction_set);
  m.def(
      "policy_rows_(Tensor(a!) logits, Tensor targets, Tensor old_logprob, Tensor advantage, Tensor token_weight, Tensor? ref_logprob, "
      "float clip_low, float clip_high, float beta, float temperature, float? softcap, bool gradient) -> Tensor");
  m.def("logprob_rows_(Tensor(a!) logits, Tensor targets, float temperature, float? softcap) -> Tensor");
  m.def(
      "logprob_rows_grad_(Tensor(a!) logits, Tensor targets, Tensor grad_logprob, Tensor? grad_entropy, float temperature, "
      "float? softcap) -> ()");
}

TORCH_LIBRARY_IMPL(dwrl_fast, CPU, m) {
  m.impl("policy_rows_", policy_rows);
  m.impl("logprob_rows_", logprob_rows);
  m.impl("logprob_rows_grad_", logprob_rows_grad);
}

}  // namespace
}  // namespace dwrl_fast
