// Rows that a group of threads holds in registers, 64 logits a thread: read once, and the gradient written in the same pass.
#pragma once

#include "sums.cuh"

namespace fastsoftloss {
namespace cuda {

constexpr int kHeld = 64;            // logits a thread
constexpr int kResidentBlock = 128;  // threads, where a row takes no more than a warp; else one row a block

template <Storage S, unsigned Needs, bool kGradient, bool kMixed>
__global__ void __launch_bounds__(256, 1) resident(const __grid_constant__ Job<float> job, int lanes) {
  using M = Memory<S>;
  constexpr int V = M::kVector, N = kHeld / V, kSure = N / 2 - 1;
  __shared__ float exchange[kMostWarps * kMostSums], slot;
  __shared__ Told<Needs> of_rows[kResidentBlock / 16];
  const Group<float> group(lanes, exchange);
  if (settled(job)) return;
  Told<Needs>& told = of_rows[group.index];
  Tally<float> tally{};
  const float scale = kGradient ? scale_of_all(job) : 1.f;

  const int64_t stride_of_rows = int64_t(gridDim.x) * group.count;
  for (int64_t r = int64_t(blockIdx.x) * group.count + group.index; r < job.rows; r += stride_of_rows) {
    const Row<float, kMixed> row = locate<kMixed>(job, r);
    if (kGradient && settled(job, row)) continue;

    if (row.label < 0) {
      row_without_label<S>(job, group, r, row, job.gradient_step, kGradient, tally);
      continue;
    }

    // load. Lane 0 starts at a sector of 32 bytes, so that a warp's accesses do: where the first vector is the second half of
    // one, lane 0 has none in its place. The plan takes so few lanes that each has vectors 1 to kSure.
    const Span<S> span(row.logits, job.classes);
    const int half = (int(reinterpret_cast<intptr_t>(row.logits)) + 15) & 16;  // of the first vector in its sector
    const int skip = span.vectors < lanes * N ? half / 16 : 0;
    const int count = span.vectors + skip, stride = lanes * 16;
    const int body = span.head * M::kBytes + (group.lane - skip) * 16;
    const int mine = (count + lanes - 1 - group.lane) >> group.shift;
    const auto has = [&](int v) { return v == 0 ? group.lane >= skip : v <= kSure || v < mine; };
    const char* from = row.logits + body;
    uint4 raw[N];
#pragma unroll
    for (int v = 0; v < N; ++v) {
      if (has(v)) raw[v] = load16(from);
      from += stride;
    }
    const int edge = span.edge(group.lane);
    float z_edge = 0;
    if (edge >= 0) z_edge = M::load(row.logits + edge * M::kBytes);

    // a label is overwritten with a logit beside it, whose second exponential is taken back out below
    const auto take = [&](int label, int avoid, float& z, float& twin) {
      const int vector = span.vector(label);
      const bool owner = vector >= 0 && ((vector + skip) & (lanes - 1)) == group.lane;
      if (owner) {
        const int held = (vector + skip) >> group.shift;
        uint4 own;
#pragma unroll
        for (int v = 0; v < N; ++v)
          if (v == held) own = raw[v];
        z = span.take(own, label, avoid, twin);
#pragma unroll
        for (int v = 0; v < N; ++v)
          if (v == held) raw[v] = own;
      }
      if (edge == label) z = z_edge;
      return owner;
    };
    float twin = 0, other_twin = 0;
    const bool owns_other = row.two() && take(row.other, row.label, told.z[1], other_twin);
    const bool owner = take(row.label, -1, told.z[0], twin);

    // reduce, about the mean of four logits that lane 1 has
    float z[V];
    M::unpack(raw[0], z);
    const Reference at(group.of(1, (z[0] + z[1] + z[2] + z[3]) * 0.25f, &slot));
    Sums<Needs> sums;
    if (owner) {
      const float y = at.y(twin);
      sums.remove(y, exp2_approx(y));
    }
    if (owns_other) {
      const float y = at.y(other_twin);
      sums.remove(y, exp2_approx(y));
    }
    float y[kHeld], e[kHeld];
#pragma unroll
    for (int v = 0; v < N; ++v) {
      if (has(v)) {
        M::unpack(raw[v], z);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          y[v * V + i] = at.y(z[i]), e[v * V + i] = exp2_approx(y[v * V + i]);
          sums.add(y[v * V + i], e[v * V + i]);
        }
      }
    }
    if (edge >= 0 && !row.has(edge)) {
      const float y_edge = at.y(z_edge);
      sums.add(y_edge, exp2_approx(y_edge));
    }
    __builtin_assume(group.size >= 16);
    sums.join_for_first(group);

    // finish
    if (group.lane == 0) {
      const float n = float(job.classes - row.classes()), inv_n = inverse(n);
      told.way = Way::careful;
      if (sums.sound(inv_n, at, kMostMovable<Needs>)) {
        RowMoments<float> moments = sums.moments(n, inv_n, at);
        const Move move(moments);
        const Weights<float, kMixed> weights(job, r, row);
        const RowLoss<float> out = finish_row<Needs>(moments, row, told.z, weights, 1.f, job.options);
        const RowGradient<float> g = times<kMixed>(out.gradient, scale * row.upstream);
        told.slope = Slope<Needs>(move.back(g), at, kMixed), told.label = g.label;
        if (kMixed) told.other = g.other;
        if (!kGradient || told.slope.exact) {
          told.way = alike<S>(row, job.gradient_step) ? Way::quick : Way::across;
          tally.add(job, r, weights.share(), out);
          if (job.saved) save<kMixed>(job, r, moments.m, out.gradient, false);
        }
      }
    }
    group.sync();
    if (kGradient ? told.way != Way::quick : told.way == Way::careful) {
      if (told.way == Way::careful) {
        careful_row<S>(job, group, r, row, M::kBytes, job.gradient_step, scale, kGradient, tally);
      } else {
        spread_across<S>(group, row, job.gradient_step, 0, job.classes, at, told.slope, told.label, told.other);
      }
      continue;
    }
    if (!kGradient) continue;

    // spread
    const Slope<Needs> slope = told.slope;
    char* to = row.gradient + body;
#pragma unroll
    for (int v = 0; v < N; ++v) {
      if (has(v)) {
        float dz[V];
#pragma unroll
        for (int i = 0; i < V; ++i) dz[i] = slope(y[v * V + i], e[v * V + i]);
        store16(to, M::pack(dz));
      }
      to += stride;
    }
    if (edge >= 0) {
      const float y_edge = at.y(z_edge);
      M::store(row.gradient + edge * M::kBytes, slope(y_edge, exp2_approx(y_edge)));
    }
    // over what this thread has just stored
    if (owner || edge == row.label) M::store(row.gradient + row.label * M::kBytes, told.label);
    if (row.two() && (owns_other || edge == row.other)) M::store(row.gradient + row.other * M::kBytes, told.other);
  }
  tally.close(job);
}

}  // namespace cuda
}  // namespace fastsoftloss
