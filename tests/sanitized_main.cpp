// The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: every instruction set that the machine has, on
// every border of size, each stride and dtype, with buffers of exactly the size that is theirs. Prints how often and how
// far a value was off the same loss worked out in double; exits with 1 if one was.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "../csrc/cpu/cross_entropy.h"
#include "../csrc/cpu/kernels.h"

using namespace fastsoftloss;

static std::mt19937 generator(0);
static int failures = 0;
static long values = 0;

// A heap block of its own, so that one byte before or behind it is a report.
template <class E>
std::unique_ptr<E[]> block(int64_t count) {
  return std::unique_ptr<E[]>(new E[count]);
}

static void store(char* p, Storage storage, double x) {
  if (storage == Storage::float64)
    store_one(x, storage, p);
  else
    store_one(float(x), storage, p);
}

static double load(const char* p, Storage storage) {
  return storage == Storage::float64 ? load_one<double>(p, storage) : double(load_one<float>(p, storage));
}

static void expect(double got, double truth, double bound, const char* what, const char* isa, int64_t classes) {
  ++values;
  if (std::fabs(got - truth) <= bound || (std::isnan(got) && std::isnan(truth))) return;
  if (++failures < 20) std::printf("%s, %s, %lld classes: %.9g for %.9g\n", isa, what, (long long)classes, got, truth);
}

static void serial(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  for (int64_t i = begin; i < end; i += grain) body(i, i + grain < end ? i + grain : end, context);
}

struct Layout {
  int64_t step, row;  // in elements, from class to class and from row to row
};

template <class T>
void check(const Kernels<T>* kernels, const char* isa, int64_t rows, int64_t classes, Storage storage, bool by_columns, Diversity diversity,
           bool smoothing, bool weighted, bool shared) {
  const int64_t bytes = bytes_of(storage);
  const Layout at = by_columns ? Layout{rows, 1} : Layout{1, classes};
  auto logits = block<char>(rows * classes * bytes), gradient = block<char>(rows * classes * bytes);
  auto target = block<int64_t>(rows);
  auto class_weight = block<T>(classes), sample_weight = block<T>(rows);
  std::vector<std::unique_ptr<T[]>> losses;
  for (int i = 0; i < 3; ++i) losses.push_back(block<T>(rows));
  std::normal_distribution<double> normal(0, 3);
  for (int64_t i = 0; i < rows * classes; ++i) store(&logits[i * bytes], storage, normal(generator));
  for (int64_t j = 0; j < classes; ++j) class_weight[j] = T(0.5 + j % 3);
  for (int64_t r = 0; r < rows; ++r) {
    target[r] = r % 5 == 4 ? -100 : int64_t(generator() % classes);
    if (r == 0) target[r] = classes - 1;
    if (r == 1) target[r] = 0;
    sample_weight[r] = T(0.25 + r % 2);
  }

  Job<T> job;
  job.rows = rows, job.classes = classes, job.row_dims = 1, job.row_size[0] = rows, job.storage = storage;
  job.logits = logits.get(), job.row_step[0].logits = at.row * bytes, job.logits_step = at.step * bytes;
  job.gradient = gradient.get(), job.row_step[0].gradient = job.row_step[0].logits, job.gradient_step = job.logits_step;
  job.target = reinterpret_cast<const char*>(target.get()), job.row_step[0].target = 8;
  job.sample_weight = reinterpret_cast<const char*>(sample_weight.get()), job.row_step[0].sample_weight = sizeof(T);
  if (weighted) job.class_weight = class_weight.get();
  for (int i = 0; i < 3; ++i) job.row_losses[i] = losses[i].get();
  LossOptions& o = job.options;
  o.diversity = diversity, o.diversity_weight = 0.5, o.label_smoothing = smoothing ? 0.125 : 0, o.classes = double(classes);
  o.class_weights = weighted, o.class_weight_sum = 0;
  for (int64_t j = 0; j < classes; ++j) o.class_weight_sum += weighted ? double(class_weight[j]) : 1;

  LossSums<T> sums;
  if (!kernels) {  // the whole way, in the instruction set that it chooses
    if (scan_targets(job, serial).outside >= 0) std::abort();
    sums = run(job, serial);
  } else if (!shared) {
    kernels->rows(job, 0, rows, &sums);
  } else {
    const int64_t parts = (classes + kPart - 1) / kPart;
    auto moments = block<RowMoments<T>>(parts);
    for (int64_t r = 0; r < rows; ++r) {
      RowGradient<T> slopes;
      for (int64_t p = 0; p < parts; ++p) kernels->reduce_part(job, r, p, &moments[p]);
      kernels->finish_row(job, r, moments.get(), &slopes, &sums);
      for (int64_t p = 0; p < parts; ++p) kernels->spread_part(job, r, p, moments[0].m, slopes);
      if (target[r] < 0)
        for (int64_t j = 0; j < classes; ++j) store(&gradient[(r * at.row + j * at.step) * bytes], storage, 0);
    }
  }

  // 1e-5: what float32 is held to; the terms here are of size 1
  const double bound = sizeof(T) == 8 ? 1e-13 : 1e-5;
  const double half = storage == Storage::bfloat16 ? 0x1p-8 : storage == Storage::float16 ? 0x1p-11 : 0;
  for (int64_t r = 0; r < rows; ++r) {
    const auto place = [&](int64_t j) { return (r * at.row + j * at.step) * bytes; };
    RowMoments<double> whole;
    const int64_t y = target[r];
    for (int64_t j = 0; y >= 0 && j < classes; ++j) {
      if (j == y) continue;
      RowMoments<double> one;
      one.n = one.s1 = one.s2 = 1, one.m = load(&logits[place(j)], storage), one.sw = double(class_weight[j]);
      whole = merge<kAllMoments>(whole, one);
    }
    RowLoss<double> truth{};
    if (y >= 0)
      truth = finish(whole, load(&logits[place(y)], storage), weighted ? double(class_weight[y]) : 1.0, double(sample_weight[r]), 1.0, o);
    const double size = 1 + std::fabs(truth.loss) + (y >= 0 && smoothing ? 10 : 0);
    expect(losses[0][r], truth.loss, bound * size, "loss", isa, classes);
    expect(losses[1][r], truth.cross_entropy, bound * size, "cross-entropy", isa, classes);
    expect(losses[2][r], truth.diversity, bound * (size + std::fabs(truth.diversity)), "diversity", isa, classes);
    const RowGradient<double>& g = truth.gradient;
    for (int64_t j = 0; j < classes; ++j) {
      const double x = y < 0 || j == y ? 0 : load(&logits[place(j)], storage) - whole.m, e = std::exp(x);
      const double dz = y < 0 ? 0 : j == y ? g.label : e * (g.a + g.b * e + g.t * x) + g.e0 + g.e1 * x + g.ew * double(class_weight[j]);
      const double terms = y < 0 ? 0
                                 : std::fabs(g.label) + e * (std::fabs(g.a) + std::fabs(g.b) + 10 * std::fabs(g.t)) + std::fabs(g.e0) +
                                       std::fabs(g.e1 * x) + std::fabs(g.ew) * 3;
      expect(load(&gradient[place(j)], storage), dz, bound * terms + half * std::fabs(dz) + (half ? 0x1p-25 : 1e-35), "gradient", isa,
             classes);
    }
  }
}

// The gradient of a row's loss, in double, term by term.
static std::vector<double> gradient_of(const std::vector<double>& z, int64_t y, const LossOptions& o) {
  RowMoments<double> whole;
  for (int64_t j = 0; j < int64_t(z.size()); ++j)
    if (j != y) whole = with<kAllMoments>(whole, z[j], 1.0).all;
  const RowGradient<double> g = finish(whole, z[y], 1.0, 1.0, 1.0, o).gradient;
  std::vector<double> dz;
  for (int64_t j = 0; j < int64_t(z.size()); ++j)
    dz.push_back(j == y ? g.label : slope_at<fastsoftloss::kAllMoments>(g, z[j], z[j] - whole.m, std::exp(z[j] - whole.m), 1.0));
  return dz;
}

// H v and <dL/dz, v> against central differences; each array in a block of its own.
template <class T>
void check_hessian(const Kernels<T>* kernels, const char* isa, int64_t rows, int64_t classes, Storage storage, bool by_columns,
                   bool direction_by_columns, Diversity diversity, bool smoothing) {
  const int64_t bytes = bytes_of(storage);
  const auto layout = [&](bool columns) { return columns ? Layout{rows, 1} : Layout{1, classes}; };
  const Layout at = layout(by_columns), along = layout(direction_by_columns);
  auto logits = block<char>(rows * classes * bytes), out = block<char>(rows * classes * bytes), v = block<char>(rows * classes * bytes);
  auto target = block<int64_t>(rows);
  auto upstream = block<T>(rows), slopes = block<T>(rows);
  std::normal_distribution<double> normal(0, 2);
  for (int64_t i = 0; i < rows * classes; ++i) {
    store(&logits[i * bytes], storage, normal(generator));
    store(&v[i * bytes], storage, normal(generator));
  }
  for (int64_t r = 0; r < rows; ++r) {
    target[r] = r == 0 ? classes - 1 : r % 5 == 4 ? -100 : int64_t(generator() % classes);
    upstream[r] = T(0.25 + r % 2);
  }
  HessianJob<T> h;
  Job<T>& job = h.job;
  job.rows = rows, job.classes = classes, job.row_dims = 1, job.row_size[0] = rows, job.storage = storage;
  job.logits = logits.get(), job.row_step[0].logits = at.row * bytes, job.logits_step = at.step * bytes;
  job.gradient = out.get(), job.row_step[0].gradient = job.row_step[0].logits, job.gradient_step = job.logits_step;
  job.target = reinterpret_cast<const char*>(target.get()), job.row_step[0].target = 8;
  job.row_losses[0] = slopes.get();
  h.direction = v.get(), job.row_step[0].direction = along.row * bytes, h.direction_step = along.step * bytes;
  h.upstream = reinterpret_cast<const char*>(upstream.get()), job.row_step[0].upstream = sizeof(T);
  LossOptions& o = job.options;
  o.diversity = diversity, o.diversity_weight = 0.5, o.z_loss = 0.01, o.label_smoothing = smoothing ? 0.125 : 0;
  o.classes = o.class_weight_sum = double(classes);
  LossSums<T> sums;
  if (kernels)
    kernels->hessian(h, 0, rows, &sums);
  else
    sums = run(h, serial);

  const double step = 1e-4;  // leaves an error of step^2 times a fourth derivative, and of 2^-53 / step
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t y = target[r];
    std::vector<double> z, below, above, direction;
    for (int64_t j = 0; j < classes; ++j) {
      z.push_back(load(&logits[(r * at.row + j * at.step) * bytes], storage));
      direction.push_back(load(&v[(r * along.row + j * along.step) * bytes], storage));
      below.push_back(z[j] - step * direction[j]), above.push_back(z[j] + step * direction[j]);
    }
    std::vector<double> dz(classes), less(classes), more(classes);
    if (y >= 0) dz = gradient_of(z, y, o), less = gradient_of(below, y, o), more = gradient_of(above, y, o);
    double slope = 0, largest = 0;
    for (int64_t j = 0; j < classes; ++j) slope += dz[j] * direction[j], largest = std::fmax(largest, std::fabs(direction[j]));
    const double bound = (sizeof(T) == 8 ? 1e-6 : 3e-5) * (1 + largest) * (1 + largest);
    const double half = storage == Storage::bfloat16 ? 0x1p-8 : storage == Storage::float16 ? 0x1p-11 : 0;
    expect(slopes[r], slope, bound * std::sqrt(double(classes)), "<dL/dz, v>", isa, classes);
    for (int64_t j = 0; j < classes; ++j) {
      const double hv = double(upstream[r]) * (more[j] - less[j]) / (2 * step);
      expect(load(&out[(r * at.row + j * at.step) * bytes], storage), hv, bound + half * std::fabs(hv), "H v", isa, classes);
    }
  }
}

template <class T>
void check_hessians(const Kernels<T>& (*kernels_for)(unsigned), const char* isa, Storage storage) {
  for (int d = 0; d <= int(Diversity::variance); ++d)
    for (bool smoothing : {false, true}) {
      LossOptions o;
      o.diversity = static_cast<Diversity>(d), o.label_smoothing = smoothing;
      unsigned needs = moments_of(o);
      if (needs & (needs - 1)) needs |= kAllMoments & ~kWeighted;
      const Kernels<T>* kernels = kernels_for ? &kernels_for(needs) : nullptr;
      for (int64_t classes : {1, 2, 3, 10, 255, 256, 257, 320, 400})  // tails of 0, 1 and more; two looks of a tile
        for (int columns = 0; columns < 4; ++columns)
          check_hessian(kernels, isa, classes == 10 ? 33 : 7, classes, storage, columns & 1, columns & 2, o.diversity, smoothing);
      if (d < 2) check_hessian(kernels, isa, 1, kPart + 1, storage, false, false, o.diversity, smoothing);
    }
}

// The loss and the gradient of one contiguous batch, whatever its targets are.
template <class T>
std::vector<double> run_form(Form form, const T* logits, int64_t rows, int64_t classes, const void* target, const T* sample_weight,
                             Diversity diversity) {
  auto gradient = block<T>(rows * classes);
  Job<T> job;
  job.rows = rows, job.classes = classes, job.row_dims = 1, job.row_size[0] = rows;
  job.storage = job.target_storage = sizeof(T) == 8 ? Storage::float64 : Storage::float32;
  job.logits = reinterpret_cast<const char*>(logits), job.row_step[0].logits = classes * sizeof(T), job.logits_step = sizeof(T);
  job.gradient = reinterpret_cast<char*>(gradient.get()), job.row_step[0].gradient = job.row_step[0].logits,
  job.gradient_step = job.logits_step;
  job.form = form, job.target = static_cast<const char*>(target), job.row_step[0].target = 8;
  job.sample_weight = reinterpret_cast<const char*>(sample_weight), job.row_step[0].sample_weight = sizeof(T);
  if (form == Form::mixture) job.target_step = rows * 8, job.sample_weight_step = rows * sizeof(T);
  if (form == Form::probabilities) job.row_step[0].target = job.row_step[0].logits, job.target_step = sizeof(T);
  job.options.diversity = diversity, job.options.diversity_weight = 0.5, job.options.z_loss = 0.01;
  job.options.classes = job.options.class_weight_sum = double(classes);
  if (scan_targets(job, serial).outside >= 0) std::abort();
  std::vector<double> out{run(job, serial).of[0]};
  for (int64_t i = 0; i < rows * classes; ++i) out.push_back(gradient[i]);
  return out;
}

// A mixture, and the probabilities that say the same, against its two labels one after the other.
template <class T>
void check_soft(int64_t rows, int64_t classes, Diversity diversity) {
  auto logits = block<T>(rows * classes), probabilities = block<T>(rows * classes), shares = block<T>(2 * rows);
  auto labels = block<int64_t>(2 * rows);
  std::normal_distribution<double> normal(0, 3);
  for (int64_t i = 0; i < rows * classes; ++i) logits[i] = T(normal(generator)), probabilities[i] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int i = 0; i < 2; ++i) labels[i * rows + r] = r == 0 ? i * (classes - 1) : int64_t(generator() % classes);
    shares[r] = T(0.25 + r % 2 * 0.5), shares[rows + r] = 1 - shares[r];
    for (int i = 0; i < 2; ++i) probabilities[r * classes + labels[i * rows + r]] += shares[i * rows + r];
  }
  const auto truth = run_form(Form::index, logits.get(), rows, classes, labels.get(), shares.get(), diversity);
  const auto second = run_form(Form::index, logits.get(), rows, classes, labels.get() + rows, shares.get() + rows, diversity);
  const auto mixture = run_form(Form::mixture, logits.get(), rows, classes, labels.get(), shares.get(), diversity);
  const auto soft = run_form<T>(Form::probabilities, logits.get(), rows, classes, probabilities.get(), nullptr, diversity);
  for (size_t i = 0; i < truth.size(); ++i) {
    const double sum = truth[i] + second[i], bound = (sizeof(T) == 8 ? 1e-12 : 2e-5) * (i ? 10 : 1 + std::fabs(sum));
    expect(mixture[i], sum, bound, "mixture", instruction_set(), classes);
    expect(soft[i], sum, bound, "probabilities", instruction_set(), classes);
  }
}

// A NaN is no extreme of its row, whatever lies around it in its lane: all of the row is NaN, and nothing behind it is written to.
template <class T>
void check_nan(int64_t classes, int64_t place) {
  auto logits = block<T>(classes), probabilities = block<T>(classes);
  for (int64_t i = 0; i < classes; ++i) logits[i] = -Limits<T>::infinity(), probabilities[i] = T(1) / T(classes);
  logits[classes / 25] = 1, logits[place] = Limits<T>::quiet_NaN();
  for (int d = 0; d <= int(Diversity::variance); ++d)
    for (double value : run_form<T>(Form::probabilities, logits.get(), 1, classes, probabilities.get(), nullptr, static_cast<Diversity>(d)))
      if (++values, value == value) std::printf("not NaN: %g of %ld classes\n", value, long(classes)), ++failures;
}

template <class T>
void check_all(const Kernels<T>& (*kernels_for)(unsigned), const char* isa, Storage storage, bool thorough) {
  const int64_t tile[] = {1, 2, 10, 15, 16, 17, 255, 256, 257, 400};                       // with a class stride: two looks at 257
  const int64_t row[] = {257, 319, 320, 321, 1000, 4095, 4096, 4097, 8192, kRowLimit<T>};  // tails of 1, 63, 0; part borders
  const int64_t shared[] = {kRowLimit<T> + 1, 3 * kPart, 3 * kPart + 1};
  for (int d = 0; d <= int(Diversity::variance); ++d)
    for (int mode = 0; mode < 3; ++mode) {  // plain, smoothing, smoothing with class weights
      if (!thorough && (d + mode) % 3) continue;
      const auto kind = static_cast<Diversity>(d);
      LossOptions o;
      o.diversity = kind, o.label_smoothing = mode ? 0.125 : 0, o.class_weights = mode == 2;
      unsigned needs = moments_of(o);
      if (needs & (needs - 1)) needs |= kAllMoments & ~kWeighted;
      const Kernels<T>* kernels = kernels_for ? &kernels_for(needs) : nullptr;
      for (int64_t classes : tile)
        for (int64_t rows : {1, 7, 16, 33})
          for (bool by_columns : {false, true})
            check<T>(kernels, isa, rows, classes, storage, by_columns, kind, mode > 0, mode == 2, false);
      const bool borders = kernels && (thorough || d < 2);  // sanitized code is slow
      for (int64_t classes : row)
        if (classes <= 1000 || borders)
          check<T>(kernels, isa, classes > 1000 ? 1 : 3, classes, storage, false, kind, mode > 0, mode == 2, false);
      for (int64_t classes : shared)
        if (borders || !kernels) check<T>(kernels, isa, 1, classes, storage, false, kind, mode > 0, mode == 2, kernels != nullptr);
    }
}

void check_isa(const Kernels<float>& (*floats)(unsigned), const Kernels<double>& (*doubles)(unsigned), const char* isa) {
  const long before = values;
  check_all<float>(floats, isa, Storage::float32, floats != nullptr);
  check_all<double>(doubles, isa, Storage::float64, false);
  check_all<float>(floats, isa, Storage::bfloat16, false);
  check_all<float>(floats, isa, Storage::float16, false);
  check_hessians<float>(floats, isa, Storage::float32);
  check_hessians<double>(doubles, isa, Storage::float64);
  check_hessians<float>(floats, isa, Storage::bfloat16);
  std::printf("%s: %ld values\n", isa, values - before);
}

int main() {
  for (int d = 0; d <= int(Diversity::variance); ++d)
    for (int64_t classes : {1, 2, 3, 15, 16, 17, 64, 256, 257, 320, 1000, int(kRowLimit<float>) + 1}) {
      if (classes > 1000 && d > 1) continue;
      check_soft<float>(classes > 1000 ? 1 : 19, classes, static_cast<Diversity>(d));
      if (classes < 400) check_soft<double>(9, classes, static_cast<Diversity>(d));
    }
  for (int64_t classes : {2, 3, 256, 300, 5003})  // tiles, a row, and one with a tail in another lane
    for (int64_t place = 0; place < classes; place = place * 2 + 1) {
      if (place == classes / 25) continue;
      check_nan<float>(classes, place), check_nan<float>(classes, classes - 1 - place / 2);
      check_nan<double>(classes, place), check_nan<double>(classes, classes - 1 - place / 2);
    }
  check_isa(nullptr, nullptr, instruction_set());
  check_isa(baseline::kernels<float>, baseline::kernels<double>, "baseline kernels");
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    check_isa(avx2::kernels<float>, avx2::kernels<double>, "AVX2 kernels");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    check_isa(avx512::kernels<float>, avx512::kernels<double>, "AVX-512 kernels");
#endif
  std::printf("%d failures\n", failures);
  return failures != 0;
}
