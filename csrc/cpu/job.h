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

  const char* target = nullptr;
  bool wide_target = true;  // int64, else int32
  Strides target_rows;
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
};

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
  const int64_t y =
      job.wide_target ? *reinterpret_cast<const int64_t*>(job.target + target) : *reinterpret_cast<const int32_t*>(job.target + target);
  row.label = y == job.ignore_index ? kIgnored : y < 0 ? -1 : y;
  row.class_weight = job.class_weight && row.label >= 0 && y < job.classes ? job.class_weight[y] : T(1);
  row.row_weight = job.sample_weight ? *reinterpret_cast<const T*>(job.sample_weight + sample_weight) : T(1);
  row.scale = job.upstream ? job.scale * *reinterpret_cast<const T*>(job.upstream + upstream) : job.scale;
  return row;
}

}  // namespace fastsoftloss
