// What a kernel is told: pointers, sizes and strides in, pointers out.
#pragma once

#include <cstdint>

#include "../row_loss.h"
#include "storage.h"

namespace fastsoftloss {

constexpr int kMaxRowDims = 8;

// Bytes from where the operands start, or from one row to the next: 0 for an operand that is a single value.
struct Offsets {
  int64_t logits = 0, gradient = 0, target = 0, sample_weight = 0, upstream = 0, direction = 0;

  FSL_FN void add(const Offsets& o, int64_t times = 1) {
    logits += o.logits * times, gradient += o.gradient * times, target += o.target * times;
    sample_weight += o.sample_weight * times, upstream += o.upstream * times, direction += o.direction * times;
  }
};

// What a row's target is: a class, two classes with a weight each, or a probability for each class.
enum class Form : int { index, mixture, probabilities };

template <class T>
struct Job {
  int64_t rows = 0, classes = 0;
  int row_dims = 0;
  int64_t row_size[kMaxRowDims] = {};
  Offsets row_step[kMaxRowDims];

  Storage storage = Storage::float32;
  const char* logits = nullptr;
  int64_t logits_step = 0;  // bytes between classes

  char* gradient = nullptr;  // null where none is wanted
  int64_t gradient_step = 0;

  Form form = Form::index;
  const char* target = nullptr;
  bool wide_target = true;                          // int64, else int32
  Storage target_storage = Storage::float32;        // of probabilities
  int64_t target_step = 0, sample_weight_step = 0;  // bytes between a mixture's labels, and between probabilities
  int64_t ignore_index = -100;

  const T* class_weight = nullptr;      // (K,) or null
  const char* sample_weight = nullptr;  // T or null
  const char* upstream = nullptr;       // T or null for 1
  T scale = 1;                          // 1 over the mean's divisor

  LossOptions options;
  T* row_losses[3] = {};  // (rows,) each or null: loss, cross-entropy, diversity

  // Whether a row is its logits and one target, and nothing is weighted.
  FSL_FN bool plain() const { return form != Form::mixture && !class_weight && !sample_weight && !upstream; }
};

// The same of a Hessian-vector product: H v in the place of the gradient, <dL/dz, v> in that of the loss.
template <class T>
struct HessianJob {
  Job<T> job;                       // for an upstream gradient of 1, of which <dL/dz, v> knows nothing
  const char* upstream = nullptr;   // T; what H v is multiplied by
  const char* direction = nullptr;  // v, in the logits' dtype
  int64_t direction_step = 0;       // bytes between classes
};

template <class T>
struct LossSums {
  double of[3] = {};
};

constexpr int64_t kIgnored = -2;  // -1 is every other label below 0

// What a row is besides its logits.
template <class T>
struct Row {
  const char* logits;
  char* gradient;
  int64_t label;  // kIgnored where the row is
  T class_weight, row_weight, scale;
  int64_t other = -1;  // a mixture's second label, where it is another class than the first
  T other_class_weight = 1, other_row_weight = 0;
  const char* probabilities = nullptr;
};

template <class T>
FSL_FN int64_t label_at(const Job<T>& job, const char* target) {
  const int64_t y = job.wide_target ? *reinterpret_cast<const int64_t*>(target) : *reinterpret_cast<const int32_t*>(target);
  return y == job.ignore_index ? kIgnored : y < 0 ? -1 : y;
}
template <class T>
FSL_FN T class_weight_of(const Job<T>& job, int64_t label) {
  return job.class_weight && label >= 0 && label < job.classes ? job.class_weight[label] : T(1);
}

// The second label of a mixture. Labels that are one class, or one of them ignored, are a row with one label.
template <class T>
FSL_FN void locate_other(const Job<T>& job, const char* target, const char* sample_weight, Row<T>& row) {
  const int64_t y = label_at(job, target + job.target_step);
  const T weight = job.sample_weight ? *reinterpret_cast<const T*>(sample_weight + job.sample_weight_step) : T(1);
  if (y == kIgnored) return;
  if (y == row.label) {
    row.row_weight += weight;
  } else if (row.label == kIgnored || y == -1 || y >= job.classes) {  // what is out of range is found as the first label
    row.label = y, row.class_weight = class_weight_of(job, y), row.row_weight = weight;
  } else {
    row.other = y, row.other_class_weight = class_weight_of(job, y), row.other_row_weight = weight;
  }
}

// A walk over the rows, which takes a division for where it starts and none after that.
template <class T>
struct Walk {
  const Job<T>* job;
  Offsets at, step;
  int64_t index[kMaxRowDims], left = INT64_MAX;  // left: rows to the end of the last dimension

  FSL_FN Walk(const Job<T>& job, int64_t r) : job(&job) {
    const int last = job.row_dims - 1;
    for (int d = last; d >= 0; --d) {
      index[d] = d == 0 ? r : r % job.row_size[d];
      if (d > 0) r /= job.row_size[d];
      at.add(job.row_step[d], index[d]);
    }
    if (last >= 0) step = job.row_step[last];
    if (last > 0) left = job.row_size[last] - index[last];
  }
  FSL_FN void next() {
    at.add(step);
    if (--left == 0) carry();
  }

 private:
  void carry() {
    int d = job->row_dims - 1;
    left = job->row_size[d];
    do {  // back to where dimension d starts, and on by one in that before it
      at.add(job->row_step[d], -job->row_size[d]);
      index[d--] = 0;
      at.add(job->row_step[d]);
    } while (++index[d] == job->row_size[d] && d > 0);
  }
};

// kPlain: the caller knows that the job is plain().
template <bool kPlain = false, class T>
FSL_FN Row<T> locate(const Job<T>& job, const Offsets& at) {
  Row<T> row;
  row.logits = job.logits + at.logits;
  row.gradient = job.gradient + at.gradient;
  row.row_weight = T(1), row.scale = job.scale;
  if (job.form == Form::probabilities) {
    row.probabilities = job.target + at.target;
    row.label = job.classes > 0 ? 0 : kIgnored, row.class_weight = T(1);  // a row without classes does not count
  } else {
    row.label = label_at(job, job.target + at.target);
    row.class_weight = kPlain ? T(1) : class_weight_of(job, row.label);
  }
  if (kPlain) return row;
  if (job.sample_weight) row.row_weight = *reinterpret_cast<const T*>(job.sample_weight + at.sample_weight);
  if (job.upstream) row.scale *= *reinterpret_cast<const T*>(job.upstream + at.upstream);
  if (job.form == Form::mixture) locate_other(job, job.target + at.target, job.sample_weight + at.sample_weight, row);
  return row;
}
template <class T>
FSL_FN Row<T> locate(const Job<T>& job, int64_t r) {
  return locate(job, Walk<T>(job, r).at);
}

}  // namespace fastsoftloss
