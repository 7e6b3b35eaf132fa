// The row functions in at::vec. Each `row_pass_*.cpp` includes this once, for its own instruction set and in its own namespace.
//
// A row is processed in blocks that fit into the first-level cache. The first pass computes the running maximum, exponentials relative
// to the maximum so far, their sum, and the entropy's dot product; the second pass computes dLoss/dx. Sums within a block are in float32,
// sums over blocks in float64.

#include "row_pass_table.h"

#include <ATen/cpu/vec/vec.h>

namespace dwrl_fast::ROW_PASS_NAMESPACE {

constexpr int64_t kBlock = 2048;

template <typename real_t>
using Vec = at::vec::Vectorized<real_t>;

template <typename real_t>
real_t sum_of(Vec<real_t> v) {
  alignas(64) real_t lane[Vec<real_t>::size()];
  v.store(lane);
  real_t sum = 0;
  for (const real_t x : lane) sum += x;
  return sum;
}

// e^v for v <= 0, exactly 1 at 0. It needs half of at::vec's instructions: no clamping, and the scaling underflows correctly.
template <typename real_t>
inline Vec<real_t> exp_of_negative(const Vec<real_t>& v) {
  return v.exp_u20();
}

#ifdef CPU_CAPABILITY_AVX512
template <>
inline Vec<float> exp_of_negative(const Vec<float>& v) {
  const __m512 x = v, n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);  // x - n log 2, in two parts
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  // Minimax on +-log(2)/2, relative error 2e-9; the rounding of float32 is 6e-8.
  __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(0.0013843558f), _mm512_set1_ps(0.0083742365f));
  p = _mm512_fmadd_ps(r, p, _mm512_set1_ps(0.04166801f));
  p = _mm512_fmadd_ps(r, p, _mm512_set1_ps(0.1666643f));
  p = _mm512_fmadd_ps(r, p, _mm512_set1_ps(0.49999994f));
  p = _mm512_fmadd_ps(r, p, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(r, p, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}
#endif

// Calls f(vector, offset, count) over n values at x.
template <typename real_t, typename F>
inline void each(const real_t* x, int64_t n, F f) {
  constexpr int64_t width = Vec<real_t>::size();
  int64_t i = 0;
  for (; i + width <= n; i += width) f(Vec<real_t>::loadu(x + i), i, width);
  if (i < n) f(Vec<real_t>::loadu(x + i, n - i), i, n - i);
}

template <typename real_t>
real_t maximum_of(const real_t* x, int64_t n) {
  constexpr int64_t width = Vec<real_t>::size();
  real_t top = std::numeric_limits<real_t>::lowest();
  int64_t i = 0;
  if (n >= 4 * width) {
    Vec<real_t> m[4];
    for (int k = 0; k < 4; ++k) m[k] = Vec<real_t>::loadu(x + k * width);
    for (i = 4 * width; i + 4 * width <= n; i += 4 * width)
      for (int k = 0; k < 4; ++k) m[k] = at::vec::clamp_min(m[k], Vec<real_t>::loadu(x + i + k * width));
    alignas(64) real_t lane[width];
    at::vec::clamp_min(at::vec::clamp_min(m[0], m[1]), at::vec::clamp_min(m[2], m[3])).store(lane);
    for (const real_t v : lane) top = std::max(top, v);
  }
  for (; i < n; ++i) top = std::max(top, x[i]);
  return top;
}

template <typename real_t>
struct Row {
  static constexpr double kFloor = -1e4;  // its exp is 0 in every dtype; avoids 0 * -inf in the dot product

  real_t* x;
  int64_t n;
  real_t inverse_temperature, cap;
  real_t maximum = std::numeric_limits<real_t>::lowest();
  double sum = 0, dot = 0;  // of e^(z - max), and of e^(z - max) (z - max)
  double target = 0;        // its z - max; before that its capped x

  double log_sum() const { return std::log(sum); }
  double logprob() const { return target - log_sum(); }
  double entropy() const { return log_sum() - dot / sum; }

  void cap_block(real_t* b, int64_t count) const {
    const Vec<real_t> c(cap), inverse(1 / cap);
    each(b, count, [&](Vec<real_t> v, int64_t i, int64_t k) { ((v * inverse).tanh() * c).store(b + i, k); });
  }

  // First pass over one block; with `keep` the block then holds e^(z - maximum so far).
  template <bool keep>
  void take(real_t* b, int64_t count) {
    const real_t top = std::max(maximum, maximum_of(b, count));
    const double step = std::max(kFloor, (double(maximum) - top) * inverse_temperature);
    const double shrink = std::exp(step);
    dot = shrink * (dot + step * sum);
    sum *= shrink;
    maximum = top;
    const Vec<real_t> m(top), scale(inverse_temperature), floor(static_cast<real_t>(kFloor));
    Vec<real_t> s(0), d(0);
    each(b, count, [&](Vec<real_t> v, int64_t i, int64_t k) {
      __builtin_prefetch(b + i + kBlock);
      v = at::vec::clamp_min((v - m) * scale, floor);
      if (k < Vec<real_t>::size()) v = Vec<real_t>::set(floor, v, k);
      const Vec<real_t> e = exp_of_negative(v);
      s = s + e;
      d = at::vec::fmadd(e, v, d);
      if constexpr (keep) e.store(b + i, k);
    });
    sum += sum_of(s);
    dot += sum_of(d);
  }
};

template <typename scalar_t, typename real_t>
constexpr bool kInPlace = std::is_same_v<scalar_t, real_t>;

inline void widen(const c10::BFloat16* from, float* to, int64_t n) {
  constexpr int64_t width = Vec<c10::BFloat16>::size();
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    const auto [low, high] = at::vec::convert_bfloat16_float(Vec<c10::BFloat16>::loadu(from + i));
    low.store(to + i);
    high.store(to + i + width / 2);
  }
  for (; i < n; ++i) to[i] = from[i];
}

inline void narrow(const float* from, c10::BFloat16* to, int64_t n) {
  constexpr int64_t width = Vec<c10::BFloat16>::size();
  int64_t i = 0;
  for (; i + width <= n; i += width)
    at::vec::convert_float_bfloat16(Vec<float>::loadu(from + i), Vec<float>::loadu(from + i + width / 2)).store(to + i);
  for (; i < n; ++i) to[i] = from[i];
}

// The first pass. `top[j]` becomes the maximum that block j's exponentials are relative to.
template <bool keep, typename scalar_t, typename real_t>
Row<real_t> read_row(scalar_t* logits, real_t* x, int64_t n, int64_t target, const Head& head, real_t* top) {
  Row<real_t> row{x, n, static_cast<real_t>(1 / head.temperature), static_cast<real_t>(head.softcap)};
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t count = std::min(kBlock, n - start);
    if constexpr (!kInPlace<scalar_t, real_t>) widen(logits + start, x + start, count);
    if (row.cap != 0) row.cap_block(x + start, count);
    if (start <= target && target < start + count) row.target = x[target];
    row.template take<keep>(x + start, count);
    top[start / kBlock] = row.maximum;
  }
  row.target = (row.target - row.maximum) / head.temperature;
  if (std::isnan(row.dot)) row.sum = row.dot;  // the fast exponential loses a NaN, but the dot product keeps it
  return row;
}

template <typename scalar_t, typename real_t>
void put_block(scalar_t* logits, const real_t* x, int64_t start, int64_t count) {
  if constexpr (!kInPlace<scalar_t, real_t>) narrow(x + start, logits + start, count);
}

// dLoss/dx = k (onehot - p), from the exponentials of the first pass.
template <typename scalar_t, typename real_t>
void write_kept(scalar_t* logits, const Row<real_t>& row, int64_t target, double k, const real_t* top) {
  const double factor = -k * row.inverse_temperature / row.sum;
  for (int64_t start = 0; start < row.n; start += kBlock) {
    const int64_t count = std::min(kBlock, row.n - start);
    real_t* b = row.x + start;
    const double shrink = std::exp((double(top[start / kBlock]) - row.maximum) * row.inverse_temperature);
    const Vec<real_t> scale(static_cast<real_t>(factor * shrink));
    each(b, count, [&](Vec<real_t> v, int64_t i, int64_t c) { (v * scale).store(b + i, c); });
    if (start <= target && target < start + count)
      row.x[target] = static_cast<real_t>(-k * std::expm1(row.logprob()) * row.inverse_temperature);
    put_block(logits, row.x, start, count);
  }
}

// dLoss/dx = [k (onehot - p) - h p (log p + entropy)] dz/dx, with recomputed exponentials.
template <typename scalar_t, typename real_t>
void write_again(scalar_t* logits, const Row<real_t>& row, int64_t target, double k, double h) {
  const real_t inverse_cap = row.cap != 0 ? 1 / row.cap : 0;
  const Vec<real_t> m(row.maximum), scale(row.inverse_temperature), floor(static_cast<real_t>(Row<real_t>::kFloor));
  const Vec<real_t> minus_k(static_cast<real_t>(-k)), entropy_factor(static_cast<real_t>(h));
  const Vec<real_t> log_sum(static_cast<real_t>(row.log_sum())), inverse_sum(static_cast<real_t>(1 / row.sum));
  const Vec<real_t> entropy(static_cast<real_t>(row.entropy())), one(1), icap(inverse_cap);
  for (int64_t start = 0; start < row.n; start += kBlock) {
    const int64_t count = std::min(kBlock, row.n - start);
    real_t* b = row.x + start;
    const bool here = start <= target && target < start + count;
    const real_t u = here ? row.x[target] * inverse_cap : 0;
    each(b, count, [&](Vec<real_t> v, int64_t i, int64_t c) {
      const Vec<real_t> z = at::vec::clamp_min((v - m) * scale, floor);
      const Vec<real_t> u = v * icap;
      const Vec<real_t> slope = (one - u * u) * scale;
      (z.exp() * inverse_sum * (minus_k - entropy_factor * (z - log_sum + entropy)) * slope).store(b + i, c);
    });
    if (here) {
      const double logp = row.logprob(), p = std::exp(logp);
      const double dz = -k * std::expm1(logp) - h * p * (logp + row.entropy());
      row.x[target] = static_cast<real_t>(dz * (1 - double(u) * u) * row.inverse_temperature);
    }
    put_block(logits, row.x, start, count);
  }
}

template <typename scalar_t, typename real_t>
real_t* workspace(scalar_t* logits, real_t* scratch) {
  if constexpr (kInPlace<scalar_t, real_t>) {
    return logits;
  } else {
    return scratch;
  }
}

// `scratch` holds V values, followed by one value per block.
template <typename scalar_t, typename real_t>
void policy_row(scalar_t* logits, real_t* scratch, int64_t n, int64_t i, const Head& head, const PolicyRows<real_t>& a) {
  real_t *x = workspace(logits, scratch), *top = scratch + n;
  const bool keep = a.gradient && head.softcap == 0;
  const int64_t target = a.target[i];
  const Row<real_t> row = keep ? read_row<true>(logits, x, n, target, head, top) : read_row<false>(logits, x, n, target, head, top);
  a.logprob[i] = static_cast<real_t>(row.logprob());
  a.entropy[i] = static_cast<real_t>(row.entropy());
  const double ref = a.ref ? double(a.ref[i]) : std::numeric_limits<double>::quiet_NaN();
  const double k = a.rule.token(a.logprob[i], a.old[i], a.advantage[i], a.token_weight[i], ref).coefficient;
  a.coefficient[i] = static_cast<real_t>(k);
  if (!a.gradient) return;
  if (k == 0) {
    std::fill_n(logits, n, scalar_t(0));
  } else if (keep) {
    write_kept(logits, row, target, k, top);
  } else {
    write_again(logits, row, target, k, 0.0);
  }
}

template <typename scalar_t, typename real_t>
void logprob_row(scalar_t* logits, real_t* scratch, int64_t n, int64_t i, const Head& head, const LogprobRows<real_t>& a) {
  real_t *x = workspace(logits, scratch), *top = scratch + n;
  const int64_t target = a.target[i];
  const double k = a.grad_logprob ? double(a.grad_logprob[i]) : 0, h = a.grad_entropy ? double(a.grad_entropy[i]) : 0;
  const bool backward = a.logprob == nullptr, keep = backward && head.softcap == 0 && h == 0;
  const Row<real_t> row = keep ? read_row<true>(logits, x, n, target, head, top) : read_row<false>(logits, x, n, target, head, top);
  if (!backward) {
    a.logprob[i] = static_cast<real_t>(row.logprob());
    a.entropy[i] = static_cast<real_t>(row.entropy());
  } else if (keep) {
    write_kept(logits, row, target, k, top);
  } else {
    write_again(logits, row, target, k, h);
  }
}

template <typename scalar_t, typename real_t>
RowPass<scalar_t, real_t> row_pass() {
  return {policy_row<scalar_t, real_t>, logprob_row<scalar_t, real_t>};
}

inline RowPasses row_passes() {
  return {row_pass<float, float>(), row_pass<double, double>(), row_pass<c10::BFloat16, float>()};
}

}  // namespace dwrl_fast::ROW_PASS_NAMESPACE
