// The CPU kernels of one instruction set, and how the fastest set that the machine has is found.
#pragma once

#include "job.h"

namespace fastsoftloss {

// A long row is reduced and spread in parts of this many classes, whether one thread does it or several: same sums.
constexpr int64_t kPart = 4096;

// Up to here a tile of rows, whose lanes are rows, beats a row at a time.
constexpr int64_t kTileClasses = 256;

template <class T>
FSL_FN bool by_row(const Job<T>& job) {
  const int64_t bytes = bytes_of(job.storage);
  return job.classes > kTileClasses && job.logits_step == bytes && (!job.gradient || job.gradient_step == bytes);
}

template <class T>
FSL_FN bool by_row(const HessianJob<T>& h) {
  return by_row(h.job) && h.direction_step == h.job.logits_step;
}

template <class T>
struct Kernels {
  // rows [begin, end), one after the other on this thread: losses, and the gradient where the job asks for it
  void (*rows)(const Job<T>&, int64_t begin, int64_t end, LossSums<T>* sums);
  // the same where targets are class probabilities
  void (*probabilities)(const Job<T>&, int64_t begin, int64_t end, LossSums<T>* sums);
  // part p of a row that several threads share, and what becomes of its merged moments
  void (*reduce_part)(const Job<T>&, int64_t row, int64_t part, RowMoments<T>* moments);
  void (*finish_row)(const Job<T>&, int64_t row, RowMoments<T>* parts, RowGradient<T>* gradient, LossSums<T>* sums);
  void (*spread_part)(const Job<T>&, int64_t row, int64_t part, T m, const RowGradient<T>& gradient);
  // rows [begin, end), whatever their length
  void (*hessian)(const HessianJob<T>&, int64_t begin, int64_t end, LossSums<T>* sums);
};

// Rows of up to this many classes keep their exps on the thread's stack between reduce and spread.
template <class T>
constexpr int64_t kRowLimit = 131072 / sizeof(T);

namespace avx512 {
template <class T>
const Kernels<T>& kernels(unsigned needs);
}
namespace avx2 {
template <class T>
const Kernels<T>& kernels(unsigned needs);
}
namespace baseline {
template <class T>
const Kernels<T>& kernels(unsigned needs);
}

}  // namespace fastsoftloss
