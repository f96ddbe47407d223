// reduce and spread over a row, and over a tile of rows whose lanes are rows. Compiled once for each instruction set.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace fastsoftloss {
namespace FSL_ISA {
namespace {

// A loop over logits: one copy of it in the object code.
#define FSL_LOOP __attribute__((noinline))

constexpr int kBlock = 64;

template <class T>
FSL_FN bool holds(Storage s) {
  return s == (sizeof(T) == 8 ? Storage::float64 : Storage::float32);
}

// Memory answers while the caches are worked on; hardware does not look past a page. A wrong address costs nothing.
template <int kWrite>
FSL_FN void prefetch_block(const char* p, Storage storage) {
  for (int64_t i = 0; i < kBlock * bytes_of(storage); i += 64) __builtin_prefetch(p + i, kWrite);
}
constexpr int64_t kWriteAhead = 1024;  // bytes

// A row with class stride 1 as blocks of 64 lanes. The true class (a mixture has two) and the padding read as -inf, which
// is what a class that is not there looks like: no loop below knows of either. The blocks that hold them are copies.
template <class T>
struct RowBlocks {
  const char* logits;
  Storage storage;
  int64_t classes, count, label_block, other_block, tail_block;
  T label_copy[kBlock], other_copy[kBlock], tail_copy[kBlock];

  RowBlocks(const Job<T>& job, const Row<T>& row) : RowBlocks(job, row, row.logits, -Limits<T>::infinity()) {}
  // Of another array as the logits; gone: what there is in the place of a true class or the padding.
  FSL_LOOP RowBlocks(const Job<T>& job, const Row<T>& row, const char* from, T gone)
      : logits(from), storage(job.storage), classes(job.classes), count((classes + kBlock - 1) / kBlock) {
    label_block = row.label / kBlock;
    tail_block = classes % kBlock ? count - 1 : -1;
    copy(label_block, gone, label_copy);
    label_copy[row.label % kBlock] = gone;
    other_block = row.other / kBlock;
    if (row.other < 0 || other_block == label_block) other_block = -1;
    if (other_block >= 0) copy(other_block, gone, other_copy);
    if (row.other >= 0) (other_block >= 0 ? other_copy : label_copy)[row.other % kBlock] = gone;
    if (tail_block >= 0 && tail_block != label_block && tail_block != other_block) copy(tail_block, gone, tail_copy);
  }
  FSL_FN int64_t size(int64_t b) const { return b == tail_block ? classes % kBlock : kBlock; }
  FSL_FN bool direct(int64_t b) const { return holds<T>(storage) && b != label_block && b != other_block && b != tail_block; }
  FSL_FN const T* at(int64_t b, T* buffer) const {
    if (b == label_block) return label_copy;
    if (b == other_block) return other_copy;
    if (b == tail_block) return tail_copy;
    if (holds<T>(storage)) return reinterpret_cast<const T*>(logits) + b * kBlock;
    load_contiguous(logits + b * kBlock * bytes_of(storage), storage, kBlock, buffer);
    return buffer;
  }
  FSL_FN const T* weights_at(const T* weight, int64_t b, T* buffer) const {
    if (b != tail_block) return weight + b * kBlock;
    for (int i = 0; i < kBlock; ++i) buffer[i] = i < size(b) ? weight[b * kBlock + i] : T(0);
    return buffer;
  }
  // Block b, which may lie behind the row: what is behind a part is read next.
  FSL_FN void prefetch(int64_t b) const { prefetch_block<0>(logits + b * kBlock * bytes_of(storage), storage); }

 private:
  FSL_FN void copy(int64_t b, T gone, T* to) const {
    load_contiguous(logits + b * kBlock * bytes_of(storage), storage, size(b), to);
    for (int64_t i = size(b); i < kBlock; ++i) to[i] = gone;
  }
};

// What both loops over logits accumulate: lanes of one row, or one lane a row.
template <class T, unsigned Needs>
struct Accumulator {
  using V = Vec<T>;
  V m{-Limits<T>::infinity()}, n{0}, total{0};  // first look
  V shift, s1{0}, s2{0}, sx{0}, sd{0}, sdd{0}, sw{0}, swx{0};

  FSL_FN void look(V z) {
    const auto there = z > V(-Limits<T>::infinity());
    m = max(m, z);
    n = n + select(there, V(1), V(0));
    if (Needs & kLogits) total = total + select(there, z, V(0));
  }
  // x = z - m; w: class weights. Returns e.
  FSL_FN V add(V z, V at, V w) {
    const V x = z - at, low = bounded(x), e = exp_bounded(low);
    const auto there = z > V(-Limits<T>::infinity());
    s1 = s1 + e;
    if (Needs & kSquares) s2 = s2 + e * e;
    if (Needs & kEntropy) sx = sx + e * low;
    if (Needs & kLogits) {
      const V d = select(there, x - shift, V(0));
      sd = sd + d;
      sdd = sdd + d * d;
    }
    if (Needs & kWeighted) {
      sw = sw + select(there, w, V(0));
      swx = swx + select(there, w * x, V(0));
    }
    return e;
  }
};

// The moments of one row, once its lanes are joined, or of one row a lane.
template <unsigned Needs, class T, class U, class F>
FSL_FN RowMoments<U> moments(const Accumulator<T, Needs>& acc, U n, U m, U shift, F join) {
  RowMoments<U> r;
  r.n = n, r.m = m, r.s1 = join(acc.s1);
  if (Needs & kSquares) r.s2 = join(acc.s2);
  if (Needs & kEntropy) r.sx = join(acc.sx);
  if (Needs & kLogits) {  // corrected two-pass: the squares were taken about `shift`, the mean up to rounding
    const U sd = join(acc.sd), off = sd / max(n, U(1));
    r.mean = select(n > U(0), shift + off, U(0));
    r.m2 = max(join(acc.sdd) - sd * off, U(0));
  }
  if (Needs & kWeighted) r.sw = join(acc.sw), r.swx = join(acc.swx);
  return r;
}

// reduce: blocks [from, to) of a row; exps, where given, keeps their e for spread.
template <class T, unsigned Needs>
FSL_LOOP RowMoments<T> reduce(const RowBlocks<T>& row, const T* weight, int64_t from, int64_t to, T* exps) {
  using V = Vec<T>;
  T buffer[kBlock], weight_buffer[kBlock];
  Accumulator<T, Needs> acc;
  for (int64_t b = from; b < to; ++b) {
    const T* z = row.at(b, buffer);
    FSL_ROLLED for (int i = 0; i < kBlock; i += V::kLanes) acc.look(V::load(z + i));
  }
  const T n = sum(acc.n), m = maximum(acc.m);
  const T at = m == -Limits<T>::infinity() ? T(0) : m;  // no class at all: -inf - -inf must not appear
  const T shift = Needs & kLogits ? sum(acc.total) / max(n, T(1)) - at : T(0);
  acc.shift = V(shift);
  for (int64_t b = from; b < to; ++b) {
    const T* z = row.at(b, buffer);
    row.prefetch(b + (to - from));
    const T* w = Needs & kWeighted ? row.weights_at(weight, b, weight_buffer) : z;
    FSL_ROLLED for (int i = 0; i < kBlock; i += V::kLanes) {
      const V e = acc.add(V::load(z + i), V(at), V::load(w + i));
      if (exps) e.store(exps + (b - from) * kBlock + i);
    }
  }
  return moments<Needs>(acc, n, m, shift, [](V lanes) { return sum(lanes); });
}

// One gradient element for each lane, save the true class's.
template <unsigned Needs, class V>
FSL_FN V slope(const RowGradient<V>& g, V z, V x, V e, V w) {
  V factor = g.a;
  if (Needs & kSquares) factor = factor + g.b * e;
  if (Needs & kEntropy) factor = factor + g.t * bounded(x);
  V dz = e * factor;
  if (Needs & kLogits) dz = dz + (g.e0 + g.e1 * x);
  dz = select(z == V(-Limits<V>::infinity()), g.masked, dz);
  if (Needs & kWeighted) dz = dz + g.ew * w;
  return dz;
}

template <class T>
FSL_FN RowGradient<Vec<T>> broadcast(const RowGradient<T>& g) {
  using V = Vec<T>;
  return {V(g.a), V(g.b), V(g.t), V(g.e0), V(g.e1), V(g.ew), V(g.masked), V(g.label), V(g.other)};
}
template <class T>
FSL_FN RowMoments<Vec<T>> broadcast(const RowMoments<T>& r) {
  using V = Vec<T>;
  return {V(r.n), V(r.m), V(r.s1), V(r.s2), V(r.sx), V(r.mean), V(r.m2), V(r.sw), V(r.swx)};
}

// spread: blocks [from, to) of a row. exps: the e that reduce kept, relative to `exps_m`, or null.
template <class T, unsigned Needs>
FSL_LOOP void spread(const RowBlocks<T>& row, const T* weight, int64_t from, int64_t to, RowGradient<T> g, T m, const T* exps, T exps_m,
                     char* gradient) {
  using V = Vec<T>;
  T buffer[kBlock], weight_buffer[kBlock], out_buffer[kBlock];
  if (exps && exps_m != m) {
    const T f = exps_m == -Limits<T>::infinity() ? T(0) : exp(exps_m - m);
    g.a *= f, g.b *= f * f, g.t *= f;
  }
  const RowGradient<V> lanes = broadcast(g);
  const V at(m);
  for (int64_t b = from; b < to; ++b) {
    const T* z = row.at(b, buffer);
    const T* w = Needs & kWeighted ? row.weights_at(weight, b, weight_buffer) : z;
    char* to_memory = gradient + b * kBlock * bytes_of(row.storage);
    T* out = row.direct(b) ? reinterpret_cast<T*>(to_memory) : out_buffer;
    prefetch_block<1>(to_memory + kWriteAhead, row.storage);
    FSL_ROLLED for (int i = 0; i < kBlock; i += V::kLanes) {
      const V zi = V::load(z + i), x = zi - at;
      const V e = exps ? V::load(exps + (b - from) * kBlock + i) : exp(x);
      slope<Needs>(lanes, zi, x, e, V::load(w + i)).store(out + i);
    }
    if (!row.direct(b)) store_contiguous(out, row.storage, row.size(b), to_memory);
  }
}

template <class T>
FSL_FN void record(const Job<T>& job, int64_t r, const RowLoss<T>& loss, LossSums<T>* sums) {
  const T values[3] = {loss.loss, loss.cross_entropy, loss.diversity};
  for (int i = 0; i < 3; ++i) {
    if (job.row_losses[i]) job.row_losses[i][r] = values[i];
    sums->of[i] += values[i];
  }
}

// finish, of a row or of a tile: one copy in the object code, whatever moments there are; those that are not are 0.
template <class U>
FSL_LOOP RowLoss<U> finish_label(const RowMoments<U>& r, const U& z_y, const U& class_weight, const U& row_weight, const U& scale,
                                 const LossOptions& o) {
  return finish(r, z_y, class_weight, row_weight, scale, o);
}
template <class U>
FSL_LOOP MixturePart<U> finish_one_of_two(const RowMoments<U>& rest, const U& z_y, const U& z_other, const U& class_weight,
                                          const U& other_class_weight, const U& row_weight, const U& scale, const LossOptions& o) {
  return finish_part<kAllMoments>(rest, z_y, z_other, class_weight, other_class_weight, row_weight, scale, o);
}

// Both labels of a row in one go, a lane each.
template <class T>
FSL_FN RowLoss<T> finish_both(const RowMoments<T>& rest, const T (&z)[2], const T (&class_weight)[2], const T (&row_weight)[2], T scale,
                              const LossOptions& o) {
  using V = Vec<T>;
  const auto lanes = [](T first, T second) {
    T all[V::kLanes];
    for (int lane = 0; lane < V::kLanes; ++lane) all[lane] = lane % 2 ? second : first;
    return V::load(all);
  };
  const MixturePart<V> both =
      finish_one_of_two(broadcast(rest), lanes(z[0], z[1]), lanes(z[1], z[0]), lanes(class_weight[0], class_weight[1]),
                        lanes(class_weight[1], class_weight[0]), lanes(row_weight[0], row_weight[1]), V(scale), o);
  MixturePart<T> part[2];
  const V* from = &both.of.loss;
  for (size_t i = 0; i < sizeof(both) / sizeof(V); ++i) {
    T member[V::kLanes];
    from[i].store(member);
    for (int lane = 0; lane < 2; ++lane) (&part[lane].of.loss)[i] = member[lane];
  }
  return sum_of(part[0], part[1]);
}

// What stands at the row's labels; 0 where there is no second one.
template <class T>
FSL_FN void load_labels(const Job<T>& job, const Row<T>& row, const char* from, int64_t step, T (&z)[2]) {
  z[0] = load_one<T>(from + row.label * step, job.storage);
  z[1] = row.other < 0 ? T(0) : load_one<T>(from + row.other * step, job.storage);
}

template <class T>
FSL_FN RowLoss<T> finish_at(const Job<T>& job, const Row<T>& row, const RowMoments<T>& moments) {
  T z[2];
  load_labels(job, row, row.logits, job.logits_step, z);
  if (row.other < 0) return finish_label(moments, z[0], row.class_weight, row.row_weight, row.scale, job.options);
  return finish_both(moments, z, {row.class_weight, row.other_class_weight}, {row.row_weight, row.other_row_weight}, row.scale,
                     job.options);
}

template <class T>
FSL_FN void store_labels(const Job<T>& job, const Row<T>& row, const RowGradient<T>& g) {
  store_one(g.label, job.storage, row.gradient + row.label * job.gradient_step);
  if (row.other >= 0) store_one(g.other, job.storage, row.gradient + row.other * job.gradient_step);
}

template <class T>
FSL_FN void ignore(const Job<T>& job, const Row<T>& row, int64_t r) {
  for (T* losses : job.row_losses)
    if (losses) losses[r] = 0;
  if (job.gradient) memset(row.gradient, 0, job.classes * bytes_of(job.storage));
}

template <class T>
FSL_FN int64_t min_of(T a, T b) {
  return a < b ? a : b;
}

// A row at a time, its exps kept on the stack.
template <class T, unsigned Needs>
void one_row(const Job<T>& job, int64_t r, T* exps, LossSums<T>* sums) {
  const Row<T> row = locate(job, r);
  if (row.label < 0) return ignore(job, row, r);
  const RowBlocks<T> blocks(job, row);
  const int64_t count = blocks.count, step = kPart / kBlock;
  T part_m[(kRowLimit<T> + kPart - 1) / kPart];
  RowMoments<T> whole;
  for (int64_t b = 0, p = 0; b < count; b += step, ++p) {
    const auto part = reduce<T, Needs>(blocks, job.class_weight, b, min_of(b + step, count), job.gradient ? exps + b * kBlock : nullptr);
    part_m[p] = part.m;
    whole = p ? merge<Needs>(whole, part) : part;
  }
  const RowLoss<T> loss = finish_at(job, row, whole);
  record(job, r, loss, sums);
  if (!job.gradient) return;
  for (int64_t b = 0, p = 0; b < count; b += step, ++p)
    spread<T, Needs>(blocks, job.class_weight, b, min_of(b + step, count), loss.gradient, whole.m, exps + b * kBlock, part_m[p],
                     row.gradient);
  store_labels(job, row, loss.gradient);
}

// Rows to lanes and back: z[i][lane] is line[lane][i].
template <class T, int kLanes>
FSL_FN void load_columns(const T* const (&line)[kLanes], int count, T (*z)[kLanes]) {
#ifdef FSL_COLUMNS
  if constexpr (sizeof(T) == 4)
    if (count >= 4) {
      for (int i = 0; i < count; i += 4) {
        const int from = i < count - 4 ? i : count - 4;  // the last four again where four do not divide them
        Columns::load(line, from, z + from);
      }
      return;
    }
#endif
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < count; ++i) z[i][lane] = line[lane][i];
}
template <class T, int kLanes>
FSL_FN void store_columns(const T (*dz)[kLanes], int count, T* const (&line)[kLanes]) {
#ifdef FSL_COLUMNS
  if constexpr (sizeof(T) == 4)
    if (count >= 4) {
      for (int i = 0; i < count; i += 4) {
        const int from = i < count - 4 ? i : count - 4;
        Columns::store(dz + from, line, from);
      }
      return;
    }
#endif
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < count; ++i) line[lane][i] = dz[i][lane];
}

// As many rows as there are lanes, a class at a time: for few classes, and for any class stride.
template <class T>
struct Tile {
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;
  const Job<T>& job;
  const int valid;  // lanes that have a row of their own: the others repeat the first
  const char *logits[kLanes], *probabilities[kLanes];
  char* gradient[kLanes];
  int64_t label[kLanes], other[kLanes];  // below 0: the row is ignored, or has no second label; other: mixtures have it
  T class_weight[kLanes], row_weight[kLanes], scale[kLanes], other_class_weight[kLanes], other_row_weight[kLanes];
  T counts[kLanes];  // 1 where the lane has a row that is not ignored, else 0

  // From the walk's row on, which is left behind the tile.
  FSL_LOOP Tile(Walk<T>& walk, int64_t rows) : job(*walk.job), valid(int(min_of<int64_t>(rows, kLanes))) {
    const Offsets first = walk.at;
    job.plain() ? set_lanes<true>(walk) : set_lanes<false>(walk);
    for (int lane = valid; lane < kLanes; ++lane) set<false>(lane, first), counts[lane] = T(0);
  }
  // Classes [k, k + count) of the logits, or of the probabilities, into z, a vector each.
  FSL_LOOP void load(const char* const (&from)[kLanes], Storage storage, int64_t step, int64_t k, int count, T (*z)[kLanes]) const {
    const int64_t bytes = bytes_of(storage);
    if (lie_apart(from, bytes)) {
      for (int i = 0; i < count; ++i) load_contiguous(from[0] + (k + i) * step, storage, kLanes, z[i]);
    } else if (step == bytes) {
      T buffer[kLanes * kTileClasses];
      const T* line[kLanes];
      if (holds<T>(storage)) {
        for (int lane = 0; lane < kLanes; ++lane) line[lane] = reinterpret_cast<const T*>(from[lane]) + k;
      } else {
        for (int lane = 0; lane < kLanes; ++lane) line[lane] = buffer + lane * count;
        if (count == job.classes && lie_apart(from, count * bytes)) {
          load_contiguous(from[0], storage, kLanes * count, buffer);
        } else {
          for (int lane = 0; lane < kLanes; ++lane) load_contiguous(from[lane] + k * bytes, storage, count, buffer + lane * count);
        }
      }
      load_columns(line, count, z);
    } else {
      for (int i = 0; i < count; ++i)
        for (int lane = 0; lane < kLanes; ++lane) z[i][lane] = load_one<T>(from[lane] + (k + i) * step, storage);
    }
  }
  FSL_FN void load(int64_t k, int count, T (*z)[kLanes]) const { load(logits, job.storage, job.logits_step, k, count, z); }
  FSL_LOOP void store(int64_t k, int count, const T (*dz)[kLanes]) const {
    const int64_t bytes = bytes_of(job.storage);
    if (lie_apart(gradient, bytes)) {
      for (int i = 0; i < count; ++i) store_contiguous(dz[i], job.storage, kLanes, gradient[0] + (k + i) * job.gradient_step);
    } else if (job.gradient_step == bytes) {
      T buffer[kLanes * kTileClasses];
      T* line[kLanes];
      const bool direct = holds<T>(job.storage);
      for (int lane = 0; lane < kLanes; ++lane)
        line[lane] = direct && lane < valid ? reinterpret_cast<T*>(gradient[lane]) + k : buffer + lane * count;
      store_columns(dz, count, line);
      if (direct) return;
      if (count == job.classes && lie_apart(gradient, count * bytes)) {
        store_contiguous(buffer, job.storage, kLanes * count, gradient[0]);
      } else {
        for (int lane = 0; lane < valid; ++lane) store_contiguous(buffer + lane * count, job.storage, count, gradient[lane] + k * bytes);
      }
    } else {
      for (int i = 0; i < count; ++i)
        for (int lane = 0; lane < valid; ++lane) store_one(dz[i][lane], job.storage, gradient[lane] + (k + i) * job.gradient_step);
    }
  }
  FSL_LOOP void record(int64_t begin, V loss, V cross_entropy, V diversity, LossSums<T>* sums) const {
    const V values[3] = {loss, cross_entropy, diversity};
    for (int i = 0; i < 3; ++i) {
      T lanes[kLanes];
      double sum[kLanes];
      select(V::load(counts) > V(0), values[i], V(0)).store(lanes);
      for (int lane = 0; lane < kLanes; ++lane) sum[lane] = lanes[lane];
      for (int width = kLanes / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) sum[lane] += sum[lane + width];
      sums->of[i] += sum[0];
      if (job.row_losses[i]) memcpy(job.row_losses[i] + begin, lanes, valid * sizeof(T));
    }
  }

 private:
  template <bool kPlain>
  FSL_FN void set_lanes(Walk<T>& walk) {
    if (kPlain) {
      V(1).store(class_weight), V(1).store(row_weight), V(job.scale).store(scale);
    }
    Walk<T> at = walk;  // a copy that no store can change
    for (int lane = 0; lane < valid; ++lane, at.next()) set<kPlain>(lane, at.at);
    walk = at;
  }
  template <bool kPlain>
  FSL_FN void set(int lane, const Offsets& at) {
    const Row<T> row = locate<kPlain>(job, at);
    logits[lane] = row.logits, gradient[lane] = row.gradient;
    label[lane] = row.label, counts[lane] = T(row.label >= 0), probabilities[lane] = row.probabilities;
    if (kPlain) return;
    other[lane] = row.other;
    class_weight[lane] = row.class_weight, row_weight[lane] = row.row_weight, scale[lane] = row.scale;
    other_class_weight[lane] = row.other_class_weight, other_row_weight[lane] = row.other_row_weight;
  }
  // Whether the rows, no two of them the same, lie this many bytes apart.
  template <class P>
  FSL_FN bool lie_apart(P* const (&which)[kLanes], int64_t bytes) const {
    bool all = valid == kLanes;
    for (int lane = 1; lane < kLanes; ++lane) all &= which[lane] == which[0] + lane * bytes;
    return all;
  }
};

// Labels among classes [k, k + count): their logits go to `out`, and `gone` to z: -inf is what a class that is not there looks like.
template <class T, int kLanes>
FSL_LOOP void take_out(const int64_t (&label)[kLanes], int64_t k, int count, T gone, T (*z)[kLanes], T (&out)[kLanes]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t i = label[lane] - k;
    if (i >= 0 && i < count) out[lane] = z[i][lane], z[i][lane] = gone;
  }
}
template <class T, int kLanes>
FSL_LOOP void put_in(const int64_t (&label)[kLanes], int64_t k, int count, Vec<T> values, T (*dz)[kLanes]) {
  T lanes[kLanes];
  values.store(lanes);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t i = label[lane] - k;
    if (i >= 0 && i < count) dz[i][lane] = lanes[lane];
  }
}

// finish for lanes of which some have a second label.
template <class T>
FSL_LOOP RowLoss<Vec<T>> finish_mixtures(const Tile<T>& tile, const RowMoments<Vec<T>>& rest, const Vec<T> (&z)[2]) {
  using V = Vec<T>;
  const V class_weight[2] = {V::load(tile.class_weight), V::load(tile.other_class_weight)}, scale = V::load(tile.scale);
  T two[V::kLanes];
  for (int lane = 0; lane < V::kLanes; ++lane) two[lane] = T(tile.other[lane] >= 0);
  const auto mixed = V::load(two) > V(0);
  const V other = select(mixed, z[1], V(-Limits<T>::infinity()));
  const auto first =
      finish_one_of_two(rest, z[0], other, class_weight[0], class_weight[1], V::load(tile.row_weight), scale, tile.job.options);
  auto second =
      finish_one_of_two(rest, z[1], z[0], class_weight[1], class_weight[0], V::load(tile.other_row_weight), scale, tile.job.options);
  V* const members = &second.of.loss;
  for (size_t i = 0; i < sizeof(second) / sizeof(V); ++i) members[i] = select(mixed, members[i], V(0));
  return sum_of(first, second);
}

// reduce: a row a lane, the labels taken out.
template <class T, unsigned Needs>
FSL_LOOP RowMoments<Vec<T>> reduce(const T* weight, int count, const T (*z)[Vec<T>::kLanes], T (*exps)[Vec<T>::kLanes]) {
  using V = Vec<T>;
  Accumulator<T, Needs> acc;
  for (int i = 0; i < count; ++i) acc.look(V::load(z[i]));
  const V at = select(acc.m == V(-Limits<T>::infinity()), V(0), acc.m);
  acc.shift = Needs & kLogits ? acc.total / max(acc.n, V(1)) - at : V(0);
  for (int i = 0; i < count; ++i) acc.add(V::load(z[i]), at, V(Needs & kWeighted ? weight[i] : T(0))).store(exps[i]);
  return moments<Needs>(acc, acc.n, acc.m, acc.shift, [](V lanes) { return lanes; });
}

// spread: over z itself. exps: what reduce kept, or null.
template <class T, unsigned Needs>
FSL_LOOP void spread(const T* weight, const RowGradient<Vec<T>>& gradient, Vec<T> m, int count, const T (*exps)[Vec<T>::kLanes],
                     T (*z)[Vec<T>::kLanes]) {
  using V = Vec<T>;
  const RowGradient<V> g = gradient;  // by value: what is stored is none of it
  for (int i = 0; i < count; ++i) {
    const V zi = V::load(z[i]), x = zi - m, e = exps ? V::load(exps[i]) : exp(x);
    slope<Needs>(g, zi, x, e, V(Needs & kWeighted ? weight[i] : T(0))).store(z[i]);
  }
}

// Into the tile's gradient, with the labels' own in their places and 0 in the rows that are ignored.
template <class T>
FSL_FN void store_labelled(const Tile<T>& tile, int64_t k, int count, const RowGradient<Vec<T>>& g, T (*dz)[Vec<T>::kLanes]) {
  put_in(tile.label, k, count, g.label, dz);
  if (tile.job.form == Form::mixture) put_in(tile.other, k, count, g.other, dz);
  for (int lane = 0; lane < Vec<T>::kLanes; ++lane)
    for (int i = 0; tile.label[lane] < 0 && i < count; ++i) dz[i][lane] = 0;
  tile.store(k, count, dz);
}

template <class T, unsigned Needs>
void one_tile(Walk<T>& walk, int64_t begin, int64_t end, LossSums<T>* sums) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  const Job<T>& job = *walk.job;
  const Tile<T> tile(walk, end - begin);
  const bool one_look = job.classes <= kTileClasses, mixture = job.form == Form::mixture;
  alignas(64) T z[kTileClasses][kLanes], exps[kTileClasses][kLanes], z_of[2][kLanes];
  for (T(&lanes)[kLanes] : z_of) V(0).store(lanes);
  const auto look = [&](int64_t k) {
    const int count = int(min_of(job.classes - k, kTileClasses));
    tile.load(k, count, z);
    take_out(tile.label, k, count, -Limits<T>::infinity(), z, z_of[0]);
    if (mixture) take_out(tile.other, k, count, -Limits<T>::infinity(), z, z_of[1]);
    return reduce<T, Needs>(job.class_weight ? job.class_weight + k : nullptr, count, z, exps);
  };
  RowMoments<V> whole = look(0);
  for (int64_t k = kTileClasses; k < job.classes; k += kTileClasses) whole = merge<Needs>(whole, look(k));

  const V z_y[2] = {V::load(z_of[0]), V::load(z_of[1])};
  const RowLoss<V> loss =
      mixture ? finish_mixtures(tile, whole, z_y)
              : finish_label(whole, z_y[0], V::load(tile.class_weight), V::load(tile.row_weight), V::load(tile.scale), job.options);
  tile.record(begin, loss.loss, loss.cross_entropy, loss.diversity, sums);
  if (!job.gradient) return;

  for (int64_t k = 0; k < job.classes; k += kTileClasses) {
    const int count = int(min_of(job.classes - k, kTileClasses));
    if (!one_look) tile.load(k, count, z);
    spread<T, Needs>(job.class_weight ? job.class_weight + k : nullptr, loss.gradient, whole.m, count, one_look ? exps : nullptr, z);
    store_labelled(tile, k, count, loss.gradient, z);
  }
}

template <class T, unsigned Needs>
void rows(const Job<T>& job, int64_t begin, int64_t end, LossSums<T>* sums) {
  if (by_row(job)) {
    alignas(64) T exps[kRowLimit<T> + kBlock];
    for (int64_t r = begin; r < end; ++r) one_row<T, Needs>(job, r, exps, sums);
  } else {
    Walk<T> walk(job, begin);
    for (int64_t r = begin; r < end; r += Vec<T>::kLanes) one_tile<T, Needs>(walk, r, end, sums);
  }
}

template <class T, unsigned Needs>
void reduce_part(const Job<T>& job, int64_t r, int64_t part, RowMoments<T>* moments) {
  const Row<T> row = locate(job, r);
  if (row.label < 0) return;
  const RowBlocks<T> blocks(job, row);
  const int64_t from = part * (kPart / kBlock);
  *moments = reduce<T, Needs>(blocks, job.class_weight, from, min_of(from + kPart / kBlock, blocks.count), nullptr);
}

template <class T, unsigned Needs>
void finish_row(const Job<T>& job, int64_t r, RowMoments<T>* parts, RowGradient<T>* gradient, LossSums<T>* sums) {
  const Row<T> row = locate(job, r);
  if (row.label < 0) return ignore(job, row, r);
  const int64_t count = (job.classes + kPart - 1) / kPart;
  for (int64_t width = 1; width < count; width *= 2)  // pairwise: a million classes add up in eight roundings, not 245
    for (int64_t p = 0; p + width < count; p += 2 * width) parts[p] = merge<Needs>(parts[p], parts[p + width]);
  const RowLoss<T> loss = finish_at(job, row, parts[0]);
  record(job, r, loss, sums);
  *gradient = loss.gradient;
}

template <class T, unsigned Needs>
void spread_part(const Job<T>& job, int64_t r, int64_t part, T m, const RowGradient<T>& gradient) {
  const Row<T> row = locate(job, r);
  if (row.label < 0) return;
  const RowBlocks<T> blocks(job, row);
  const int64_t from = part * (kPart / kBlock);
  spread<T, Needs>(blocks, job.class_weight, from, min_of(from + kPart / kBlock, blocks.count), gradient, m, nullptr, m, row.gradient);
  if (row.label / kPart == part) store_one(gradient.label, job.storage, row.gradient + row.label * job.gradient_step);
  if (row.other >= 0 && row.other / kPart == part) store_one(gradient.other, job.storage, row.gradient + row.other * job.gradient_step);
}

}  // namespace
}  // namespace FSL_ISA
}  // namespace fastsoftloss

#include "hessian_impl.h"
#include "probabilities_impl.h"

namespace fastsoftloss {
namespace FSL_ISA {
namespace {

// A penalty alone asks for moments there, in float32: the kernels for several things at once are never called.
template <class T>
constexpr unsigned of_probabilities(unsigned needs) {
  return sizeof(T) == 8 ? unsigned(kAllMoments & ~kWeighted) : needs & (needs - 1) ? unsigned(kBase) : needs;
}

template <class T, unsigned Needs>
constexpr Kernels<T> kKernels = {rows<T, Needs>,        probabilities<T, of_probabilities<T>(Needs)>,
                                 reduce_part<T, Needs>, finish_row<T, Needs>,
                                 spread_part<T, Needs>, hessian<T, Needs>};

}  // namespace

template <>
const Kernels<float>& kernels(unsigned needs) {
  switch (needs) {
    case kBase:
      return kKernels<float, kBase>;
    case kLogits:
      return kKernels<float, kLogits>;
    case kSquares:
      return kKernels<float, kSquares>;
    case kEntropy:
      return kKernels<float, kEntropy>;
    case kAllMoments & ~kWeighted:
      return kKernels<float, kAllMoments & ~kWeighted>;
    default:
      return kKernels<float, kAllMoments>;
  }
}

template <>
const Kernels<double>& kernels(unsigned needs) {
  return needs & kWeighted ? kKernels<double, kAllMoments> : kKernels<double, kAllMoments & ~kWeighted>;
}

}  // namespace FSL_ISA
}  // namespace fastsoftloss
