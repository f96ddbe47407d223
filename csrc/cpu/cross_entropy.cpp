#include "cross_entropy.h"

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace fastsoftloss {
namespace {

// About as many elements as a thread should have before another one is woken.
constexpr int64_t kGrain = 32768;
// Several rows that share threads part by part are held in cache between reduce and spread: elements at a time.
constexpr int64_t kShared = 1 << 20;

enum class Isa { baseline, avx2, avx512 };

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa isa() {
  static const Isa best = best_isa();
  return best;
}

template <class T>
const Kernels<T>& kernels_of(const Job<T>& job) {
  // smoothed probabilities are probabilities: no moment is needed for that
  unsigned needs = job.form == Form::probabilities ? moments_of(job.options.diversity) : moments_of(job.options);
  // label smoothing with another penalty, and float64, which is not where the speed is wanted: one kernel for all
  if (needs & (needs - 1) || sizeof(T) == 8) needs |= kAllMoments & ~kWeighted;
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return avx512::kernels<T>(needs);
  if (isa() == Isa::avx2) return avx2::kernels<T>(needs);
#endif
  return baseline::kernels<T>(needs);
}

template <class F>
void parallel(ParallelFor parallel_for, int64_t count, int64_t grain, F& body) {
  if (count <= grain) return body(0, count);
  parallel_for(0, count, grain, [](int64_t begin, int64_t end, void* f) { (*static_cast<F*>(f))(begin, end); }, &body);
}

// A block of rows has one sum, whichever thread works on it; a block of tiles holds whole tiles.
int64_t rows_in_block(int64_t classes, bool by_row) {
  const int64_t rows = 16384 / std::max<int64_t>(classes, 1);
  return by_row ? std::max<int64_t>(rows, 1) : std::clamp<int64_t>(rows / 16, 1, 16) * 16;
}

template <class T>
LossSums<T> total(const std::vector<LossSums<T>>& blocks) {
  LossSums<T> sums;
  for (const auto& block : blocks)
    for (int i = 0; i < 3; ++i) sums.of[i] += block.of[i];
  return sums;
}

// kernel: of rows [begin, end) of `of`, which is the job or has it in it.
template <class T, class Of>
LossSums<T> run_rows(const Job<T>& job, const Of& of, void (*kernel)(const Of&, int64_t begin, int64_t end, LossSums<T>*),
                     ParallelFor parallel_for) {
  const int64_t size = rows_in_block(job.classes, by_row(of)), count = (job.rows + size - 1) / size;
  std::vector<LossSums<T>> blocks(count);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) kernel(of, block * size, std::min((block + 1) * size, job.rows), &blocks[block]);
  };
  parallel(parallel_for, count, std::max<int64_t>(1, kGrain / (size * std::max<int64_t>(job.classes, 1))), body);
  return total(blocks);
}

template <class T>
LossSums<T> run_long_rows(const Job<T>& job, ParallelFor parallel_for) {
  const Kernels<T>& kernels = kernels_of(job);
  const int64_t parts = (job.classes + kPart - 1) / kPart, group = std::max<int64_t>(1, kShared / job.classes);
  std::vector<RowMoments<T>> moments(group * parts);
  std::vector<RowGradient<T>> gradients(group);
  std::vector<LossSums<T>> sums(job.rows);
  for (int64_t first = 0; first < job.rows; first += group) {
    const int64_t rows = std::min(group, job.rows - first), grain = std::max<int64_t>(1, kGrain / kPart);
    auto reduce = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) kernels.reduce_part(job, first + i / parts, i % parts, &moments[i]);
    };
    parallel(parallel_for, rows * parts, grain, reduce);
    for (int64_t r = 0; r < rows; ++r) kernels.finish_row(job, first + r, &moments[r * parts], &gradients[r], &sums[first + r]);
    if (!job.gradient) continue;
    auto spread = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        kernels.spread_part(job, first + i / parts, i % parts, moments[i / parts * parts].m, gradients[i / parts]);
    };
    parallel(parallel_for, rows * parts, grain, spread);
  }
  return total(sums);
}

template <bool kPlain, class T>
TargetScan<T> scan_rows(const Job<T>& job, int64_t begin, int64_t end) {
  TargetScan<T> scan;
  int64_t ones = 0;  // weights that need no sum of doubles
  Walk<T> walk(job, begin);
  for (int64_t r = begin; r < end; ++r, walk.next()) {
    const Row<T> row = locate<kPlain>(job, walk.at);
    if (row.label == kIgnored) continue;
    if (job.form != Form::probabilities && (row.label < 0 || row.label >= job.classes)) {
      if (scan.outside < 0) scan.outside = r;
    } else if (kPlain) {
      ++ones;
    } else {
      scan.weight += double(row.class_weight) * double(row.row_weight);
      if (row.other >= 0) scan.weight += double(row.other_class_weight) * double(row.other_row_weight);
    }
  }
  scan.weight += double(ones);
  return scan;
}

}  // namespace

template <class T>
TargetScan<T> scan_targets(const Job<T>& job, ParallelFor parallel_for) {
  constexpr int64_t kRows = 8192;
  const int64_t count = (job.rows + kRows - 1) / kRows;
  std::vector<TargetScan<T>> blocks(count);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kRows, last = std::min(first + kRows, job.rows);
      blocks[block] = job.plain() ? scan_rows<true>(job, first, last) : scan_rows<false>(job, first, last);
    }
  };
  parallel(parallel_for, count, 4, body);
  TargetScan<T> whole;
  for (const auto& block : blocks) {
    whole.weight += block.weight;
    if (whole.outside < 0) whole.outside = block.outside;
  }
  return whole;
}

template <class T>
LossSums<T> run(const Job<T>& job, ParallelFor parallel_for) {
  if (by_row(job) && job.classes > kRowLimit<T> && job.form != Form::probabilities) return run_long_rows(job, parallel_for);
  const Kernels<T>& kernels = kernels_of(job);
  return run_rows(job, job, job.form == Form::probabilities && job.classes > 0 ? kernels.probabilities : kernels.rows, parallel_for);
}

template <class T>
LossSums<T> run(const HessianJob<T>& h, ParallelFor parallel_for) {
  return run_rows(h.job, h, kernels_of(h.job).hessian, parallel_for);
}

const char* instruction_set() { return isa() == Isa::avx512 ? "AVX-512" : isa() == Isa::avx2 ? "AVX2" : "baseline"; }

template TargetScan<float> scan_targets<float>(const Job<float>&, ParallelFor);
template TargetScan<double> scan_targets<double>(const Job<double>&, ParallelFor);
template LossSums<float> run<float>(const Job<float>&, ParallelFor);
template LossSums<double> run<double>(const Job<double>&, ParallelFor);
template LossSums<float> run<float>(const HessianJob<float>&, ParallelFor);
template LossSums<double> run<double>(const HessianJob<double>&, ParallelFor);

}  // namespace fastsoftloss
