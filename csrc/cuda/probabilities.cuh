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

constexpr int kProbabilitiesHeld = 32;  // classes a thread

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

// What a thread's classes have at most and at least, how many there are, and their sum; the masked are not there.
template <bool kBoth, class T>
struct Look {
  T most = -Limits<T>::infinity(), least = Limits<T>::infinity(), n = 0, total = 0;

  FSL_DEVICE void add(T z) {
    const bool there = z > -Limits<T>::infinity();
    most = max(most, z);
    n += there ? T(1) : T(0);
    if (kBoth) least = min(least, there ? z : Limits<T>::infinity()), total += there ? z : T(0);
  }
};

// A thread's share of a row. each(f): f(z, u, k, whether k is a class that is not taken), from left to right; where it is
// not, z is -inf and u is 0. take(i, z, f): extreme i is its first class of logit z, and f(u, k) is told.
template <Storage S, class T, bool kHeld>
struct Classes {
  const Job<T>& job;
  const ProbabilityRow<T>& row;
  const int first, size;    // classes first + i size
  int taken[2] = {-1, -1};  // the extremes that were this thread's, or -1

  FSL_DEVICE Classes(const Job<T>& job, const ProbabilityRow<T>& row, const Group<T>& group)
      : job(job), row(row), first(group.lane), size(group.size) {}

  template <class F>
  FSL_DEVICE void each(F f) {
#pragma unroll 1
    for (int k = first; k < job.classes; k += size) {
      if (k == taken[0] || k == taken[1]) continue;
      T u = load_probability(job, row.target + k * job.target_step);
      if (job.class_weight) u *= job.class_weight[k];
      f(Memory<S>::load(row.logits + k * job.logits_step), u, k, true);
    }
  }
  template <class F>
  FSL_DEVICE void take(int i, T z_of, F f) {
    each([&](T z, T u, int k, bool) {
      if (z == z_of && taken[i] < 0) taken[i] = k, f(u, k);
    });
  }
};

template <Storage S, class T>
struct Classes<S, T, true> {
  static constexpr int kChunk = 4;
  const int size, count;  // classes that a thread of the group has at most
  int first;
  unsigned there = 0;  // which of this thread's are a class that is not taken
  int taken[2] = {-1, -1};
  T z[kProbabilitiesHeld], u[kProbabilitiesHeld];

  FSL_DEVICE Classes(const Job<T>& job, const ProbabilityRow<T>& row, const Group<T>& group)
      : size(group.size), count((job.classes + skipped(row, group) + group.size - 1) >> group.shift) {
    first = group.lane - skipped(row, group);
    const char* from = row.logits + first * job.logits_step;
    const char* target = row.target + first * job.target_step;
    const int64_t apart = job.logits_step * size, target_apart = job.target_step * size;
    all([&](int i) {
      const bool has = unsigned(first + i * size) < unsigned(job.classes);
      z[i] = -Limits<T>::infinity(), u[i] = 0;
      if (has) z[i] = Memory<S>::load(from), there |= 1u << i;
      from += apart;
    });
    const auto load = [&](auto storage) {
      all([&](int i) {
        if (there >> i & 1) u[i] = Memory<storage.value>::load(target);
        target += target_apart;
      });
    };
    switch (job.target_storage) {
      case Storage::bfloat16:
        load(std::integral_constant<Storage, Storage::bfloat16>());
        break;
      case Storage::float16:
        load(std::integral_constant<Storage, Storage::float16>());
        break;
      default:
        load(std::integral_constant<Storage, Storage::float32>());
    }
    if (!job.class_weight) return;
    all([&](int i) {
      if (there >> i & 1) u[i] *= job.class_weight[first + i * size];
    });
  }
  // A warp starts where a sector of 32 bytes does.
  static FSL_DEVICE int skipped(const ProbabilityRow<T>& row, const Group<T>& group) {
    return group.size < 32 ? 0 : (int(reinterpret_cast<intptr_t>(row.logits)) & 31) / Memory<S>::kBytes;
  }
  template <class F>
  FSL_DEVICE void each(F f) {
    all([&](int i) { f(z[i], u[i], first + i * size, (there >> i & 1) != 0); });
  }
  template <class F>
  FSL_DEVICE void take(int which, T z_of, F f) {
    all([&](int i) {
      if (z[i] == z_of && taken[which] < 0 && (there >> i & 1)) {
        taken[which] = first + i * size;
        f(u[i], taken[which]);
        z[i] = -Limits<T>::infinity(), u[i] = 0, there &= ~(1u << i);
      }
    });
  }

  template <class F>
  FSL_DEVICE void all(F f) {
#pragma unroll
    for (int c = 0; c < kProbabilitiesHeld; c += kChunk) {
      if (c >= count) continue;
#pragma unroll
      for (int i = c; i < c + kChunk; ++i) f(i);
    }
  }
};

// What the threads of a row tell one another.
template <class T>
struct Expectation {
  Extremes<T> ends;
  Rest<T> rest;
  Whole<T> whole;
  RowGradient<T> gradient;
};

template <Storage S, Diversity D, bool kHeld, class T>
__global__ void __launch_bounds__(256, 1) probabilities(const __grid_constant__ Job<T> job, int lanes) {
  constexpr unsigned kNeeds = moments_of(D);
  constexpr bool kBoth = (kNeeds & kLogits) != 0;
  constexpr T infinity = Limits<T>::infinity();
  __shared__ T exchange[kMostWarps * kMostSums];
  extern __shared__ uint4 stage[];
  const Group<T> group(lanes, exchange);
  if (settled(job)) return;
  Expectation<T>& told = reinterpret_cast<Expectation<T>*>(stage)[group.index];
  Tally<T> tally{};
  const bool gradient = job.gradient.data != nullptr, smooth = job.options.label_smoothing != 0;
  const T scale = gradient ? scale_of_all(job) : T(1);
  const T keep = T(1) - job.options.label_smoothing, even = job.options.label_smoothing / T(job.classes);
  Options<T> options = job.options;
  options.diversity = D;
  const auto smoothed = [&](T u, int k, bool there) {
    if (!smooth) return u;
    return keep * u + (!there ? T(0) : job.class_weight ? even * job.class_weight[k] : even);
  };

  for (int64_t r = int64_t(blockIdx.x) * group.count + group.index; r < job.rows; r += int64_t(gridDim.x) * group.count) {
    const ProbabilityRow<T> row = locate_probabilities(job, r);
    if (settled(job, row)) continue;
    group.sync();  // what the last row was told is read
    if (group.lane == 0) told.ends = {row.weight, scale * row.upstream * row.weight, {-infinity, -infinity}, {0, 0}, {0, 0}};
    group.sync();
    Classes<S, T, kHeld> classes(job, row, group);

    // the extremes
    const auto look_at_all = [&] {
      Look<kBoth, T> look;
      classes.each([&](T z, T&, int, bool) { look.add(z); });
      return look;
    };
    Look<kBoth, T> look = look_at_all();
#pragma unroll
    for (int i = 0; i < (kBoth ? 2 : 1); ++i) {
      const T mine = i ? -look.least : look.most, most = group.largest(mine);
      const T place = mine == most && most > -infinity ? T(group.size - group.lane) : T(0);
      if (place > T(0) & group.largest(place) == place) {
        const T z = i ? -most : most;
        classes.take(i, z, [&](T u, int k) { told.ends.z_of[i] = z, told.ends.u_of[i] = u, told.ends.v_of[i] = smoothed(u, k, true); });
        look = look_at_all();
      }
    }

    // reduce
    T count[2] = {look.n, look.total};
    group.sum(count);
    const T n = count[0], m = group.largest(look.most), at = m == -infinity ? T(0) : m;
    const T shift = count[1] / max(n, T(1)) - at;
    T sums[3] = {0, 0, 0}, labels[3] = {0, 0, 0};
    classes.each([&](T z, T& u, int k, bool there) {
      const T x = z - at, e = quick_exp(x), v = smoothed(u, k, there);
      sums[0] += e;
      if (kNeeds & kSquares) sums[1] += e * e;
      if (kNeeds & kEntropy) sums[1] += e * max(x, T(-1000));
      if (kNeeds & kLogits) {
        const T d = z > -infinity ? x - shift : T(0);
        sums[1] += d, sums[2] += d * d;
      }
      labels[0] += u, labels[1] += v, labels[2] -= v == T(0) ? T(0) : v * x;
    });
    group.sum_for_first(sums);
    group.sum_for_first(labels);
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
      told.rest = {moments, labels[0], labels[1], labels[2]};
      told.whole = whole_row(told.ends, moments);
    }
    group.sync();

    // the expectation over the rest; what a class gets besides the row's gradient
    const RowMoments<T> all = told.whole.all;
    const T inv_s1 = inverse(all.s1);
    const auto own_of = [&](T z, T u, int k, bool there, Penalty<T>& sum) {
      const T own = -smoothed(u, k, there);
      if (D == Diversity::none) return own;
      const bool seen = z > -infinity;
      const T x = seen ? z - all.m : T(0), e = seen ? quick_exp(x) : T(0);
      return own - expect<D>(options, all, inv_s1, x, e, seen ? u : T(0), sum);
    };
    Penalty<T> sum;
    if (D != Diversity::none) {
      classes.each([&](T z, T& u, int k, bool there) { u = own_of(z, u, k, there, sum); });
      T terms[5] = {sum.value, sum.gradient.a, sum.gradient.b + sum.gradient.t, sum.gradient.e0, sum.gradient.e1};
      group.sum_for_first(terms);
      sum.value = terms[0], sum.gradient.a = terms[1], sum.gradient.e0 = terms[3], sum.gradient.e1 = terms[4];
      (D == Diversity::kl ? sum.gradient.t : sum.gradient.b) = terms[2];
    }
    if (group.lane == 0) {
      const RowLoss<T> out = finish(told.ends, told.rest, told.whole, sum, options);
      tally.add(job, r, job.classes > 0 ? row.weight : T(0), out);
      told.gradient = out.gradient;
    }
    if (!gradient) continue;
    group.sync();

    // spread
    const RowGradient<T> g = told.gradient;
    const T scale_of_row = told.ends.scale;
    classes.each([&](T z, T& u, int k, bool there) {
      Penalty<T> again;
      const T own = kHeld && D != Diversity::none ? u : own_of(z, u, k, there, again);
      const T x = z - at, e = quick_exp(x);
      T factor = g.a;
      if (kNeeds & kSquares) factor += g.b * e;
      if (kNeeds & kEntropy) factor += g.t * max(x, T(-1000));
      T dz = e * factor + scale_of_row * own;
      if (kNeeds & kLogits) dz += z > -infinity ? g.e0 + g.e1 * x : T(0);
      if (there) Memory<S>::store(row.gradient + k * job.gradient_step, dz);
    });
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (classes.taken[i] >= 0) Memory<S>::store(row.gradient + classes.taken[i] * job.gradient_step, i ? g.other : g.label);
  }
  tally.close(job);
}

}  // namespace cuda
}  // namespace fastsoftloss
