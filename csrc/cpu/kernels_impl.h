// reduce and spread over a row, and over a tile of rows whose lanes are rows. Compiled once for each instruction set.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace fastsoftloss {
namespace FSL_ISA {
namespace {

// A loop over logits: one copy of it in the object code.
#define FSL_LOOP __attribute__((noinline))
// Unrolling these gains nothing and triples the time to compile.
#define FSL_ROLLED _Pragma("GCC unroll 1")

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

  FSL_LOOP RowBlocks(const Job<T>& job, const Row<T>& row)
      : logits(row.logits), storage(job.storage), classes(job.classes), count((classes + kBlock - 1) / kBlock) {
    label_block = row.label / kBlock;
    tail_block = classes % kBlock ? count - 1 : -1;
    copy(label_block, label_copy);
    label_copy[row.label % kBlock] = -Limits<T>::infinity();
    other_block = row.other / kBlock;
    if (row.other < 0 || other_block == label_block) other_block = -1;
    if (other_block >= 0) copy(other_block, other_copy);
    if (row.other >= 0) (other_block >= 0 ? other_copy : label_copy)[row.other % kBlock] = -Limits<T>::infinity();
    if (tail_block >= 0 && tail_block != label_block && tail_block != other_block) copy(tail_block, tail_copy);
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
  FSL_FN void copy(int64_t b, T* to) const {
    load_contiguous(logits + b * kBlock * bytes_of(storage), storage, size(b), to);
    for (int64_t i = size(b); i < kBlock; ++i) to[i] = -Limits<T>::infinity();
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
FSL_LOOP RowLoss<U> finish_labels(const RowMoments<U>& rest, const U (&z)[2], const U (&class_weight)[2], const U (&row_weight)[2],
                                  const U& scale, const LossOptions& o) {
  return finish_mixture<kAllMoments>(rest, z, class_weight, row_weight, scale, o);
}

template <class T>
FSL_FN RowLoss<T> finish_at(const Job<T>& job, const Row<T>& row, const RowMoments<T>& moments) {
  const T z_y = load_one<T>(row.logits + row.label * job.logits_step, job.storage);
  if (row.other < 0) return finish_label(moments, z_y, row.class_weight, row.row_weight, row.scale, job.options);
  const T z[2] = {z_y, load_one<T>(row.logits + row.other * job.logits_step, job.storage)};
  const T class_weight[2] = {row.class_weight, row.other_class_weight}, row_weight[2] = {row.row_weight, row.other_row_weight};
  return finish_labels(moments, z, class_weight, row_weight, row.scale, job.options);
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
  Row<T> row[kLanes];
  int valid;

  FSL_FN Tile(const Job<T>& job, int64_t begin, int64_t end) : job(job), valid(int(end - begin)) {
    for (int lane = 0; lane < kLanes; ++lane) row[lane] = lane < valid ? locate(job, begin + lane) : row[0];
  }
  // The true classes, counted from class k on, as far as a tile's classes go; below 0 where a row is ignored, or has no other.
  FSL_FN V labels(int64_t k, int64_t Row<T>::* which = &Row<T>::label) const {
    T label[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t y = row[lane].*which;
      label[lane] = y < 0 ? T(-1) : T(y < k || y >= k + kTileClasses ? kTileClasses : y - k);
    }
    return V::load(label);
  }
  // Each row's logit of one of its labels.
  FSL_FN V logits_at(int64_t Row<T>::* which) const {
    T lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t y = row[lane].*which;
      lanes[lane] = y >= 0 ? load_one<T>(row[lane].logits + y * job.logits_step, job.storage) : T(0);
    }
    return V::load(lanes);
  }
  // What each row has one of.
  FSL_FN V each(T Row<T>::* which) const {
    T lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = row[lane].*which;
    return V::load(lanes);
  }
  FSL_FN void load(int64_t k, int count, T (*z)[kLanes]) const { load(&Row<T>::logits, job.storage, job.logits_step, k, count, z); }
  // Classes [k, k + count) of the logits, or of the probabilities, into z, a vector each.
  FSL_LOOP void load(const char* Row<T>::* from, Storage storage, int64_t step, int64_t k, int count, T (*z)[kLanes]) const {
    const int64_t bytes = bytes_of(storage);
    if (run(from, bytes)) {
      for (int i = 0; i < count; ++i) load_contiguous(row[0].*from + (k + i) * step, storage, kLanes, z[i]);
    } else if (step == bytes) {
      T buffer[kLanes][kTileClasses];
      const T* line[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        line[lane] = reinterpret_cast<const T*>(row[lane].*from) + k;
        if (!holds<T>(storage)) load_contiguous(row[lane].*from + k * bytes, storage, count, buffer[lane]), line[lane] = buffer[lane];
      }
      load_columns(line, count, z);
    } else {
      for (int i = 0; i < count; ++i)
        for (int lane = 0; lane < kLanes; ++lane) z[i][lane] = load_one<T>(row[lane].*from + (k + i) * step, storage);
    }
  }
  FSL_LOOP void store(int64_t k, int count, const T (*dz)[kLanes]) const {
    const int64_t bytes = bytes_of(job.storage);
    if (run(&Row<T>::gradient, bytes)) {
      for (int i = 0; i < count; ++i) store_contiguous(dz[i], job.storage, kLanes, row[0].gradient + (k + i) * job.gradient_step);
    } else if (job.gradient_step == bytes) {
      T buffer[kLanes][kTileClasses];
      T* line[kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        line[lane] = holds<T>(job.storage) && lane < valid ? reinterpret_cast<T*>(row[lane].gradient) + k : buffer[lane];
      store_columns(dz, count, line);
      if (!holds<T>(job.storage))
        for (int lane = 0; lane < valid; ++lane) store_contiguous(buffer[lane], job.storage, count, row[lane].gradient + k * bytes);
    } else {
      for (int i = 0; i < count; ++i)
        for (int lane = 0; lane < valid; ++lane) store_one(dz[i][lane], job.storage, row[lane].gradient + (k + i) * job.gradient_step);
    }
  }
  FSL_LOOP void record(int64_t begin, V loss, V cross_entropy, V diversity, LossSums<T>* sums) const {
    const V values[3] = {loss, cross_entropy, diversity};
    for (int i = 0; i < 3; ++i) {
      T lanes[kLanes];
      values[i].store(lanes);
      double sum = 0;
      for (int lane = 0; lane < valid; ++lane) sum += lanes[lane];
      sums->of[i] += sum;
      if (job.row_losses[i]) memcpy(job.row_losses[i] + begin, lanes, valid * sizeof(T));
    }
  }

 private:
  // The lanes lie side by side in memory.
  template <class P>
  FSL_FN bool run(P* Row<T>::* which, int64_t bytes) const {
    bool all = valid == kLanes;
    for (int lane = 1; lane < kLanes; ++lane) all &= row[lane].*which == row[0].*which + lane * bytes;
    return all;
  }
};

// A mixture's second labels: -inf in z, as the first ones become in reduce.
template <class T>
FSL_LOOP void take_out(const Tile<T>& tile, int64_t k, int count, T (*z)[Vec<T>::kLanes]) {
  for (int lane = 0; lane < Vec<T>::kLanes; ++lane) {
    const int64_t y = tile.row[lane].other;
    if (y >= k && y < k + count) z[y - k][lane] = -Limits<T>::infinity();
  }
}

// finish for lanes of which some have a second label.
template <class T>
FSL_FN RowLoss<Vec<T>> finish_mixtures(const Tile<T>& tile, const RowMoments<Vec<T>>& rest, const RowLoss<Vec<T>>& single) {
  using V = Vec<T>;
  const V z[2] = {tile.logits_at(&Row<T>::label), tile.logits_at(&Row<T>::other)};
  const V class_weight[2] = {tile.each(&Row<T>::class_weight), tile.each(&Row<T>::other_class_weight)};
  const V row_weight[2] = {tile.each(&Row<T>::row_weight), tile.each(&Row<T>::other_row_weight)};
  RowLoss<V> both = finish_labels(rest, z, class_weight, row_weight, tile.each(&Row<T>::scale), tile.job.options);
  const auto mixed = V(T(-1)) < tile.labels(0, &Row<T>::other);
  V* const to = &both.loss;
  const V* const from = &single.loss;
  for (size_t i = 0; i < sizeof(both) / sizeof(V); ++i) to[i] = select(mixed, to[i], from[i]);
  return both;
}

// reduce: a row a lane; the true class, where it is one of these, becomes -inf in z.
template <class T, unsigned Needs>
FSL_LOOP RowMoments<Vec<T>> reduce(const T* weight, Vec<T> label, int count, T (*z)[Vec<T>::kLanes], T (*exps)[Vec<T>::kLanes]) {
  using V = Vec<T>;
  Accumulator<T, Needs> acc;
  for (int i = 0; i < count; ++i) {
    const V zi = select(label == V(T(i)), V(-Limits<T>::infinity()), V::load(z[i]));
    zi.store(z[i]);
    acc.look(zi);
  }
  const V at = select(acc.m == V(-Limits<T>::infinity()), V(0), acc.m);
  acc.shift = Needs & kLogits ? acc.total / max(acc.n, V(1)) - at : V(0);
  for (int i = 0; i < count; ++i) acc.add(V::load(z[i]), at, V(Needs & kWeighted ? weight[i] : T(0))).store(exps[i]);
  return moments<Needs>(acc, acc.n, acc.m, acc.shift, [](V lanes) { return lanes; });
}

template <class T, unsigned Needs>
void one_tile(const Job<T>& job, int64_t begin, int64_t end, LossSums<T>* sums) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  const Tile<T> tile(job, begin, end);
  alignas(64) T z[kTileClasses][kLanes], exps[kTileClasses][kLanes];
  const bool one_look = job.classes <= kTileClasses;
  RowMoments<V> whole;
  for (int64_t k = 0; k < job.classes; k += kTileClasses) {
    const int count = int(min_of(job.classes - k, kTileClasses));
    tile.load(k, count, z);
    if (job.form == Form::mixture) take_out(tile, k, count, z);
    const auto part = reduce<T, Needs>(job.class_weight ? job.class_weight + k : nullptr, tile.labels(k), count, z, exps);
    whole = k ? merge<Needs>(whole, part) : part;
  }

  RowLoss<V> loss = finish_label(whole, tile.logits_at(&Row<T>::label), tile.each(&Row<T>::class_weight), tile.each(&Row<T>::row_weight),
                                 tile.each(&Row<T>::scale), job.options);
  if (job.form == Form::mixture) loss = finish_mixtures(tile, whole, loss);
  const auto counts = V(T(-1)) < tile.labels(0);
  tile.record(begin, select(counts, loss.loss, V(0)), select(counts, loss.cross_entropy, V(0)), select(counts, loss.diversity, V(0)), sums);
  if (!job.gradient) return;

  for (int64_t k = 0; k < job.classes; k += kTileClasses) {
    const int count = int(min_of(job.classes - k, kTileClasses));
    const V label = tile.labels(k);
    if (!one_look) tile.load(k, count, z);
    const V other = job.form == Form::mixture ? tile.labels(k, &Row<T>::other) : V(T(-1));
    for (int i = 0; i < count; ++i) {
      const V zi = V::load(z[i]), x = zi - whole.m, e = one_look ? V::load(exps[i]) : exp(x);
      const V w(Needs & kWeighted ? job.class_weight[k + i] : T(0));
      V dz = select(label == V(T(i)), loss.gradient.label, slope<Needs>(loss.gradient, zi, x, e, w));
      if (job.form == Form::mixture) dz = select(other == V(T(i)), loss.gradient.other, dz);
      select(counts, dz, V(0)).store(z[i]);
    }
    tile.store(k, count, z);
  }
}

template <class T, unsigned Needs>
void rows(const Job<T>& job, int64_t begin, int64_t end, LossSums<T>* sums) {
  if (by_row(job)) {
    alignas(64) T exps[kRowLimit<T> + kBlock];
    for (int64_t r = begin; r < end; ++r) one_row<T, Needs>(job, r, exps, sums);
  } else {
    for (int64_t r = begin; r < end; r += Vec<T>::kLanes) one_tile<T, Needs>(job, r, min_of(r + Vec<T>::kLanes, end), sums);
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
constexpr Kernels<T> kKernels = {rows<T, Needs>, probabilities<T, of_probabilities<T>(Needs)>, reduce_part<T, Needs>, finish_row<T, Needs>,
                                 spread_part<T, Needs>};

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
