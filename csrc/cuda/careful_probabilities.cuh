// Rows of class probabilities the plain way, by the moments of row_probabilities.h: in passes, of any length, value and stride.
// Class k is one of thread k mod the group's size, so that neighbours read neighbours. The extremes are taken out of the classes first.
#pragma once

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

// What the threads of a row tell one another.
template <class T>
struct Expectation {
  Extremes<T> ends;
  RowMoments<T> all;
  RowGradient<T> gradient;
  Own<T> own;
};

// How a block goes about its rows.
template <class T>
struct Probabilities {
  const Job<T>& job;
  const Group<T>& group;
  const Options<T>& options;  // the diversity known
  const T scale;              // of all gradients
  Expectation<T>& told;
  const T keep, even;  // of label smoothing

  FSL_DEVICE Probabilities(const Job<T>& job, const Group<T>& group, const Options<T>& options, T scale, Expectation<T>& told)
      : job(job),
        group(group),
        options(options),
        scale(scale),
        told(told),
        keep(T(1) - job.options.label_smoothing),
        even(job.options.label_smoothing / T(job.classes)) {}
};

// From the sums about m, and of x less shift and its square where they are asked for.
template <unsigned Needs, class T>
FSL_DEVICE RowMoments<T> moments_about(T n, T m, T shift, const T (&sums)[3]) {
  RowMoments<T> r;
  r.n = n, r.m = m, r.s1 = sums[0];
  if (Needs & kSquares) r.s2 = sums[1];
  if (Needs & kEntropy) r.sx = sums[1];
  if (Needs & kLogits) {  // corrected two-pass
    const T off = sums[1] / max(n, T(1));
    r.mean = n > T(0) ? shift + off : T(0), r.m2 = max(sums[2] - sums[1] * off, T(0));
  }
  return r;
}

// The sums of `expect` over the group, for its first thread.
template <Diversity D, class T>
FSL_DEVICE void sum_for_first(const Group<T>& group, Penalty<T>& sum) {
  T& square = D == Diversity::kl ? sum.gradient.t : sum.gradient.b;  // a penalty has one of the two at most
  T terms[4] = {sum.value, sum.gradient.a, square, sum.gradient.e0};
  group.sum_for_first(terms);
  sum.value = terms[0], sum.gradient.a = terms[1], square = terms[2], sum.gradient.e0 = terms[3];
}

// finish, by the group's first thread. sum: of `expect`, where the penalty is no polynomial.
template <Diversity D, class T>
FSL_DEVICE void finish_probabilities(const Probabilities<T>& of, int64_t r, const ProbabilityRow<T>& row, const Rest<T>& rest,
                                     const Whole<T>& whole, Penalty<T>& sum, Tally<T>& tally) {
  if (D == Diversity::logit_variance) sum = expected_variance(of.options, rest, whole, of.told.own = Own<T>());
  constexpr unsigned kNeeds = moments_of(D);
  const RowLoss<T> out = finish<kNeeds>(of.told.ends, rest, whole, sum, of.options);
  tally.add(of.job, r, row.weight, out);
  RowGradient<T>& told = of.told.gradient;
  told.a = out.gradient.a, told.label = out.gradient.label, told.other = out.gradient.other;
  if (kNeeds & kSquares) told.b = out.gradient.b;
  if (kNeeds & kEntropy) told.t = out.gradient.t;
  if (kNeeds & kLogits) told.e0 = out.gradient.e0, told.e1 = out.gradient.e1;
}

// The largest logit of a thread's classes and the smallest that is there; how many there are, and their sum.
template <class T>
struct Look {
  T most = -Limits<T>::infinity(), least = Limits<T>::infinity(), n = 0, total = 0;

  FSL_DEVICE void add(T z) {
    if (z > -Limits<T>::infinity()) least = fmin(least, z), n += T(1), total += z;
    most = fmax(most, z);
  }
};

// f(z, u, k) of a thread's classes, in order, without those that are taken.
template <Storage S, class T, class F>
FSL_DEVICE void each_class(const Probabilities<T>& of, const ProbabilityRow<T>& row, const int (&taken)[2], F f) {
  const Job<T>& job = of.job;
#pragma unroll 1
  for (int k = of.group.lane; k < job.classes; k += of.group.size) {
    if (k == taken[0] || k == taken[1]) continue;
    T u = load_probability(job, row.target + k * job.target_step);
    if (job.class_weight) u *= job.class_weight[k];
    f(Memory<S>::load(row.logits + k * job.logits_step), u, k);
  }
}

template <Storage S, Diversity D, class T>
FSL_DEVICE void careful_probabilities(const Probabilities<T>& of, int64_t r, const ProbabilityRow<T>& row, Tally<T>& tally) {
  constexpr unsigned kNeeds = moments_of(D);
  constexpr bool kPolynomial = D == Diversity::logit_variance, kEach = D != Diversity::none && !kPolynomial;
  constexpr T infinity = Limits<T>::infinity();
  const Job<T>& job = of.job;
  const Group<T>& group = of.group;
  Expectation<T>& told = of.told;
  int taken[2] = {-1, -1};  // the extremes that were this thread's, or -1
  const auto each = [&](auto f) { each_class<S>(of, row, taken, f); };
  const auto smoothed = [&](T u, int k) { return of.keep * u + (job.class_weight ? of.even * job.class_weight[k] : of.even); };
  const auto look_at = [&] {
    Look<T> look;
    each([&](T z, T, int) { look.add(z); });
    return look;
  };
  if (group.lane == 0) told.ends = {row.weight, of.scale * row.upstream * row.weight, {-infinity, -infinity}, {0, 0}, {0, 0}};
  group.sync();

  // the extremes: the smallest only where it can be most of a moment
  Look<T> look = look_at();
#pragma unroll 1
  for (int i = 0; i < (kNeeds & kLogits ? 2 : 1); ++i) {
    const T mine = i ? -look.least : look.most, most = group.largest(mine);
    const T place = mine == most && most > -infinity ? T(group.size - group.lane) : T(0);
    if (group.largest(place) == place && place > T(0)) {  // the first thread that has it
      int found = -1;
      each([&](T z, T u, int k) {
        if (z == (i ? -most : most) && found < 0)
          found = k, told.ends.z_of[i] = z, told.ends.u_of[i] = u, told.ends.v_of[i] = smoothed(u, k);
      });
      (i ? taken[1] : taken[0]) = found;
      look = look_at();
    }
  }
  const T m = group.largest(look.most), at = m == -infinity ? T(0) : m;
  T count[2] = {look.n, look.total};
  group.sum(count);
  const T n = count[0], shift = count[1] / max(n, T(1)) - at;

  // reduce
  T sums[3] = {0, 0, 0}, labels[3] = {0, 0, 0}, apart[3] = {0, 0, 0};
  each([&](T z, T u, int k) {
    const T x = z - at, e = quick_exp(x), v = smoothed(u, k);
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
    labels[0] += u, labels[1] += v;
    if (v != T(0)) labels[2] -= v * x;  // 0 log 0 is 0
  });
  group.sum_for_first(sums);
  group.sum_for_first(labels);
  if (kPolynomial) group.sum_for_first(apart);
  Rest<T> rest;
  Whole<T> whole;
  if (group.lane == 0) {
    rest = {moments_about<kNeeds>(n, m, shift, sums), labels[0], labels[1], labels[2], shift, apart[0], apart[1], apart[2]};
    if (!(abs(told.ends.z_of[0]) < infinity)) told.ends.weight = told.ends.scale = Limits<T>::quiet_NaN();
    whole = whole_row<kNeeds>(told.ends, rest.moments);
    if (kEach) told.all = whole.row.all;
  }

  // the expectation over the rest, and what a class gets besides the row's gradient
  Penalty<T> sum;
  RowMoments<T> all;
  T inv_s1(0);
  const auto own_of = [&](T z, T u, int k, Penalty<T>& to) {
    const bool seen = z > -infinity;
    const T x = seen ? z - all.m : T(0), e = seen ? quick_exp(x) : T(0);
    return -smoothed(u, k) - expect<D>(of.options, all, inv_s1, x, e, seen ? u : T(0), to);
  };
  if constexpr (kEach) {
    group.sync();
    all = told.all, inv_s1 = inverse(all.s1);
    each([&](T z, T u, int k) { own_of(z, u, k, sum); });
    sum_for_first<D>(group, sum);
  }
  if (group.lane == 0) finish_probabilities<D>(of, r, row, rest, whole, sum, tally);
  group.sync();
  if (!job.gradient.data) return;

  // spread
  const RowGradient<T> g = told.gradient;
  const T scale_of_row = told.ends.scale;
  const Own<T> polynomial = kPolynomial ? told.own : Own<T>();
  const auto store = [&](int k, T dz) { Memory<S>::store(row.gradient + k * job.gradient_step, dz); };
  each([&](T z, T u, int k) {
    Penalty<T> again;
    const bool there = z > -infinity;
    const T x = z - at, e = quick_exp(x);
    T own;
    if constexpr (kEach) {
      own = own_of(z, u, k, again);
    } else {
      own = -smoothed(u, k);
      if (kPolynomial) own -= there ? polynomial.pull * (u * (x - polynomial.centre)) : T(0);
    }
    T factor = g.a;
    if (kNeeds & kSquares) factor += g.b * e;
    if (kNeeds & kEntropy) factor += g.t * max(x, T(-1000));
    T dz = e * factor + scale_of_row * own;
    if (kNeeds & kLogits) dz += there ? g.e0 + g.e1 * x : T(0);
    store(k, dz);
  });
  if (taken[0] >= 0) store(taken[0], g.label);
  if (taken[1] >= 0) store(taken[1], g.other);
  group.sync();  // what it was told is read before the next row comes
}

}  // namespace cuda
}  // namespace fastsoftloss
