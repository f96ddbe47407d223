// What a kernel is told, and what a row is besides its logits.
#pragma once

#include <cstdint>

#include "../row_loss.h"
#include "plan.h"

namespace fastsoftloss {
namespace cuda {

enum class Storage : int { float32, float64, bfloat16, float16 };

constexpr int kMaxRowDims = 4;  // after joining neighbours; a tensor with more is copied first
constexpr int kSaved = 6;       // floats a row that the backward finds again, see careful.cuh; of a mixture one more

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
  Form form = Form::index;                                    // a mixture's labels have a sample weight each
  int64_t target_step = 0, sample_weight_step = 0;            // bytes between the two, and between probabilities
  Storage target_storage = Storage::float32;                  // of probabilities
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

// A mixture's second label, where it is another class than the first; a row of one label is compiled without it.
template <bool kMixed>
struct Second {
  static constexpr int other = -1;
};
template <>
struct Second<true> {
  int other = -1;
  bool counted[2];  // whose sample weights the row has
};

template <bool kMixed>
struct Labels : Second<kMixed> {
  int label;  // a class, kIgnored or kOutside

  FSL_FN bool counts() const { return label != kIgnored; }
  FSL_FN bool two() const { return this->other >= 0; }
  FSL_FN bool has(int k) const { return k == label || (two() && k == this->other); }
  FSL_FN int classes() const { return two() ? 2 : 1; }
};

template <class T, bool kMixed>
struct Row : Labels<kMixed> {
  const char* logits;
  char* gradient;
  T upstream;
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

// Labels that are one class, or one of them ignored, are a row with one label; one out of range makes a row that is.
template <bool kMixed, class T>
FSL_FN Labels<kMixed> labels_at(const Job<T>& job, int64_t target) {
  Labels<kMixed> row;
  row.label = label_at(job, target);
  if constexpr (kMixed) {
    const int second = label_at(job, target + job.target_step);
    row.counted[0] = row.counts(), row.counted[1] = second != kIgnored;
    if (!row.counts() || second == kOutside) {
      row.label = second;
    } else if (row.label >= 0 && second >= 0 && second != row.label) {
      row.other = second;
    }
  }
  return row;
}

template <bool kMixed, class T>
FSL_FN Labels<kMixed> labels_of(const Job<T>& job, int64_t r) {
  int64_t target = 0;
  unfold(job, r, [&](int d, int64_t i) { target += i * job.target.stride[d]; });
  return labels_at<kMixed>(job, target);
}

// What row r has of its labels, where a kernel before has kept them.
template <bool kMixed, class T>
FSL_FN bool kept_labels(const Job<T>& job, int64_t r, Row<T, kMixed>& row) {
  if (kMixed || !job.labels) return false;
  row.label = job.labels[r];
  return true;
}

// A row with its logits at `line`, which are to become its gradient.
template <bool kMixed, class T>
FSL_FN Row<T, kMixed> locate(const Job<T>& job, int64_t r, char* line) {
  Row<T, kMixed> row;
  row.logits = row.gradient = line, row.upstream = T(1);
  if (!kept_labels(job, r, row)) static_cast<Labels<kMixed>&>(row) = labels_of<kMixed>(job, r);
  if (!job.upstream.data) return row;
  int64_t upstream = 0;
  unfold(job, r, [&](int d, int64_t i) { upstream += i * job.upstream.stride[d]; });
  row.upstream = *reinterpret_cast<const T*>(job.upstream.data + upstream);
  return row;
}

template <bool kMixed, class T>
FSL_FN Row<T, kMixed> locate(const Job<T>& job, int64_t r) {
  int64_t logits = 0, gradient = 0, target = 0, upstream = 0;
  unfold(job, r, [&](int d, int64_t i) {
    logits += i * job.logits.stride[d], gradient += i * job.gradient.stride[d], target += i * job.target.stride[d];
    upstream += i * job.upstream.stride[d];
  });
  Row<T, kMixed> row;
  row.logits = job.logits.data + logits;
  row.gradient = job.gradient.data + gradient;
  if (!kept_labels(job, r, row)) static_cast<Labels<kMixed>&>(row) = labels_at<kMixed>(job, target);
  row.upstream = job.upstream.data ? *reinterpret_cast<const T*>(job.upstream.data + upstream) : T(1);
  return row;
}

template <class T>
FSL_FN int64_t sample_weight_offset(const Job<T>& job, int64_t r) {
  int64_t at = 0;
  unfold(job, r, [&](int d, int64_t i) { at += i * job.sample_weight.stride[d]; });
  return at;
}
template <class T>
FSL_FN T sample_weight_of(const Job<T>& job, int64_t r) {
  return job.sample_weight.data ? *reinterpret_cast<const T*>(job.sample_weight.data + sample_weight_offset(job, r)) : T(1);
}

// What a row counts for, by each of its labels: by whoever finishes it.
template <class T, bool kMixed>
struct Weights {
  T of_class[2] = {T(1), T(1)}, of_sample[2] = {T(1), T(kMixed)};

  FSL_FN Weights(const Job<T>& job, int64_t r, const Labels<kMixed>& row) {
    if (job.weighted) look_up(job, r, row);
    if constexpr (kMixed) {
      if (row.two()) return;
      of_sample[0] = (row.counted[0] ? of_sample[0] : T(0)) + (row.counted[1] ? of_sample[1] : T(0));
      of_sample[1] = T(0);
    }
  }
  FSL_FN T of_row() const { return kMixed ? of_sample[0] + of_sample[1] : of_sample[0]; }
  FSL_FN T share() const {  // of the mean's divisor
    const T first = of_class[0] * of_sample[0];
    return kMixed ? first + of_class[1] * of_sample[1] : first;
  }

 private:
  FSL_FN void look_up(const Job<T>& job, int64_t r, const Labels<kMixed>& row) {
    if (job.class_weight && row.label >= 0) of_class[0] = job.class_weight[row.label];
    if (job.class_weight && row.two()) of_class[1] = job.class_weight[row.other];
    if (!job.sample_weight.data) return;
    const int64_t at = sample_weight_offset(job, r);
    of_sample[0] = *reinterpret_cast<const T*>(job.sample_weight.data + at);
    if (kMixed) of_sample[1] = *reinterpret_cast<const T*>(job.sample_weight.data + at + job.sample_weight_step);
  }
};

}  // namespace cuda
}  // namespace fastsoftloss
