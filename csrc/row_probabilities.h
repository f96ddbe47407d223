// finish, of a row whose target is a probability for each class: the loss expected over the label, sum_k u_k loss(k) with u = w t.
//
// D_k leaves class k out. Taken from the sums over the whole row that is a subtraction, which cancels where k is most of a
// sum: of exps only the largest logit is, of squares about the mean only the largest or the smallest. So these two,
// the extremes, stay out of the sums over the rest, their complements are merged from it, and every other class is left out
// of the whole. The penalty's gradient is then that of one RowGradient, the expectation of all, less at class k what k's
// own has no business giving it: a RowGradient covers the complement of k, and the expectation added it everywhere.
// Of logit_variance all this is polynomial in a class's distance from the mean, and three sums over the labels give it.
//
// No torch header: CPU and CUDA take this file alone. U is the type of what a row has one of, V that of what a class has.
#pragma once

#include "row_loss.h"

namespace fastsoftloss {

template <class U>
struct Extremes {
  U weight, scale;              // of the row, NaN where +inf, or no class at all, make all of it NaN
  U z_of[2], u_of[2], v_of[2];  // of the extremes, the largest and the smallest: logit, u, and u smoothed
};

// The moments of the rest, and the sums over its labels that cross-entropy and logit_variance want.
template <class U>
struct Rest {
  RowMoments<U> moments;
  U u, v, vx;                           // sums of u, of v, and of v (m - z), where 0 log 0 is 0 and log 0 is -inf
  U shift{0}, there{0}, ud{0}, udd{0};  // about shift, an offset from m: sums of u, u d and u d^2 over the classes that are there
};

// The moments of all classes, and of each extreme's complement, the rest with the other one.
template <class U>
struct Whole {
  With<U> complement[2], row;

  // From the largest logit to the rest's m, and exp of it.
  FSL_FN U step() const { return complement[1].down; }
  FSL_FN U e_step() const { return complement[1].e_down; }
};
template <unsigned Needs, class U>
FSL_FN Whole<U> whole_row(const Extremes<U>& ends, const RowMoments<U>& rest) {
  Whole<U> r = {{with<Needs>(rest, ends.z_of[1], U(0)), with<Needs>(rest, ends.z_of[0], U(0))}, {}};
  r.row = with<Needs>(r.complement[0].all, ends.z_of[0], U(0));
  return r;
}

// The moments of all classes, about their largest, less one of them that is no extreme.
template <unsigned Needs, class U, class V>
FSL_FN RowMoments<V> without(const RowMoments<U>& all, V x, V e) {
  RowMoments<V> r;
  const U left = max(all.n - U(1), U(1));
  r.n = V(all.n - U(1));
  r.m = V(all.m);
  r.s1 = V(all.s1) - e;
  if (Needs & kSquares) r.s2 = V(all.s2) - e * e;
  if (Needs & kEntropy) r.sx = V(all.sx) - e * x;
  if (Needs & kLogits) {
    const V d = x - V(all.mean);
    r.mean = V(all.mean) - d * V(U(1) / left);
    r.m2 = V(all.m2) - d * d * V(all.n / left);
  }
  return r;
}

// What a class gets of logit_variance besides the RowGradient is -u_k times `pull` (x_k - centre), x from the rest's m.
template <class U>
struct Own {
  U pull{0}, centre{0};
};

// logit_variance expected over the labels that are no extremes: its value, and the RowGradient about the largest logit.
template <class U, class Real>
FSL_FN Penalty<U> expected_variance(const Options<Real>& o, const Rest<U>& rest, const Whole<U>& whole, Own<U>& own) {
  const RowMoments<U>& all = whole.row.all;
  const U one(1), left = max(all.n - one, one), inv = one / left, stretch = all.n * inv;
  const U off = all.mean - (rest.shift + whole.step());
  const U ud = rest.ud - off * rest.there, udd = rest.udd - off * (rest.ud + ud);  // about the mean of all
  const U weight = select(left > one, U(2 * o.diversity_weight) * inv, U(0));      // one class has no spread
  Penalty<U> out;
  out.value = select(left > one, (all.m2 * rest.there - stretch * udd) * inv, U(0));
  if (o.diversity_weight == 0) return out;
  out.gradient.e1 = weight * rest.there;
  out.gradient.e0 = weight * (ud * inv - rest.there * all.mean);
  own.pull = weight * stretch, own.centre = rest.shift + off;
  return out;
}

// What another penalty of one class that is no extreme adds to the expectation: to `sum` its value, and the RowGradient about all.m;
// returned, times u, what the class itself must not get of it. o.diversity is D; x and e about all.m; inv_s1 of all.s1.
template <Diversity D, class U, class V, class Real>
FSL_FN V expect(const Options<Real>& o, const RowMoments<U>& all, V inv_s1, V x, V e, V u, Penalty<V>& sum) {
  constexpr unsigned kNeeds = moments_of(D);
  const V zero(0), one(1);
  const auto rest = without<kNeeds>(all, x, e);
  const V p = e * inv_s1;
  const Margin<V> y{rest.s1 * inv_s1, p, zero, zero, zero, inverse(rest.s1 + select(rest.n > zero, zero, one))};
  const Penalty<V> d = penalty_of(rest, y, one, o);
  const RowGradient<V>& g = d.gradient;
  sum.value = sum.value + u * d.value;
  V factor = g.a;
  sum.gradient.a = sum.gradient.a + u * g.a;
  if (kNeeds & kSquares) sum.gradient.b = sum.gradient.b + u * g.b, factor = factor + g.b * e;
  if (kNeeds & kEntropy) sum.gradient.t = sum.gradient.t + u * g.t, factor = factor + g.t * x;
  V here = e * factor;
  if (kNeeds & kLogits) sum.gradient.e0 = sum.gradient.e0 + u * g.e0, here = here + g.e0;
  if (D == Diversity::variance) here = here - g.label;
  return u * here;
}

// expected: what `expect` has summed over the rest. The gradient is about the rest's m, with the extremes' own elements beside
// it: `label` the largest's, `other` the smallest's.
template <unsigned Needs, class U, class Real>
FSL_FN RowLoss<U> finish(const Extremes<U>& ends, const Rest<U>& rest, const Whole<U>& whole, const Penalty<U>& expected,
                         const Options<Real>& o) {
  const U zero(0), one(1), masked(-Limits<U>::infinity());
  const RowMoments<U>& r = rest.moments;
  const Margin<U> top = margin(whole.complement[0].all, ends.z_of[0]);
  const auto two = ends.z_of[1] > masked;
  const U step = whole.step(), to_low = select(two, ends.z_of[0] - ends.z_of[1], zero);
  // about the largest logit, where the sum over all classes is 1 / top.p
  const U e_low = whole.complement[0].e * whole.row.e_down, p_low = e_low * top.p;

  const U v_others = rest.v + ends.v_of[1], v = v_others + ends.v_of[0], u = rest.u + ends.u_of[0] + ends.u_of[1];
  const U lse = ends.z_of[0] + top.ce, slope = U(2 * o.z_loss) * u * lse;
  // sum of v_k (lse - z_k), each term positive where v is
  const U ce = v * top.ce + (rest.vx - rest.v * step) + ends.v_of[1] * to_low;

  RowGradient<U> g;
  g.a = (v + slope) * whole.e_step() * top.p;
  // the largest's: whichever difference does not cancel
  const U own = select(top.s > U(0.5), v * top.p - ends.v_of[0], v_others - v * top.s);
  U dz[2] = {own + slope * top.p, (v + slope) * p_low - ends.v_of[1]};
  U penalty(0);
  if (o.diversity != Diversity::none) {
    penalty = expected.value;
    add(g, one, about<Needs>(expected.gradient, step, whole.e_step()));
    dz[0] = dz[0] + slope_at<Needs>(expected.gradient, ends.z_of[0], whole.row.x, whole.row.e, zero);
    dz[1] = dz[1] + slope_at<Needs>(expected.gradient, ends.z_of[1], zero - to_low, e_low, zero);
    for (int i = 0; i < 2; ++i) {
      const With<U>& c = whole.complement[i];
      const Margin<U> y = i ? Margin<U>{one - p_low, p_low, zero, zero, zero, inverse(c.all.s1)} : top;
      const Penalty<U> d = penalty_of(c.all, y, one, o);
      penalty = penalty + ends.u_of[i] * d.value;
      add(g, ends.u_of[i], about<Needs>(d.gradient, c.down, c.e_down));
      dz[i] = dz[i] + ends.u_of[i] * d.gradient.label;
      // without a smallest one it is none of a complement
      const U other = select(two, ends.z_of[1 - i], masked);
      dz[1 - i] = dz[1 - i] + ends.u_of[i] * slope_at<Needs>(d.gradient, other, c.x, c.e, zero);
    }
  }
  g.label = dz[0], g.other = dz[1];

  RowLoss<U> out;
  out.loss = ce;
  if (o.diversity_weight != 0) out.loss = out.loss + U(o.diversity_weight) * penalty;
  if (o.z_loss != 0) out.loss = out.loss + U(o.z_loss) * u * lse * lse;
  const U nan = select(r.s1 == r.s1, U(1), U(Limits<U>::quiet_NaN())), weight = nan * ends.weight;  // and a NaN does
  out.loss = out.loss * weight, out.cross_entropy = ce * weight, out.diversity = penalty * weight;
  add(out.gradient, nan * ends.scale, g);
  return out;
}

}  // namespace fastsoftloss
