// Rows whose target is a probability for each class. A group's threads hold a row in registers and read it once; rows too long for
// that, in float64, or with a class masked by -inf go the careful way.
//
// In the place of an extreme stands the next class, without a probability, and is taken out of the sums once: that next class is in
// them itself, so that never more than half of a sum cancels. Where two classes are the largest neither is most of anything, and both stay.
#pragma once

#include <type_traits>

#include "careful_probabilities.cuh"

namespace fastsoftloss {
namespace cuda {

// A thread's share of a row: class first + i size at place i, if there is one.
//   all(f): f(i, full) of the places; only where it is not `full` does has(i) say more
template <Storage S, class T>
struct Held {
  static constexpr int kChunk = 4;
  const Job<T>& job;
  const ProbabilityRow<T>& row;
  const int size, skipped, first, mine, full;  // mine: places up to the thread's last class; full: those that all of the group have
  int taken[2] = {-1, -1};                     // the extremes that were this thread's, or -1
  T z[kProbabilitiesHeld], u[kProbabilitiesHeld];

  FSL_DEVICE Held(const Job<T>& job, const ProbabilityRow<T>& row, const Group<T>& group)
      : job(job),
        row(row),
        size(group.size),
        // a warp starts where a sector of 32 bytes does
        skipped(group.size < 32 ? 0 : (int(reinterpret_cast<intptr_t>(row.logits)) & 31) / Memory<S>::kBytes),
        first(group.lane - skipped),
        mine((job.classes - first + group.size - 1) >> group.shift),
        full((job.classes + skipped) >> group.shift) {
    read<S>(row.logits, job.logits_step, Limits<T>::quiet_NaN(), z);
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
      if (full || has(i)) u[i] *= job.class_weight[class_of(i)];
    });
  }
  FSL_DEVICE int class_of(int i) const { return first + i * size; }
  FSL_DEVICE bool has(int i) const { return i < mine && (i > 0 || first >= 0); }  // less than a place is skipped
  template <int kFrom = 0, class F>  // a loop with a way out is not unrolled on every architecture, and then nothing is in registers
  FSL_DEVICE void all(F f) {
    const bool whole = kFrom + kChunk <= full;
    if constexpr (kFrom == 0) {
      if (whole && skipped == 0) {
        chunk<kFrom>(f, std::true_type());
      } else {
        chunk<kFrom>(f, std::false_type());
      }
      if (whole) all<kFrom + kChunk>(f);
    } else if constexpr (kFrom < kProbabilitiesHeld) {
      if (whole) {
        chunk<kFrom>(f, std::true_type());
        all<kFrom + kChunk>(f);
      } else {
        chunk<kFrom>(f, std::false_type());
      }
    }
  }
  // The two largest logits, and the two largest of them negated.
  FSL_DEVICE void look(T (&ends)[2][2]) {
    T least = Limits<T>::infinity(), low = least;
    ends[0][0] = ends[0][1] = -least;
    all([&](int i, auto full) {
      if (!full && !has(i)) return;
      Group<T>::keep_two(ends[0], z[i]);
      low = fmin(fmax(least, z[i]), low), least = fmin(least, z[i]);
    });
    ends[1][0] = -least, ends[1][1] = -low;
  }
  // f(which, u) of what exceeds m, 0, or is below low, 1; in its place stand m and low.
  template <class F>
  FSL_DEVICE void take(T m, T low, F f) {
    all([&](int i, auto) {  // NaN is neither, and stands where there is no class
      if (z[i] > m) f(0, u[i]), taken[0] = class_of(i), z[i] = m, u[i] = 0;
      if (z[i] < low) f(1, u[i]), taken[1] = class_of(i), z[i] = low, u[i] = 0;
    });
  }
  // How many of the first places have a class, and the sum of their logits.
  FSL_DEVICE void sample(T (&of)[2]) const {
    of[0] = of[1] = T(0);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (has(i)) of[0] += T(1), of[1] += z[i];
  }
  // f(z, u), and of an extreme what it gets.
  template <class F>
  FSL_DEVICE void write(F f, T largest, T smallest) {
    char* to = row.gradient + first * job.gradient_step;
    const int64_t apart = job.gradient_step * size;
    all([&](int i, auto full) {
      if (full || has(i)) Memory<S>::store(to, f(z[i], u[i]));
      to += apart;
    });
    if (taken[0] >= 0) Memory<S>::store(row.gradient + taken[0] * job.gradient_step, largest);
    if (taken[1] >= 0) Memory<S>::store(row.gradient + taken[1] * job.gradient_step, smallest);
  }

 private:
  template <int kFrom, class F, class Full>
  FSL_DEVICE void chunk(F f, Full full) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) f(kFrom + i, full);
  }
  template <Storage From>
  FSL_DEVICE void read(const char* from, int64_t step, T nothing, T (&to)[kProbabilitiesHeld]) {
    from += first * step;
    const int64_t apart = step * size;
    all([&](int i, auto full) {
      to[i] = full || has(i) ? Memory<From>::load(from) : nothing;
      from += apart;
    });
  }
};

// Whether the row is done; if not, nothing has been.
template <Storage S, Diversity D, class T>
FSL_DEVICE bool held_probabilities(const Probabilities<T>& of, int64_t r, const ProbabilityRow<T>& row, Tally<T>& tally) {
  constexpr unsigned kNeeds = moments_of(D);
  constexpr bool kPolynomial = D == Diversity::logit_variance, kEach = D != Diversity::none && !kPolynomial;
  constexpr int kEnds = kNeeds & kLogits ? 2 : 1;  // the smallest only where it can be most of a moment
  const Job<T>& job = of.job;
  const Group<T>& group = of.group;
  Expectation<T>& told = of.told;
  Held<S, T> held(job, row, group);
  T ends[2][2];
  held.look(ends);
  const T top = ends[0][0], bottom = -ends[1][0];  // this thread's
  if constexpr (kEnds == 2) {
    group.largest_two(ends);
  } else {
    group.largest_two(reinterpret_cast<T(&)[1][2]>(ends));
    ends[1][0] = group.largest(ends[1][0]);
  }
  if (ends[1][0] == Limits<T>::infinity() || job.classes <= kEnds) return false;
  const T m = ends[0][1], low = kEnds == 2 ? -ends[1][1] : -Limits<T>::infinity(), x_low = low - m;
  if (group.lane == 0)
    told.ends = {row.weight, of.scale * row.upstream * row.weight, {ends[0][0], kEnds == 2 ? -ends[1][0] : low}, {0, 0}, {0, 0}};
  group.sync();
  if (top > m || bottom < low) held.take(m, low, [&](int i, T u) { told.ends.u_of[i] = u, told.ends.v_of[i] = of.keep * u + of.even; });
  T shift(0);
  if constexpr (kNeeds & kLogits) {
    T sample[2];
    held.sample(sample);
    group.sum(sample);
    shift = sample[1] / sample[0] - m;  // the variance of the sampled is part of that of all
  }

  // reduce
  T sums[3] = {0, 0, 0}, labels[4] = {0, 0, 0, 0};
  held.all([&](int i, auto full) {
    if (!full && !held.has(i)) return;
    const T x = held.z[i] - m, u = held.u[i], e = quick_exp(x);
    sums[0] += e;
    if (kNeeds & kSquares) sums[1] += e * e;
    if (kNeeds & kEntropy) sums[1] += e * x;
    labels[0] += u;
    labels[1] += (of.keep * u + of.even) * x;
    if constexpr ((kNeeds & kLogits) != 0) {
      const T d = x - shift;
      sums[1] += d, sums[2] += d * d;
      if (kPolynomial) labels[2] += u * d, labels[3] += u * d * d;
    }
  });
  group.sum_for_first(sums);
  group.sum_for_first(labels);
  Rest<T> rest;
  Whole<T> whole;
  if (group.lane == 0) {
    // what stands in the extremes' place
    sums[0] -= T(1);
    if (kNeeds & kSquares) sums[1] -= T(1);
    if (kNeeds & kLogits) {
      const T d = x_low - shift;
      sums[0] -= quick_exp(x_low);
      sums[1] += shift - d, sums[2] -= shift * shift + d * d;
    }
    const bool above = told.ends.z_of[0] > m, below = kEnds == 2 && told.ends.z_of[1] < low;
    if (below) labels[1] -= of.even * x_low;
    rest.moments = moments_about<kNeeds>(T(job.classes - kEnds), m, shift, sums);
    rest.u = labels[0], rest.v = of.keep * labels[0] + of.even * T(job.classes - above - below), rest.vx = -labels[1];
    rest.shift = shift, rest.there = labels[0], rest.ud = labels[2], rest.udd = labels[3];
    if (!(abs(told.ends.z_of[0]) < Limits<T>::infinity())) told.ends.weight = told.ends.scale = Limits<T>::quiet_NaN();
    whole = whole_row<kNeeds>(told.ends, rest.moments);
    if (kEach) told.all = whole.row.all;
  }

  // the expectation over the rest; of u is left what a class gets besides the row's gradient
  Penalty<T> sum;
  if constexpr (kEach) {
    group.sync();
    const RowMoments<T> all = told.all;
    const T inv_s1 = inverse(all.s1);
    held.all([&](int i, auto full) {
      if (!full && !held.has(i)) return;
      const T x = held.z[i] - all.m, own = of.keep * held.u[i] + of.even;
      held.u[i] = -own - expect<D>(of.options, all, inv_s1, x, quick_exp(x), held.u[i], sum);
    });
    sum_for_first<D>(group, sum);
  }
  if (group.lane == 0) finish_probabilities<D>(of, r, row, rest, whole, sum, tally);
  group.sync();
  if (!job.gradient.data) return true;

  // spread
  const RowGradient<T> g = told.gradient;
  const Own<T> own = kPolynomial ? told.own : Own<T>();
  const T scale = told.ends.scale, pull = -scale * own.pull, u0 = -scale * of.keep - pull * own.centre;
  const T e0 = (kNeeds & kLogits ? g.e0 : T(0)) - scale * of.even;
  held.write(
      [&](T z, T u) {
        const T x = z - m, e = quick_exp(x);
        T factor = g.a;
        if (kNeeds & kSquares) factor += g.b * e;
        if (kNeeds & kEntropy) factor += g.t * fmax(x, T(-1000));
        T dz = e * factor;
        if constexpr (kEach) {
          dz += kNeeds & kLogits ? scale * u + g.e0 : scale * u;
        } else {
          dz += kPolynomial ? g.e1 * x + e0 : e0;
          dz += u * (kPolynomial ? pull * x + u0 : u0);
        }
        return dz;
      },
      g.label, g.other);
  group.sync();  // what it was told is read before the next row comes
  return true;
}

template <Storage S, Diversity D, bool kHeld, class T>
__global__ void __launch_bounds__(256, 1) probabilities(const __grid_constant__ Job<T> job, int lanes) {
  __shared__ T exchange[kMostWarps * kMostSums];
  extern __shared__ uint4 stage[];
  const Group<T> group(lanes, exchange);
  if (settled(job)) return;
  Options<T> options = job.options;
  options.diversity = D;
  const T scale = job.gradient.data ? scale_of_all(job) : T(1);
  const Probabilities<T> of(job, group, options, scale, reinterpret_cast<Expectation<T>*>(stage)[group.index]);
  Tally<T> tally{};
  for (int64_t r = int64_t(blockIdx.x) * group.count + group.index; r < job.rows; r += int64_t(gridDim.x) * group.count) {
    const ProbabilityRow<T> row = locate_probabilities(job, r);
    if (settled(job, row)) continue;
    if constexpr (kHeld)
      if (held_probabilities<S, D>(of, r, row, tally)) continue;
    careful_probabilities<S, D>(of, r, row, tally);
  }
  tally.close(job);
}

}  // namespace cuda
}  // namespace fastsoftloss
