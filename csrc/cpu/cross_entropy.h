// The loss of a whole batch on the CPU: rows over threads, sums in an order that no thread count changes.
#pragma once

#include "job.h"

namespace fastsoftloss {

// Runs body(context, begin, end) over [0, count) on the caller's threads.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

template <class T>
struct TargetScan {
  double weight = 0;     // summed over the rows that count: the mean's divisor
  int64_t outside = -1;  // the first row whose target is neither a class nor ignored
};

template <class T>
TargetScan<T> scan_targets(const Job<T>& job, ParallelFor parallel_for);

// Losses, and the gradient where the job has a place for it. The targets must have been scanned.
template <class T>
LossSums<T> run(const Job<T>& job, ParallelFor parallel_for);

// H v, and the sums of <dL/dz, v>, of targets that are labels. The targets must have been scanned.
template <class T>
LossSums<T> run(const HessianJob<T>& job, ParallelFor parallel_for);

// The instruction set that serves this machine.
const char* instruction_set();

}  // namespace fastsoftloss
