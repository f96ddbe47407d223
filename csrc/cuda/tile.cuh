// Rows of few classes, one to sixteen threads a row, 32 logits a thread in registers.
//
// Staged: whole rows that lie one behind the other pass through shared memory, so that global memory sees nothing but
// 16-byte accesses whatever the number of classes. Direct: a thread reads its row where it is; with a class stride,
// neighbouring threads are neighbouring rows, and those lie side by side.
#pragma once

#include "sums.cuh"

namespace fastsoftloss {
namespace cuda {

constexpr int kTileHeld = 32, kChunk = 2, kTileBlock = 128;

template <Storage S, unsigned Needs, bool kStaged>
__global__ void __launch_bounds__(kTileBlock, 1) tile(const __grid_constant__ Job<float> job, int lanes, int tile_rows) {
  using M = Memory<S>;
  constexpr int V = M::kVector;
  extern __shared__ uint4 stage[];
  char* const staged = reinterpret_cast<char*>(stage);
  const Group<float> group(lanes, nullptr);
  const bool gradient = job.gradient.data != nullptr;
  const int classes = job.classes;
  if (settled(job)) return;
  Tally<float> tally;
  const float scale = gradient ? mean_scale(job) : 1.f;

  for (int64_t start = int64_t(blockIdx.x) * tile_rows; start < job.rows; start += int64_t(gridDim.x) * tile_rows) {
    const int here = int(min(int64_t(tile_rows), job.rows - start));
    if (kStaged) {
      const char* from = job.logits.data + start * classes * M::kBytes;
      const int elements = here * classes;
      __syncthreads();  // the last tile is stored
      for (int i = threadIdx.x; i < elements / V; i += kTileBlock) stage[i] = load16(from + i * 16);
      for (int i = elements / V * V + threadIdx.x; i < elements; i += kTileBlock)
        M::store(staged + i * M::kBytes, M::load(from + i * M::kBytes));
      __syncthreads();
    }
    for (int i = group.index; i < here; i += group.count) {
      const int64_t r = start + i;
      const Row<float> row = locate(job, r);
      const int64_t step = kStaged ? M::kBytes : job.logits_step;
      char* const line = kStaged ? staged + i * classes * M::kBytes : const_cast<char*>(row.logits);
      if (row.label < 0) {
        Row<float> empty = row;
        if (kStaged) empty.gradient = line;
        row_without_label<S>(job, group, r, empty, kStaged ? M::kBytes : job.gradient_step, gradient, tally);
        continue;
      }

      // about one logit of the complement, which also stands in for the true class until its exponential is taken out
      const int other = row.label == 0 ? 1 : 0;
      const Reference at(M::load(line + other * step));
      const float z_y = M::load(line + row.label * step);
      if (kStaged) {
        __syncwarp(group.mask);
        if (group.lane == 0) M::store(line + row.label * step, at.ref);
        __syncwarp(group.mask);
      }
      float y[kTileHeld], e[kTileHeld];
      Sums<Needs> sums;
      const auto load_chunk = [&](int c, bool whole) {
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          const int k = (c + j) * lanes + group.lane;
          const bool there = whole || k < classes;
          float z = at.ref;
          if (there && (kStaged || k != row.label)) z = M::load(line + k * step);
          y[c + j] = at.y(z), e[c + j] = exp2_approx(y[c + j]);
          if (there) sums.add(y[c + j], e[c + j]);
        }
      };
#pragma unroll
      for (int c = 0; c < kTileHeld; c += kChunk) {
        if ((c + kChunk) * lanes <= classes) {
          load_chunk(c, true);
        } else if (c * lanes < classes) {
          load_chunk(c, false);
        }
      }
      if (group.lane == 0) sums.remove(at.lost, exp2_approx(at.lost));
      sums.join(group);
      const float n = float(classes - 1);
      if (!sums.sound(n)) {
        if (kStaged && group.lane == 0) M::store(line + row.label * step, z_y);
        if (kStaged) __syncwarp(group.mask);
        Row<float> careful = row;
        if (kStaged) careful.logits = line, careful.gradient = line;
        careful_row<S>(job, group, r, careful, step, kStaged ? step : job.gradient_step, scale, gradient, tally);
        continue;
      }
      RowMoments<float> moments = sums.moments(n, at);
      const Move move(moments);
      const RowLoss<float> out = finish_row(job, row, moments, z_y, float(classes));
      if (group.lane == 0) tally.add(job, r, row, out);
      if (!gradient || (!kStaged && job.rescale && row.upstream == 1.f)) continue;
      const RowGradient<float> g = times(out.gradient, scale * row.upstream);
      const Slope<Needs> slope(g, at, move.shift, move.factor);
      char* const to = kStaged ? line : row.gradient;
      const int64_t to_step = kStaged ? M::kBytes : job.gradient_step;
      if (!slope.exact) {
        careful_spread<S>(group, line, step, to, to_step, 0, classes, row.label, moments.m, g, static_cast<const float*>(nullptr));
        continue;
      }
#pragma unroll
      for (int c = 0; c < kTileHeld; c += kChunk) {
        if (c * lanes >= classes) continue;
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          const int k = (c + j) * lanes + group.lane;
          if (k < classes) M::store(to + k * to_step, slope(y[c + j], e[c + j]));
        }
      }
      if (row.label % lanes == group.lane) M::store(to + row.label * to_step, g.label);
    }
    if (kStaged && gradient) {
      char* to = job.gradient.data + start * classes * M::kBytes;
      const int elements = here * classes;
      __syncthreads();
      for (int i = threadIdx.x; i < elements / V; i += kTileBlock) store16(to + i * 16, stage[i]);
      for (int i = elements / V * V + threadIdx.x; i < elements; i += kTileBlock)
        M::store(to + i * M::kBytes, M::load(staged + i * M::kBytes));
    }
  }
  tally.close(job);
}

}  // namespace cuda
}  // namespace fastsoftloss
