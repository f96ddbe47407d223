// Rows of few classes, one to sixteen threads a row, 32 logits a thread in registers.
//
// Staged: whole rows that lie one behind the other pass through shared memory, so that global memory sees nothing but
// 16-byte accesses whatever the number of classes. Direct: a thread reads its row where it is; with a class stride,
// neighbouring threads are neighbouring rows, and those lie side by side.
#pragma once

#include "sums.cuh"

namespace fastsoftloss {
namespace cuda {

constexpr int kTileHeld = 36, kTileBlock = 128;

// f(j) for j < count, which is kMost at most; each j is a constant, so that arrays stay in registers.
template <int kMost, int kChunk, int kFrom = 0, class F>
FSL_DEVICE void each(int count, F f) {
  if constexpr (kFrom < kMost) {
    if (kFrom + kChunk <= count) {
#pragma unroll
      for (int j = kFrom; j < kFrom + kChunk && j < kMost; ++j) f(j);
      each<kMost, kChunk, kFrom + kChunk>(count, f);
    } else {
#pragma unroll
      for (int j = kFrom; j < kFrom + kChunk - 1 && j < kMost; ++j)
        if (j < count) f(j);
    }
  }
}

// From one place to another at a multiple of 16 bytes, by all threads of a block.
template <class M>
FSL_DEVICE void copy(char* to, const char* from, int bytes) {
  const int whole = bytes & ~15;
  for (int i = threadIdx.x * 16; i < whole; i += kTileBlock * 16) store16(to + i, load16(from + i));
  for (int i = whole + threadIdx.x * M::kBytes; i < bytes; i += kTileBlock * M::kBytes) M::store(to + i, M::load(from + i));
}

// kAlone: a thread a row. in_twos: every row starts with a whole word, and so does every thread's share of it.
template <Storage S, unsigned Needs, bool kStaged, bool kAlone, bool kMixed>
__global__ void __launch_bounds__(kTileBlock, 1) tile(const __grid_constant__ Job<float> job, int lanes, int tile_rows, int in_twos) {
  using M = Memory<S>;
  extern __shared__ uint4 stage[];
  char* const staged = reinterpret_cast<char*>(stage);
  const Group<float> group(kAlone ? 1 : lanes, nullptr);
  const bool gradient = job.gradient.data != nullptr;
  const int classes = job.classes;
  // an odd number of words a thread, so that neighbours are in different banks
  const int words = (((classes + group.size - 1) >> group.shift) * M::kBytes + 3) / 4 | 1, share = words * 4 / M::kBytes;
  const int line_bytes = classes * M::kBytes, rows_at_once = kTileBlock >> group.shift;
  if (settled(job)) return;
  Tally<float> tally{};
  const float scale = gradient ? scale_of_all(job) : 1.f;

  for (int64_t start = int64_t(blockIdx.x) * tile_rows; start < job.rows; start += int64_t(gridDim.x) * tile_rows) {
    const int64_t stop = min(start + tile_rows, job.rows);
    const int bytes = int(stop - start) * line_bytes;
    if (kStaged) {
      __syncthreads();  // the last tile is stored
      copy<M>(staged, job.logits.data + start * line_bytes, bytes);
      __syncthreads();
    }
    int64_t r = start + group.index;
    for (int at_byte = group.index * line_bytes; at_byte < bytes; at_byte += rows_at_once * line_bytes, r += rows_at_once) {
      const Row<float, kMixed> row = kStaged ? locate<kMixed>(job, r, staged + at_byte) : locate<kMixed>(job, r);
      const int64_t step = kStaged ? M::kBytes : job.logits_step, to_step = kStaged ? M::kBytes : job.gradient_step;
      const char* const line = row.logits;
      if (row.label < 0) {
        row_without_label<S>(job, group, r, row, to_step, gradient, tally);
        continue;
      }

      // about one logit of the others, which also stands in for the labels
      const int beside = !row.has(0) ? 0 : !row.has(1) ? 1 : 2;
      const Reference at(M::load(line + beside * step));
      float z[2];
      load_labels<S>(row, step, z);
      const auto put_in = [&](float first, float second) {
        M::store(row.gradient + row.label * step, first);
        if (row.two()) M::store(row.gradient + row.other * step, second);
      };
      if (kStaged) {
        group.sync();
        if (group.lane == 0) put_in(at.ref, at.ref);
        group.sync();
      }
      // this thread's classes: side by side where the tile is staged, else every so many, so that neighbours read neighbours
      const int first = kStaged ? group.lane * share : group.lane;
      const int count = kStaged ? min(share, classes - first) : (classes - first + group.size - 1) >> group.shift;
      const int64_t apart = kStaged ? M::kBytes : step * group.size;
      float y[kTileHeld], e[kTileHeld];
      Sums<Needs> sums;
      if (group.lane == 0) sums.start_without(at);
      if (group.lane == 0 && row.two()) sums.remove(at.y(at.ref), exp2_approx(at.y(at.ref)));
      const char* const from = line + first * step;
      const auto take = [&](int j, float z) {
        y[j] = at.y(z), e[j] = exp2_approx(y[j]);
        sums.add(y[j], e[j]);
      };
      if (kStaged && in_twos) {
        each<kTileHeld / 2, 2>(count / 2, [&](int j) {
          float low, high;
          M::load_two(from + j * 2 * M::kBytes, low, high);
          take(2 * j, low), take(2 * j + 1, high);
        });
      } else {
        each<kTileHeld, 4>(count, [&](int j) {
          const bool own = !kStaged && row.has(first + j * group.size);
          take(j, own ? at.ref : M::load(from + j * apart));
        });
      }
      sums.join(group);

      // finish: by the group's first thread
      Slope<Needs> slope;
      RowGradient<float> g;
      bool careful = true;
      if (group.lane == 0) {
        const float n = float(classes - row.classes()), inv_n = inverse(n), y_own = at.y(z[0]);
        if (sums.sound(inv_n, at, kMostSum) & (kMixed | fabsf(y_own) < kMostApart)) {
          const Weights<float, kMixed> weights(job, r, row);
          const float factor = scale * row.upstream;
          const Reference about = kMixed ? at : at.rounded();  // a mixture's labels are compared with it
          const RowMoments<float> moments = sums.moments(n, inv_n, about);
          RowLoss<float> out;
          if constexpr (kMixed) {
            out = finish_row<Needs>(moments, row, z, weights, factor, job.options);
          } else {
            out = finish(moments, sums.margin(y_own), z[0], weights.of_class[0], weights.of_sample[0], factor, job.options);
          }
          g = out.gradient;
          slope = Slope<Needs>(g, about, kMixed);
          careful = gradient && !slope.exact;
          if (!careful) tally.add(job, r, weights.share(), out);
        }
      }
      careful = group.of_first(int(careful));
      if (careful) {
        if (kStaged && group.lane == 0) put_in(z[0], z[1]);
        if (kStaged) group.sync();
        careful_row<S>(job, group, r, row, step, to_step, scale, gradient, tally);
        continue;
      }
      if (!gradient || (!kStaged && settled(job, row))) continue;

      // spread
      slope.share(group);
      char* const to = row.gradient + first * to_step;
      const int64_t to_apart = kStaged ? M::kBytes : to_step * group.size;
      if (kStaged && in_twos) {
        each<kTileHeld / 2, 2>(
            count / 2, [&](int j) { M::store_two(to + j * 2 * M::kBytes, slope(y[2 * j], e[2 * j]), slope(y[2 * j + 1], e[2 * j + 1])); });
      } else {
        each<kTileHeld, 4>(count, [&](int j) { M::store(to + j * to_apart, slope(y[j], e[j])); });
      }
      group.sync();
      if (group.lane == 0) M::store(row.gradient + row.label * to_step, g.label);
      if (group.lane == 0 && row.two()) M::store(row.gradient + row.other * to_step, g.other);
    }
    if (kStaged && gradient) {
      __syncthreads();
      copy<M>(job.gradient.data + start * line_bytes, staged, bytes);
    }
  }
  tally.close(job);
}

}  // namespace cuda
}  // namespace fastsoftloss
