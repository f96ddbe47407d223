// Dual numbers: a value and its derivative along a direction v. What finish makes of them is a gradient and its derivative.
//
// A logit is {z_j, v_j}. The loops take moments about an m that stays where it is, with a tangent of 0, so that x_j's is v_j; with()
// gives one that moves with its class, and merge and margin take both.
// A penalty is written once, in row_loss.h: nothing here knows of it. T is float or double, or a vector of them.
#pragma once

#include "row_loss.h"

namespace fastsoftloss {

template <class T>
struct Dual {
  T value, tangent;

  Dual() = default;
  FSL_FN Dual(T value, T tangent) : value(value), tangent(tangent) {}
  template <class Real>
  FSL_FN explicit Dual(Real constant) : value(constant), tangent(0) {}
};
template <class T>
struct Limits<Dual<T>> : Limits<T> {};

template <class T>
FSL_FN Dual<T> operator+(const Dual<T>& a, const Dual<T>& b) {
  return {a.value + b.value, a.tangent + b.tangent};
}
template <class T>
FSL_FN Dual<T> operator-(const Dual<T>& a, const Dual<T>& b) {
  return {a.value - b.value, a.tangent - b.tangent};
}
template <class T>
FSL_FN Dual<T> operator*(const Dual<T>& a, const Dual<T>& b) {
  return {a.value * b.value, a.tangent * b.value + a.value * b.tangent};
}
template <class T>
FSL_FN Dual<T> operator/(const Dual<T>& a, const Dual<T>& b) {
  const T ratio = a.value / b.value;
  return {ratio, (a.tangent - ratio * b.tangent) / b.value};
}

template <class T>
FSL_FN auto operator<(const Dual<T>& a, const Dual<T>& b) {
  return a.value < b.value;
}
template <class T>
FSL_FN auto operator>(const Dual<T>& a, const Dual<T>& b) {
  return a.value > b.value;
}
template <class T>
FSL_FN auto operator==(const Dual<T>& a, const Dual<T>& b) {
  return a.value == b.value;
}
template <class T>
FSL_FN auto operator!=(const Dual<T>& a, const Dual<T>& b) {
  return a.value != b.value;
}

template <class C, class T>
FSL_FN Dual<T> select(const C& c, const Dual<T>& a, const Dual<T>& b) {
  return {select(c, a.value, b.value), select(c, a.tangent, b.tangent)};
}
template <class T>
FSL_FN Dual<T> max(const Dual<T>& a, const Dual<T>& b) {
  return {max(a.value, b.value), select(a < b, b.tangent, a.tangent)};
}
template <class T>
FSL_FN Dual<T> exp(const Dual<T>& a) {
  const T e = exp(a.value);
  return {e, e * a.tangent};
}
template <class T>
FSL_FN Dual<T> log(const Dual<T>& a) {
  return {log(a.value), a.tangent / a.value};
}
template <class T>
FSL_FN Dual<T> inverse(const Dual<T>& a) {
  const T i = inverse(a.value);
  return {i, T(0) - a.tangent * i * i};
}

// The margin's own derivatives, in what the margin is made of: s' = s p delta', and nothing cancels where s or p is near 0.
template <class T>
FSL_FN Margin<Dual<T>> margin(const RowMoments<Dual<T>>& r, const Dual<T>& z_y) {
  RowMoments<T> values;
  values.n = r.n.value, values.m = r.m.value, values.s1 = r.s1.value;
  const Margin<T> y = margin(values, z_y.value);
  const T zero(0), mean = r.s1.tangent * y.inv_s1;          // of v over the complement, by the softmax
  const T d = r.m.tangent - z_y.tangent, delta = d + mean;  // the margin is d + log s1
  const T slope = y.s * y.p * delta;                        // of s, and of p downwards
  const T log_both = select(y.d > zero, y.s * mean - y.p * d, y.s * delta);
  return {{y.s, slope}, {y.p, zero - slope}, {y.ce, y.s * delta}, {y.d, d}, {y.log_both, log_both}, {y.inv_s1, zero - mean * y.inv_s1}};
}

// The derivatives alone, times a factor.
template <class T>
FSL_FN RowGradient<T> tangents(const RowGradient<Dual<T>>& g, T factor) {
  RowGradient<T> r;
  r.a = factor * g.a.tangent, r.b = factor * g.b.tangent, r.t = factor * g.t.tangent;
  r.e0 = factor * g.e0.tangent, r.e1 = factor * g.e1.tangent, r.ew = factor * g.ew.tangent;
  r.masked = factor * g.masked.tangent, r.label = factor * g.label.tangent, r.other = factor * g.other.tangent;
  return r;
}

// What a class's gradient changes by with its own x, times a factor, as spread takes it.
template <class T>
FSL_FN RowGradient<T> by_own(const RowGradient<Dual<T>>& g, T factor) {
  RowGradient<T> r;
  r.a = factor * (g.a.value + g.t.value), r.b = factor * (T(2) * g.b.value), r.t = factor * g.t.value;
  r.e0 = factor * g.e1.value;
  return r;
}

// <dz, v>, from the same sums: a moment's tangent is what its part of the gradient meets. label, other: v there. masked: the sum of v
// over the classes that are, which label smoothing alone gives a gradient; swx has them already.
template <class T>
FSL_FN T along(const RowGradient<Dual<T>>& g, const RowMoments<Dual<T>>& r, T label, T other, T masked, bool smoothing) {
  const T half(T(0.5)), v = r.n.value * r.mean.tangent;  // v: its sum
  T sum = g.a.value * r.s1.tangent + half * g.b.value * r.s2.tangent + g.t.value * (r.sx.tangent - r.s1.tangent);
  const T squares = select(g.e1.value == T(0), T(0), half * g.e1.value * r.m2.tangent);  // which may be no number where nobody asks
  sum = sum + (squares + (g.e0.value + g.e1.value * r.mean.value) * v) + g.ew.value * r.swx.tangent;
  if (smoothing) sum = sum + g.masked.value * masked;
  return sum + g.label.value * label + g.other.value * other;
}

}  // namespace fastsoftloss
