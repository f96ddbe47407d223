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

// The moments of one class, w its class weight. A masked one is not there; NaN and +inf end up in s1.
template <class T>
FSL_FN RowMoments<T> alone(T z, T w) {
  const auto masked = z == T(-Limits<T>::infinity());
  RowMoments<T> r;
  r.n = select(masked, T(0), T(1));
  r.m = z;
  r.s1 = r.s2 = select(masked, T(0), exp(z - z));
  r.sw = select(masked, T(0), w);
  return r;
}

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

}  // namespace fastsoftloss
