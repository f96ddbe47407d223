// The moments of a row in one look at each logit: y = (z - ref) log2(e) is one fma, exp is one special function of it.
//
// ref is some logit of the complement or a mean of a few, not the maximum: nothing has to be known of a row before it is
// summed. Where that was a bad guess (a sum overflowed, the variance is a small difference of large sums, or a class is
// masked), sound() says so and the row goes the careful way.
#pragma once

#include "careful.cuh"

namespace fastsoftloss {
namespace cuda {

// ref log2(e) is rounded to `scaled`; what that lost is the same for every class of a row, so it is put back at the end.
struct Reference {
  float ref, scaled, lost;

  FSL_DEVICE explicit Reference(float ref) : ref(ref), scaled(ref * kLog2e), lost(fmaf(ref, kLog2e, -scaled)) {}
  FSL_DEVICE float y(float z) const { return fmaf(z, kLog2e, -scaled); }
  // x = z - ref = y ln 2 - offset(), and exp of that, by its series: sound() sees to it that it is small.
  FSL_DEVICE float offset() const { return lost * kLn2; }
  static FSL_DEVICE float series(float x) { return 1.f + x * (1.f + x * 0.5f); }
  // The same about the logit where y is 0, of which nothing is lost; but that logit is rounded, so none may be compared with it.
  FSL_DEVICE Reference rounded() const {
    Reference r = *this;
    r.ref = fmaf(-lost, kLn2, ref), r.lost = 0;
    return r;
  }
};

// Which moments a kernel is compiled for; class weights under label smoothing always go the careful way.
constexpr unsigned kQuickNeeds[] = {kBase, kLogits, kSquares | kEntropy, kLogits | kSquares | kEntropy};

template <unsigned Needs>
struct Sums {
  static constexpr int kCount = 1 + (Needs & kLogits ? 2 : 0) + (Needs & kSquares ? 2 : 0);
  float s1 = 0, sy = 0, syy = 0, s2 = 0, sey = 0;

  FSL_DEVICE void add(float y, float e) {
    s1 += e;
    if (Needs & kLogits) sy += y, syy = fmaf(y, y, syy);
    if (Needs & kSquares) s2 = fmaf(e, e, s2), sey = fmaf(e, y, sey);
  }
  FSL_DEVICE void remove(float y, float e) {
    s1 -= e;
    if (Needs & kLogits) sy -= y, syy = fmaf(-y, y, syy);
    if (Needs & kSquares) s2 = fmaf(-e, e, s2), sey = fmaf(-e, y, sey);
  }
  // The class that stands in for the true one, which is at the reference: taken out before it is added.
  FSL_DEVICE void start_without(const Reference& at) {
    s1 = fmaf(at.lost, -kLn2, -1.f), sy = -at.lost, syy = at.lost * sy;
    s2 = fmaf(at.lost, -2 * kLn2, -1.f), sey = sy;
  }
  FSL_DEVICE void join(const Group<float>& group) {
    float v[kCount];
    give(v);
    group.sum(v);
    take(v);
  }
  FSL_DEVICE void join_for_first(const Group<float>& group) {
    float v[kCount];
    give(v);
    group.sum_for_first(v);
    take(v);
  }
  // Comparisons that infinities and NaN fail. inv_n: of the number of classes summed.
  FSL_DEVICE bool sound(float inv_n, const Reference& at, float most) const {
    bool good = s1 < most & fabsf(at.lost) < 0.001f;
    if (Needs & kLogits) good &= syy <= 8 * (syy - sy * (sy * inv_n));
    if (Needs & kSquares) good &= sey - sey == 0;
    return good;
  }
  // How a true class at y, |y| < kMostApart, stands against these: what is lost of the reference is lost on both sides.
  FSL_DEVICE Margin<float> margin(float y) const {
    const float own = exp2_approx(y), both = s1 + own, inv_both = inverse(s1 * both), share = s1 * inv_both;
    Margin<float> out;
    out.inv_s1 = both * inv_both;
    out.s = s1 * share;
    out.p = own * share;
    out.ce = minus_log(out.p, out.s);
    out.d = 1, out.log_both = fmaf(y, kLn2, out.ce);  // the reference led whatever y is: see lift()
    return out;
  }
  FSL_DEVICE RowMoments<float> moments(float n, float inv_n, const Reference& at) const {
    // in terms of x = z - ref
    RowMoments<float> r;
    const float offset = at.offset(), f = at.series(-offset);
    r.n = n, r.m = at.ref, r.s1 = s1 * f;
    if (Needs & kLogits) {
      const float mean = sy * inv_n;
      r.mean = mean * kLn2 - offset, r.m2 = (syy - sy * mean) * (kLn2 * kLn2);
    }
    if (Needs & kSquares) r.s2 = s2 * f * f, r.sx = (sey - at.lost * s1) * f * kLn2;
    return r;
  }

 private:
  FSL_DEVICE void give(float* v) const {
    *v++ = s1;
    if (Needs & kLogits) *v++ = sy, *v++ = syy;
    if (Needs & kSquares) *v++ = s2, *v++ = sey;
  }
  FSL_DEVICE void take(const float* v) {
    s1 = *v++;
    if (Needs & kLogits) sy = *v++, syy = *v++;
    if (Needs & kSquares) s2 = *v++, sey = *v++;
  }
};

// The largest s1 that is squared in finish, or that sums of squares keep up with; and the largest for a Move and no squares.
constexpr float kMostSum = 1e15f;
template <unsigned Needs>
constexpr float kMostMovable = Needs & kSquares ? kMostSum : 1e30f;
// How far from the reference the true class may be for Sums::margin: y is rounded by no more than 2^-19.
constexpr float kMostApart = 64;

// Moments moved to a reference at which s1 is about 1, so that finish neither over- nor underflows: by how much, and what
// that does to an exponential. A row that is all but flat stays where it is, for its mean would be rounded.
struct Move {
  float shift, factor;

  FSL_DEVICE explicit Move(RowMoments<float>& r) {
    const float m = r.s1 > 2 * r.n ? r.m + __log2f(r.s1) * kLn2 : r.m;  // any m is right that is known exactly
    shift = m - r.m, factor = quick_exp(-shift);
    r.m = m;
    r.sx = (r.sx - shift * r.s1) * factor;
    r.s1 *= factor, r.s2 *= factor * factor, r.mean -= shift;
  }
  // A gradient in terms of the moved reference in terms of the first.
  FSL_DEVICE RowGradient<float> back(RowGradient<float> g) const {
    g.a = (g.a - g.t * shift) * factor, g.t *= factor, g.b *= factor * factor, g.e0 -= g.e1 * shift;
    return g;
  }
};

// The gradient of finish in terms of y and its exponential.
template <unsigned Needs>
struct Slope {
  float a, b, t, e0, e1;
  bool exact;  // a has not underflowed where a product of it with a large exponential would be seen

  Slope() = default;
  FSL_DEVICE Slope(const RowGradient<float>& g, const Reference& at, bool mixed) {
    const float offset = at.offset(), f = at.series(-offset);
    a = g.a * f;
    if (Needs & kSquares) t = g.t * f * kLn2, a -= g.t * offset * f, b = g.b * f * f;
    if (Needs & kLogits) e1 = g.e1 * kLn2, e0 = g.e0 - g.e1 * offset;
    // label, with a mixture's other: what cross-entropy gives all other classes together, or more
    exact = fabsf(a) > 1e-36f || (fabsf(g.label) < 1e-35f && (!mixed || fabsf(g.other) < 1e-35f));
  }
  // What the group's first thread has, for all of it.
  FSL_DEVICE void share(const Group<float>& group) {
    a = group.of_first(a);
    if (Needs & kSquares) b = group.of_first(b), t = group.of_first(t);
    if (Needs & kLogits) e0 = group.of_first(e0), e1 = group.of_first(e1);
  }
  FSL_DEVICE float operator()(float y, float e) const {
    const float factor = Needs & kSquares ? fmaf(t, y, fmaf(b, e, a)) : a;
    return Needs & kLogits ? fmaf(e, factor, fmaf(e1, y, e0)) : e * factor;
  }
};

enum class Way : int { quick, across, careful };

// What the threads of a row tell one another.
template <unsigned Needs>
struct Told {
  float z[2];          // of the labels, by whoever has them
  Slope<Needs> slope;  // and the rest by the first, when it has finished
  float label, other;
  Way way;
};

// Whether the gradient's row starts at the same place of its 16 bytes as the logits', which a fresh gradient mostly does.
template <Storage S, bool kMixed>
FSL_DEVICE bool alike(const Row<float, kMixed>& row, int64_t gradient_step) {
  return gradient_step == Memory<S>::kBytes && (int(row.gradient - row.logits) & 15) == 0;
}

// A gradient that lies otherwise than its logits, a logit at a time.
template <Storage S, unsigned Needs, bool kMixed>
FSL_DEVICE void spread_across(const Group<float>& group, const Row<float, kMixed>& row, int64_t gradient_step, int begin, int end,
                              const Reference& at, const Slope<Needs>& slope, float label, float other) {
  for (int k = begin + group.lane; k < end; k += group.size) {
    const float y = at.y(Memory<S>::load(row.logits + int64_t(k) * Memory<S>::kBytes));
    const float dz = row.two() && k == row.other ? other : slope(y, exp2_approx(y));
    Memory<S>::store(row.gradient + k * gradient_step, k == row.label ? label : dz);
  }
}

}  // namespace cuda
}  // namespace fastsoftloss
