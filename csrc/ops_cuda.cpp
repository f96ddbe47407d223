// The CUDA kernels as implementations of the operators that fastsoftloss/backends.py defines. Besides ops_cpu.cpp the only
// file that knows torch, and it knows its stable ABI alone.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "cuda/cross_entropy.h"

// The tests build this file once more, for tensors on the CPU and a runtime that simulates the device.
#ifndef FSL_DISPATCH_KEY
#define FSL_DISPATCH_KEY CUDA
#endif

// Declared by torch's header only in a CUDA build.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace {

using namespace fastsoftloss::cuda;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

enum Reduction : int64_t { kNone, kMean, kSum };

constexpr int64_t kMaxDims = 64;
constexpr int64_t kMaxClasses = (int64_t(1) << 31) - 1024;  // a kernel counts them by int, in steps of up to a block

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "fastsoftloss: ", cudaGetErrorString(error)); }

// The tensor's device is the current one for as long as this lives.
class Device {
 public:
  explicit Device(const Tensor& t) {
    check(cudaGetDevice(&before_));
    index_ = t.is_cuda() ? t.get_device_index() : before_;
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    if (index_ != before_) check(cudaSetDevice(index_));
  }
  ~Device() {
    if (index_ != before_) cudaSetDevice(before_);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  cudaStream_t stream() const { return stream_; }
  int multiprocessors() const {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_));
    return count;
  }

 private:
  int before_ = 0, index_ = 0;
  cudaStream_t stream_ = nullptr;
};

// Contiguous and uninitialised, on the device of `like`.
Tensor empty(const Tensor& like, const int64_t* sizes, int64_t dims, ScalarType type) {
  int64_t strides[kMaxDims + 1], step = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  }
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides,
                                                         torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type,
                                                         device_index < 0 ? 0 : device_index, &handle));
  return Tensor(handle);
}

Tensor vector_of(const Tensor& like, int64_t size, ScalarType type) { return empty(like, &size, 1, type); }

struct Inputs {
  const Tensor& logits;
  const Tensor& target;
  const OptionalTensor& weight;
  const OptionalTensor& sample_weight;
  int64_t ignore_index, reduction;
  double label_smoothing;
  int64_t diversity;
  double diversity_weight, z_loss;
};

ScalarType arithmetic(const Tensor& logits) { return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// The shape of the rows: that of the logits without the class dimension.
struct RowSizes {
  explicit RowSizes(const Tensor& logits) : logits(logits), dims(logits.dim() - 1), class_dim(logits.dim() > 1 ? 1 : 0) {}
  int64_t operator[](int64_t d) const { return logits.size(d < class_dim ? d : d + 1); }
  int64_t count() const {
    int64_t rows = 1;
    for (int64_t d = 0; d < dims; ++d) rows *= (*this)[d];
    return rows;
  }

  const Tensor& logits;
  const int64_t dims, class_dim;
};

// A mixture's two labels, and their sample weights, stand in a first dimension of their own.
Form form_of(const Inputs& in) {
  const ScalarType type = in.target.scalar_type();
  if (type != ScalarType::Long && type != ScalarType::Int) return Form::probabilities;
  return in.target.dim() == in.logits.dim() ? Form::mixture : Form::index;
}

// Floats a row that the forward keeps, where it keeps any.
int kept_of(const Inputs& in) {
  const Form form = form_of(in);
  return form == Form::probabilities ? 0 : kSaved + (form == Form::mixture);
}

Storage storage_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Storage::float64;
    case ScalarType::BFloat16:
      return Storage::bfloat16;
    case ScalarType::Half:
      return Storage::float16;
    default:
      return Storage::float32;
  }
}

bool same_device(const Tensor& a, const Tensor& b) { return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index(); }

// What functional.py explains, this refuses: no kernel may read where it should not.
void check(const Inputs& in, const Tensor* upstream) {
  STD_TORCH_CHECK(in.logits.dim() > 0 && in.logits.dim() <= kMaxDims, "logits must have from 1 to ", kMaxDims, " dimensions");
  const RowSizes rows(in.logits);
  STD_TORCH_CHECK(in.logits.size(rows.class_dim) < kMaxClasses, "logits must have fewer than 2^31 - 1024 classes");
  const Form form = form_of(in);
  const bool two = form == Form::mixture;
  const auto like_rows = [&](const Tensor& t, bool both) {
    bool same = t.dim() == rows.dims + both && (!both || t.size(0) == 2);
    for (int64_t d = 0; same && d < rows.dims; ++d) same = t.size(d + both) == rows[d];
    return same;
  };
  const ScalarType logits = in.logits.scalar_type(), of_target = in.target.scalar_type(), type = arithmetic(in.logits);
  if (form == Form::probabilities) {
    bool fits = in.target.dim() == in.logits.dim();
    for (int64_t d = 0; fits && d < in.logits.dim(); ++d) fits = in.target.size(d) == in.logits.size(d);
    STD_TORCH_CHECK(fits, "target must have the shape of logits, or without the class dimension and be int64 or int32");
    STD_TORCH_CHECK(
        of_target == type || (type == ScalarType::Float && (of_target == ScalarType::BFloat16 || of_target == ScalarType::Half)),
        "target must be int64 or int32, or probabilities in the dtype of the arithmetic or 16 bits");
  } else {
    STD_TORCH_CHECK(like_rows(in.target, two),
                    "target must have the shape of logits without the class dimension, or hold two of that shape");
  }
  STD_TORCH_CHECK(
      logits == ScalarType::Float || logits == ScalarType::Double || logits == ScalarType::BFloat16 || logits == ScalarType::Half,
      "logits must be float32, float64, bfloat16 or float16");
  STD_TORCH_CHECK(in.logits.size(rows.class_dim) < std::numeric_limits<int>::max(), "logits must have fewer than 2^31 classes");
  STD_TORCH_CHECK(same_device(in.logits, in.target), "logits and target must be on one device");
  const auto weighs = [&](const Tensor& t, bool both) {
    return like_rows(t, both) && t.scalar_type() == type && same_device(t, in.logits);
  };
  if (in.weight)
    STD_TORCH_CHECK(in.weight->dim() == 1 && in.weight->size(0) == in.logits.size(rows.class_dim) && in.weight->scalar_type() == type &&
                        in.weight->is_contiguous() && same_device(*in.weight, in.logits),
                    "weight must hold one contiguous value for each class, in the dtype of the arithmetic");
  if (in.sample_weight)
    STD_TORCH_CHECK(weighs(*in.sample_weight, two), "sample_weight must have the shape of target and the dtype of the arithmetic");
  if (upstream)
    STD_TORCH_CHECK(in.reduction == kNone ? weighs(*upstream, false)
                                          : upstream->dim() == 0 && upstream->scalar_type() == type && same_device(*upstream, in.logits),
                    "the upstream gradient must have the shape and the dtype of the loss");
  STD_TORCH_CHECK(in.reduction >= kNone && in.reduction <= kSum, "reduction must be 0, 1 or 2");
  STD_TORCH_CHECK(in.diversity >= 0 && in.diversity <= int64_t(fastsoftloss::Diversity::variance), "diversity must be from 0 to 5");
}

// One operand over the row dimensions, in bytes.
struct Walk {
  const Tensor* tensor;
  int64_t skip;  // the dimension that is not the rows': of the classes, of a mixture's labels, or -1
  int64_t bytes;
  Operand* out;

  int64_t stride(int64_t d) const { return tensor->stride(skip >= 0 && d >= skip ? d + 1 : d) * bytes; }
};

// Row dimensions that all operands walk alike are one dimension; false where more are left than a job has.
template <class T>
bool set_rows(Job<T>& job, const RowSizes& sizes, const Walk* walks, int count) {
  job.rows = sizes.count();
  int dims = 0;
  for (int64_t d = 0; d < sizes.dims; ++d) {
    const int64_t size = sizes[d];
    if (size == 1) continue;
    bool joins = dims > 0;
    for (int i = 0; i < count; ++i) joins = joins && walks[i].out->stride[dims - 1] == walks[i].stride(d) * size;
    if (!joins) {
      if (dims == kMaxRowDims) return false;
      job.row_size[dims++] = 1;
    }
    job.row_size[dims - 1] *= size;
    for (int i = 0; i < count; ++i) walks[i].out->stride[dims - 1] = walks[i].stride(d);
  }
  job.row_dims = dims;
  return true;
}

// Rows of contiguous classes one behind the other.
bool packed(const Tensor& logits, int64_t class_dim) {
  int64_t step = logits.size(class_dim);
  bool good = logits.stride(class_dim) == 1;
  for (int64_t d = logits.dim() - 1; d >= 0; --d) {
    if (d == class_dim || logits.size(d) == 1) continue;
    good = good && logits.stride(d) == step;
    step *= logits.size(d);
  }
  return good;
}

template <class T>
struct Call {
  Job<T> job;
  Plan plan;
};

// The job that the arguments, found good by check(), describe; false where they have more dimensions than a job.
template <class T>
bool make_call(Call<T>& call, const Inputs& in, const Tensor* gradient, const Tensor* upstream, int multiprocessors) {
  const Tensor& logits = in.logits;
  Job<T>& job = call.job;
  const RowSizes rows(logits);
  const int64_t class_dim = rows.class_dim, bytes = int64_t(logits.element_size());
  job.classes = int(logits.size(class_dim));
  job.logits.data = static_cast<char*>(const_cast<void*>(logits.const_data_ptr()));
  job.logits_step = logits.stride(class_dim) * bytes;
  job.form = form_of(in);
  const bool mixed = job.form == Form::mixture, soft = job.form == Form::probabilities;
  job.wide_target = in.target.scalar_type() == ScalarType::Long;
  if (soft) job.target_storage = storage_of(in.target.scalar_type());
  const int64_t target_bytes = int64_t(in.target.element_size()), label_dim = mixed ? 0 : -1, target_dim = soft ? class_dim : label_dim;
  if (mixed || soft) job.target_step = in.target.stride(target_dim) * target_bytes;
  job.target.data = static_cast<char*>(const_cast<void*>(in.target.const_data_ptr()));
  job.ignore_index = in.ignore_index;
  job.mean = in.reduction == kMean;
  job.weighted = in.weight || in.sample_weight;
  Walk walks[5];
  int count = 0;
  walks[count++] = {&logits, class_dim, bytes, &job.logits};
  walks[count++] = {&in.target, target_dim, target_bytes, &job.target};
  if (gradient) {
    job.gradient.data = static_cast<char*>(gradient->mutable_data_ptr());
    job.gradient_step = gradient->stride(class_dim) * bytes;
    walks[count++] = {gradient, class_dim, bytes, &job.gradient};
  }
  if (in.weight) job.class_weight = static_cast<const T*>(in.weight->const_data_ptr());
  if (in.sample_weight) {
    job.sample_weight.data = static_cast<char*>(const_cast<void*>(in.sample_weight->const_data_ptr()));
    if (mixed) job.sample_weight_step = in.sample_weight->stride(0) * int64_t(sizeof(T));
    walks[count++] = {&*in.sample_weight, label_dim, sizeof(T), &job.sample_weight};
  }
  if (upstream) {
    auto* const data = static_cast<char*>(const_cast<void*>(upstream->const_data_ptr()));
    if (upstream->dim() == 0) {
      job.one_upstream = reinterpret_cast<const T*>(data);
    } else {
      job.upstream.data = data;
      walks[count++] = {upstream, -1, sizeof(T), &job.upstream};
    }
  }
  if (!set_rows(job, rows, walks, count)) return false;

  auto& o = job.options;
  o.diversity = static_cast<fastsoftloss::Diversity>(in.diversity);
  o.diversity_weight = T(in.diversity_weight);
  o.label_smoothing = T(in.label_smoothing);
  o.z_loss = T(in.z_loss);
  o.classes = o.class_weight_sum = T(job.classes);
  o.class_weights = job.class_weight != nullptr && o.label_smoothing != 0;  // a row's own weight is an argument of finish

  Batch batch;
  batch.rows = job.rows;
  batch.classes = job.classes;
  batch.bytes = int(bytes);
  batch.contiguous = job.logits_step == bytes;
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  batch.packed =
      packed(logits, class_dim) && aligned(job.logits.data) && (!gradient || (packed(*gradient, class_dim) && aligned(job.gradient.data)));
  batch.side_by_side = job.row_dims > 0 && job.logits.stride[job.row_dims - 1] == bytes;
  batch.weighted = o.class_weights;
  batch.fused = gradient && !upstream;
  batch.form = job.form;
  call.plan = plan(batch, multiprocessors);
  return true;
}

Tensor compact(const Tensor& t) {
  Tensor copy = empty(t, t.sizes().data(), t.dim(), t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

// f is called with the storage type as a template argument.
template <class F>
auto with_storage(const Tensor& logits, F f) {
  switch (storage_of(logits.scalar_type())) {
    case Storage::float64:
      return f(std::integral_constant<Storage, Storage::float64>(), double());
    case Storage::bfloat16:
      return f(std::integral_constant<Storage, Storage::bfloat16>(), float());
    case Storage::float16:
      return f(std::integral_constant<Storage, Storage::float16>(), float());
    default:
      return f(std::integral_constant<Storage, Storage::float32>(), float());
  }
}

// f(storage, zero, call), which launches what the arguments describe; or, where they have more dimensions that cannot be joined than a
// kernel unfolds, what compact copies of them do.
template <class F>
void with_call(const Inputs& in, Tensor* gradient, const Tensor* upstream, int multiprocessors, F f) {
  with_storage(in.logits, [&](auto storage, auto zero) {
    Call<decltype(zero)> call;
    if (make_call(call, in, gradient, upstream, multiprocessors)) return f(storage, zero, call);
    const auto copied = [](const Tensor* t) { return t ? OptionalTensor(compact(*t)) : std::nullopt; };
    const Tensor logits = compact(in.logits), target = compact(in.target);
    const OptionalTensor sample_weight = copied(in.sample_weight ? &*in.sample_weight : nullptr), upstreams = copied(upstream);
    OptionalTensor gradients = copied(gradient);
    const Inputs copies{
        logits,   target, in.weight, sample_weight, in.ignore_index, in.reduction, in.label_smoothing, in.diversity, in.diversity_weight,
        in.z_loss};
    call = {};
    STD_TORCH_CHECK(make_call(call, copies, gradients ? &*gradients : nullptr, upstreams ? &*upstreams : nullptr, multiprocessors),
                    "tensors have more than ", kMaxRowDims, " dimensions that cannot be joined");
    f(storage, zero, call);
    if (gradients) torch::stable::copy_(*gradient, *gradients);
  });
}

// FASTSOFTLOSS_CHECK=1: a target out of range is an error, at the price of waiting for the device.
template <class T>
void check_targets(const Job<T>& job, const Device& device, const Tensor& logits) {
  const char* wanted = std::getenv("FASTSOFTLOSS_CHECK");
  if (!wanted || std::strcmp(wanted, "1") != 0 || job.form == Form::probabilities) return;
  Job<float> targets;
  targets.rows = job.rows, targets.classes = job.classes, targets.row_dims = job.row_dims;
  std::memcpy(targets.row_size, job.row_size, sizeof job.row_size);
  targets.target = job.target, targets.wide_target = job.wide_target, targets.ignore_index = job.ignore_index;
  targets.form = job.form, targets.target_step = job.target_step;
  const Tensor found = vector_of(logits, 1, ScalarType::Long);
  auto* first = static_cast<unsigned long long*>(found.mutable_data_ptr());
  unsigned long long row = job.rows;
  check(cudaMemcpyAsync(first, &row, sizeof row, cudaMemcpyHostToDevice, device.stream()));
  check(find_outside(targets, first, device.stream()));
  check(cudaMemcpyAsync(&row, first, sizeof row, cudaMemcpyDeviceToHost, device.stream()));
  check(cudaStreamSynchronize(device.stream()));
  STD_TORCH_CHECK(int64_t(row) == job.rows, "target of row ", row, " is outside [0, ", job.classes, ") and is not ignore_index");
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Outputs cross_entropy(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const OptionalTensor& sample_weight,
                      int64_t ignore_index, int64_t reduction, double label_smoothing, int64_t diversity, double diversity_weight,
                      double z_loss, bool parts, bool gradient) {
  const Device device(logits);
  const Inputs in{logits, target, weight, sample_weight, ignore_index, reduction, label_smoothing, diversity, diversity_weight, z_loss};
  check(in, nullptr);
  const ScalarType type = arithmetic(logits);
  const RowSizes sizes(logits);
  const int64_t rows = sizes.count(), classes = logits.size(sizes.class_dim);
  int64_t shape[kMaxDims + 1] = {2}, dims = 0;  // of the parts; without the 2, of the loss
  if (reduction == kNone)
    for (; dims < sizes.dims; ++dims) shape[dims + 1] = sizes[dims];
  gradient = gradient && fused(classes);
  Tensor loss = empty(logits, shape + 1, dims, type);
  Tensor components = parts ? empty(logits, shape, dims + 1, type) : vector_of(logits, 0, type);
  Tensor dlogits = gradient ? torch::stable::empty_like(logits) : vector_of(logits, 0, logits.scalar_type());
  Tensor moments = vector_of(logits, kept(rows, classes, reduction == kMean, kept_of(in)), type);
  if (rows == 0 || (classes == 0 && form_of(in) == Form::probabilities)) {  // no row that counts
    const double nothing = reduction == kMean ? std::numeric_limits<double>::quiet_NaN() : 0;
    torch::stable::fill_(loss, nothing);
    torch::stable::fill_(components, nothing);
    torch::stable::fill_(moments, nothing);
    return {loss, components, dlogits, moments};
  }
  with_call(in, gradient ? &dlogits : nullptr, nullptr, device.multiprocessors(), [&](auto storage, auto zero, auto& call) {
    using T = decltype(zero);
    Job<T>& job = call.job;
    check_targets(job, device, logits);
    job.parts = parts;
    T* const parts_data = parts ? static_cast<T*>(components.mutable_data_ptr()) : nullptr;
    T* const kept_data = moments.numel() ? static_cast<T*>(moments.mutable_data_ptr()) : nullptr;
    if (reduction == kMean) job.divisor = kept_data + moments.numel() - 1;
    if (classes > kKeptClasses && call.plan.kernel != Kernel::careful_rows) job.saved = kept_data;
    // elsewhere they are little beside the logits, and those of a mixture too wide
    const bool labelled = gradient && job.mean && job.form == Form::index && classes <= kTileClasses;
    const Scratch places = scratch(call.plan, rows, sizeof(fastsoftloss::RowMoments<T>) / sizeof(T), labelled);
    const Tensor memory = vector_of(logits, reduction != kNone || call.plan.splits > 1 ? places.size : 0, type);
    T* const scratch_data = memory.numel() ? static_cast<T*>(memory.mutable_data_ptr()) : nullptr;
    if (reduction == kNone) {
      job.row_loss = static_cast<T*>(loss.mutable_data_ptr());
      job.row_parts = parts_data;
    } else {
      job.loss = static_cast<T*>(loss.mutable_data_ptr());
      job.loss_parts = parts_data;
      job.partial = scratch_data + places.partial;
      job.shares = scratch_data + places.shares;
      job.counter = reinterpret_cast<unsigned*>(scratch_data + places.counter);
      if (labelled) job.labels = reinterpret_cast<const int16_t*>(scratch_data + places.labels);
    }
    if (call.plan.splits > 1) job.moments = scratch_data + places.moments;
    check(fastsoftloss::cuda::forward<storage.value, T>(job, call.plan, device.stream()));
  });
  return {loss, components, dlogits, moments};
}

void write_gradient(Tensor& dlogits, const Tensor& upstream, const Tensor& moments, const Inputs& in, bool rescale) {
  const Device device(in.logits);
  check(in, &upstream);
  const RowSizes sizes(in.logits);
  const int64_t rows = sizes.count(), classes = in.logits.size(sizes.class_dim);
  STD_TORCH_CHECK(moments.numel() == kept(rows, classes, in.reduction == kMean, kept_of(in)) &&
                      moments.scalar_type() == arithmetic(in.logits) && moments.is_contiguous() && same_device(moments, in.logits),
                  "moments must be what the forward gave");
  if (rows == 0 || classes == 0) return;
  with_call(in, &dlogits, &upstream, device.multiprocessors(), [&](auto storage, auto zero, auto& call) {
    using T = decltype(zero);
    Job<T>& job = call.job;
    job.rescale = rescale && job.one_upstream, job.rescale_rows = rescale && !job.one_upstream;
    T* const kept_data = moments.numel() ? static_cast<T*>(const_cast<void*>(moments.const_data_ptr())) : nullptr;
    if (in.reduction == kMean) job.divisor = kept_data + moments.numel() - 1;
    if (classes > kKeptClasses && call.plan.kernel != Kernel::careful_rows) job.saved = kept_data;
    check(fastsoftloss::cuda::backward<storage.value, T>(job, call.plan, device.stream()));
  });
}

Tensor cross_entropy_backward(const Tensor& upstream, const Tensor& moments, const Tensor& logits, const Tensor& target,
                              const OptionalTensor& weight, const OptionalTensor& sample_weight, int64_t ignore_index, int64_t reduction,
                              double label_smoothing, int64_t diversity, double diversity_weight, double z_loss) {
  const Inputs in{logits, target, weight, sample_weight, ignore_index, reduction, label_smoothing, diversity, diversity_weight, z_loss};
  Tensor dlogits = torch::stable::empty_like(logits);
  write_gradient(dlogits, upstream, moments, in, false);
  return dlogits;
}

// The gradient that the forward wrote becomes that for `upstream`, in place; where that is 1, the device finds nothing to do.
void cross_entropy_rescale(Tensor dlogits, const Tensor& upstream, const Tensor& moments, const Tensor& logits, const Tensor& target,
                           const OptionalTensor& weight, const OptionalTensor& sample_weight, int64_t ignore_index, int64_t reduction,
                           double label_smoothing, int64_t diversity, double diversity_weight, double z_loss) {
  const Inputs in{logits, target, weight, sample_weight, ignore_index, reduction, label_smoothing, diversity, diversity_weight, z_loss};
  bool alike = dlogits.dim() == logits.dim() && dlogits.scalar_type() == logits.scalar_type() && same_device(dlogits, logits);
  for (int64_t d = 0; alike && d < logits.dim(); ++d) alike = dlogits.size(d) == logits.size(d);
  STD_TORCH_CHECK(alike, "dlogits must be like logits");
  write_gradient(dlogits, upstream, moments, in, true);
}

STABLE_TORCH_LIBRARY_IMPL(fastsoftloss, FSL_DISPATCH_KEY, m) {
  m.impl("cuda_cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cuda_cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("cuda_cross_entropy_rescale", TORCH_BOX(&cross_entropy_rescale));
}

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

// Importing the module runs the registration above.
PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&module); }
