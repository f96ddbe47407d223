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
  T *z, *u, *exps, *own, *v;  // a vector a step, the last one of a row padded with classes that are not there; v: u smoothed

  static constexpr int kArrays = 5;
  ProbabilityRows(T* memory, int64_t steps, const LossOptions& o)
      : steps(steps),
        z(memory),
        u(memory + steps * V::kLanes),
        exps(memory + 2 * steps * V::kLanes),
        own(memory + 3 * steps * V::kLanes),  // what a class gets of the penalty besides the RowGradient, where it is no polynomial
        v(o.label_smoothing == 0 ? u : memory + 4 * steps * V::kLanes) {}

  // u, read as the probabilities, becomes w t, and v what smoothing makes of it; weight(i): the class weights of a step.
  template <class F>
  FSL_FN void weigh(const Job<T>& job, F weight) {
    const V keep(1 - job.options.label_smoothing), even(job.options.label_smoothing / job.options.classes);
    if (!job.class_weight && v == u) return;
    for (int64_t i = 0; i < steps; ++i) {
      const V w = job.class_weight ? weight(i) : V(1), ui = V::load(u + i * V::kLanes) * w;
      ui.store(u + i * V::kLanes);
      if (v != u) (keep * ui + even * w).store(v + i * V::kLanes);
    }
  }
  // Class `at` of the arrays becomes one that is not there; below 0: none.
  FSL_FN void take_out(int64_t at, T& z_at, T& u_at, T& v_at) {
    z_at = -Limits<T>::infinity(), u_at = v_at = 0;
    if (at < 0) return;
    z_at = z[at], u_at = u[at], v_at = v[at];
    z[at] = -Limits<T>::infinity(), u[at] = v[at] = 0;
  }
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

// Lane by lane: the largest logit and the step of the first one, the smallest and the step of the last; NaN is neither.
template <class T>
struct Ends {
  using V = Vec<T>;
  V most{-Limits<T>::infinity()}, least{Limits<T>::infinity()}, first{0}, last{0};
};

template <bool kBoth, class T>
FSL_LOOP Ends<T> ends(const T* z, int64_t steps) {
  using V = Vec<T>;
  Ends<T> r;
  const V inf(Limits<T>::infinity());
  for (int64_t i = 0; i < steps; ++i) {
    const V zi = V::load(z + i * V::kLanes), at = V(T(i));
    r.first = select(r.most < zi, at, r.first);
    r.most = max(r.most, zi);
    if (kBoth) {
      const V present = select(zi > V(0) - inf, zi, inf);  // neither -inf nor NaN
      const auto above = r.least < present;
      r.last = select(above, r.last, at);
      r.least = select(above, r.least, present);
    }
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
  for (int64_t k = job.classes; k < padded; ++k) to.z[k] = -Limits<T>::infinity(), to.u[k] = 0;
  to.weigh(job, [&](int64_t i) {
    const int64_t from = i * V::kLanes;
    if (from + V::kLanes <= job.classes) return V::load(job.class_weight + from);
    T tail[V::kLanes] = {};
    memcpy(tail, job.class_weight + from, (job.classes - from) * sizeof(T));
    return V::load(tail);
  });
  for (int64_t k = job.classes; k < padded; ++k) to.v[k] = 0;

  const Ends<T> found = ends<kBoth>(to.z, to.steps);
  const T top = maximum(found.most), bottom = -maximum(V(0) - found.least);
  to.weight = row.row_weight, to.scale = row.scale * row.row_weight;
  T lanes[4][V::kLanes];
  found.most.store(lanes[0]), found.first.store(lanes[1]), found.least.store(lanes[2]), found.last.store(lanes[3]);
  extreme[0] = padded, extreme[1] = -1;
  if (top == Limits<T>::infinity() || top == -Limits<T>::infinity()) {
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
  for (int i = 0; i < 2; ++i) to.take_out(extreme[i], to.z_of[i], to.u_of[i], to.v_of[i]);
}

// The same for a tile.
template <bool kBoth, class T>
FSL_LOOP void read(const Tile<T>& tile, ProbabilityRows<T, Vec<T>>& to, Vec<T> (&extreme)[2]) {
  using V = Vec<T>;
  const Job<T>& job = tile.job;
  const int count = int(to.steps);
  tile.load(0, count, reinterpret_cast<T(*)[V::kLanes]>(to.z));
  tile.load(tile.probabilities, job.target_storage, job.target_step, 0, count, reinterpret_cast<T(*)[V::kLanes]>(to.u));

  to.weigh(job, [&](int64_t k) { return V(job.class_weight[k]); });

  const Ends<T> found = ends<kBoth>(to.z, to.steps);
  const V none(-1), inf(Limits<T>::infinity());
  const auto bad = (found.most == inf) | (found.most == V(0) - inf);
  const V poison = select(bad, V(Limits<T>::quiet_NaN()), V(1));
  to.weight = V::load(tile.row_weight) * poison, to.scale = V::load(tile.scale) * to.weight;
  if (sum(select(bad, V(1), V(0))) > 0)
    for (int64_t i = 0; i < to.steps * V::kLanes; i += V::kLanes) select(bad, V(0), V::load(to.z + i)).store(to.z + i);
  extreme[0] = select(bad, V(0), found.first);
  extreme[1] = kBoth ? select(bad | (found.first == found.last), none, found.last) : none;
  for (int i = 0; i < 2; ++i) {
    T class_of[V::kLanes], z[V::kLanes], u[V::kLanes], v[V::kLanes];
    extreme[i].store(class_of);
    for (int lane = 0; lane < V::kLanes; ++lane) {
      const int64_t k = int64_t(class_of[lane]);
      to.take_out(k < 0 ? k : k * V::kLanes + lane, z[lane], u[lane], v[lane]);
    }
    to.z_of[i] = V::load(z), to.u_of[i] = V::load(u), to.v_of[i] = V::load(v);
  }
}

// next: the row or tile to come.
template <unsigned Needs, class T, class U>
FSL_LOOP Rest<U> reduce(const ProbabilityRows<T, U>& rows, const Row<T>& next) {
  using V = Vec<T>;
  Accumulator<T, Needs> acc;
  for (int64_t i = 0; i < rows.steps; ++i) acc.look(V::load(rows.z + i * V::kLanes));
  const U n = joined<U>(acc.n), m = largest<U>(acc.m), from = select(m == U(-Limits<T>::infinity()), U(0), m);
  const U shift = Needs & kLogits ? joined<U>(acc.total) / max(n, U(1)) - from : U(0);
  const V at(from);
  acc.shift = V(shift);
  V u(0), v(0), vx(0), there(0), ud(0), udd(0);
  for (int64_t i = 0; i < rows.steps * V::kLanes; i += V::kLanes) {
    const V zi = V::load(rows.z + i), ui = V::load(rows.u + i), vi = V::load(rows.v + i), x = zi - at;
    constexpr int kInto = std::is_same_v<U, T> ? 3 : 2;  // the first cache holds a row and the next one, but not two tiles
    __builtin_prefetch(next.logits + i * sizeof(T), 0, kInto);
    __builtin_prefetch(next.probabilities + i * sizeof(T), 0, kInto);
    acc.add(zi, at, ui).store(rows.exps + i);
    u = u + ui;
    v = v + vi;
    vx = vx - select(vi == V(0), V(0), vi * x);
    if (Needs & kLogits) {
      const auto present = zi > V(-Limits<T>::infinity());
      const V d = select(present, x - acc.shift, V(0)), weight = select(present, ui, V(0)), first = weight * d;
      there = there + weight;
      ud = ud + first;
      udd = udd + first * d;
    }
  }
  const auto join = [](V lanes) { return joined<U>(lanes); };
  return {moments<Needs>(acc, n, m, shift, join), join(u), join(v), join(vx), shift, join(there), join(ud), join(udd)};
}

// What no class gets of the RowGradient alone is in `own`.
FSL_FN bool kept(const LossOptions& o) { return o.diversity != Diversity::none && o.diversity != Diversity::logit_variance; }

// The penalty expected over the labels that are no extremes, where it is no polynomial. By value, and the penalty known: whatever no
// class changes is computed once.
template <Diversity D, class T, class U>
FSL_LOOP Penalty<U> expected(LossOptions o, ProbabilityRows<T, U> rows, RowMoments<U> all, U rest_m) {
  using V = Vec<T>;
  o.diversity = D;
  const U down = select(rest_m == U(-Limits<T>::infinity()), U(0), rest_m - all.m);
  const V f(exp(max(down, U(-1000)))), inv_s1(U(1) / all.s1), zero(0), m(all.m), masked(-Limits<T>::infinity());
  Penalty<V> sum;
  for (int64_t i = 0; i < rows.steps * V::kLanes; i += V::kLanes) {
    typedef uint64_t Word __attribute__((may_alias));
    uint64_t any = 0;  // read where they are: a copy of 64 bytes would be waited for
    for (int word = 0; word < 8; ++word) any |= reinterpret_cast<const Word*>(rows.u + i)[word];
    if (!any) {  // labels are often few
      zero.store(rows.own + i);
      continue;
    }
    const V z = V::load(rows.z + i);
    const auto there = z > masked;
    const V u = select(there, V::load(rows.u + i), zero), x = select(there, z - m, zero);
    const V e = select(there, f * V::load(rows.exps + i), zero);
    expect<D>(o, all, inv_s1, x, e, u, sum).store(rows.own + i);
  }
  Penalty<U> out;
  const RowGradient<V>& g = sum.gradient;
  out.value = joined<U>(sum.value);
  out.gradient.a = joined<U>(g.a), out.gradient.b = joined<U>(g.b), out.gradient.t = joined<U>(g.t), out.gradient.e0 = joined<U>(g.e0);
  return out;
}

template <class T, class U>
FSL_FN Penalty<U> expected(const LossOptions& o, const ProbabilityRows<T, U>& rows, const RowMoments<U>& all, U rest_m) {
  switch (o.diversity) {
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
FSL_LOOP RowLoss<U> finish(const LossOptions& o, const ProbabilityRows<T, U>& rows, const Rest<U>& rest, Own<U>& own) {
  const Whole<U> whole = whole_row<kAllMoments, U>(rows, rest.moments);
  const Penalty<U> expectation =
      o.diversity == Diversity::logit_variance ? expected_variance(o, rest, whole, own) : expected(o, rows, whole.row.all, rest.moments.m);
  return finish<kAllMoments, U>(rows, rest, whole, expectation, o);
}

// spread: one step.
template <unsigned Needs, class T>
struct Spread {
  using V = Vec<T>;
  const T *z, *exps, *v, *u, *own;
  RowGradient<V> gradient;
  V m, scale, pull, centre;

  template <class U>
  Spread(const LossOptions& o, const ProbabilityRows<T, U>& rows, const RowGradient<V>& g, const RowMoments<U>& rest, const Own<U>& own)
      : z(rows.z),
        exps(rows.exps),
        v(rows.v),
        u(rows.u),
        own(kept(o) ? rows.own : nullptr),
        gradient(g),
        m(rest.m),
        scale(rows.scale),
        pull(own.pull),
        centre(own.centre) {}
  FSL_FN V at(int64_t i) const {
    const V zi = V::load(z + i), x = zi - m;
    V less = V::load(v + i);
    if (own) less = less + V::load(own + i);
    if ((Needs & kLogits) && !own) less = less + select(zi == V(-Limits<T>::infinity()), V(0), pull * (V::load(u + i) * (x - centre)));
    return slope<Needs>(gradient, zi, x, V::load(exps + i), V(0)) - scale * less;
  }
};

// Where it belongs, or into `exps` and from there.
template <unsigned Needs, class T>
FSL_LOOP void spread(const Job<T>& job, const Row<T>& at, const ProbabilityRows<T, T>& rows, const int64_t (&extreme)[2],
                     const RowGradient<T>& g, const RowMoments<T>& rest, const Own<T>& own) {
  using V = Vec<T>;
  const Spread<Needs, T> spread(job.options, rows, broadcast(g), rest, own);
  const bool direct = holds<T>(job.storage) && job.gradient_step == int64_t(sizeof(T));
  T* const out = direct ? reinterpret_cast<T*>(at.gradient) : rows.exps;
  for (int64_t i = 0; i < rows.steps * V::kLanes; i += V::kLanes) {
    const V dz = spread.at(i);
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
                     const RowMoments<Vec<T>>& rest, const Own<Vec<T>>& own) {
  using V = Vec<T>;
  const Spread<Needs, T> spread(tile.job.options, rows, g, rest, own);
  for (int64_t i = 0; i < rows.steps * V::kLanes; i += V::kLanes) spread.at(i).store(rows.exps + i);
  for (int i = 0; i < 2; ++i) {
    T class_of[V::kLanes], dz[V::kLanes];
    extreme[i].store(class_of), (i ? g.other : g.label).store(dz);
    for (int lane = 0; lane < V::kLanes; ++lane)
      if (class_of[lane] >= 0) rows.exps[int64_t(class_of[lane]) * V::kLanes + lane] = dz[lane];
  }
  tile.store(0, int(rows.steps), reinterpret_cast<const T(*)[V::kLanes]>(rows.exps));
}

template <class T, unsigned Needs>
void probabilities(const Job<T>& job, int64_t begin, int64_t end, LossSums<T>* sums) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  constexpr bool kBoth = (Needs & kLogits) != 0;
  const bool tiles = job.classes <= kTileClasses;
  const int64_t steps = tiles ? job.classes : (job.classes + kLanes - 1) / kLanes;
  T* const memory = new T[ProbabilityRows<T, T>::kArrays * steps * kLanes];
  const int64_t stride = tiles ? kLanes : 1;
  Walk<T> walk(job, begin);
  for (int64_t r = begin; r < end; r += stride) {
    const Row<T> next = locate(job, r + stride < end ? r + stride : r);
    if (tiles) {
      const Tile<T> tile(walk, end - r);
      ProbabilityRows<T, V> rows(memory, steps, job.options);
      V extreme[2];
      read<kBoth>(tile, rows, extreme);
      const auto rest = reduce<Needs>(rows, next);
      Own<V> own;
      const RowLoss<V> loss = finish(job.options, rows, rest, own);
      tile.record(r, loss.loss, loss.cross_entropy, loss.diversity, sums);
      if (job.gradient) spread<Needs>(tile, rows, extreme, loss.gradient, rest.moments, own);
    } else {
      const Row<T> row = locate(job, r);
      ProbabilityRows<T, T> rows(memory, steps, job.options);
      int64_t extreme[2];
      read<kBoth>(job, row, rows, extreme);
      const auto rest = reduce<Needs>(rows, next);
      Own<T> own;
      const RowLoss<T> loss = finish(job.options, rows, rest, own);
      record(job, r, loss, sums);
      if (job.gradient) spread<Needs>(job, row, rows, extreme, loss.gradient, rest.moments, own);
    }
  }
  delete[] memory;
}

}  // namespace
}  // namespace FSL_ISA
}  // namespace fastsoftloss
