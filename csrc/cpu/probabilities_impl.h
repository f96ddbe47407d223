// A row whose target is a probability for each class: the loss expected over the label, sum_k u_k loss(k) with u = w t.
//
// D_k leaves class k out. Taken from the sums over the whole row that is a subtraction, which cancels where k is most of a
// sum: of exps only the largest logit is, of squares about the mean only the largest or the smallest. So these two,
// the extremes, stay out of the sums over the rest, their complements are merged from it, and every other class is left out
// of the whole. The penalty's gradient is then that of one RowGradient, the expectation of all, less at class k what k's
// own has no business giving it: a RowGradient covers the complement of k, and the expectation added it everywhere.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace fastsoftloss {
namespace FSL_ISA {
namespace {

template <class T>
struct ProbabilityRow {
  using V = Vec<T>;
  int64_t classes, padded;
  T *z, *u, *exps, *own;  // padded with classes that are not there; own: what a class gets besides the RowGradient
  int64_t extreme[2] = {-1, -1};
  T z_of[2], u_of[2], v_of[2];  // of the extremes: logit, u, and u smoothed

  FSL_FN T smoothed(const Job<T>& job, T u, T w) const {
    return T(1 - job.options.label_smoothing) * u + T(job.options.label_smoothing / job.options.classes) * w;
  }

  // Read the row, and take the extremes out: the smallest only where a moment can be most of it. Returns false where NaN or
  // +inf, or no class at all, make all of it NaN.
  template <unsigned Needs>
  FSL_LOOP bool read(const Job<T>& job, const Row<T>& row) {
    gather(row.logits, job.storage, job.logits_step, z);
    gather(row.probabilities, job.target_storage, job.target_step, u);
    for (int64_t i = classes; i < padded; ++i) z[i] = -Limits<T>::infinity(), u[i] = 0;
    if (job.class_weight)
      for (int64_t i = 0; i < classes; ++i) u[i] *= job.class_weight[i];
    const V inf(Limits<T>::infinity());
    V most = V(0) - inf, least = inf, bad(0), first(0), last(0);  // with the vector of the first largest and the last smallest
    for (int64_t i = 0; i < padded; i += V::kLanes) {
      const V zi = V::load(z + i), at(T(i / V::kLanes));
      first = select(most < zi, at, first);
      most = max(zi, most);
      if (Needs & kLogits) {
        const V present = select(zi == V(0) - inf, inf, zi);
        const auto above = least < present;
        last = select(above, last, at);
        least = select(above, least, present);
      }
      bad = bad + select(zi == zi, V(0), V(1));
    }
    const T top = maximum(most), bottom = -maximum(V(0) - least);
    if (sum(bad) > 0 || !(top < Limits<T>::infinity()) || top == -Limits<T>::infinity()) return false;
    T lanes[4][V::kLanes];
    most.store(lanes[0]), first.store(lanes[1]), least.store(lanes[2]), last.store(lanes[3]);
    extreme[0] = padded, extreme[1] = -1;
    for (int lane = 0; lane < V::kLanes; ++lane) {
      const int64_t f = int64_t(lanes[1][lane]) * V::kLanes + lane, l = int64_t(lanes[3][lane]) * V::kLanes + lane;
      if (lanes[0][lane] == top && f < extreme[0]) extreme[0] = f;
      if (Needs & kLogits && lanes[2][lane] == bottom && l > extreme[1]) extreme[1] = l;
    }
    const int found = extreme[1] < 0 || extreme[0] == extreme[1] ? 1 : 2;
    z_of[1] = -Limits<T>::infinity(), u_of[1] = v_of[1] = 0;
    for (int i = 0; i < found; ++i) {
      const int64_t k = extreme[i];
      z_of[i] = z[k], u_of[i] = u[k], v_of[i] = smoothed(job, u[k], job.class_weight ? job.class_weight[k] : T(1));
    }
    for (int i = 0; i < found; ++i) z[extreme[i]] = -Limits<T>::infinity(), u[extreme[i]] = 0;
    if (found == 1) extreme[1] = -1;
    return true;
  }

 private:
  FSL_FN void gather(const char* from, Storage storage, int64_t step, T* to) const {
    if (step == bytes_of(storage)) return load_contiguous(from, storage, classes, to);
    for (int64_t i = 0; i < classes; ++i) to[i] = load_one<T>(from + i * step, storage);
  }
};

// The moments of the rest, and the sums over the labels that cross-entropy wants.
template <class T>
struct Rest {
  RowMoments<T> moments;
  T u, v, vx, v_masked;  // sums of u, of v, of v (m - z), and of v over the classes that are masked
};

template <class T, unsigned Needs>
FSL_LOOP Rest<T> reduce(const Job<T>& job, const ProbabilityRow<T>& row, const Row<T>& next) {
  using V = Vec<T>;
  Accumulator<T, Needs> acc;
  for (int64_t i = 0; i < row.padded; i += V::kLanes) acc.look(V::load(row.z + i));
  const T n = sum(acc.n), m = maximum(acc.m);
  const T at = m == -Limits<T>::infinity() ? T(0) : m;
  const T shift = Needs & kLogits ? sum(acc.total) / max(n, T(1)) - at : T(0);
  acc.shift = V(shift);
  const bool smooth = job.options.label_smoothing != 0;
  V u(0), v(0), vx(0), v_masked(0);
  for (int64_t i = 0; i < row.padded; i += V::kLanes) {
    const V zi = V::load(row.z + i), ui = V::load(row.u + i);
    __builtin_prefetch(next.logits + i * sizeof(T));
    __builtin_prefetch(next.probabilities + i * sizeof(T));
    acc.add(zi, V(at), ui).store(row.exps + i);
    V vi = ui;
    if (smooth) {
      V w(1);
      if (job.class_weight || i + V::kLanes > row.classes) {
        T weight[V::kLanes] = {};
        for (int l = 0; l < V::kLanes && i + l < row.classes; ++l) weight[l] = job.class_weight ? job.class_weight[i + l] : T(1);
        w = V::load(weight);
      }
      vi = V(T(1 - job.options.label_smoothing)) * ui + V(T(job.options.label_smoothing / job.options.classes)) * w;
      for (int64_t k : row.extreme)
        if (k >= i && k < i + V::kLanes) {
          T lanes[V::kLanes];
          vi.store(lanes);
          lanes[k - i] = 0;
          vi = V::load(lanes);
        }
    }
    const auto there = zi > V(-Limits<T>::infinity());
    u = u + ui;
    v = v + vi;
    vx = vx + select(there, vi * (V(at) - zi), V(0));
    v_masked = v_masked + select(there, V(0), vi);
    (V(0) - vi).store(row.own + i);
  }
  return {moments<Needs>(acc, n, m, shift, [](V lanes) { return sum(lanes); }), sum(u), sum(v), sum(vx), sum(v_masked)};
}

// The moments of all classes, about their largest, less one of them that is no extreme.
template <unsigned Needs, class T, class V>
FSL_FN RowMoments<V> without(const RowMoments<T>& all, V x, V e) {
  RowMoments<V> r;
  r.n = V(all.n - T(1));
  r.m = V(all.m);
  r.s1 = V(all.s1) - e;
  if (Needs & kSquares) r.s2 = V(all.s2) - e * e;
  if (Needs & kEntropy) r.sx = V(all.sx) - e * x;
  if (Needs & kLogits) {
    const V d = x - V(all.mean);
    r.mean = V(all.mean) - d * V(T(1) / max(all.n - T(1), T(1)));
    r.m2 = V(all.m2) - d * d * V(all.n / max(all.n - T(1), T(1)));
  }
  return r;
}

// The penalty expected over the labels that are no extremes: its value, and the RowGradient about all.m. What a class must
// not get of it goes to `own`. By value, and the penalty known: whatever no class changes is computed once.
template <class T, Diversity D>
FSL_LOOP Penalty<T> expected(LossOptions o, const ProbabilityRow<T>& row, RowMoments<T> all, T rest_m) {
  using V = Vec<T>;
  constexpr unsigned kNeeds = moments_of(D);
  constexpr bool kUsesA = D != Diversity::logit_variance;
  o.diversity = D;
  const T down = rest_m == -Limits<T>::infinity() ? T(0) : rest_m - all.m;
  const V f(exp(max(down, T(-1000)))), inv_s1(T(1) / all.s1), zero(0), m(all.m), masked(-Limits<T>::infinity());
  const T *const zs = row.z, *const us = row.u, *const exps = row.exps;
  T* const own = row.own;
  V value(0), a(0), b(0), t(0), e0(0), e1(0);
  for (int64_t i = 0; i < row.padded; i += V::kLanes) {
    uint64_t words[8], any = 0;
    memcpy(words, us + i, 64);
    for (uint64_t word : words) any |= word;
    if (!any) continue;  // labels are often few
    const V z = V::load(zs + i);
    const auto there = z > masked;
    const V u = select(there, V::load(us + i), zero), x = select(there, z - m, zero), e = select(there, f * V::load(exps + i), zero);
    const auto rest = without<kNeeds>(all, x, e);
    const V p = e * inv_s1;
    const Penalty<V> d = penalty_of(rest, rest.s1 * inv_s1, p, o);
    const RowGradient<V>& g = d.gradient;
    value = value + u * d.value;
    V here(0);
    if (kUsesA) {
      V factor = g.a;
      a = a + u * g.a;
      if (kNeeds & kSquares) b = b + u * g.b, factor = factor + g.b * e;
      if (kNeeds & kEntropy) t = t + u * g.t, factor = factor + g.t * x;
      here = e * factor;
    }
    if (kNeeds & kLogits) {
      e0 = e0 + u * g.e0;
      here = here + g.e0;
      if (!kUsesA) e1 = e1 + u * g.e1, here = here + g.e1 * x;
    }
    if (D == Diversity::variance) here = here - g.label;
    (V::load(own + i) - u * here).store(own + i);
  }
  Penalty<T> out;
  out.value = sum(value);
  out.gradient.a = sum(a), out.gradient.b = sum(b), out.gradient.t = sum(t);
  out.gradient.e0 = sum(e0), out.gradient.e1 = sum(e1);
  return out;
}

template <class T>
FSL_FN Penalty<T> expected(const LossOptions& o, const ProbabilityRow<T>& row, const RowMoments<T>& all, T rest_m) {
  switch (o.diversity) {
    case Diversity::logit_variance:
      return expected<T, Diversity::logit_variance>(o, row, all, rest_m);
    case Diversity::kl:
      return expected<T, Diversity::kl>(o, row, all, rest_m);
    case Diversity::reverse_kl:
      return expected<T, Diversity::reverse_kl>(o, row, all, rest_m);
    case Diversity::chi2:
      return expected<T, Diversity::chi2>(o, row, all, rest_m);
    case Diversity::variance:
      return expected<T, Diversity::variance>(o, row, all, rest_m);
    default:
      return {};
  }
}

template <class T, unsigned Needs>
FSL_LOOP RowLoss<T> finish(const Job<T>& job, const ProbabilityRow<T>& row, const Rest<T>& rest, const Row<T>& at) {
  const LossOptions& o = job.options;
  const auto &r = rest.moments, high = alone(row.z_of[0], T(0)), low = alone(row.z_of[1], T(0));
  const RowMoments<T> complement[2] = {merge<Needs>(r, low), merge<Needs>(r, high)};
  const RowMoments<T> all = merge<Needs>(complement[0], high);
  const Margin<T> top = margin(complement[0], row.z_of[0]), bottom = margin(complement[1], row.z_of[1]);
  const T step = r.n > T(0) ? r.m - row.z_of[0] : T(0), to_low = row.extreme[1] < 0 ? T(0) : row.z_of[0] - row.z_of[1];

  const T v_others = rest.v + row.v_of[1], v = v_others + row.v_of[0], u = rest.u + row.u_of[0] + row.u_of[1];
  const T lse = row.z_of[0] + top.ce, slope = T(2 * o.z_loss) * u * lse;
  // sum of v_k (lse - z_k), each term positive where v is
  T ce = v * top.ce + (rest.vx - (rest.v - rest.v_masked) * step) + row.v_of[1] * to_low;
  if (rest.v_masked != T(0)) ce = Limits<T>::infinity();

  RowGradient<T> g;  // about r.m
  g.a = (v + slope) * exp(max(step, T(-1000))) / all.s1;
  T dz[2] = {v_others - v * top.s + slope * top.p, (v + slope) * bottom.p - row.v_of[1]};
  T penalty(0);
  if (o.diversity != Diversity::none && all.n > T(2)) {
    const Penalty<T> most = expected(o, row, all, r.m);
    penalty = most.value;
    add(g, T(1), about(most.gradient, step));
    for (int i = 0; i < 2; ++i) {
      const Margin<T>& margin = i ? bottom : top;
      const Penalty<T> d = penalty_of(complement[i], margin.s, margin.p, o);
      penalty += row.u_of[i] * d.value;
      if (r.n > T(0)) add(g, row.u_of[i], about(d.gradient, r.m - complement[i].m));
      dz[i] += row.u_of[i] * d.gradient.label + slope_at(most.gradient, row.z_of[i] - all.m, T(0));
      dz[1 - i] += row.u_of[i] * slope_at(d.gradient, row.z_of[1 - i] - complement[i].m, T(0));
    }
  }
  // a RowGradient says what a complement's class gets: the extremes, left out above, have theirs beside it
  g.label = dz[0], g.other = dz[1];

  RowLoss<T> out;
  const T scale = at.scale * at.row_weight;
  out.loss = ce;
  if (o.diversity_weight != 0) out.loss += T(o.diversity_weight) * penalty;
  if (o.z_loss != 0) out.loss += T(o.z_loss) * u * lse * lse;
  out.loss *= at.row_weight, out.cross_entropy = ce * at.row_weight, out.diversity = penalty * at.row_weight;
  add(out.gradient, scale, g);
  return out;
}

template <class T>
FSL_FN void write(const Job<T>& job, const Row<T>& at, const T* dz) {
  if (job.gradient_step == bytes_of(job.storage)) return store_contiguous(dz, job.storage, job.classes, at.gradient);
  for (int64_t k = 0; k < job.classes; ++k) store_one(dz[k], job.storage, at.gradient + k * job.gradient_step);
}

// spread: where it belongs, or into `own` and from there.
template <class T, unsigned Needs>
FSL_LOOP void spread(const Job<T>& job, const Row<T>& at, const ProbabilityRow<T>& row, const RowGradient<T>& g, T m) {
  using V = Vec<T>;
  const RowGradient<V> lanes = broadcast(g);
  const V base(m), scale(at.scale * at.row_weight);
  const bool direct = holds<T>(job.storage) && job.gradient_step == int64_t(sizeof(T));
  T* const out = direct ? reinterpret_cast<T*>(at.gradient) : row.own;
  for (int64_t i = 0; i < row.padded; i += V::kLanes) {
    const V z = V::load(row.z + i);
    const V dz = slope<Needs>(lanes, z, z - base, V::load(row.exps + i), V(0)) + scale * V::load(row.own + i);
    if (!direct || i + V::kLanes <= row.classes) {
      dz.store(out + i);
    } else {
      T tail[V::kLanes];
      dz.store(tail);
      memcpy(out + i, tail, (row.classes - i) * sizeof(T));
    }
  }
  for (int i = 0; i < 2; ++i)
    if (row.extreme[i] >= 0) out[row.extreme[i]] = i ? g.other : g.label;
  if (!direct) write(job, at, out);
}

template <class T, unsigned Needs>
void probabilities(const Job<T>& job, int64_t begin, int64_t end, LossSums<T>* sums) {
  ProbabilityRow<T> row;
  row.classes = job.classes;
  row.padded = (job.classes + Vec<T>::kLanes - 1) / Vec<T>::kLanes * Vec<T>::kLanes;
  T* const memory = new T[4 * row.padded];
  row.z = memory, row.u = memory + row.padded, row.exps = memory + 2 * row.padded, row.own = memory + 3 * row.padded;
  for (int64_t r = begin; r < end; ++r) {
    const Row<T> at = locate(job, r);
    if (!row.template read<Needs>(job, at)) {
      const T nan = Limits<T>::quiet_NaN();
      record(job, r, RowLoss<T>{nan, nan, nan, {}}, sums);
      for (int64_t k = 0; k < job.classes; ++k) row.own[k] = nan;
      if (job.gradient) write(job, at, row.own);
    } else {
      const Rest<T> rest = reduce<T, Needs>(job, row, locate(job, r + 1 < end ? r + 1 : r));
      const RowLoss<T> loss = finish<T, Needs>(job, row, rest, at);
      record(job, r, loss, sums);
      if (job.gradient) spread<T, Needs>(job, at, row, loss.gradient, rest.moments.m);
    }
  }
  delete[] memory;
}

}  // namespace
}  // namespace FSL_ISA
}  // namespace fastsoftloss
