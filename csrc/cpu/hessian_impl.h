// Hessian-vector products: the gradient's derivative along a direction v. After reduce the sums of v, finish in dual numbers,
// spread of what finish gives and of its derivative. A part of kernels_impl.h.
#pragma once

#include "../dual.h"

namespace fastsoftloss {
namespace FSL_ISA {
namespace {

// The moments with their derivatives, and the sum of v over the masked classes.
template <class U>
struct Along {
  RowMoments<Dual<U>> moments;
  U masked;
};

template <class U>
FSL_LOOP Along<U> joined(const Along<U>& a, const Along<U>& b) {
  return {merge<kAllMoments>(a.moments, b.moments), a.masked + b.masked};
}

// What spread makes H v of: shared + v own, class by class; and <dL/dz, v>.
template <class U>
struct HessianRow {
  U slope, m;
  RowGradient<U> shared, own;
};

// v: at the labels.
template <class U>
FSL_FN HessianRow<U> hessian_row(const Along<U>& r, const RowGradient<Dual<U>>& g, U v, U other, U upstream, const LossOptions& o) {
  return {along(g, r.moments, v, other, r.masked, o.label_smoothing != 0), r.moments.m.value, tangents(g, upstream), by_own(g, upstream)};
}

// finish, one copy in the object code: of a row or a tile with one label each, and of a row with two.
template <class U>
FSL_LOOP HessianRow<U> finish_along(const Along<U>& r, const Dual<U>& z_y, const U& class_weight, const U& row_weight, const U& scale,
                                    const U& upstream, const LossOptions& o) {
  using D = Dual<U>;
  const RowLoss<D> loss = finish(r.moments, z_y, D(class_weight), D(row_weight), D(scale), o);
  return hessian_row(r, loss.gradient, z_y.tangent, U(0), upstream, o);
}
template <class T>
FSL_LOOP HessianRow<T> finish_along(const Along<T>& r, const Row<T>& row, const Dual<T> (&z)[2], T upstream, const LossOptions& o) {
  using D = Dual<T>;
  if (row.other < 0) return finish_along(r, z[0], row.class_weight, row.row_weight, row.scale, upstream, o);
  const D class_weight[2] = {D(row.class_weight), D(row.other_class_weight)}, row_weight[2] = {D(row.row_weight), D(row.other_row_weight)};
  const RowLoss<D> loss = finish_mixture<kAllMoments>(r.moments, z, class_weight, row_weight, D(row.scale), o);
  return hessian_row(r, loss.gradient, z[0].tangent, z[1].tangent, upstream, o);
}

// What both loops over v accumulate: lanes of one row, or one lane a row.
template <class T, unsigned Needs>
struct TangentSums {
  using V = Vec<T>;
  V m, mean;
  V s1{0}, s2{0}, sx{0}, v{0}, dv{0}, wv{0}, masked{0};

  FSL_FN TangentSums(V m, V mean) : m(select(m == V(-Limits<T>::infinity()), V(0), m)), mean(mean) {}  // no class at all: -inf - -inf
  FSL_FN void add(V z, V e, V w, V direction) {
    const auto there = z > V(-Limits<T>::infinity());
    const V x = z - m, vi = select(there, direction, V(0)), ev = e * vi;
    s1 = s1 + ev;
    if (Needs & kSquares) s2 = s2 + e * ev;
    if (Needs & kEntropy) sx = sx + ev * bounded(x);
    if (Needs & kLogits) {
      v = v + vi;
      dv = dv + vi * select(there, x - mean, V(0));
      masked = masked + select(there, V(0), direction);
    }
    if (Needs & kWeighted) wv = wv + w * direction;
  }
  template <class U, class F>
  FSL_FN Along<U> with(const RowMoments<U>& r, F join) const {
    Along<U> out{{}, join(masked)};
    const U one = join(s1);
    out.moments.n = Dual<U>(r.n), out.moments.m = Dual<U>(r.m), out.moments.s1 = {r.s1, one};
    if (Needs & kSquares) out.moments.s2 = {r.s2, U(2) * join(s2)};
    if (Needs & kEntropy) out.moments.sx = {r.sx, join(sx) + one};
    if (Needs & kLogits) out.moments.mean = {r.mean, join(v) / max(r.n, U(1))}, out.moments.m2 = {r.m2, U(2) * join(dv)};
    if (Needs & kWeighted) out.moments.sw = Dual<U>(r.sw), out.moments.swx = {r.swx, join(wv)};
    return out;
  }
};

// One element for each lane, save the true class's; a masked class's v is not looked at, and class weights are constants.
template <unsigned Needs, class V>
FSL_FN V curvature(const HessianRow<V>& h, V z, V x, V e, V v) {
  constexpr unsigned kNeeds = Needs & ~kWeighted;
  const V vi = select(z == V(-Limits<V>::infinity()), V(0), v);
  return slope<kNeeds>(h.shared, z, x, e, V(0)) + vi * slope<kNeeds>(h.own, z, x, e, V(0));
}

// The loops that depend on the moments; whatever drives them does not.
template <class T>
struct HessianLoops {
  using V = Vec<T>;
  using Lanes = T[V::kLanes];
  // blocks [from, to) of a row; exps is written
  Along<T> (*reduce)(const RowBlocks<T>& row, const RowBlocks<T>& direction, const T* weight, int64_t from, int64_t to, T* exps);
  // a row; exps as reduce kept them, or null
  void (*spread)(const RowBlocks<T>& row, const RowBlocks<T>& direction, const HessianRow<T>& h, const T* exps, char* out);
  // the same of a tile, over v itself
  Along<V> (*reduce_tile)(const T* weight, int count, const Lanes* z, const Lanes* v, Lanes* exps);
  void (*spread_tile)(const HessianRow<V>& h, int count, const Lanes* z, const Lanes* exps, Lanes* v);
};

// One copy in the object code.
template <class T>
FSL_LOOP const T* block_at(const RowBlocks<T>& row, int64_t b, T* buffer) {
  return row.at(b, buffer);
}
template <class T>
FSL_LOOP void store_block(const RowBlocks<T>& row, int64_t b, const T* from, char* to) {
  store_contiguous(from, row.storage, row.size(b), to);
}

template <class T, unsigned Needs>
Along<T> reduce_along(const RowBlocks<T>& row, const RowBlocks<T>& direction, const T* weight, int64_t from, int64_t to, T* exps) {
  using V = Vec<T>;
  const RowMoments<T> moments = reduce<T, Needs>(row, weight, from, to, exps);
  T buffer[kBlock], direction_buffer[kBlock], weight_buffer[kBlock];
  TangentSums<T, Needs> sums(V(moments.m), V(moments.mean));
  for (int64_t b = from; b < to; ++b) {
    const T *z = block_at(row, b, buffer), *v = block_at(direction, b, direction_buffer);
    const T* w = Needs & kWeighted ? row.weights_at(weight, b, weight_buffer) : z;
    FSL_ROLLED for (int i = 0; i < kBlock; i += V::kLanes)
        sums.add(V::load(z + i), V::load(exps + (b - from) * kBlock + i), V::load(w + i), V::load(v + i));
  }
  return sums.with(moments, [](V lanes) { return sum(lanes); });
}

template <class T, unsigned Needs>
void spread_along(const RowBlocks<T>& row, const RowBlocks<T>& direction, const HessianRow<T>& h, const T* exps, char* out) {
  using V = Vec<T>;
  T buffer[kBlock], direction_buffer[kBlock], out_buffer[kBlock];
  const HessianRow<V> lanes{V(h.slope), V(h.m), broadcast(h.shared), broadcast(h.own)};
  for (int64_t b = 0; b < row.count; ++b) {
    const T *z = block_at(row, b, buffer), *v = block_at(direction, b, direction_buffer);
    char* to_memory = out + b * kBlock * bytes_of(row.storage);
    T* to = row.direct(b) ? reinterpret_cast<T*>(to_memory) : out_buffer;
    FSL_ROLLED for (int i = 0; i < kBlock; i += V::kLanes) {
      const V zi = V::load(z + i), x = zi - lanes.m, e = exps ? V::load(exps + b * kBlock + i) : exp(x);
      curvature<Needs>(lanes, zi, x, e, V::load(v + i)).store(to + i);
    }
    if (!row.direct(b)) store_block(row, b, to, to_memory);
  }
}

template <class T, unsigned Needs>
Along<Vec<T>> reduce_along_tile(const T* weight, int count, const T (*z)[Vec<T>::kLanes], const T (*v)[Vec<T>::kLanes],
                                T (*exps)[Vec<T>::kLanes]) {
  using V = Vec<T>;
  const RowMoments<V> moments = reduce<T, Needs>(weight, count, z, exps);
  TangentSums<T, Needs> sums(moments.m, moments.mean);
  for (int i = 0; i < count; ++i) sums.add(V::load(z[i]), V::load(exps[i]), V(Needs & kWeighted ? weight[i] : T(0)), V::load(v[i]));
  return sums.with(moments, [](V lanes) { return lanes; });
}

template <class T, unsigned Needs>
void spread_along_tile(const HessianRow<Vec<T>>& row, int count, const T (*z)[Vec<T>::kLanes], const T (*exps)[Vec<T>::kLanes],
                       T (*v)[Vec<T>::kLanes]) {
  using V = Vec<T>;
  const HessianRow<V> h = row;  // by value: what is stored is none of it
  for (int i = 0; i < count; ++i) {
    const V zi = V::load(z[i]), x = zi - h.m, e = exps ? V::load(exps[i]) : exp(x);
    curvature<Needs>(h, zi, x, e, V::load(v[i])).store(v[i]);
  }
}

// A row at a time; the exps of one that has a single part are kept on the stack.
template <class T>
FSL_LOOP void hessian_of_row(const HessianJob<T>& h, const HessianLoops<T>& loops, int64_t r, LossSums<T>* sums) {
  const Job<T>& job = h.job;
  const Offsets at = Walk<T>(job, r).at;
  const Row<T> row = locate(job, at);
  if (row.label < 0) return ignore(job, row, r);
  const char* const v = h.direction + at.direction;
  const RowBlocks<T> blocks(job, row), direction(job, row, v, T(0));
  alignas(64) T exps[kPart];
  Along<T> whole;
  for (int64_t b = 0; b < blocks.count; b += kPart / kBlock) {
    const auto part = loops.reduce(blocks, direction, job.class_weight, b, min_of(b + kPart / kBlock, blocks.count), exps);
    whole = b ? joined(whole, part) : part;
  }
  T z_of[2], v_of[2];
  load_labels(job, row, row.logits, job.logits_step, z_of);
  load_labels(job, row, v, h.direction_step, v_of);
  const T upstream = *reinterpret_cast<const T*>(h.upstream + at.upstream);
  const HessianRow<T> found = finish_along(whole, row, {{z_of[0], v_of[0]}, {z_of[1], v_of[1]}}, upstream, job.options);
  record(job, r, RowLoss<T>{found.slope, T(0), T(0), {}}, sums);
  loops.spread(blocks, direction, found, job.classes <= kPart ? exps : nullptr, row.gradient);
  store_labels(job, row, found.shared);
}

// Values that lie `from_step` bytes apart, to where they are `to_step` apart.
template <class T>
FSL_FN void copy_values(size_t count, const void* from, size_t from_step, void* to, size_t to_step) {
  for (size_t i = 0; i < count; ++i)
    memcpy(static_cast<char*>(to) + i * to_step, static_cast<const char*>(from) + i * from_step, sizeof(T));
}

// finish for one lane, a mixture: vectors of it would be most of the object code.
template <class T>
FSL_LOOP void finish_lane(const Along<Vec<T>>& r, int lane, const Row<T>& row, const Dual<T> (&z)[2], T upstream, const LossOptions& o,
                          HessianRow<Vec<T>>& found) {
  Along<T> one;
  copy_values<T>(sizeof(one) / sizeof(T), reinterpret_cast<const T*>(&r) + lane, sizeof(Vec<T>), &one, sizeof(T));
  const HessianRow<T> of_lane = finish_along(one, row, z, upstream, o);
  copy_values<T>(sizeof(of_lane) / sizeof(T), &of_lane, sizeof(T), reinterpret_cast<T*>(&found) + lane, sizeof(Vec<T>));
}

template <class T>
FSL_LOOP void hessian_of_tile(const HessianJob<T>& h, const HessianLoops<T>& loops, Walk<T>& walk, int64_t begin, int64_t end,
                              LossSums<T>* sums) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  const Job<T>& job = h.job;
  const char* direction[kLanes];
  alignas(64) T upstream[kLanes];
  const Walk<T> first = walk;
  Walk<T> at = first;
  for (int lane = 0; lane < kLanes; ++lane) {
    direction[lane] = h.direction + at.at.direction;
    upstream[lane] = *reinterpret_cast<const T*>(h.upstream + at.at.upstream);
    if (begin + lane + 1 < end) at.next();  // lanes that have no row of their own repeat the last
  }
  const Tile<T> tile(walk, end - begin);
  const bool one_look = job.classes <= kTileClasses, mixture = job.form == Form::mixture;
  alignas(64) T z[kTileClasses][kLanes], v[kTileClasses][kLanes], exps[kTileClasses][kLanes], z_of[2][kLanes], v_of[2][kLanes];
  for (int i = 0; i < 2; ++i) V(0).store(z_of[i]), V(0).store(v_of[i]);
  const auto load = [&](int64_t k) {
    const int count = int(min_of(job.classes - k, kTileClasses));
    tile.load(k, count, z);
    tile.load(direction, job.storage, h.direction_step, k, count, v);
    return count;
  };
  Along<V> whole;
  for (int64_t k = 0; k == 0 || k < job.classes; k += kTileClasses) {
    const int count = load(k);
    for (int i = 0; i < 1 + mixture; ++i) {
      take_out(i ? tile.other : tile.label, k, count, -Limits<T>::infinity(), z, z_of[i]);
      take_out(i ? tile.other : tile.label, k, count, T(0), v, v_of[i]);
    }
    const auto part = loops.reduce_tile(job.class_weight ? job.class_weight + k : nullptr, count, z, v, exps);
    whole = k ? joined(whole, part) : part;
  }

  HessianRow<V> found = finish_along(whole, Dual<V>(V::load(z_of[0]), V::load(v_of[0])), V::load(tile.class_weight),
                                     V::load(tile.row_weight), V::load(tile.scale), V::load(upstream), job.options);
  at = first;
  for (int lane = 0; mixture && lane < tile.valid; ++lane, at.next()) {
    const Dual<T> z_y[2] = {{z_of[0][lane], v_of[0][lane]}, {z_of[1][lane], v_of[1][lane]}};
    if (tile.other[lane] >= 0) finish_lane(whole, lane, locate(job, at.at), z_y, upstream[lane], job.options, found);
  }
  tile.record(begin, found.slope, V(0), V(0), sums);

  for (int64_t k = 0; k < job.classes; k += kTileClasses) {
    const int count = one_look ? int(job.classes) : load(k);
    loops.spread_tile(found, count, z, one_look ? exps : nullptr, v);
    store_labelled(tile, k, count, found.shared, v);
  }
}

template <class T>
void hessian(const HessianJob<T>& h, const HessianLoops<T>& loops, int64_t begin, int64_t end, LossSums<T>* sums) {
  if (by_row(h)) {
    for (int64_t r = begin; r < end; ++r) hessian_of_row(h, loops, r, sums);
  } else {
    Walk<T> walk(h.job, begin);
    for (int64_t r = begin; r < end; r += Vec<T>::kLanes) hessian_of_tile(h, loops, walk, r, end, sums);
  }
}

template <class T, unsigned Needs>
void hessian(const HessianJob<T>& h, int64_t begin, int64_t end, LossSums<T>* sums) {
  constexpr HessianLoops<T> kLoops = {reduce_along<T, Needs>, spread_along<T, Needs>, reduce_along_tile<T, Needs>,
                                      spread_along_tile<T, Needs>};
  hessian(h, kLoops, begin, end, sums);
}

}  // namespace
}  // namespace FSL_ISA
}  // namespace fastsoftloss
