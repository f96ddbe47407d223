// The CPU kernels as implementations of the operators that fastsoftloss/ops.py defines. Besides ops_cuda.cpp the only
// file that knows torch, and it knows its stable ABI alone: one build serves every torch from 2.10 on.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/cross_entropy.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

enum Reduction : int64_t { kNone, kMean, kSum };

constexpr int64_t kMaxDims = 64;  // of a tensor that torch's own operators take; there are tensors with more

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

fastsoftloss::Storage storage_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return fastsoftloss::Storage::float32;
    case ScalarType::Double:
      return fastsoftloss::Storage::float64;
    case ScalarType::BFloat16:
      return fastsoftloss::Storage::bfloat16;
    case ScalarType::Half:
      return fastsoftloss::Storage::float16;
    default:
      STD_TORCH_CHECK(false, "logits must be float32, float64, bfloat16 or float16");
  }
}

// Contiguous and uninitialised; the C shim takes a fraction of the time of a call through the dispatcher by name.
Tensor empty(const int64_t* sizes, int64_t dims, ScalarType type) {
  int64_t strides[kMaxDims];
  int64_t step = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  }
  static const int32_t cpu = aoti_torch_device_type_cpu();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), cpu, 0, &handle));
  return Tensor(handle);
}

// Fresh memory of many megabytes costs more in page faults than the kernel costs: ask for large pages.
Tensor empty_gradient(const Tensor& logits) {
  Tensor out =
      logits.is_contiguous() ? empty(logits.sizes().data(), logits.dim(), logits.scalar_type()) : torch::stable::empty_like(logits);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const int64_t bytes = out.numel() * int64_t(out.element_size());
  if (bytes >= int64_t(2 * kPage)) {
    const auto begin = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + bytes) / kPage * kPage;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: it may fail
  }
#endif
  return out;
}

// One operand over the row dimensions, in elements.
struct Operand {
  const int64_t* strides = nullptr;
  int64_t skip = -1;  // the class dimension, where there is one
  int64_t bytes = 0;
  int64_t fastsoftloss::Offsets::* which = nullptr;

  int64_t stride(int64_t d) const { return strides[skip >= 0 && d >= skip ? d + 1 : d] * bytes; }
};

// The logits' sizes without the class dimension.
struct RowSizes {
  explicit RowSizes(const Tensor& logits) : logits(logits), dims(logits.dim() - 1), class_dim(logits.dim() > 1 ? 1 : 0) {}
  int64_t operator[](int64_t d) const { return logits.size(d < class_dim ? d : d + 1); }

  const Tensor& logits;
  const int64_t dims, class_dim;
};

// Row dimensions that all operands walk alike are one dimension.
template <class T>
void set_rows(fastsoftloss::Job<T>& job, const RowSizes& sizes, const Operand* operands, int count) {
  job.rows = 1;
  int dims = 0;
  for (int64_t d = 0; d < sizes.dims; ++d) {
    const int64_t size = sizes[d];
    job.rows *= size;
    if (size == 1) continue;
    bool joins = dims > 0;
    for (int i = 0; i < count; ++i) joins = joins && job.row_step[dims - 1].*operands[i].which == operands[i].stride(d) * size;
    if (!joins) {
      STD_TORCH_CHECK(dims < fastsoftloss::kMaxRowDims, "logits have more than ", fastsoftloss::kMaxRowDims,
                      " dimensions that cannot be joined");
      job.row_size[dims++] = 1;
    }
    job.row_size[dims - 1] *= size;
    for (int i = 0; i < count; ++i) job.row_step[dims - 1].*operands[i].which = operands[i].stride(d);
  }
  job.row_dims = dims;
}

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

fastsoftloss::Form form_of(const Inputs& in) {
  const ScalarType type = in.target.scalar_type();
  if (type != ScalarType::Long && type != ScalarType::Int) return fastsoftloss::Form::probabilities;
  return in.target.dim() == in.logits.dim() ? fastsoftloss::Form::mixture : fastsoftloss::Form::index;
}

// What functional.py explains, this refuses: nothing below may read where it should not.
void check(const Inputs& in, const Tensor* upstream, const Tensor* direction = nullptr) {
  using fastsoftloss::Form;
  STD_TORCH_CHECK(in.logits.dim() > 0 && in.logits.dim() <= kMaxDims, "logits must have from 1 to ", kMaxDims, " dimensions");
  STD_TORCH_CHECK(in.logits.is_cpu() && in.target.is_cpu(), "logits and target must be on the CPU");
  const RowSizes rows(in.logits);
  const ScalarType type = in.logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  // one value a row, or two where a mixture has two labels
  const auto like_rows = [&](const Tensor& t, bool two) {
    bool same = t.dim() == rows.dims + two && (!two || t.size(0) == 2);
    for (int64_t d = 0; same && d < rows.dims; ++d) same = t.size(d + two) == rows[d];
    return same;
  };
  const Form form = form_of(in);
  const bool two = form == Form::mixture;
  if (form == Form::probabilities) {
    bool fits = in.target.dim() == in.logits.dim();
    for (int64_t d = 0; fits && d < in.logits.dim(); ++d) fits = in.target.size(d) == in.logits.size(d);
    STD_TORCH_CHECK(fits, "target must have the shape of logits, or without the class dimension and be int64 or int32");
    const ScalarType of = in.target.scalar_type();
    STD_TORCH_CHECK(of == type || (type == ScalarType::Float && (of == ScalarType::BFloat16 || of == ScalarType::Half)),
                    "target must be int64 or int32, or probabilities in the dtype of the arithmetic or 16 bits");
  } else {
    STD_TORCH_CHECK(like_rows(in.target, two), "target must have the shape of logits without the class dimension");
  }
  const auto weighs = [&](const Tensor& t, bool both) { return like_rows(t, both) && t.scalar_type() == type && t.is_cpu(); };
  if (in.weight)
    STD_TORCH_CHECK(in.weight->dim() == 1 && in.weight->size(0) == in.logits.size(rows.class_dim) && in.weight->scalar_type() == type &&
                        in.weight->is_contiguous() && in.weight->is_cpu(),
                    "weight must hold one contiguous value for each class, in the dtype of the arithmetic");
  if (in.sample_weight)
    STD_TORCH_CHECK(weighs(*in.sample_weight, two), "sample_weight must have the shape of target and the dtype of the arithmetic");
  if (upstream)
    STD_TORCH_CHECK(
        in.reduction == kNone ? weighs(*upstream, false) : upstream->dim() == 0 && upstream->scalar_type() == type && upstream->is_cpu(),
        "the upstream gradient must have the shape and the dtype of the loss");
  if (direction) {
    bool fits = direction->dim() == in.logits.dim() && direction->scalar_type() == in.logits.scalar_type() && direction->is_cpu();
    for (int64_t d = 0; fits && d < in.logits.dim(); ++d) fits = direction->size(d) == in.logits.size(d);
    STD_TORCH_CHECK(fits, "the gradient of dlogits must have the shape, the dtype and the device of logits");
    STD_TORCH_CHECK(form != Form::probabilities, "class probabilities have no fused second derivative");
  }
  STD_TORCH_CHECK(in.reduction >= kNone && in.reduction <= kSum, "reduction must be 0, 1 or 2");
  STD_TORCH_CHECK(in.diversity >= 0 && in.diversity <= int64_t(fastsoftloss::Diversity::variance), "diversity must be from 0 to 5");
}

// The job that the arguments, found good by check(), describe, with its targets found good, and what the sums are divided by.
// gradient: where to write it, or null. direction: what else is walked over like the logits, or null.
template <class T>
fastsoftloss::Job<T> make_job(const Inputs& in, const Tensor* gradient, const Tensor* upstream, double* divisor,
                              const Tensor* direction = nullptr) {
  fastsoftloss::Job<T> job;
  const RowSizes rows(in.logits);
  const int64_t class_dim = rows.class_dim;
  job.classes = in.logits.size(class_dim);
  job.storage = storage_of(in.logits.scalar_type());
  const int64_t bytes = fastsoftloss::bytes_of(job.storage);
  job.logits = static_cast<const char*>(in.logits.const_data_ptr());
  job.logits_step = in.logits.stride(class_dim) * bytes;
  job.target = static_cast<const char*>(in.target.const_data_ptr());
  job.form = form_of(in);
  job.wide_target = in.target.scalar_type() == ScalarType::Long;
  const int64_t two = job.form == fastsoftloss::Form::mixture;  // both labels stand first
  int64_t target_class_dim = -1, target_bytes = job.wide_target ? 8 : 4;
  if (job.form == fastsoftloss::Form::probabilities) {
    job.target_storage = storage_of(in.target.scalar_type());
    target_class_dim = class_dim;
    target_bytes = fastsoftloss::bytes_of(job.target_storage);
  }
  if (job.form != fastsoftloss::Form::index) job.target_step = in.target.stride(two ? 0 : class_dim) * target_bytes;
  job.ignore_index = in.ignore_index;

  using fastsoftloss::Offsets;
  Operand operands[6];
  int count = 0;
  operands[count++] = {in.logits.strides().data(), class_dim, bytes, &Offsets::logits};
  operands[count++] = {in.target.strides().data() + two, target_class_dim, target_bytes, &Offsets::target};
  if (gradient) {
    job.gradient = static_cast<char*>(gradient->mutable_data_ptr());
    job.gradient_step = gradient->stride(class_dim) * bytes;
    operands[count++] = {gradient->strides().data(), class_dim, bytes, &Offsets::gradient};
  }
  if (in.weight) job.class_weight = static_cast<const T*>(in.weight->const_data_ptr());
  if (in.sample_weight) {
    job.sample_weight = static_cast<const char*>(in.sample_weight->const_data_ptr());
    if (two) job.sample_weight_step = in.sample_weight->stride(0) * int64_t(sizeof(T));
    operands[count++] = {in.sample_weight->strides().data() + two, -1, sizeof(T), &Offsets::sample_weight};
  }
  if (upstream && upstream->dim() > 0) {
    job.upstream = static_cast<const char*>(upstream->const_data_ptr());
    operands[count++] = {upstream->strides().data(), -1, sizeof(T), &Offsets::upstream};
  }
  if (direction) operands[count++] = {direction->strides().data(), class_dim, bytes, &Offsets::direction};
  set_rows(job, rows, operands, count);

  auto& o = job.options;
  o.diversity = static_cast<fastsoftloss::Diversity>(in.diversity);
  o.diversity_weight = in.diversity_weight;
  o.label_smoothing = in.label_smoothing;
  o.z_loss = in.z_loss;
  o.classes = double(job.classes);
  o.class_weights = job.class_weight != nullptr;
  o.class_weight_sum = o.classes;
  if (o.class_weights && o.label_smoothing != 0) {
    o.class_weight_sum = 0;
    for (int64_t k = 0; k < job.classes; ++k) o.class_weight_sum += job.class_weight[k];
  }

  const auto scan = fastsoftloss::scan_targets(job, parallel_for);
  STD_TORCH_CHECK(scan.outside < 0, "target of row ", scan.outside, " is outside [0, ", job.classes, ") and is not ignore_index");
  *divisor = in.reduction == kMean ? scan.weight : 1;  // 0 where no row counts: 0 / 0 is NaN, as PyTorch has it
  double scale = 1 / *divisor;
  if (upstream && upstream->dim() == 0) scale *= double(*static_cast<const T*>(upstream->const_data_ptr()));
  job.scale = T(scale);
  return job;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The loss's sizes into `shape`; how many there are.
int64_t loss_shape(const Inputs& in, int64_t* shape) {
  int64_t dims = 0;
  if (in.reduction == kNone)
    for (const RowSizes rows(in.logits); dims < rows.dims; ++dims) shape[dims] = rows[dims];
  return dims;
}

template <class T>
Outputs forward(const Inputs& in, bool parts, bool gradient) {
  check(in, nullptr);
  const ScalarType type = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  int64_t shape[kMaxDims] = {2};  // of the parts; without the 2, of the loss
  const int64_t dims = loss_shape(in, shape + 1), nothing = 0;
  Tensor loss = empty(shape + 1, dims, type);
  Tensor components = parts ? empty(shape, dims + 1, type) : empty(&nothing, 1, type);
  Tensor dlogits = gradient ? empty_gradient(in.logits) : empty(&nothing, 1, in.logits.scalar_type());
  Tensor moments = empty(&nothing, 1, type);  // the backward reads the logits anyway, and reduces them again

  double divisor;
  auto job = make_job<T>(in, gradient ? &dlogits : nullptr, nullptr, &divisor);
  T* const loss_data = static_cast<T*>(loss.mutable_data_ptr());
  T* const parts_data = parts ? static_cast<T*>(components.mutable_data_ptr()) : nullptr;
  if (in.reduction == kNone) {
    job.row_losses[0] = loss_data;
    if (parts) job.row_losses[1] = parts_data, job.row_losses[2] = parts_data + job.rows;
  }
  const auto sums = fastsoftloss::run(job, parallel_for);
  if (in.reduction != kNone) {
    *loss_data = T(sums.of[0] / divisor);
    if (parts) parts_data[0] = T(sums.of[1] / divisor), parts_data[1] = T(sums.of[2] / divisor);
  }
  return {loss, components, dlogits, moments};
}

Outputs cross_entropy(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const OptionalTensor& sample_weight,
                      int64_t ignore_index, int64_t reduction, double label_smoothing, int64_t diversity, double diversity_weight,
                      double z_loss, bool parts, bool gradient) {
  const Inputs in{logits, target, weight, sample_weight, ignore_index, reduction, label_smoothing, diversity, diversity_weight, z_loss};
  return logits.scalar_type() == ScalarType::Double ? forward<double>(in, parts, gradient) : forward<float>(in, parts, gradient);
}

template <class T>
Tensor backward(const Inputs& in, const Tensor& upstream) {
  check(in, &upstream);
  Tensor dlogits = empty_gradient(in.logits);
  double divisor;
  fastsoftloss::run(make_job<T>(in, &dlogits, &upstream, &divisor), parallel_for);
  return dlogits;
}

Tensor cross_entropy_backward(const Tensor& upstream, const Tensor& /*moments*/, const Tensor& logits, const Tensor& target,
                              const OptionalTensor& weight, const OptionalTensor& sample_weight, int64_t ignore_index, int64_t reduction,
                              double label_smoothing, int64_t diversity, double diversity_weight, double z_loss) {
  const Inputs in{logits, target, weight, sample_weight, ignore_index, reduction, label_smoothing, diversity, diversity_weight, z_loss};
  return logits.scalar_type() == ScalarType::Double ? backward<double>(in, upstream) : backward<float>(in, upstream);
}

template <class T>
std::tuple<Tensor, Tensor> double_backward(const Inputs& in, const Tensor& grad, const Tensor& upstream) {
  check(in, &upstream, &grad);
  int64_t shape[kMaxDims];
  const int64_t dims = loss_shape(in, shape);
  Tensor dupstream = empty(shape, dims, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);
  Tensor dlogits = empty_gradient(in.logits);
  double divisor;
  fastsoftloss::HessianJob<T> h;
  h.job = make_job<T>(in, &dlogits, upstream.dim() > 0 ? &upstream : nullptr, &divisor, &grad);
  h.job.upstream = nullptr;
  h.upstream = static_cast<const char*>(upstream.const_data_ptr());
  h.direction = static_cast<const char*>(grad.const_data_ptr());
  h.direction_step = grad.stride(RowSizes(in.logits).class_dim) * int64_t(grad.element_size());
  T* const slopes = static_cast<T*>(dupstream.mutable_data_ptr());
  if (in.reduction == kNone) h.job.row_losses[0] = slopes;
  const auto sums = fastsoftloss::run(h, parallel_for);
  if (in.reduction != kNone) *slopes = T(sums.of[0]);
  return {dupstream, dlogits};
}

std::tuple<Tensor, Tensor> cross_entropy_double_backward(const Tensor& grad, const Tensor& upstream, const Tensor& logits,
                                                         const Tensor& target, const OptionalTensor& weight,
                                                         const OptionalTensor& sample_weight, int64_t ignore_index, int64_t reduction,
                                                         double label_smoothing, int64_t diversity, double diversity_weight,
                                                         double z_loss) {
  const Inputs in{logits, target, weight, sample_weight, ignore_index, reduction, label_smoothing, diversity, diversity_weight, z_loss};
  return logits.scalar_type() == ScalarType::Double ? double_backward<double>(in, grad, upstream)
                                                    : double_backward<float>(in, grad, upstream);
}

STABLE_TORCH_LIBRARY_IMPL(fastsoftloss, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("cross_entropy_double_backward", TORCH_BOX(&cross_entropy_double_backward));
}

PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(fastsoftloss::instruction_set()); }

PyMethodDef methods[] = {{"instruction_set", instruction_set, METH_NOARGS, "The instruction set that the kernels run in here."},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

// Importing the module runs the registration above.
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
