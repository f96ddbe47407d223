// Rows of few classes, one to sixteen threads a row, 32 logits a thread in registers.
//
// Staged: whole rows that lie one behind the other pass through shared memory, so that global memory sees nothing but
// 16-byte accesses whatever the number of classes. Direct: a thread reads its row where it is; with a class stride,
// neighbouring threads are neighbouring rows, and those lie side by side.
#pragma once

#include "sums.cuh"

namespace fastsoftloss {
namespace cuda {

constexpr int kTileHeld = 36, kChunk = 4, kTileBlock = 128;

// f(j) for j < count; each j is a constant, so that arrays stay in registers.
template <int kFrom, class F>
FSL_DEVICE void each_held(int count, F f) {
  if constexpr (kFrom < kTileHeld) {
    if (kFrom + kChunk <= count) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) f(kFrom + j);
      each_held<kFrom + kChunk>(count, f);
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j)
        if (kFrom + j < count) f(kFrom + j);
    }
  }
}

template <Storage S, unsigned Needs, bool kStaged>
__global__ void __launch_bounds__(kTileBlock, 1) tile(const __grid_constant__ Job<float> job, int lanes, int tile_rows) {
  using M = Memory<S>;
  constexpr int V = M::kVector;
  extern __shared__ uint4 stage[];
  char* const staged = reinterpret_cast<char*>(stage);
  const Group<float> group(lanes, nullptr);
  const bool gradient = job.gradient.data != nullptr;
  const int classes = job.classes;
  // an odd number of words a thread, so that neighbours are in different banks
  const int words = (((classes + lanes - 1) >> group.shift) * M::kBytes + 3) / 4 | 1, share = words * 4 / M::kBytes;
  if (settled(job)) return;
  Tally<float> tally{};
  const float scale = gradient ? mean_scale(job) : 1.f, n = float(classes - 1), inv_n = inverse(n);

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
      // this thread's classes: side by side where the tile is staged, else every so many, so that neighbours read neighbours
      const int first = kStaged ? group.lane * share : group.lane;
      const int count = kStaged ? min(share, classes - first) : (classes - first + lanes - 1) >> group.shift;
      const int64_t apart = kStaged ? M::kBytes : step * lanes;
      float y[kTileHeld], e[kTileHeld];
      Sums<Needs> sums;
      const char* const from = line + first * step;
      each_held<0>(count, [&](int j) {
        const bool own = !kStaged && first + j * lanes == row.label;
        y[j] = at.y(own ? at.ref : M::load(from + j * apart)), e[j] = exp2_approx(y[j]);
        sums.add(y[j], e[j]);
      });
      if (group.lane == 0) sums.remove(at.lost, at.series(at.offset()));
      sums.join(group);

      // finish: by the group's first thread
      Slope<Needs> slope;
      float label = 0;
      bool careful = true;
      if (group.lane == 0) {
        if (sums.sound(inv_n, at, kMostSum)) {
          const Weights<float> weights(job, r, row.label);
          const RowLoss<float> out =
              finish(sums.moments(n, inv_n, at), z_y, weights.of_class, weights.of_row, scale * row.upstream, job.options);
          slope = Slope<Needs>(out.gradient, at), label = out.gradient.label;
          careful = gradient && !slope.exact;
          if (!careful) tally.add(job, r, weights.both(), out);
        }
      }
      careful = group.of_first(int(careful));
      if (careful) {
        if (kStaged && group.lane == 0) M::store(line + row.label * step, z_y);
        if (kStaged) __syncwarp(group.mask);
        Row<float> there = row;
        if (kStaged) there.logits = line, there.gradient = line;
        careful_row<S>(job, group, r, there, step, kStaged ? step : job.gradient_step, scale, gradient, tally);
        continue;
      }
      if (!gradient || (!kStaged && job.rescale && row.upstream == 1.f)) continue;

      // spread
      slope.share(group);
      const int64_t to_step = kStaged ? M::kBytes : job.gradient_step;
      char* const row_to = kStaged ? line : row.gradient;
      char* const to = row_to + first * to_step;
      const int64_t to_apart = kStaged ? M::kBytes : to_step * lanes;
      each_held<0>(count, [&](int j) { M::store(to + j * to_apart, slope(y[j], e[j])); });
      __syncwarp(group.mask);
      if (group.lane == 0) M::store(row_to + row.label * to_step, label);
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
