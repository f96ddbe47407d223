// finish: a row's moments and the options -> its loss, its parts, and the few scalars that its gradient is made of.
//
// Every feature of the loss lives here: a penalty is one case of the switch, with the moments it asks for beside it.
// Source of the penalty: arXiv:2303.12363. No torch header: CPU, CUDA and the tests take this file alone.
#pragma once

#include "row_moments.h"

namespace fastsoftloss {

// The order of DIVERSITIES in fastsoftloss/ops.py.
enum class Diversity : int { none, logit_variance, kl, reverse_kl, chi2, variance };

template <class Real>
struct Options {
  Diversity diversity = Diversity::none;
  Real diversity_weight = 0;
  Real label_smoothing = 0;
  Real z_loss = 0;
  Real classes = 0;           // K
  Real class_weight_sum = 0;  // over all K classes; K where there are no class weights
  bool class_weights = false;
};
using LossOptions = Options<double>;

// dz_j = e_j (a + b e_j + t x_j) + e0 + e1 x_j + ew w_j for j in the complement, with e_j and x_j as in RowMoments;
// the true class gets `label`, a mixture's second one `other`, a class masked with -inf gets `masked` + ew w_j.
template <class T>
struct RowGradient {
  T a = T(0), b = T(0), t = T(0), e0 = T(0), e1 = T(0), ew = T(0), masked = T(0), label = T(0), other = T(0);
};

// g += factor times h, label by label; both about the same m.
template <class T>
FSL_FN void add(RowGradient<T>& g, T factor, const RowGradient<T>& h) {
  g.a = g.a + factor * h.a, g.b = g.b + factor * h.b, g.t = g.t + factor * h.t;
  g.e0 = g.e0 + factor * h.e0, g.e1 = g.e1 + factor * h.e1, g.ew = g.ew + factor * h.ew;
  g.masked = g.masked + factor * h.masked, g.label = g.label + factor * h.label, g.other = g.other + factor * h.other;
}

// The same gradient about another m, lower by -down: e = e' e_down, the exp of it, and x = x' + down.
template <unsigned Needs, class T>
FSL_FN RowGradient<T> about(RowGradient<T> g, T down, T e_down) {
  if (Needs & kEntropy) g.a = g.a + g.t * max(down, T(-1000));  // e_down is 0 there, and 0 * -inf must not appear
  g.a = e_down * g.a;
  if (Needs & kSquares) g.b = e_down * e_down * g.b;
  if (Needs & kEntropy) g.t = e_down * g.t;
  if (Needs & kLogits) g.e0 = g.e0 + g.e1 * down;
  return g;
}

// What the gradient gives one class of the complement, or one masked with z = -inf.
template <unsigned Needs, class T>
FSL_FN T slope_at(const RowGradient<T>& g, T z, T x, T e, T w) {
  T factor = g.a;
  if (Needs & kSquares) factor = factor + g.b * e;
  if (Needs & kEntropy) factor = factor + g.t * x;
  T dz = e * factor;
  if (Needs & kLogits) dz = dz + (g.e0 + g.e1 * x);
  dz = select(z == T(-Limits<T>::infinity()), g.masked, dz);
  return Needs & kWeighted ? dz + g.ew * w : dz;
}

template <class T>
struct RowLoss {
  T loss, cross_entropy, diversity;
  RowGradient<T> gradient;
};

FSL_FN constexpr unsigned moments_of(Diversity d) {
  return d == Diversity::logit_variance || d == Diversity::reverse_kl ? kLogits
         : d == Diversity::kl                                         ? kEntropy
         : d == Diversity::chi2 || d == Diversity::variance           ? kSquares
                                                                      : kBase;
}

template <class Real>
FSL_FN unsigned moments_of(const Options<Real>& o) {
  const unsigned smoothing = o.label_smoothing == 0 ? kBase : o.class_weights ? kWeighted : kLogits;
  return moments_of(o.diversity) | smoothing;
}

// How a class stands against its complement.
template <class T>
struct Margin {
  T s, p;         // 1 - p_y, p_y
  T ce;           // -log p_y
  T d, log_both;  // m - z_y, of which the sign is asked; log(others + own), what lse has over the larger of the two, see margin()
  T inv_s1;       // 1 / s1, where there is a complement

  FSL_FN T lift() const { return log_both + max(T(0) - d, T(0)); }  // lse - m
};

// m is no more than a little above the largest logit, so that s1 is no less than about 1, and s1^2 is a number.
template <class T>
FSL_FN Margin<T> margin(const RowMoments<T>& r, T z_y) {
  const T zero(0), one(1);
  const auto some = r.n > zero;
  // without a class s1 is 0, or NaN where the only classes were: that must not be replaced
  const T s1 = r.s1 + select(some, zero, one);

  // The margin is delta = d + log s1, its odds are others : own = exp(d) s1 : 1, or s1 : exp(-d) where d > 0: no logarithm is
  // rounded on the way, the rounding of d is put back (two-sum), and exp(-|d|/2) is applied twice, since s1 may lift what
  // exp(d) would flush to 0. One reciprocal gives all.
  const T d = r.m - z_y;
  const T z_back = d - r.m, lost = (r.m - (d - z_back)) - (z_y + z_back);
  const auto wrong = d > zero;
  T rest;
  const T h = exp_but(abs(d) * T(-0.5), rest);
  const T tilt = select(abs(lost) < one, select(wrong, zero - lost, lost) + rest + rest, zero);  // NaN where a logit is infinite
  const T h_back = h + h * tilt;
  const T others = select(wrong, s1, h * s1 * h_back), own = select(wrong, h * h_back, one);
  const T both = others + own, inv_both = inverse(s1 * both), share = s1 * inv_both;
  Margin<T> out;
  out.inv_s1 = both * inv_both;
  out.s = others * share;
  out.p = own * share;
  const T v = select(wrong, one, others);  // where it is near 0, 1 + v has lost it
  out.d = d;
  out.log_both = log_of_sum(both, v);
  out.ce = out.log_both + select(wrong, d, zero);  // softplus(delta)
  return out;
}

template <class T>
struct Penalty {
  T value = T(0), cost = T(0);  // cost: diversity_weight times the value
  RowGradient<T> gradient;      // of the cost, times a factor
};

// D of the complement r of a class that stands against it as y says.
template <class T, class Real>
FSL_FN Penalty<T> penalty_of(const RowMoments<T>& r, const Margin<T>& y, T factor, const Options<Real>& o) {
  const T zero(0), one(1);
  Penalty<T> out;
  T& penalty = out.value;
  RowGradient<T>& g = out.gradient;
  if (o.diversity == Diversity::none) return out;
  const T n = max(r.n, one), inv_n = inverse(n), inv_s1 = y.inv_s1, s = y.s, p = y.p;
  const T weight = select(r.n > one, T(o.diversity_weight), zero) * factor;  // one class has no spread
  switch (o.diversity) {
    case Diversity::logit_variance:
      penalty = r.m2 * inv_n;
      g.e1 = weight * inv_n * T(2);
      g.e0 = zero - g.e1 * r.mean;
      break;
    case Diversity::kl: {
      const T mean_x = r.sx * inv_s1;  // log q_j + H = x_j - mean_x
      penalty = mean_x - log(r.s1 * inv_n);
      g.t = weight * inv_s1;
      g.a = zero - g.t * mean_x;
      break;
    }
    case Diversity::reverse_kl:
      penalty = log(r.s1 * inv_n) - r.mean;
      g.a = weight * inv_s1;
      g.e0 = zero - weight * inv_n;
      break;
    case Diversity::chi2: {
      const T q2 = r.s2 * inv_s1 * inv_s1;
      penalty = n * q2 - one;
      g.a = zero - weight * T(2) * n * q2 * inv_s1;
      g.b = weight * T(2) * n * inv_s1 * inv_s1;
      break;
    }
    case Diversity::variance: {
      const T q2 = r.s2 * inv_s1 * inv_s1, v_q = (q2 - inv_n) * inv_n;
      penalty = s * s * v_q;
      g.a = weight * T(2) * s * s * (p * v_q - q2 * inv_n) * inv_s1;
      g.b = weight * T(2) * s * s * inv_n * inv_s1 * inv_s1;
      g.label = zero - weight * T(2) * s * s * p * v_q;
      break;
    }
    case Diversity::none:
      break;
  }
  penalty = select(r.n > one, penalty, zero);
  if (o.diversity_weight == 0) {
    g = RowGradient<T>();  // only looked at: an infinite penalty times 0 must not appear
  } else {
    out.cost = T(o.diversity_weight) * penalty;
  }
  return out;
}

// y: how the true class stands against its complement r. z_y: its logit. class_weight: w_y. row_weight: the row's sample weight.
// scale: what the gradient is multiplied by besides, the upstream gradient over the mean's divisor.
template <class T, class Real>
FSL_FN RowLoss<T> finish(const RowMoments<T>& r, const Margin<T>& y, T z_y, T class_weight, T row_weight, T scale, const Options<Real>& o) {
  const T zero(0), one(1);
  const auto some = r.n > zero;
  const T n = max(r.n, one);
  scale = scale * row_weight;
  const T own = class_weight * scale;

  const Penalty<T> d = penalty_of(r, y, own, o);
  RowGradient<T> g = d.gradient;
  g.masked = zero * scale;

  T ce = class_weight * y.ce, pull = own;  // pull: what multiplies s q_j and -s
  if (o.label_smoothing != 0) {
    const T eps(o.label_smoothing), k = eps / T(o.classes), k_scale = k * scale;
    const T keep = (one - eps) * own;
    const T others = o.class_weights ? r.sw * y.lift() - r.swx : n * (y.lift() - r.mean);  // sum over C of w_j (lse - z_j)
    const T masked = select(r.n < T(o.classes - 1), T(Limits<T>::infinity()), zero);       // -log 0, as PyTorch has it
    ce = (one - eps) * ce + k * (select(some, others, zero) + masked + ce);
    pull = keep + k_scale * T(o.class_weight_sum);
    // d/dz_y of the smooth part is k (W p_y - w_y), written with W p_y = W - W s
    g.label = g.label + k_scale * (T(o.class_weight_sum) * y.p - class_weight) - keep * y.s;
    if (o.class_weights) {
      g.ew = zero - k_scale;
    } else {
      g.e0 = g.e0 - k_scale;
      g.masked = g.masked - k_scale;
    }
  } else {
    g.label = g.label - own * y.s;
  }

  T loss = ce + class_weight * d.cost;
  if (o.z_loss != 0) {
    const T lse = select(y.d > zero, r.m, z_y) + y.log_both, slope = T(2 * o.z_loss) * lse;
    loss = loss + T(o.z_loss) * class_weight * lse * lse;
    pull = pull + slope * own;
    g.label = g.label + slope * own * y.p;
  }
  g.a = g.a + pull * y.s * y.inv_s1;
  return {loss * row_weight, ce * row_weight, class_weight * d.value * row_weight, g};
}

template <class T, class Real>
FSL_FN RowLoss<T> finish(const RowMoments<T>& r, T z_y, T class_weight, T row_weight, T scale, const Options<Real>& o) {
  const Margin<T> y = margin(r, z_y);
  // NaN and +inf poison the whole row, as in PyTorch; +inf in the complement is NaN in s1 already
  const auto bad = (y.ce != y.ce) | (z_y == T(Limits<T>::infinity()));
  return finish(r, y, z_y, class_weight, select(bad, T(Limits<T>::quiet_NaN()), row_weight), scale, o);
}

// One label of a mixture: its loss, with the gradient about the rest's m, and what the other label's class gets of it.
template <class T>
struct MixturePart {
  RowLoss<T> of;
  T other;
};

// From the moments of the classes that are neither label, the rest: what they lack of a label's complement is the other label.
// Not there: an other label of -inf, and none where there is one label alone.
template <unsigned Needs, class T, class Real>
FSL_FN MixturePart<T> finish_part(const RowMoments<T>& rest, T z_y, T z_other, T class_weight, T other_class_weight, T row_weight, T scale,
                                  const Options<Real>& o, bool two = true) {
  if (!two) z_other = T(-Limits<T>::infinity());
  const With<T> complement = with<Needs>(rest, z_other, other_class_weight);
  MixturePart<T> part = {finish(complement.all, z_y, class_weight, row_weight, scale, o), T(0)};
  RowGradient<T>& g = part.of.gradient;
  part.other = slope_at<Needs>(g, z_other, complement.x, complement.e, other_class_weight);
  g = about<Needs>(g, complement.down, complement.e_down);
  return part;
}

// Each part's gradient is linear in the same few things, so their sum is one.
template <class T>
FSL_FN RowLoss<T> sum_of(const MixturePart<T>& first, const MixturePart<T>& second) {
  const RowLoss<T>&a = first.of, &b = second.of;
  RowLoss<T> out = {a.loss + b.loss, a.cross_entropy + b.cross_entropy, a.diversity + b.diversity, a.gradient};
  add(out.gradient, T(1), b.gradient);
  out.gradient.label = a.gradient.label + second.other, out.gradient.other = b.gradient.label + first.other;
  return out;
}

// A mixture of two labels that are not the same class. labels: 1 where the second one is not there.
template <unsigned Needs, class T, class Real>
FSL_FN RowLoss<T> finish_mixture(const RowMoments<T>& rest, const T (&z)[2], const T (&class_weight)[2], const T (&row_weight)[2], T scale,
                                 const Options<Real>& o, int labels = 2) {
  RowLoss<T> out = {T(0), T(0), T(0), {}};
  T own[2] = {T(0), T(0)};
  FSL_ROLLED for (int i = 0; i < labels; ++i) {
    const bool first = i == 0;
    const MixturePart<T> part =
        finish_part<Needs>(rest, first ? z[0] : z[1], first ? z[1] : z[0], first ? class_weight[0] : class_weight[1],
                           first ? class_weight[1] : class_weight[0], first ? row_weight[0] : row_weight[1], scale, o, labels == 2);
    out.loss = out.loss + part.of.loss, out.cross_entropy = out.cross_entropy + part.of.cross_entropy;
    out.diversity = out.diversity + part.of.diversity;
    add(out.gradient, T(1), part.of.gradient);
    own[0] = own[0] + (first ? part.of.gradient.label : part.other);
    own[1] = own[1] + (first ? part.other : part.of.gradient.label);
  }
  out.gradient.label = own[0], out.gradient.other = own[1];
  return out;
}

}  // namespace fastsoftloss
