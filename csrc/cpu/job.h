// What a kernel is told: pointers, sizes and strides in, pointers out.
#pragma once

#include <cstdint>

#include "../row_loss.h"
#include "storage.h"

namespace fastsoftloss {

constexpr int kMaxRowDims = 8;

// One operand's place for row r; strides in bytes, 0 where the operand is a single value.
struct Strides {
  int64_t of[kMaxRowDims] = {};
};

// What a row's target is: a class, two classes with a weight each, or a probability for each class.
enum class Form : int { index, mixture, probabilities };

template <class T>
struct Job {
  int64_t rows = 0, classes = 0;
  int row_dims = 0;
  int64_t row_size[kMaxRowDims] = {};

  Storage storage = Storage::float32;
  const char* logits = nullptr;
  Strides logits_rows;
  int64_t logits_step = 0;  // bytes between classes

  char* gradient = nullptr;  // null where none is wanted
  Strides gradient_rows;
  int64_t gradient_step = 0;

  Form form = Form::index;
  const char* target = nullptr;
  bool wide_target = true;                    // int64, else int32
  Storage target_storage = Storage::float32;  // of probabilities
  Strides target_rows;
  int64_t target_step = 0, sample_weight_step = 0;  // bytes between a mixture's labels, and between probabilities
  int64_t ignore_index = -100;

  const T* class_weight = nullptr;      // (K,) or null
  const char* sample_weight = nullptr;  // T or null
  Strides sample_weight_rows;
  const char* upstream = nullptr;  // T or null for 1
  Strides upstream_rows;
  T scale = 1;  // 1 over the mean's divisor

  LossOptions options;
  T* row_losses[3] = {};  // (rows,) each or null: loss, cross-entropy, diversity
};

template <class T>
struct LossSums {
  double of[3] = {};
};

constexpr int64_t kIgnored = INT64_MIN;

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

template <class T>
FSL_FN Row<T> locate(const Job<T>& job, int64_t r) {
  int64_t logits = 0, gradient = 0, target = 0, sample_weight = 0, upstream = 0;
  for (int d = job.row_dims - 1; d >= 0; --d) {
    const int64_t i = d == 0 ? r : r % job.row_size[d];
    if (d > 0) r /= job.row_size[d];
    logits += i * job.logits_rows.of[d];
    gradient += i * job.gradient_rows.of[d];
    target += i * job.target_rows.of[d];
    sample_weight += i * job.sample_weight_rows.of[d];
    upstream += i * job.upstream_rows.of[d];
  }
  Row<T> row;
  row.logits = job.logits + logits;
  row.gradient = job.gradient + gradient;
  if (job.form == Form::probabilities) {
    row.probabilities = job.target + target;
    row.label = 0, row.class_weight = T(1);
  } else {
    row.label = label_at(job, job.target + target);
    row.class_weight = class_weight_of(job, row.label);
  }
  row.row_weight = job.sample_weight ? *reinterpret_cast<const T*>(job.sample_weight + sample_weight) : T(1);
  row.scale = job.upstream ? job.scale * *reinterpret_cast<const T*>(job.upstream + upstream) : job.scale;
  if (job.form == Form::mixture) locate_other(job, job.target + target, job.sample_weight + sample_weight, row);
  return row;
}

}  // namespace fastsoftloss
