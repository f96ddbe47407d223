// Rows that a group of threads holds in registers, 64 logits a thread: read once, and the gradient written in the same pass.
#pragma once

#include "sums.cuh"

namespace fastsoftloss {
namespace cuda {

constexpr int kHeld = 64;            // logits a thread
constexpr int kResidentBlock = 128;  // threads, where a row takes no more than a warp; else one row a block

template <Storage S, unsigned Needs, bool kGradient>
__global__ void __launch_bounds__(256, 1) resident(const __grid_constant__ Job<float> job, int lanes) {
  using M = Memory<S>;
  constexpr int V = M::kVector, N = kHeld / V, kSure = N / 2 - 1;
  __shared__ float exchange[kMostWarps * 4];
  __shared__ RowGradient<float> finished;
  const Group<float> group(lanes, exchange);
  if (settled(job)) return;
  const bool leader = group.lane == 0;
  Tally<float> tally;
  const float scale = kGradient ? mean_scale(job) : 1.f;

  for (int64_t r = int64_t(blockIdx.x) * group.count + group.index; r < job.rows; r += int64_t(gridDim.x) * group.count) {
    const Row<float> row = locate(job, r);
    if (kGradient && job.rescale && row.upstream == 1.f) continue;

    if (row.label < 0) {
      row_without_label<S>(job, group, r, row, job.gradient_step, kGradient, tally);
      continue;
    }

    // load. Lane 0 starts at a sector of 32 bytes, so that a warp's accesses do: where the first vector is the second half of
    // one, lane 0 has none in its place. The plan takes so few lanes that each has vectors 1 to kSure.
    const Span<S> span(row.logits, job.classes);
    const int skip = (reinterpret_cast<intptr_t>(row.logits) + span.head * M::kBytes) % 32 != 0 && span.vectors < lanes * N;
    const int count = span.vectors + skip, stride = lanes * 16;
    const int body = (span.head - skip * V) * M::kBytes + group.lane * 16;
    const int mine = (count - group.lane + lanes - 1) / lanes;
    const auto has = [&](int v) { return v == 0 ? group.lane >= skip : v <= kSure || v < mine; };
    const char* from = row.logits + body;
    uint4 raw[N];
#pragma unroll
    for (int v = 0; v < N; ++v)
      if (has(v)) raw[v] = load16(from + v * stride);
    const int edge = span.edge(group.lane);
    float z_edge = edge >= 0 ? M::load(row.logits + edge * M::kBytes) : 0.f;

    // the true class is overwritten with the logit beside it, whose second exponential is taken back out below
    const int place = row.label - span.head;
    const int vector = place >= 0 && place < span.vectors * V ? place / V + skip : -1;
    const bool owner = vector >= 0 && vector % lanes == group.lane;
    float z_y = 0, twin = 0;
    if (owner) {
      const int held = vector / lanes;
      uint4 own;
#pragma unroll
      for (int v = 0; v < N; ++v)
        if (v == held) own = raw[v];
      z_y = M::take(own, place % V, twin);
#pragma unroll
      for (int v = 0; v < N; ++v)
        if (v == held) raw[v] = own;
    }
    const bool true_edge = edge == row.label;
    if (true_edge) z_y = z_edge;

    // reduce, about the mean of each lane's first logit
    float first[V], sample[2] = {0, z_y};
    M::unpack(raw[0], first);
    if (has(0)) sample[0] = first[0];
    group.sum(sample);
    z_y = sample[1];
    const Reference at(sample[0] / float(lanes - skip));
    Sums<Needs> sums;
    if (owner) {
      const float y = at.y(twin);
      sums.remove(y, exp2_approx(y));
    }
    float y[kHeld], e[kHeld];
#pragma unroll
    for (int v = 0; v < N; ++v) {
      if (has(v)) {
        float z[V];
        M::unpack(raw[v], z);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          y[v * V + i] = at.y(z[i]), e[v * V + i] = exp2_approx(y[v * V + i]);
          sums.add(y[v * V + i], e[v * V + i]);
        }
      }
    }
    const float y_edge = at.y(z_edge), e_edge = exp2_approx(y_edge);
    if (edge >= 0 && !true_edge) sums.add(y_edge, e_edge);
    sums.join(group);
    const float n = float(job.classes - 1);
    if (!sums.sound(n)) {
      careful_row<S>(job, group, r, row, M::kBytes, job.gradient_step, scale, kGradient, tally);
      continue;
    }

    // finish: by one warp where there are several, since all would compute the same
    RowLoss<float> out;
    RowMoments<float> moments = sums.moments(n, at);
    const Move move(moments);
    if (lanes <= 32 || threadIdx.x < 32) out = finish_row(job, row, moments, z_y, float(job.classes));
    if (leader) {
      tally.add(job, r, row, out);
      if (job.saved) save(job, r, moments.m, out.gradient, false);
    }
    if (!kGradient) continue;
    if (lanes > 32) {
      if (leader) finished = out.gradient;
      __syncthreads();
      out.gradient = finished;
      __syncthreads();
    }

    // spread; where the gradient's row does not start at the same place of its 16 bytes, a logit at a time
    const RowGradient<float> g = times(out.gradient, scale * row.upstream);
    const Slope<Needs> slope(g, at, move.shift, move.factor);
    const bool alike = job.gradient_step == M::kBytes && ((row.gradient - row.logits) & 15) == 0;
    if (!alike || !slope.exact) {
      careful_spread<S>(group, row.logits, M::kBytes, row.gradient, job.gradient_step, 0, job.classes, row.label, moments.m, g,
                        static_cast<const float*>(nullptr));
      continue;
    }
    char* to = row.gradient + body;
#pragma unroll
    for (int v = 0; v < N; ++v) {
      if (has(v)) {
        float dz[V];
#pragma unroll
        for (int i = 0; i < V; ++i) dz[i] = slope(y[v * V + i], e[v * V + i]);
        store16(to + v * stride, M::pack(dz));
      }
    }
    if (edge >= 0 && !true_edge) M::store(row.gradient + edge * M::kBytes, slope(y_edge, e_edge));
    if (owner || true_edge) M::store(row.gradient + row.label * M::kBytes, g.label);  // over what this thread has just stored
  }
  tally.close(job);
}

}  // namespace cuda
}  // namespace fastsoftloss
