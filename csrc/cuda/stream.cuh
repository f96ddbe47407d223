// Rows of class stride 1 in passes: reduce a part of a row, merge the parts where there are several, spread a part of the
// gradient. A warp a row, or a block where rows are long, with no more of a row in registers than one turn.
#pragma once

#include "sums.cuh"

namespace fastsoftloss {
namespace cuda {

constexpr int kTurn = 4;           // vectors a thread and turn
constexpr int kStreamBlock = 128;  // threads; a multiprocessor has 8 blocks, or 6 where a second label takes registers

// A block's part of a row, of as many as the grid is high: its share of the vectors, and the edge beside them.
template <Storage S>
struct Part {
  int begin, end;  // vectors
  int from, to;    // classes
  Span<S> span;    // of the whole row

  FSL_DEVICE Part(const Span<S>& whole, int classes) : begin(0), end(whole.vectors), from(0), to(classes), span(whole) {
    if (gridDim.y == 1) return;
    const int split = blockIdx.y, share = (span.vectors + gridDim.y - 1) / gridDim.y;
    begin = min(split * share, span.vectors), end = min(begin + share, span.vectors);
    if (split > 0) from = span.head + begin * Memory<S>::kVector;
    if (split < gridDim.y - 1) to = span.head + end * Memory<S>::kVector;
  }
  FSL_DEVICE bool holds(int k) const { return k >= from && k < to; }
  FSL_DEVICE int edge(int lane) const {
    if ((span.head | span.tail) == 0) return -1;
    const int k = span.edge(lane);
    return holds(k) ? k : -1;
  }
  // The first of this thread's vectors. From there kTurn of them are 32 apart, and neighbouring turns are neighbouring warps'.
  FSL_DEVICE int mine(int lane) const { return begin + lane / 32 * (32 * kTurn) + lane % 32; }
  // turn(i, has) for the vectors i + 32 v, v < kTurn; has(v) says which of them there are.
  template <class F>
  FSL_DEVICE void each_turn(int lane, int lanes, F turn) const {
    int i = mine(lane);
    for (; i + 32 * (kTurn - 1) < end; i += kTurn * lanes) turn(i, [](int) { return true; });
    if (i < end) turn(i, [i, this](int v) { return i + 32 * v < end; });
  }
};

// A row's losses, and what its backward wants: by one thread.
template <unsigned Needs, class T, bool kMixed>
FSL_DEVICE void settle(const Job<T>& job, int64_t r, const Row<T, kMixed>& row, RowMoments<T> moments, const T (&z)[2], Tally<T>& tally) {
  const bool finite = moments.s1 > 0 && moments.s1 < 1e37f, whole = finite && moments.n == T(job.classes - row.classes());
  if (finite) Move about_one(moments);
  const Weights<T, kMixed> weights(job, r, row);
  const RowLoss<T> out = finish_row<Needs>(moments, row, z, weights, T(1), job.options);
  tally.add(job, r, weights.share(), out);
  save<kMixed>(job, r, moments.m, out.gradient, !whole);
}

// A group a row and part: its moments; and its losses, where the part is the row.
template <Storage S, unsigned Needs, bool kMixed>
__global__ void __launch_bounds__(kStreamBlock, kMixed ? 6 : 8) reduce(const __grid_constant__ Job<float> job, int lanes) {
  using M = Memory<S>;
  constexpr int V = M::kVector;
  __shared__ float exchange[kMostWarps * kMostSums];
  __builtin_assume(lanes >= 32);  // no register for the lanes of a group within a warp
  const Group<float> group(lanes, exchange);
  __shared__ Tally<float> tallies[kStreamBlock / 32];  // a warp's first thread's: registers are short
  Tally<float>& tally = tallies[threadIdx.x / 32];
  const bool first = threadIdx.x % 32 == 0;
  if (first) tally = {};
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0 && job.counter) *job.counter = 0;  // for merge_parts
  const int64_t stride = int64_t(gridDim.x) * group.count;
  for (int64_t r = int64_t(blockIdx.x) * group.count + group.index; r < job.rows; r += stride) {
    const Row<float, kMixed> row = locate<kMixed>(job, r);
    if (row.label < 0) {
      if (gridDim.y == 1) row_without_label<S>(job, group, r, row, 0, false, tally);
      continue;
    }
    const Span<S> span(row.logits, job.classes);
    const Part<S> part(span, job.classes);
    const char* body = row.logits + span.head * M::kBytes;
    const int vector = span.vector(row.label), other_vector = row.two() ? span.vector(row.other) : -1;

    // about the mean of four logits that are no label: the plan gives each part more than three vectors
    float z[V];
    int free = part.begin + (vector == part.begin);
    if (row.two()) free += free == other_vector, free += free == vector;
    M::unpack(load16(body + int64_t(free) * 16), z);
    const Reference at((z[0] + z[1] + z[2] + z[3]) * 0.25f);

    const float n = float(part.to - part.from - part.holds(row.label) - (row.two() && part.holds(row.other)));
    Sums<Needs> sums;
    const char* from = body + int64_t(part.mine(group.lane)) * 16;
    part.each_turn(group.lane, lanes, [&](int i, auto has) {
      uint4 raw[kTurn];
      // without the zeros ptxas keeps registers for raw through the whole kernel
#pragma unroll
      for (int v = 0; v < kTurn; ++v) raw[v] = has(v) ? load16(from + v * 512) : uint4{};
      // a label is overwritten with a logit beside it, whose second exponential is taken back out
      const auto take = [&](int label, int vector, int avoid) {
        const unsigned ahead = vector - i, held = __funnelshift_r(ahead, ahead, 5);  // ahead / 32, huge where that leaves a rest
        if (held < kTurn) {
          float twin;
#pragma unroll
          for (int v = 0; v < kTurn; ++v)
            if (v == held) span.take(raw[v], label, avoid, twin);
          const float y = at.y(twin);
          sums.remove(y, exp2_approx(y));
        }
      };
      if (row.two()) take(row.other, other_vector, row.label);
      take(row.label, vector, -1);
#pragma unroll
      for (int v = 0; v < kTurn; ++v) {
        if (has(v)) {
          M::unpack(raw[v], z);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const float y = at.y(z[j]);
            sums.add(y, exp2_approx(y));
          }
        }
      }
      from += kTurn * 16 * lanes;
    });
    const int edge = part.edge(group.lane);
    if (edge >= 0 && !row.has(edge)) {
      const float y = at.y(M::load(row.logits + int64_t(edge) * M::kBytes));
      sums.add(y, exp2_approx(y));
    }
    sums.join(group);
    RowMoments<float> moments;
    const float inv_n = inverse(n);
    if (n > 0 && !sums.sound(inv_n, at, kMostMovable<Needs>)) {
      moments =
          careful_reduce<S>(group, row, M::kBytes, part.from, part.to, static_cast<const float*>(nullptr), static_cast<float*>(nullptr));
    } else if (n > 0) {
      moments = sums.moments(n, inv_n, at);
    }
    if (group.lane != 0) continue;
    if (gridDim.y == 1) {
      float of_labels[2];
      load_labels<S>(row, M::kBytes, of_labels);
      settle<Needs>(job, r, row, moments, of_labels, tally);
    } else {
      reinterpret_cast<RowMoments<float>*>(job.moments)[r * gridDim.y + blockIdx.y] = moments;
    }
  }
  if (gridDim.y == 1) (first ? tally : Tally<float>{}).close(job);
}

template <class T, class F>
FSL_DEVICE RowMoments<T> map(RowMoments<T> r, F f) {
  r.n = f(r.n), r.m = f(r.m), r.s1 = f(r.s1), r.s2 = f(r.s2), r.sx = f(r.sx), r.mean = f(r.mean), r.m2 = f(r.m2);
  return r;
}

// One warp a row: the parts in one, its losses, and what the backward wants.
template <Storage S, bool kMixed>
__global__ void __launch_bounds__(256, kMixed ? 3 : 4) merge_parts(const __grid_constant__ Job<float> job) {
  constexpr unsigned kAll = kLogits | kSquares | kEntropy;
  const Group<float> group(32, nullptr);
  Tally<float> tally{};
  const int64_t stride = int64_t(gridDim.x) * group.count;
  for (int64_t r = int64_t(blockIdx.x) * group.count + group.index; r < job.rows; r += stride) {
    const Row<float, kMixed> row = locate<kMixed>(job, r);
    if (row.label < 0) {
      row_without_label<S>(job, group, r, row, 0, false, tally);
      continue;
    }
    RowMoments<float> moments;
    const auto* parts = reinterpret_cast<const RowMoments<float>*>(job.moments) + r * job.splits;
    for (int i = group.lane; i < job.splits; i += 32) moments = merge<kAll>(moments, parts[i]);
#pragma unroll
    for (int o = 16; o > 0; o /= 2) {
      const auto other = map(moments, [o](float x) { return __shfl_xor_sync(~0u, x, o); });
      // the lower lane's part first on both sides, so that they agree
      moments = group.lane & o ? merge<kAll>(other, moments) : merge<kAll>(moments, other);
    }
    float z[2];
    load_labels<S>(row, Memory<S>::kBytes, z);
    if (group.lane == 0) settle<kAll>(job, r, row, moments, z, tally);
  }
  tally.close(job);
}

// A warp a row and part: its gradient from what the forward kept.
template <Storage S, unsigned Needs, bool kMixed>
__global__ void __launch_bounds__(kStreamBlock, kMixed ? 6 : 8) spread(const __grid_constant__ Job<float> job) {
  using M = Memory<S>;
  constexpr int V = M::kVector, lanes = 32;
  if (settled(job)) return;
  const Group<float> group(lanes, nullptr);
  const float scale = scale_of_all(job);
  const int64_t stride = int64_t(gridDim.x) * group.count;
  for (int64_t r = int64_t(blockIdx.x) * group.count + group.index; r < job.rows; r += stride) {
    const Row<float, kMixed> row = locate<kMixed>(job, r);
    if (settled(job, row)) continue;
    const Span<S> span(row.logits, job.classes);
    const Part<S> part(span, job.classes);

    if (row.label < 0) {
      fill_zero<S>(group, row.gradient, job.gradient_step, part.from, part.to);
      continue;
    }

    const Kept<float, kMixed> kept(job, r);
    const float factor = scale * row.upstream;
    RowGradient<float> g = kept.template gradient<Needs>(job.options, factor);
    if (kept.careful) {
      // a masked class gets what label smoothing takes from each, and NaN in a NaN row
      g.masked =
          g.a * 0.f - float(job.options.label_smoothing) / float(job.classes) * Weights<float, kMixed>(job, r, row).of_row() * factor;
      careful_spread<S>(group, row, M::kBytes, job.gradient_step, part.from, part.to, kept.m, g, static_cast<const float*>(nullptr));
      continue;
    }
    const Reference at(kept.m);
    const Slope<Needs> slope(g, at, kMixed);
    if (!alike<S>(row, job.gradient_step)) {
      spread_across<S>(group, row, job.gradient_step, part.from, part.to, at, slope, g.label, g.other);
      continue;
    }
    const int64_t first = int64_t(span.head + part.mine(group.lane) * V) * M::kBytes;
    const char* from = row.logits + first;
    char* to = row.gradient + first;
    part.each_turn(group.lane, lanes, [&](int, auto has) {
      uint4 raw[kTurn];
#pragma unroll
      for (int v = 0; v < kTurn; ++v)
        if (has(v)) raw[v] = load16(from + v * 512);
#pragma unroll
      for (int v = 0; v < kTurn; ++v) {
        if (has(v)) {
          float z[V];
          M::unpack(raw[v], z);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const float y = at.y(z[j]);
            z[j] = slope(y, exp2_approx(y));
          }
          store16(to + v * 512, M::pack(z));
        }
      }
      from += kTurn * 16 * lanes, to += kTurn * 16 * lanes;
    });
    const int edge = part.edge(group.lane);
    if (edge >= 0) {
      const float y = at.y(M::load(row.logits + int64_t(edge) * M::kBytes));
      M::store(row.gradient + int64_t(edge) * M::kBytes, slope(y, exp2_approx(y)));
    }
    group.sync();  // over what some thread of it has stored
    if (group.lane != 0) continue;
    if (part.holds(row.label)) M::store(row.gradient + int64_t(row.label) * M::kBytes, g.label);
    if (row.two() && part.holds(row.other)) M::store(row.gradient + int64_t(row.other) * M::kBytes, g.other);
  }
}

}  // namespace cuda
}  // namespace fastsoftloss
