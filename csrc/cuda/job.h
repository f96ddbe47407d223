// What a kernel is told, and what a row is besides its logits.
#pragma once

#include <cstdint>

#include "../row_loss.h"

namespace fastsoftloss {
namespace cuda {

enum class Storage : int { float32, float64, bfloat16, float16 };

constexpr int kMaxRowDims = 4;  // after joining neighbours; a tensor with more is copied first
constexpr int kSaved = 6;       // floats a row that the backward finds again, see careful.cuh

// One operand over the rows; strides in bytes, 0 where it is a single value.
struct Operand {
  char* data = nullptr;
  int64_t stride[kMaxRowDims] = {};
};

template <class T>
struct Job {
  int64_t rows = 0;
  int classes = 0;
  int row_dims = 1;
  int64_t row_size[kMaxRowDims] = {};

  Operand logits, gradient, target, sample_weight, upstream;  // data null where absent; T but for logits, gradient and target
  int64_t logits_step = 0, gradient_step = 0;                 // bytes between classes
  bool wide_target = true;                                    // int64, else int32
  bool rescale = false;                                       // leave the gradient as it is where the one upstream gradient is 1
  bool rescale_rows = false;                                  // or of rows whose own is
  bool parts = false;                                         // cross-entropy and diversity are wanted beside the loss
  bool mean = false;
  bool weighted = false;            // by class or by sample
  const T* one_upstream = nullptr;  // where all rows have the same, in place of `upstream`
  int64_t ignore_index = -100;
  const T* class_weight = nullptr;
  Options<T> options;  // a double is dear on many devices

  T* row_loss = nullptr;  // without a reduction: (rows,), and (2, rows) where parts are wanted
  T* row_parts = nullptr;

  // With one: what each block's rows add up to, (4, blocks), and where the total goes.
  T* partial = nullptr;
  T* loss = nullptr;
  T* loss_parts = nullptr;
  unsigned* counter = nullptr;  // blocks that are done; null where another kernel totals

  T* divisor = nullptr;       // of the mean; written by whoever totals, read by a backward
  const T* shares = nullptr;  // the divisor before that: `share_count` terms of it
  int share_count = 0;
  const int16_t* labels = nullptr;  // and by whoever summed them, the label of each row
  T* saved = nullptr;               // kSaved a row, or null
  T* moments = nullptr;             // a long row's parts: RowMoments[rows][splits]
  int splits = 1;
};

constexpr int kIgnored = -1, kOutside = -2;  // in place of a label

template <class T>
struct Row {
  const char* logits;
  char* gradient;
  int label;  // a class, kIgnored or kOutside
  T upstream;

  FSL_FN bool counts() const { return label != kIgnored; }
};

// f(dimension, index): row r unfolded over the row dimensions, of which there mostly is one.
template <class T, class F>
FSL_FN void unfold(const Job<T>& job, int64_t r, F f) {
  if (job.row_dims <= 1) return f(0, r);
  for (int d = job.row_dims - 1; d >= 0; --d) {
    const int64_t size = job.row_size[d];
    if (d == 0) {
      f(d, r);
    } else if (job.rows < INT32_MAX) {  // a division of 64 bits takes a hundred instructions
      f(d, int64_t(uint32_t(r) % uint32_t(size))), r = uint32_t(r) / uint32_t(size);
    } else {
      f(d, r % size), r = r / size;
    }
  }
}

// Of a target: a class, kIgnored or kOutside.
template <class T>
FSL_FN int label_at(const Job<T>& job, int64_t target) {
  const char* at = job.target.data + target;
  const int64_t y = job.wide_target ? *reinterpret_cast<const int64_t*>(at) : *reinterpret_cast<const int32_t*>(at);
  return y == job.ignore_index ? kIgnored : uint64_t(y) >= uint64_t(job.classes) ? kOutside : int(y);
}

template <class T>
FSL_FN int label_of(const Job<T>& job, int64_t r) {
  int64_t target = 0;
  unfold(job, r, [&](int d, int64_t i) { target += i * job.target.stride[d]; });
  return label_at(job, target);
}

// A row with its logits at `line`, which are to become its gradient.
template <class T>
FSL_FN Row<T> locate(const Job<T>& job, int64_t r, char* line) {
  Row<T> row = {line, line, job.labels ? job.labels[r] : label_of(job, r), T(1)};
  if (!job.upstream.data) return row;
  int64_t upstream = 0;
  unfold(job, r, [&](int d, int64_t i) { upstream += i * job.upstream.stride[d]; });
  row.upstream = *reinterpret_cast<const T*>(job.upstream.data + upstream);
  return row;
}

template <class T>
FSL_FN Row<T> locate(const Job<T>& job, int64_t r) {
  int64_t logits = 0, gradient = 0, target = 0, upstream = 0;
  unfold(job, r, [&](int d, int64_t i) {
    logits += i * job.logits.stride[d], gradient += i * job.gradient.stride[d], target += i * job.target.stride[d];
    upstream += i * job.upstream.stride[d];
  });
  Row<T> row;
  row.logits = job.logits.data + logits;
  row.gradient = job.gradient.data + gradient;
  row.label = job.labels ? job.labels[r] : label_at(job, target);
  row.upstream = job.upstream.data ? *reinterpret_cast<const T*>(job.upstream.data + upstream) : T(1);
  return row;
}

// What a row counts for: by whoever finishes it.
template <class T>
struct Weights {
  T of_class = T(1), of_row = T(1);

  FSL_FN Weights(const Job<T>& job, int64_t r, int label) {
    if (!job.weighted) return;
    if (job.class_weight && label >= 0) of_class = job.class_weight[label];
    if (!job.sample_weight.data) return;
    int64_t at = 0;
    unfold(job, r, [&](int d, int64_t i) { at += i * job.sample_weight.stride[d]; });
    of_row = *reinterpret_cast<const T*>(job.sample_weight.data + at);
  }
  FSL_FN T both() const { return of_class * of_row; }
};

}  // namespace cuda
}  // namespace fastsoftloss
