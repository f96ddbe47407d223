// reduce: the moments of a row's complement, and how two parts of a row merge into one.
//
// T is float or double, or a vector of them whose lanes are rows; exp, log, max and the like are found beside T.
// No torch header: CPU, CUDA and the tests take this file alone.
#pragma once

#include "scalar_math.h"

namespace fastsoftloss {

// The moments a loss asks for; the others cost nothing.
enum Moments : unsigned {
  kBase = 0,      // n, m, s1: every loss
  kLogits = 1,    // mean, m2
  kSquares = 2,   // s2
  kEntropy = 4,   // sx
  kWeighted = 8,  // sw, swx
  kAllMoments = 15,
};

// Over the complement C of a row, or a part of it, with x_j = z_j - m and e_j = exp(x_j).
template <class T>
struct RowMoments {
  T n = T(0);                       // classes
  T m = T(-Limits<T>::infinity());  // the largest logit
  T s1 = T(0);                      // sum of e
  T s2 = T(0);                      // sum of e^2
  T sx = T(0);                      // sum of e x
  T mean = T(0);                    // mean of x: an offset from m, since at logits of 1e4 a float32 mean has lost 5e-4
  T m2 = T(0);                      // sum of (x - mean)^2
  T sw = T(0);                      // sum of the class weights w
  T swx = T(0);                     // sum of w x
};

// Associative up to rounding; a part without classes is the neutral element.
template <unsigned Needs, class T>
FSL_FN RowMoments<T> merge(const RowMoments<T>& a, const RowMoments<T>& b) {
  RowMoments<T> r;
  r.n = a.n + b.n;
  r.m = max(a.m, b.m);
  // an empty part has m = -inf: no shift, for its sums are 0 and -inf * 0 is not
  const T da = select(a.n > T(0), a.m - r.m, T(0));
  const T db = select(b.n > T(0), b.m - r.m, T(0));
  const T ca = max(da, T(-1000)), cb = max(db, T(-1000));  // exp is 0 there, and 0 * -inf must not appear
  const T ea = exp(ca), eb = exp(cb);
  r.s1 = a.s1 * ea + b.s1 * eb;
  if (Needs & kSquares) r.s2 = a.s2 * (ea * ea) + b.s2 * (eb * eb);
  if (Needs & kEntropy) r.sx = (a.sx + ca * a.s1) * ea + (b.sx + cb * b.s1) * eb;
  if (Needs & kLogits) {  // Chan, Golub, LeVeque (1979)
    const T from = a.mean + da, step = (b.mean + db) - from;
    const T share = b.n / max(r.n, T(1));
    r.mean = from + step * share;
    r.m2 = a.m2 + b.m2 + step * step * (a.n * share);
  }
  if (Needs & kWeighted) {
    r.sw = a.sw + b.sw;
    r.swx = (a.swx + da * a.sw) + (b.swx + db * b.sw);
  }
  return r;
}

// A part of a row and one class besides, z its logit and w its class weight: what merge() gives, at the price of one exp.
template <class T>
struct With {
  RowMoments<T> all;
  T down, e_down;  // from the part's m to that of all, and exp of it
  T x, e;          // the class's, from the m of all; masked, it is not there, and e is 0
};

template <unsigned Needs, class T>
FSL_FN With<T> with(const RowMoments<T>& part, T z, T w) {
  const T zero(0), one(1);
  const auto masked = z == T(-Limits<T>::infinity());
  With<T> r;
  RowMoments<T>& all = r.all;
  const T there = select(masked, zero, one);
  all.n = part.n + there;
  all.m = max(part.m, z);
  r.down = select(part.n > zero, part.m - all.m, zero), r.x = select(masked, zero, z - all.m);
  // one of the two is 0; NaN and +inf end up in s1
  const auto above = r.down < zero;
  const T e = exp(max(r.down + r.x, T(-1000)));  // exp is 0 there, and 0 * -inf must not appear
  r.e_down = select(above, e, one), r.e = there * select(above, one, e);
  all.s1 = part.s1 * r.e_down + r.e;
  if (Needs & kSquares) all.s2 = part.s2 * (r.e_down * r.e_down) + r.e * r.e;
  if (Needs & kEntropy) all.sx = (part.sx + max(r.down, T(-1000)) * part.s1) * r.e_down + max(r.x, T(-1000)) * r.e;
  if (Needs & kLogits) {
    const T from = part.mean + r.down, step = r.x - from, share = there / max(all.n, one);
    all.mean = from + step * share;
    all.m2 = part.m2 + step * step * (part.n * share);
  }
  if (Needs & kWeighted) {
    all.sw = part.sw + there * w;
    all.swx = (part.swx + r.down * part.sw) + r.x * w;
  }
  return r;
}

}  // namespace fastsoftloss
