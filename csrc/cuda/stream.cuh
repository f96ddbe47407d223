// Rows of class stride 1 in passes: reduce a part of a row, merge the parts and finish, spread a part of the gradient.
// For rows that no block holds, and for the backward of all that are long enough to have kept something for it.
#pragma once

#include "sums.cuh"

namespace fastsoftloss {
namespace cuda {

constexpr int kStep = 32;  // logits a thread and turn
constexpr int kSamples = 8;

// Part `split` of `splits` of a row: its share of the vectors, and the edge beside them.
template <Storage S>
struct Part {
  int begin, end;  // vectors
  int from, to;    // classes
  bool first, last;

  FSL_DEVICE Part(const Span<S>& span, int classes, int split, int splits) {
    const int share = splits == 1 ? span.vectors : (span.vectors + splits - 1) / splits;
    begin = min(split * share, span.vectors), end = min(begin + share, span.vectors);
    first = split == 0, last = split == splits - 1;
    from = first ? 0 : span.head + begin * Memory<S>::kVector;
    to = last ? classes : span.head + end * Memory<S>::kVector;
  }
  FSL_DEVICE int edge(const Span<S>& span, int lane) const {
    return lane < Memory<S>::kVector ? (first ? span.edge(lane) : -1) : last ? span.edge(lane) : -1;
  }
};

// One block a row and part: its moments.
template <Storage S, unsigned Needs>
__global__ void __launch_bounds__(256, 4) reduce(const __grid_constant__ Job<float> job) {
  using M = Memory<S>;
  constexpr int V = M::kVector, N = kStep / V;
  __shared__ float exchange[kMostWarps * 4];
  const Group<float> group(blockDim.x, exchange);
  if (blockIdx.x == 0 && threadIdx.x == 0 && job.counter) *job.counter = 0;  // for merge
  for (int64_t unit = blockIdx.x; unit < job.rows * job.splits; unit += gridDim.x) {
    const int64_t r = job.splits == 1 ? unit : unit / job.splits;
    const int split = int(unit - r * job.splits);
    const Row<float> row = locate(job, r);
    if (row.label < 0) continue;
    const Span<S> span(row.logits, job.classes);
    const Part<S> part(span, job.classes, split, job.splits);
    const char* body = row.logits + span.head * M::kBytes;
    const int place = row.label - span.head;
    const int vector = place >= 0 && place < span.vectors * V ? place / V : -1;
    const int edge = part.edge(span, group.lane);

    // about the mean of a few logits that are not the true class
    float sample[2] = {0, 0};
    const int first = part.begin + group.lane;
    if (group.lane < kSamples && first < part.end && first * V != place) sample[0] = M::load(body + int64_t(first) * 16), sample[1] = 1;
    group.sum(sample);
    const Reference at(sample[0] / fmaxf(sample[1], 1.f));

    Sums<Needs> sums;
    const auto add = [&](const uint4& raw) {
      float z[V];
      M::unpack(raw, z);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float y = at.y(z[j]);
        sums.add(y, exp2_approx(y));
      }
    };
    // the true class is overwritten with the logit beside it, whose second exponential is taken back out
    const auto leave_out = [&](uint4& raw) {
      float twin;
      M::take(raw, place % V, twin);
      const float y = at.y(twin);
      sums.remove(y, exp2_approx(y));
    };
    const char* from = body + int64_t(first) * 16;
    const int stride = group.size * 16;
    int i = first;
    for (; i + (N - 1) * group.size < part.end; i += N * group.size, from += N * stride) {
      uint4 raw[N];
#pragma unroll
      for (int v = 0; v < N; ++v) raw[v] = load16(from + v * stride);
      const int ahead = vector - i;
      if (ahead >= 0 && ahead % group.size == 0 && ahead < N * group.size) {
        uint4 own = raw[0];
#pragma unroll
        for (int v = 1; v < N; ++v)
          if (v * group.size == ahead) own = raw[v];
        leave_out(own);
#pragma unroll
        for (int v = 0; v < N; ++v)
          if (v * group.size == ahead) raw[v] = own;
      }
#pragma unroll
      for (int v = 0; v < N; ++v) add(raw[v]);
    }
    for (; i < part.end; i += group.size, from += stride) {
      uint4 raw = load16(from);
      if (i == vector) leave_out(raw);
      add(raw);
    }
    if (edge >= 0 && edge != row.label) {
      const float y = at.y(M::load(row.logits + int64_t(edge) * M::kBytes));
      sums.add(y, exp2_approx(y));
    }
    sums.join(group);
    const float n = float(part.to - part.from - (row.label >= part.from && row.label < part.to));
    RowMoments<float> moments;
    if (n > 0 && !sums.sound(n)) {
      moments = careful_reduce<S>(group, row.logits, M::kBytes, part.from, part.to, row.label, static_cast<const float*>(nullptr),
                                  static_cast<float*>(nullptr));
    } else if (n > 0) {
      moments = sums.moments(n, at);
    }
    if (group.lane == 0) reinterpret_cast<RowMoments<float>*>(job.moments)[unit] = moments;
  }
}

template <class T, class F>
FSL_DEVICE RowMoments<T> map(RowMoments<T> r, F f) {
  r.n = f(r.n), r.m = f(r.m), r.s1 = f(r.s1), r.s2 = f(r.s2), r.sx = f(r.sx), r.mean = f(r.mean), r.m2 = f(r.m2);
  return r;
}

// One warp a row: the parts in one, its losses, and what the backward wants.
template <Storage S>
__global__ void __launch_bounds__(256) merge_parts(const __grid_constant__ Job<float> job) {
  constexpr unsigned kAll = kLogits | kSquares | kEntropy;
  const Group<float> group(32, nullptr);
  Tally<float> tally;
  for (int64_t r = int64_t(blockIdx.x) * group.count + group.index; r < job.rows; r += int64_t(gridDim.x) * group.count) {
    const Row<float> row = locate(job, r);
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
    const float z_y = Memory<S>::load(row.logits + int64_t(row.label) * Memory<S>::kBytes);
    const bool whole = moments.n == float(job.classes - 1) && moments.s1 > 0 && moments.s1 < 1e37f;
    if (moments.s1 > 0 && moments.s1 < 1e37f) Move about_one(moments);
    const RowLoss<float> out = finish_row(job, row, moments, z_y, float(job.classes));
    if (group.lane != 0) continue;
    tally.add(job, r, row, out);
    save(job, r, moments.m, out.gradient, !whole);
  }
  tally.close(job);
}

// A group a row and part: its gradient from what the forward kept.
template <Storage S, unsigned Needs>
__global__ void __launch_bounds__(256, 4) spread(const __grid_constant__ Job<float> job, int lanes) {
  using M = Memory<S>;
  constexpr int V = M::kVector, N = kStep / V;
  if (settled(job)) return;
  const Group<float> group(lanes, nullptr);
  const float scale = mean_scale(job);
  for (int64_t unit = int64_t(blockIdx.x) * group.count + group.index; unit < job.rows * job.splits;
       unit += int64_t(gridDim.x) * group.count) {
    const int64_t r = job.splits == 1 ? unit : unit / job.splits;
    const int split = int(unit - r * job.splits);
    const Row<float> row = locate(job, r);
    if (job.rescale && row.upstream == 1.f) continue;
    const Span<S> span(row.logits, job.classes);
    const Part<S> part(span, job.classes, split, job.splits);

    if (row.label < 0) {
      fill_zero<S>(group, row.gradient, job.gradient_step, part.from, part.to);
      continue;
    }

    const float* kept = job.saved + r;
    const float m = kept[0], steep = kept[2 * job.rows];
    const bool careful = kept[5 * job.rows] != 0;
    RowGradient<float> g;
    g.a = kept[job.rows], g.e0 = kept[3 * job.rows], g.label = kept[4 * job.rows];
    (job.options.diversity == Diversity::kl ? g.t : job.options.diversity == Diversity::logit_variance ? g.e1 : g.b) = steep;
    // a masked class gets what label smoothing takes from each, and NaN in a NaN row
    if (careful) g.masked = g.a * 0.f - float(job.options.label_smoothing / job.options.classes) * row.row_weight;
    g = times(g, scale * row.upstream);
    // vectors where the gradient's row starts at the same place of its 16 bytes, which a fresh gradient mostly does
    const bool alike = job.gradient_step == M::kBytes && ((row.gradient - row.logits) & 15) == 0;
    if (careful || !alike) {
      careful_spread<S>(group, row.logits, M::kBytes, row.gradient, job.gradient_step, part.from, part.to, row.label, m, g,
                        static_cast<const float*>(nullptr));
      continue;
    }
    const Reference at(m);
    const Slope<Needs> slope(g, at, 0.f, 1.f);
    const char* body = row.logits + span.head * M::kBytes;
    const int place = row.label - span.head;
    const int vector = place >= 0 && place < span.vectors * V ? place / V : -1;
    const auto turn = [&](const uint4& raw) {
      float z[V];
      M::unpack(raw, z);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float y = at.y(z[j]);
        z[j] = slope(y, exp2_approx(y));
      }
      return M::pack(z);
    };
    const int first = part.begin + group.lane, stride = group.size * 16;
    const char* from = body + int64_t(first) * 16;
    const int64_t there = row.gradient - row.logits;
    int i = first;
    for (; i + (N - 1) * group.size < part.end; i += N * group.size, from += N * stride) {
      uint4 raw[N];
#pragma unroll
      for (int v = 0; v < N; ++v) raw[v] = load16(from + v * stride);
#pragma unroll
      for (int v = 0; v < N; ++v) store16(const_cast<char*>(from + v * stride) + there, turn(raw[v]));
    }
    for (; i < part.end; i += group.size, from += stride) store16(const_cast<char*>(from) + there, turn(load16(from)));
    if (vector >= part.begin && vector < part.end && (vector - part.begin) % group.size == group.lane)  // over what this thread stored
      M::store(row.gradient + int64_t(row.label) * M::kBytes, g.label);
    const int edge = part.edge(span, group.lane);
    if (edge >= 0) {
      const float y = at.y(M::load(row.logits + int64_t(edge) * M::kBytes));
      M::store(row.gradient + int64_t(edge) * M::kBytes, edge == row.label ? g.label : slope(y, exp2_approx(y)));
    }
  }
}

}  // namespace cuda
}  // namespace fastsoftloss
