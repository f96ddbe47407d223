// Rows the plain way: any stride, any value, a logit at a time. The other kernels come here with rows that hold a -inf, a
// NaN, or a spread that their single look at the logits cannot do justice to.
#pragma once

#include "total.cuh"

namespace fastsoftloss {
namespace cuda {

FSL_DEVICE float exp2_approx(float y) {
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(y));
  return e;
}

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

FSL_DEVICE float quick_exp(float x) { return exp2_approx(x * kLog2e); }
FSL_DEVICE double quick_exp(double x) { return ::exp(x); }

// reduce: the moments of classes [begin, end) but the labels. weight_sum: of all these classes, the labels and the masked too.
template <Storage S, class T, bool kMixed>
FSL_DEVICE RowMoments<T> careful_reduce(const Group<T>& group, const Row<T, kMixed>& row, int64_t step, int begin, int end, const T* weight,
                                        T* weight_sum) {
  const T infinity = Limits<T>::infinity();
  T m = -infinity, look[3] = {0, 0, 0};  // classes, their logits, all weights
  for (int k = begin + group.lane; k < end; k += group.size) {
    const T z = Memory<S>::load(row.logits + k * step);
    if (weight) look[2] += weight[k];
    if (row.has(k)) continue;
    m = max(m, z);
    if (z > -infinity) look[0] += T(1), look[1] += z;
  }
  group.sum(look);
  if (weight) *weight_sum = look[2];
  RowMoments<T> r;
  r.n = look[0], r.m = group.largest(m);
  const T at = r.m == -infinity ? T(0) : r.m;  // no class at all: -inf - -inf must not appear
  const T shift = r.n > T(0) ? look[1] / r.n - at : T(0);
  T sums[4] = {0, 0, 0, 0}, squares[1] = {0}, weighted[2] = {0, 0};
  for (int k = begin + group.lane; k < end; k += group.size) {
    const T z = Memory<S>::load(row.logits + k * step);
    if (row.has(k)) continue;
    const T x = z - at, low = max(x, T(-1000)), e = quick_exp(x);  // low: 0 * -inf must not appear
    sums[0] += e, sums[1] += e * e, sums[2] += e * low;
    if (!(z > -infinity)) continue;
    const T d = x - shift;
    sums[3] += d, squares[0] += d * d;
    if (weight) weighted[0] += weight[k], weighted[1] += weight[k] * x;
  }
  group.sum(sums);
  group.sum(squares);
  if (weight) group.sum(weighted);
  const T off = sums[3] / max(r.n, T(1));  // corrected two-pass
  r.s1 = sums[0], r.s2 = sums[1], r.sx = sums[2];
  r.mean = r.n > T(0) ? shift + off : T(0);
  r.m2 = max(squares[0] - sums[3] * off, T(0));
  r.sw = weighted[0], r.swx = weighted[1];
  return r;
}

// spread: classes [begin, end) of the gradient, g being what finish gave times the scale.
template <Storage S, class T, bool kMixed>
FSL_DEVICE void careful_spread(const Group<T>& group, const Row<T, kMixed>& row, int64_t step, int64_t gradient_step, int begin, int end,
                               T m, const RowGradient<T>& g, const T* weight) {
  for (int k = begin + group.lane; k < end; k += group.size) {
    const T z = Memory<S>::load(row.logits + k * step), x = z - m, e = quick_exp(x);
    T dz = e * (g.a + g.b * e + g.t * max(x, T(-1000))) + (g.e0 + g.e1 * x);
    if (z == -Limits<T>::infinity()) dz = g.masked;
    if (weight) dz += g.ew * weight[k];
    if (row.two() && k == row.other) dz = g.other;
    Memory<S>::store(row.gradient + k * gradient_step, k == row.label ? g.label : dz);
  }
}

// The logit of each label.
template <Storage S, class T, bool kMixed>
FSL_DEVICE void load_labels(const Row<T, kMixed>& row, int64_t step, T (&z)[2]) {
  z[0] = Memory<S>::load(row.logits + row.label * step);
  z[1] = row.two() ? Memory<S>::load(row.logits + row.other * step) : T(0);
}

// finish, from the moments of all classes but the labels.
template <unsigned Needs, class T, bool kMixed>
FSL_DEVICE RowLoss<T> finish_row(const RowMoments<T>& rest, const Labels<kMixed>& row, const T (&z)[2], const Weights<T, kMixed>& weights,
                                 T scale, const Options<T>& o) {
  if constexpr (kMixed) {
    return finish_mixture<Needs>(rest, z, weights.of_class, weights.of_sample, scale, o, row.classes());
  } else {
    return finish(rest, z[0], weights.of_class[0], weights.of_sample[0], scale, o);
  }
}

template <bool kMixed, class T>
FSL_DEVICE RowGradient<T> times(const RowGradient<T>& g, T scale) {
  return {g.a * scale,      g.b * scale,     g.t * scale,
          g.e0 * scale,     g.e1 * scale,    g.ew * scale,
          g.masked * scale, g.label * scale, kMixed ? g.other * scale : T(0)};
}

template <class T>
struct alignas(16) Four {
  T x, y, z, w;
};
template <class T>
struct alignas(2 * sizeof(T)) Two {
  T x, y;
};

// What the backward of a row finds again: the gradient for an upstream gradient and a divisor of 1. Of b, t and e1 a loss
// has one at most. Four numbers side by side for all rows, then two, and of a mixture one more.
template <bool kMixed, class T>
FSL_DEVICE void save(const Job<T>& job, int64_t r, T m, const RowGradient<T>& g, bool careful) {
  reinterpret_cast<Four<T>*>(job.saved)[r] = {m, g.a, g.b + g.t + g.e1, g.e0};
  reinterpret_cast<Two<T>*>(job.saved + 4 * job.rows)[r] = {g.label, careful ? T(1) : T(0)};
  if (kMixed) job.saved[kSaved * job.rows + r] = g.other;
}

template <class T, bool kMixed>
struct Kept {
  T m, a, steep, e0, label, other;
  bool careful;

  FSL_DEVICE Kept(const Job<T>& job, int64_t r) {
    const Four<T> first = reinterpret_cast<const Four<T>*>(job.saved)[r];
    const Two<T> second = reinterpret_cast<const Two<T>*>(job.saved + 4 * job.rows)[r];
    m = first.x, a = first.y, steep = first.z, e0 = first.w, label = second.x, careful = second.y != T(0);
    if (kMixed) other = job.saved[kSaved * job.rows + r];
  }
  // Of a loss with these moments, times the factor.
  template <unsigned Needs>
  FSL_DEVICE RowGradient<T> gradient(const Options<T>& options, T factor) const {
    RowGradient<T> g;
    g.a = a * factor, g.e0 = e0 * factor, g.label = label * factor;
    if (kMixed) g.other = other * factor;
    if (!(Needs & kSquares)) {
      g.e1 = steep * factor;
    } else {
      (options.diversity == Diversity::kl ? g.t : g.b) = steep * factor;
    }
    return g;
  }
};

template <Storage S, class T>
FSL_DEVICE void fill_zero(const Group<T>& group, char* gradient, int64_t step, int begin, int end) {
  for (int k = begin + group.lane; k < end; k += group.size) Memory<S>::store(gradient + k * step, T(0));
}

// A row that is ignored, or whose label is out of range: no gradient, and then a loss of NaN.
template <Storage S, class T, bool kMixed>
FSL_DEVICE void row_without_label(const Job<T>& job, const Group<T>& group, int64_t r, const Row<T, kMixed>& row, int64_t gradient_step,
                                  bool gradient, Tally<T>& tally) {
  if (group.lane == 0) {
    RowLoss<T> out;
    out.loss = out.cross_entropy = row.counts() ? T(Limits<T>::quiet_NaN()) : T(0), out.diversity = T(0);
    tally.add(job, r, row.counts() ? Weights<T, kMixed>(job, r, row).share() : T(0), out);
  }
  if (gradient) fill_zero<S>(group, row.gradient, gradient_step, 0, job.classes);
}

// A row from its logits to its losses and its gradient, by a group. The gradient may be written over the logits.
template <Storage S, class T, bool kMixed>
FSL_DEVICE void careful_row(const Job<T>& job, const Group<T>& group, int64_t r, const Row<T, kMixed>& row, int64_t step,
                            int64_t gradient_step, const T& scale, bool gradient, Tally<T>& tally) {
  const T* weight = job.options.label_smoothing != 0 ? job.class_weight : nullptr;
  T weight_sum = T(job.classes);
  const RowMoments<T> moments = careful_reduce<S>(group, row, step, 0, job.classes, weight, &weight_sum);
  T z[2];
  load_labels<S>(row, step, z);
  const Weights<T, kMixed> weights(job, r, row);
  Options<T> options = job.options;
  options.class_weight_sum = weight_sum;
  const RowLoss<T> out = finish_row<kAllMoments>(moments, row, z, weights, T(1), options);
  if (group.lane == 0) {
    tally.add(job, r, weights.share(), out);
    if (job.saved) save<kMixed>(job, r, moments.m, out.gradient, true);
  }
  if (!gradient) return;
  if (group.size <= 32) __syncwarp(group.mask);  // all have read what is written over
  careful_spread<S>(group, row, step, gradient_step, 0, job.classes, moments.m, times<kMixed>(out.gradient, scale * row.upstream), weight);
}

constexpr int kCarefulBlock = 128;  // threads

// All rows so: float64, class weights under label smoothing, and class strides with more classes than tile.cuh holds.
template <Storage S, bool kMixed, class T>
__global__ void __launch_bounds__(kCarefulBlock, (kMixed ? 16 : 32) / sizeof(T))
    careful_rows(const __grid_constant__ Job<T> job, int lanes) {
  if (settled(job)) return;
  __builtin_assume(lanes <= 32);
  const Group<T> group(lanes, nullptr);
  __shared__ Tally<T> tallies[kCarefulBlock];  // registers are short
  Tally<T>& tally = tallies[threadIdx.x] = {};
  const T& scale = scale_of_all(job);  // registers are short
  for (int64_t r = int64_t(blockIdx.x) * group.count + group.index; r < job.rows; r += int64_t(gridDim.x) * group.count) {
    const Row<T, kMixed> row = locate<kMixed>(job, r);
    if (settled(job, row)) continue;
    if (row.label < 0) {
      row_without_label<S>(job, group, r, row, job.gradient_step, job.gradient.data != nullptr, tally);
    } else {
      careful_row<S>(job, group, r, row, job.logits_step, job.gradient_step, scale, job.gradient.data != nullptr, tally);
    }
  }
  tally.close(job);
}

}  // namespace cuda
}  // namespace fastsoftloss
