// Rows whose target is a probability for each class, by the moments of row_probabilities.h.
//
// A group's threads hold a row in registers, and read it once, or walk it in passes where it is too long for that, or float64.
// Either way class k is one of thread k mod the group's size, so that neighbours read neighbours, wherever a row starts and
// whatever its stride. The extremes are taken out of the classes first; what is no class, or is taken, reads as masked.
#pragma once

#include <type_traits>

#include "../row_probabilities.h"
#include "careful.cuh"

namespace fastsoftloss {
namespace cuda {

template <class T>
struct ProbabilityRow {
  const char *logits, *target;
  char* gradient;
  T upstream, weight;
};

template <class T>
FSL_DEVICE ProbabilityRow<T> locate_probabilities(const Job<T>& job, int64_t r) {
  int64_t logits = 0, gradient = 0, target = 0, upstream = 0;
  unfold(job, r, [&](int d, int64_t i) {
    logits += i * job.logits.stride[d], gradient += i * job.gradient.stride[d], target += i * job.target.stride[d];
    upstream += i * job.upstream.stride[d];
  });
  return {job.logits.data + logits, job.target.data + target, job.gradient.data + gradient,
          job.upstream.data ? *reinterpret_cast<const T*>(job.upstream.data + upstream) : T(1), sample_weight_of(job, r)};
}

FSL_DEVICE double load_probability(const Job<double>&, const char* p) { return Memory<Storage::float64>::load(p); }
FSL_DEVICE float load_probability(const Job<float>& job, const char* p) {
  if (job.target_storage == Storage::bfloat16) return Memory<Storage::bfloat16>::load(p);
  if (job.target_storage == Storage::float16) return Memory<Storage::float16>::load(p);
  return Memory<Storage::float32>::load(p);
}

// The largest logit of a thread's classes and the smallest; how many there are, and their sum, where they are counted.
template <class T>
struct Look {
  T most = -Limits<T>::infinity(), least = Limits<T>::infinity(), n = 0, total = 0;

  FSL_DEVICE void add(T z) { most = fmax(most, z), least = fmin(least, z); }
  FSL_DEVICE void count(T z) {
    if (z > -Limits<T>::infinity()) least = fmin(least, z), n += T(1), total += z;
    most = fmax(most, z);
  }
};

// A thread's share of a row, without what has been taken of it.
//   each(f): f(z, u, k), in order; where there is no class z is -inf and u is 0
//   look(), careful_look(): a masked class is the least, or is not there
//   sample(): some of them, of the thread's own choice, counted
//   each_masked(f): f(u, k) of the classes whose logit is -inf
//   take(i, z, f): extreme i is its first class of logit z, and f(u, k) is told
template <Storage S, class T, bool kHeld>
struct Classes {
  const Job<T>& job;
  const ProbabilityRow<T>& row;
  const T keep, even;  // of label smoothing
  const int first, size;
  int taken[2] = {-1, -1};  // the extremes that were this thread's, or -1

  FSL_DEVICE Classes(const Job<T>& job, const ProbabilityRow<T>& row, const Group<T>& group)
      : job(job),
        row(row),
        keep(T(1) - job.options.label_smoothing),
        even(job.options.label_smoothing / T(job.classes)),
        first(group.lane),
        size(group.size) {}

  FSL_DEVICE T smoothed(T u, int k) const { return keep * u + (job.class_weight ? even * job.class_weight[k] : even); }
  template <class F>
  FSL_DEVICE void each(F f) {
#pragma unroll 1
    for (int k = first; k < job.classes; k += size) {
      if (k == taken[0] || k == taken[1]) continue;
      T u = load_probability(job, row.target + k * job.target_step);
      if (job.class_weight) u *= job.class_weight[k];
      f(Memory<S>::load(row.logits + k * job.logits_step), u, k);
    }
  }
  FSL_DEVICE Look<T> careful_look() {
    Look<T> r;
    each([&](T z, T&, int) { r.count(z); });
    return r;
  }
  FSL_DEVICE Look<T> look() {
    Look<T> r;
    each([&](T z, T&, int) { r.add(z); });
    return r;
  }
  FSL_DEVICE Look<T> sample() { return careful_look(); }
  template <class F>
  FSL_DEVICE void each_masked(F f) {
    each([&](T z, T& u, int k) {
      if (z == -Limits<T>::infinity()) f(u, k);
    });
  }
  template <class F>
  FSL_DEVICE void take(int i, T z_of, F f) {
    each([&](T z, T& u, int k) {
      if (z == z_of && taken[i] < 0) taken[i] = k, f(u, k);
    });
  }
  template <class F>
  FSL_DEVICE void write(F f) {
    each([&](T z, T& u, int k) { Memory<S>::store(row.gradient + k * job.gradient_step, f(z, u, k)); });
  }
};

// In registers. No class weights where labels are smoothed.
template <Storage S, class T>
struct Classes<S, T, true> {
  static constexpr int kChunk = 4;
  const Job<T>& job;
  const ProbabilityRow<T>& row;
  const T keep, even;
  const int size, skipped, first, count;  // count: classes that a thread of the group has at most
  int taken[2] = {-1, -1};
  T z[kProbabilitiesHeld], u[kProbabilitiesHeld];

  FSL_DEVICE Classes(const Job<T>& job, const ProbabilityRow<T>& row, const Group<T>& group)
      : job(job),
        row(row),
        keep(T(1) - job.options.label_smoothing),
        even(job.options.label_smoothing / T(job.classes)),
        size(group.size),
        // a warp starts where a sector of 32 bytes does
        skipped(group.size < 32 ? 0 : (int(reinterpret_cast<intptr_t>(row.logits)) & 31) / Memory<S>::kBytes),
        first(group.lane - skipped),
        count((job.classes + skipped + group.size - 1) >> group.shift) {
    read<S>(row.logits, job.logits_step, -Limits<T>::infinity(), z);
    switch (job.target_storage) {
      case Storage::bfloat16:
        read<Storage::bfloat16>(row.target, job.target_step, T(0), u);
        break;
      case Storage::float16:
        read<Storage::float16>(row.target, job.target_step, T(0), u);
        break;
      default:
        read<Storage::float32>(row.target, job.target_step, T(0), u);
    }
    if (!job.class_weight) return;
    all([&](int i, auto full) {
      if (has(i, full)) u[i] *= job.class_weight[first + i * size];
    });
  }
  FSL_DEVICE T smoothed(T u, int) const { return keep * u + even; }
  template <class F>
  FSL_DEVICE void each(F f) {
#pragma unroll
    for (int c = 0; c < kProbabilitiesHeld; c += kChunk) {
      if (c >= count) continue;
#pragma unroll
      for (int i = c; i < c + kChunk; ++i) f(z[i], u[i], first + i * size);
    }
  }
  FSL_DEVICE Look<T> careful_look() {
    Look<T> r;
    each([&](T z, T&, int) { r.count(z); });
    return r;
  }
  FSL_DEVICE Look<T> look() {
    Look<T> r;
    all([&](int i, auto full) {
      if (has(i, full)) r.add(z[i]);
    });
    return r;
  }
  FSL_DEVICE Look<T> sample() {
    Look<T> r;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) r.count(z[i]);
    return r;
  }
  template <class F>
  FSL_DEVICE void each_masked(F f) {
    each([&](T z, T& u, int k) {
      if (z == -Limits<T>::infinity() && unsigned(k) < unsigned(job.classes) && k != taken[0] && k != taken[1]) f(u, k);
    });
  }
  FSL_DEVICE T left() const {  // of this thread's
    return T(((job.classes - first + size - 1) >> (31 - __clz(size))) - (first < 0) - (taken[0] >= 0) - (taken[1] >= 0));
  }
  template <class F>
  FSL_DEVICE void take(int which, T z_of, F f) {
    each([&](T& z, T& u, int k) {
      if (z == z_of && taken[which] < 0) taken[which] = k, f(u, k), z = -Limits<T>::infinity(), u = 0;
    });
  }
  template <class F>
  FSL_DEVICE void write(F f) {
    char* to = row.gradient + first * job.gradient_step;
    const int64_t apart = job.gradient_step * size;
    all([&](int i, auto full) {
      if (has(i, full)) Memory<S>::store(to, f(z[i], u[i], first + i * size));
      to += apart;
    });
  }

 private:
  // full: every thread of the group has the whole chunk
  template <class Full>
  FSL_DEVICE bool has(int i, Full full) const {
    return full.value || unsigned(first + i * size) < unsigned(job.classes);
  }
  template <class F>
  FSL_DEVICE void all(F f) {
#pragma unroll
    for (int c = 0; c < kProbabilitiesHeld; c += kChunk) {
      if (c >= count) continue;
      if (c * size >= skipped && (c + kChunk) * size - skipped <= job.classes) {
#pragma unroll
        for (int i = c; i < c + kChunk; ++i) f(i, std::true_type());
      } else {
#pragma unroll
        for (int i = c; i < c + kChunk; ++i) f(i, std::false_type());
      }
    }
  }
  template <Storage From>
  FSL_DEVICE void read(const char* from, int64_t step, T nothing, T (&to)[kProbabilitiesHeld]) {
    from += first * step;
    const int64_t apart = step * size;
    all([&](int i, auto full) {
      to[i] = has(i, full) ? Memory<From>::load(from) : nothing;
      from += apart;
    });
  }
};

// What the threads of a row tell one another.
template <class T>
struct Expectation {
  Extremes<T> ends;
  Rest<T> rest;
  Whole<T> whole;
  RowGradient<T> gradient;
  Own<T> own;
};

template <Storage S, Diversity D, bool kHeld, class T>
__global__ void __launch_bounds__(256, 1) probabilities(const __grid_constant__ Job<T> job, int lanes) {
  constexpr unsigned kNeeds = moments_of(D);
  constexpr bool kPolynomial = D == Diversity::logit_variance, kEach = D != Diversity::none && !kPolynomial;
  constexpr T infinity = Limits<T>::infinity();
  __shared__ T exchange[kMostWarps * kMostSums];
  extern __shared__ uint4 stage[];
  const Group<T> group(lanes, exchange);
  if (settled(job)) return;
  Expectation<T>& told = reinterpret_cast<Expectation<T>*>(stage)[group.index];
  Tally<T> tally{};
  const bool gradient = job.gradient.data != nullptr;
  const T scale = gradient ? scale_of_all(job) : T(1);
  Options<T> options = job.options;
  options.diversity = D;

  for (int64_t r = int64_t(blockIdx.x) * group.count + group.index; r < job.rows; r += int64_t(gridDim.x) * group.count) {
    const ProbabilityRow<T> row = locate_probabilities(job, r);
    if (settled(job, row)) continue;
    group.sync();  // what the last row was told is read
    if (group.lane == 0) told.ends = {row.weight, scale * row.upstream * row.weight, {-infinity, -infinity}, {0, 0}, {0, 0}};
    group.sync();
    Classes<S, T, kHeld> classes(job, row, group);

    // the extremes: the smallest only where it can be most of a moment
    Look<T> look = classes.look();
    const bool masked = group.largest(-look.least) == infinity;
    if (masked) look = classes.careful_look();
#pragma unroll
    for (int i = 0; i < (kNeeds & kLogits ? 2 : 1); ++i) {
      const T mine = i ? -look.least : look.most, most = group.largest(mine);
      const T place = mine == most && most > -infinity ? T(group.size - group.lane) : T(0);
      if (group.largest(place) == place && place > T(0)) {  // the first thread that has it
        const T z = i ? -most : most;
        classes.take(i, z, [&](T u, int k) { told.ends.z_of[i] = z, told.ends.u_of[i] = u, told.ends.v_of[i] = classes.smoothed(u, k); });
        look = classes.careful_look();
      }
    }
    const T m = group.largest(look.most), at = m == -infinity ? T(0) : m;
    // how many are left, and what their mean is near: the variance of the sampled is part of that of all
    if (masked) look = classes.careful_look();
    Look<T> some = masked ? look : classes.sample();
    T count[2] = {some.n, some.total};
    group.sum(count);
    const T n = masked ? count[0] : T(at_least(job.classes - (kNeeds & kLogits ? 2 : 1), 0)), shift = count[1] / max(count[0], T(1)) - at;

    // reduce
    T sums[3] = {0, 0, 0}, labels[3] = {0, 0, 0}, apart[3] = {0, 0, 0};
    classes.each([&](T z, T& u, int k) {
      const T x = z - at, e = quick_exp(x), v = classes.smoothed(u, k);
      const bool there = !(z == -infinity);
      const T seen = there ? x : T(0);
      sums[0] += e;
      if (kNeeds & kSquares) sums[1] += e * e;
      if (kNeeds & kEntropy) sums[1] += e * seen;
      if (kNeeds & kLogits) {
        const T d = there ? x - shift : T(0);
        sums[1] += d, sums[2] += d * d;
        if (kPolynomial) {
          const T weight = there ? u : T(0), first = weight * d;
          apart[0] += weight, apart[1] += first, apart[2] += first * d;
        }
      }
      labels[0] += u, labels[2] -= v * seen;
      if (!kHeld) labels[1] += v;
    });
    if constexpr (kHeld) labels[1] = classes.keep * labels[0] + classes.even * classes.left();
    if (masked)
      classes.each_masked([&](T u, int k) {
        const T v = classes.smoothed(u, k);
        if (v != T(0)) labels[2] += v * infinity;  // 0 log 0 is 0
      });
    group.sum_for_first(sums);
    group.sum_for_first(labels);
    if (kPolynomial) group.sum_for_first(apart);
    if (group.lane == 0) {
      RowMoments<T> moments;
      moments.n = n, moments.m = m, moments.s1 = sums[0];
      if (kNeeds & kSquares) moments.s2 = sums[1];
      if (kNeeds & kEntropy) moments.sx = sums[1];
      if (kNeeds & kLogits) {  // corrected two-pass
        const T off = sums[1] / max(n, T(1));
        moments.mean = n > T(0) ? shift + off : T(0), moments.m2 = max(sums[2] - sums[1] * off, T(0));
      }
      const T top = told.ends.z_of[0];
      if (sums[0] != sums[0] || !(abs(top) < infinity)) told.ends.weight = told.ends.scale = Limits<T>::quiet_NaN();
      told.rest = {moments, labels[0], labels[1], labels[2], shift, apart[0], apart[1], apart[2]};
      told.whole = whole_row(told.ends, moments);
    }
    group.sync();

    // the expectation over the rest; what a class gets besides the row's gradient
    const RowMoments<T> all = told.whole.row.all;
    const T inv_s1 = inverse(all.s1);
    const auto own_of = [&](T z, T u, int k, Penalty<T>& sum) {
      const T own = -classes.smoothed(u, k);
      const bool seen = z > -infinity;
      const T x = seen ? z - all.m : T(0), e = seen ? quick_exp(x) : T(0);
      return own - expect<D>(options, all, inv_s1, x, e, seen ? u : T(0), sum);
    };
    Penalty<T> sum;
    if constexpr (kEach) {
      classes.each([&](T z, T& u, int k) { u = own_of(z, u, k, sum); });
      T terms[4] = {sum.value, sum.gradient.a, sum.gradient.b + sum.gradient.t, sum.gradient.e0};
      group.sum_for_first(terms);
      sum.value = terms[0], sum.gradient.a = terms[1], sum.gradient.e0 = terms[3];
      (D == Diversity::kl ? sum.gradient.t : sum.gradient.b) = terms[2];
    }
    if (group.lane == 0) {
      if constexpr (kPolynomial) sum = expected_variance(options, told.ends, told.rest, all, told.own = Own<T>());
      const RowLoss<T> out = finish(told.ends, told.rest, told.whole, sum, options);
      tally.add(job, r, job.classes > 0 ? row.weight : T(0), out);
      told.gradient = out.gradient;
    }
    if (!gradient) continue;
    group.sync();

    // spread
    const RowGradient<T> g = told.gradient;
    const T scale_of_row = told.ends.scale;
    const Own<T> polynomial = told.own;
    classes.write([&](T z, T& u, int k) {
      Penalty<T> again;
      const T x = z - at, e = quick_exp(x);
      T own;
      if constexpr (kEach) {
        own = kHeld ? u : own_of(z, u, k, again);
      } else {
        own = -classes.smoothed(u, k);
        if (kPolynomial) own -= z > -infinity ? polynomial.pull * (u * (x - polynomial.centre)) : T(0);
      }
      T factor = g.a;
      if (kNeeds & kSquares) factor += g.b * e;
      if (kNeeds & kEntropy) factor += g.t * max(x, T(-1000));
      T dz = e * factor + scale_of_row * own;
      if (kNeeds & kLogits) dz += z > -infinity ? g.e0 + g.e1 * x : T(0);
      return dz;
    });
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (classes.taken[i] >= 0) Memory<S>::store(row.gradient + classes.taken[i] * job.gradient_step, i ? g.other : g.label);
  }
  tally.close(job);
}

}  // namespace cuda
}  // namespace fastsoftloss
