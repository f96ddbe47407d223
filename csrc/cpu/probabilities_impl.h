// Rows whose target is a probability for each class: what row_probabilities.h makes of them, and why, is said there.
//
// A step is a vector of the classes of one row, or, in a tile, one class of as many rows as there are lanes. U is the type of
// what a row has one of: a number, or a vector of them.
#pragma once

#include <type_traits>

#include "../row_probabilities.h"
#include "kernels.h"
#include "vec.h"

namespace fastsoftloss {
namespace FSL_ISA {
namespace {

template <class T, class U>
struct ProbabilityRows : Extremes<U> {
  using V = Vec<T>;
  int64_t steps;
  T *z, *u, *exps, *own;  // a vector a step, the last one of a row padded with classes that are not there

  ProbabilityRows(T* memory, int64_t steps)
      : steps(steps),
        z(memory),
        u(memory + steps * V::kLanes),
        exps(memory + 2 * steps * V::kLanes),
        own(memory + 3 * steps * V::kLanes) {}  // own: what a class gets besides the RowGradient, first -v
};

// The sum of a step's lanes where they belong to one row.
template <class U, class T>
FSL_FN U joined(Vec<T> v) {
  if constexpr (std::is_same_v<U, T>)
    return sum(v);
  else
    return v;
}
template <class U, class T>
FSL_FN U largest(Vec<T> v) {
  if constexpr (std::is_same_v<U, T>)
    return maximum(v);
  else
    return v;
}

// Lane by lane: the largest logit and the step of the first one, the smallest and the step of the last; `bad` counts NaN.
template <class T>
struct Ends {
  using V = Vec<T>;
  V most{-Limits<T>::infinity()}, least{Limits<T>::infinity()}, first{0}, last{0}, bad{0};
};

template <bool kBoth, class T>
FSL_LOOP Ends<T> ends(const T* z, int64_t steps) {
  using V = Vec<T>;
  Ends<T> r;
  const V inf(Limits<T>::infinity());
  for (int64_t i = 0; i < steps; ++i) {
    const V zi = V::load(z + i * V::kLanes), at = V(T(i));
    r.first = select(r.most < zi, at, r.first);
    r.most = max(zi, r.most);
    if (kBoth) {
      const V present = select(zi == V(0) - inf, inf, zi);
      const auto above = r.least < present;
      r.last = select(above, r.last, at);
      r.least = select(above, r.least, present);
    }
    r.bad = r.bad + select(zi == zi, V(0), V(1));
  }
  return r;
}

// Read a row and take its extremes out: the smallest only where it can be most of a moment.
template <bool kBoth, class T>
FSL_LOOP void read(const Job<T>& job, const Row<T>& row, ProbabilityRows<T, T>& to, int64_t (&extreme)[2]) {
  using V = Vec<T>;
  const int64_t padded = to.steps * V::kLanes;
  const auto gather = [&](const char* from, Storage storage, int64_t step, T* values) {
    if (step == bytes_of(storage)) return load_contiguous(from, storage, job.classes, values);
    for (int64_t k = 0; k < job.classes; ++k) values[k] = load_one<T>(from + k * step, storage);
  };
  gather(row.logits, job.storage, job.logits_step, to.z);
  gather(row.probabilities, job.target_storage, job.target_step, to.u);
  if (job.class_weight)
    for (int64_t k = 0; k < job.classes; ++k) to.u[k] *= job.class_weight[k];
  const T keep(1 - job.options.label_smoothing), even(job.options.label_smoothing / job.options.classes);
  for (int64_t k = 0; k < job.classes; ++k) to.own[k] = -(keep * to.u[k] + even * (job.class_weight ? job.class_weight[k] : T(1)));
  for (int64_t k = job.classes; k < padded; ++k) to.z[k] = -Limits<T>::infinity(), to.u[k] = to.own[k] = 0;

  const Ends<T> found = ends<kBoth>(to.z, to.steps);
  const T top = maximum(found.most), bottom = -maximum(V(0) - found.least);
  to.weight = row.row_weight, to.scale = row.scale * row.row_weight;
  T lanes[4][V::kLanes];
  found.most.store(lanes[0]), found.first.store(lanes[1]), found.least.store(lanes[2]), found.last.store(lanes[3]);
  extreme[0] = padded, extreme[1] = -1;
  if (sum(found.bad) > 0 || !(top < Limits<T>::infinity()) || top == -Limits<T>::infinity()) {
    to.weight = to.scale = Limits<T>::quiet_NaN();
    for (int64_t k = 0; k < job.classes; ++k) to.z[k] = 0;
    extreme[0] = 0;
  } else {
    for (int lane = 0; lane < V::kLanes; ++lane) {
      const int64_t f = int64_t(lanes[1][lane]) * V::kLanes + lane, l = int64_t(lanes[3][lane]) * V::kLanes + lane;
      if (lanes[0][lane] == top && f < extreme[0]) extreme[0] = f;
      if (kBoth && lanes[2][lane] == bottom && l > extreme[1]) extreme[1] = l;
    }
    if (extreme[1] == extreme[0]) extreme[1] = -1;
  }
  for (int i = 0; i < 2; ++i) {
    const int64_t k = extreme[i];
    to.z_of[i] = k < 0 ? -Limits<T>::infinity() : to.z[k], to.u_of[i] = k < 0 ? T(0) : to.u[k], to.v_of[i] = k < 0 ? T(0) : -to.own[k];
    if (k >= 0) to.z[k] = -Limits<T>::infinity(), to.u[k] = to.own[k] = 0;
  }
}

// The same for a tile.
template <bool kBoth, class T>
FSL_LOOP void read(const Tile<T>& tile, ProbabilityRows<T, Vec<T>>& to, Vec<T> (&extreme)[2]) {
  using V = Vec<T>;
  const Job<T>& job = tile.job;
  const int count = int(to.steps);
  tile.load(0, count, reinterpret_cast<T(*)[V::kLanes]>(to.z));
  tile.load(tile.probabilities, job.target_storage, job.target_step, 0, count, reinterpret_cast<T(*)[V::kLanes]>(to.u));

  const Ends<T> found = ends<kBoth>(to.z, to.steps);
  const V none(-1), inf(Limits<T>::infinity());
  const auto bad = (V(0) < found.bad) | (found.most == inf) | (found.most == V(0) - inf);
  const V poison = select(bad, V(Limits<T>::quiet_NaN()), V(1));
  to.weight = V::load(tile.row_weight) * poison, to.scale = V::load(tile.scale) * to.weight;
  extreme[0] = select(bad, V(0), found.first);
  extreme[1] = kBoth ? select(bad | (found.first == found.last), none, found.last) : none;
  const T keep(1 - job.options.label_smoothing), even(job.options.label_smoothing / job.options.classes);
  for (int i = 0; i < 2; ++i) to.z_of[i] = V(0) - inf, to.u_of[i] = to.v_of[i] = V(0);
  for (int k = 0; k < count; ++k) {
    const T weight = job.class_weight ? job.class_weight[k] : T(1);
    V z = select(bad, V(0), V::load(to.z + k * V::kLanes)), u = V::load(to.u + k * V::kLanes) * V(weight);
    V v = V(keep) * u + V(even * weight);
    for (int i = 0; i < 2; ++i) {
      const auto here = extreme[i] == V(T(k));
      to.z_of[i] = select(here, z, to.z_of[i]), to.u_of[i] = select(here, u, to.u_of[i]), to.v_of[i] = select(here, v, to.v_of[i]);
      z = select(here, V(0) - inf, z), u = select(here, V(0), u), v = select(here, V(0), v);
    }
    z.store(to.z + k * V::kLanes), u.store(to.u + k * V::kLanes), (V(0) - v).store(to.own + k * V::kLanes);
  }
}

// next: the row or tile to come.
template <unsigned Needs, class T, class U>
FSL_LOOP Rest<U> reduce(const ProbabilityRows<T, U>& rows, const Row<T>& next) {
  using V = Vec<T>;
  Accumulator<T, Needs> acc;
  for (int64_t i = 0; i < rows.steps; ++i) acc.look(V::load(rows.z + i * V::kLanes));
  const U n = joined<U>(acc.n), m = largest<U>(acc.m), at = select(m == U(-Limits<T>::infinity()), U(0), m);
  const U shift = Needs & kLogits ? joined<U>(acc.total) / max(n, U(1)) - at : U(0);
  acc.shift = V(shift);
  V u(0), v(0), vx(0);
  for (int64_t i = 0; i < rows.steps * V::kLanes; i += V::kLanes) {
    const V zi = V::load(rows.z + i), ui = V::load(rows.u + i), vi = V(0) - V::load(rows.own + i);
    __builtin_prefetch(next.logits + i * sizeof(T));
    __builtin_prefetch(next.probabilities + i * sizeof(T));
    acc.add(zi, V(at), ui).store(rows.exps + i);
    u = u + ui;
    v = v + vi;
    vx = vx + select(vi == V(0), V(0), vi * (V(at) - zi));
  }
  return {moments<Needs>(acc, n, m, shift, [](V lanes) { return joined<U>(lanes); }), joined<U>(u), joined<U>(v), joined<U>(vx)};
}

// The penalty expected over the labels that are no extremes: its value, and the RowGradient about all.m. What a class must
// not get of it goes to `own`. By value, and the penalty known: whatever no class changes is computed once.
template <Diversity D, class T, class U>
FSL_LOOP Penalty<U> expected(LossOptions o, ProbabilityRows<T, U> rows, RowMoments<U> all, U rest_m) {
  using V = Vec<T>;
  o.diversity = D;
  const U down = select(rest_m == U(-Limits<T>::infinity()), U(0), rest_m - all.m);
  const V f(exp(max(down, U(-1000)))), inv_s1(U(1) / all.s1), zero(0), m(all.m), masked(-Limits<T>::infinity());
  Penalty<V> sum;
  for (int64_t i = 0; i < rows.steps * V::kLanes; i += V::kLanes) {
    uint64_t words[8], any = 0;
    memcpy(words, rows.u + i, 64);
    for (uint64_t word : words) any |= word;
    if (!any) continue;  // labels are often few
    const V z = V::load(rows.z + i);
    const auto there = z > masked;
    const V u = select(there, V::load(rows.u + i), zero), x = select(there, z - m, zero);
    const V e = select(there, f * V::load(rows.exps + i), zero);
    (V::load(rows.own + i) - expect<D>(o, all, inv_s1, x, e, u, sum)).store(rows.own + i);
  }
  Penalty<U> out;
  const RowGradient<V>& g = sum.gradient;
  out.value = joined<U>(sum.value);
  out.gradient.a = joined<U>(g.a), out.gradient.b = joined<U>(g.b), out.gradient.t = joined<U>(g.t);
  out.gradient.e0 = joined<U>(g.e0), out.gradient.e1 = joined<U>(g.e1);
  return out;
}

template <class T, class U>
FSL_FN Penalty<U> expected(const LossOptions& o, const ProbabilityRows<T, U>& rows, const RowMoments<U>& all, U rest_m) {
  switch (o.diversity) {
    case Diversity::logit_variance:
      return expected<Diversity::logit_variance>(o, rows, all, rest_m);
    case Diversity::kl:
      return expected<Diversity::kl>(o, rows, all, rest_m);
    case Diversity::reverse_kl:
      return expected<Diversity::reverse_kl>(o, rows, all, rest_m);
    case Diversity::chi2:
      return expected<Diversity::chi2>(o, rows, all, rest_m);
    case Diversity::variance:
      return expected<Diversity::variance>(o, rows, all, rest_m);
    default:
      return {};
  }
}

// One copy in the object code, whatever moments there are; those that are not are 0.
template <class T, class U>
FSL_LOOP RowLoss<U> finish(const LossOptions& o, const ProbabilityRows<T, U>& rows, const Rest<U>& rest) {
  const Whole<U> whole = whole_row<U>(rows, rest.moments);
  return finish<U>(rows, rest, whole, expected(o, rows, whole.all, rest.moments.m), o);
}

// spread: one step.
template <unsigned Needs, class T, class U>
FSL_FN Vec<T> slope_of(const ProbabilityRows<T, U>& rows, const RowGradient<Vec<T>>& g, Vec<T> m, Vec<T> scale, int64_t i) {
  using V = Vec<T>;
  const V z = V::load(rows.z + i);
  return slope<Needs>(g, z, z - m, V::load(rows.exps + i), V(0)) + scale * V::load(rows.own + i);
}

// Where it belongs, or into `own` and from there.
template <unsigned Needs, class T>
FSL_LOOP void spread(const Job<T>& job, const Row<T>& at, const ProbabilityRows<T, T>& rows, const int64_t (&extreme)[2],
                     const RowGradient<T>& g, T m) {
  using V = Vec<T>;
  const RowGradient<V> lanes = broadcast(g);
  const V base(m), scale(rows.scale);
  const bool direct = holds<T>(job.storage) && job.gradient_step == int64_t(sizeof(T));
  T* const out = direct ? reinterpret_cast<T*>(at.gradient) : rows.own;
  for (int64_t i = 0; i < rows.steps * V::kLanes; i += V::kLanes) {
    const V dz = slope_of<Needs>(rows, lanes, base, scale, i);
    if (!direct || i + V::kLanes <= job.classes) {
      dz.store(out + i);
    } else {
      T tail[V::kLanes];
      dz.store(tail);
      memcpy(out + i, tail, (job.classes - i) * sizeof(T));
    }
  }
  for (int i = 0; i < 2; ++i)
    if (extreme[i] >= 0) out[extreme[i]] = i ? g.other : g.label;
  if (direct) return;
  if (job.gradient_step == bytes_of(job.storage)) return store_contiguous(out, job.storage, job.classes, at.gradient);
  for (int64_t k = 0; k < job.classes; ++k) store_one(out[k], job.storage, at.gradient + k * job.gradient_step);
}

template <unsigned Needs, class T>
FSL_LOOP void spread(const Tile<T>& tile, const ProbabilityRows<T, Vec<T>>& rows, const Vec<T> (&extreme)[2], const RowGradient<Vec<T>>& g,
                     Vec<T> m) {
  using V = Vec<T>;
  for (int64_t k = 0; k < rows.steps; ++k) {
    const V at = V(T(k)), dz = slope_of<Needs>(rows, g, m, rows.scale, k * V::kLanes);
    select(extreme[0] == at, g.label, select(extreme[1] == at, g.other, dz)).store(rows.own + k * V::kLanes);
  }
  tile.store(0, int(rows.steps), reinterpret_cast<const T(*)[V::kLanes]>(rows.own));
}

template <class T, unsigned Needs>
void probabilities(const Job<T>& job, int64_t begin, int64_t end, LossSums<T>* sums) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  constexpr bool kBoth = (Needs & kLogits) != 0;
  const bool tiles = job.classes <= kTileClasses;
  const int64_t steps = tiles ? job.classes : (job.classes + kLanes - 1) / kLanes;
  T* const memory = new T[4 * steps * kLanes];
  const int64_t stride = tiles ? kLanes : 1;
  Walk<T> walk(job, begin);
  for (int64_t r = begin; r < end; r += stride) {
    const Row<T> next = locate(job, r + stride < end ? r + stride : r);
    if (tiles) {
      const Tile<T> tile(walk, end - r);
      ProbabilityRows<T, V> rows(memory, steps);
      V extreme[2];
      read<kBoth>(tile, rows, extreme);
      const auto rest = reduce<Needs>(rows, next);
      const RowLoss<V> loss = finish(job.options, rows, rest);
      tile.record(r, loss.loss, loss.cross_entropy, loss.diversity, sums);
      if (job.gradient) spread<Needs>(tile, rows, extreme, loss.gradient, rest.moments.m);
    } else {
      const Row<T> row = locate(job, r);
      ProbabilityRows<T, T> rows(memory, steps);
      int64_t extreme[2];
      read<kBoth>(job, row, rows, extreme);
      const auto rest = reduce<Needs>(rows, next);
      const RowLoss<T> loss = finish(job.options, rows, rest);
      record(job, r, loss, sums);
      if (job.gradient) spread<Needs>(job, row, rows, extreme, loss.gradient, rest.moments.m);
    }
  }
  delete[] memory;
}

}  // namespace
}  // namespace FSL_ISA
}  // namespace fastsoftloss
