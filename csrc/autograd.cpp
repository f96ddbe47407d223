// The autograd node of an eager call on the CPU: what _CrossEntropy in fastsoftloss/ops.py is in Python, where a call costs
// more than the kernel at small batches. Torch's stable ABI has no autograd, so this file is built for one torch and one
// Python, a module of its own that carries torch's version in its name; under any other the one in Python does the same.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>

namespace {

using at::Tensor;
using c10::DispatchKey;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Options {
  int64_t ignore_index, reduction;
  double label_smoothing;
  int64_t diversity;
  double diversity_weight, z_loss;
};

struct Inputs {
  Tensor logits, target;
  OptionalTensor weight, sample_weight;
  Options options;
};

struct Outputs {
  Tensor loss, parts, dlogits, moments;
};

// The operators of fastsoftloss/ops.py, which must be defined before the first call.
Outputs forward(const Inputs& in, bool parts, bool gradient) {
  using Schema = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                            int64_t, int64_t, double, int64_t, double, double, bool, bool);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastsoftloss::cross_entropy", "").typed<Schema>();
  const Options& o = in.options;
  at::AutoDispatchBelowAutograd below;
  auto [loss, components, dlogits, moments] = op.call(in.logits, in.target, in.weight, in.sample_weight, o.ignore_index, o.reduction,
                                                      o.label_smoothing, o.diversity, o.diversity_weight, o.z_loss, parts, gradient);
  return {std::move(loss), std::move(components), std::move(dlogits), std::move(moments)};
}

Tensor backward(const Tensor& upstream, const Tensor& moments, const Inputs& in) {
  using Schema = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t,
                        int64_t, double, int64_t, double, double);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastsoftloss::cross_entropy_backward", "").typed<Schema>();
  const Options& o = in.options;
  return op.call(upstream, moments, in.logits, in.target, in.weight, in.sample_weight, o.ignore_index, o.reduction, o.label_smoothing,
                 o.diversity, o.diversity_weight, o.z_loss);
}

// Inside forward-mode AD, whose tangents, of an upstream gradient too, the operators would drop.
bool forward_mode() { return torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr; }

Tensor gradient_in_forward_mode(const Tensor& upstream, const Tensor& moments, const Inputs& in) {
  const pybind11::gil_scoped_acquire gil;
  const Options& o = in.options;
  return pybind11::module_::import("fastsoftloss.ops")
      .attr("cpu_gradient_in_forward_mode")(upstream, moments, in.logits, in.target, in.weight, in.sample_weight, o.ignore_index,
                                            o.reduction, o.label_smoothing, o.diversity, o.diversity_weight, o.z_loss)
      .cast<Tensor>();
}

constexpr c10::DispatchKeySet kTransforms({DispatchKey::Python, DispatchKey::Batched, DispatchKey::FuncTorchBatched,
                                           DispatchKey::FuncTorchGradWrapper, DispatchKey::Functionalize, DispatchKey::Negative,
                                           DispatchKey::ZeroTensor});

// Has its values in host memory, as they are.
bool is_plain(const Tensor& t) { return t.is_cpu() && !t.key_set().has_any(kTransforms); }

// The gradient for an upstream of 1 made that for `upstream`, in place; nothing where only the backward can do so without
// rounding twice, as _rescale_on_host in ops.py has it.
Tensor rescaled(Tensor dlogits, const Tensor& upstream) {
  if (!is_plain(upstream) || c10::impl::dispatch_mode_enabled()) return {};  // a mode may be tracing
  bool finite;
  if (upstream.dim() == 0) {
    const double factor = upstream.item().toDouble();
    if (factor == 1) return dlogits;
    finite = std::isfinite(factor);
  } else {
    finite = upstream.isfinite().all().item().toBool();
  }
  if (!finite || dlogits.element_size() < 4) return {};
  return dlogits.mul_(upstream.dim() == 0 || dlogits.dim() == 1 ? upstream : upstream.unsqueeze(1));
}

c10::IValue pack(const Options& o) {
  return c10::ivalue::Tuple::create(o.ignore_index, o.reduction, o.label_smoothing, o.diversity, o.diversity_weight, o.z_loss);
}

Options unpack(const c10::IValue& packed) {
  const auto of = packed.toTupleRef().elements().asArrayRef();
  return {of[0].toInt(), of[1].toInt(), of[2].toDouble(), of[3].toInt(), of[4].toDouble(), of[5].toDouble()};
}

OptionalTensor optional(Tensor t) { return t.defined() ? OptionalTensor(std::move(t)) : std::nullopt; }

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  // logits once more, for those of `in` are not seen by autograd; parts: where to leave them, or null
  static Tensor forward(AutogradContext* ctx, const Tensor& /*logits*/, const Inputs& in, Tensor* parts) {
    // float16 is trained with loss scaling, under which a gradient written now would underflow and be written again
    const bool gradient = in.logits.scalar_type() != at::kHalf;
    Outputs out = ::forward(in, parts != nullptr, gradient);
    ctx->save_for_backward(
        {in.logits, in.target, in.weight.value_or(Tensor()), in.sample_weight.value_or(Tensor()), std::move(out.moments)});
    ctx->set_materialize_grads(false);
    ctx->saved_data["options"] = pack(in.options);
    if (gradient) ctx->saved_data["dlogits"] = std::move(out.dlogits);
    if (parts) *parts = std::move(out.parts);
    return std::move(out.loss);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    const Tensor& upstream = upstreams[0];
    if (!upstream.defined()) return {Tensor(), Tensor(), Tensor()};
    Tensor dlogits;
    if (!at::GradMode::is_enabled() && !forward_mode()) {  // nor create_graph
      const auto written = ctx->saved_data.find("dlogits");
      if (written != ctx->saved_data.end()) {  // handed over once: autograd may write into it from now on
        dlogits = std::move(written->second).toTensor();
        ctx->saved_data.erase(written);
        dlogits = rescaled(std::move(dlogits), upstream);
      }
    }
    if (!dlogits.defined()) {
      variable_list saved = ctx->get_saved_variables();
      const Inputs in{std::move(saved[0]), std::move(saved[1]), optional(std::move(saved[2])), optional(std::move(saved[3])),
                      unpack(ctx->saved_data["options"])};
      if (forward_mode()) {
        dlogits = gradient_in_forward_mode(upstream, saved[4], in);
      } else if (at::GradMode::is_enabled()) {
        dlogits = ::backward(upstream, saved[4], in);  // differentiated by the operator's own formula
      } else {
        at::AutoDispatchBelowAutograd below;
        dlogits = ::backward(upstream, saved[4], in);
      }
    }
    return {std::move(dlogits), Tensor(), Tensor()};
  }
};

// Whether all of it is what the kernels and this node take; ops.py and the reference take what is not.
bool takes(const Tensor& t) { return is_plain(t) && t.layout() == at::kStrided && !t._fw_grad(0).defined(); }

bool read_tensor(PyObject* from, Tensor& to) {
  if (!THPVariable_CheckExact(from)) return false;
  to = THPVariable_Unpack(from);
  return takes(to);
}

bool read_constant(PyObject* from, OptionalTensor& to) {
  if (from == Py_None) return true;
  Tensor t;
  if (!read_tensor(from, t) || t.requires_grad()) return false;
  to = std::move(t);
  return true;
}

bool read_share(PyObject* from, double& to) {
  if (!PyFloat_Check(from) && !PyLong_Check(from)) return false;
  to = PyFloat_AsDouble(from);
  if (PyErr_Occurred()) PyErr_Clear();  // beyond every double, and so beyond 1: -1
  return 0 <= to && to <= 1;
}

// The weights of both labels, in place: `shares`, or `share` where there are none, and 1 less them.
template <class T>
void share_out(const Tensor& shares, double share, const Tensor& weights) {
  T* const to = weights.mutable_data_ptr<T>();
  const int64_t count = weights.size(1);
  for (int64_t i = 0; i < count; ++i) {
    to[i] = shares.defined() ? shares.const_data_ptr<T>()[i] : T(share);
    to[count + i] = shares.defined() ? T(1) - to[i] : T(1 - share);
  }
}

// (y_a, y_b, mix) as pack_mixture in fastsoftloss/reference.py has it: both labels in one tensor, and the sample weight of each.
bool read_mixture(PyObject* from, Inputs& in) {
  if (PyTuple_GET_SIZE(from) != 3) return false;
  OptionalTensor first, second, mix;
  double share = -1;
  PyObject* const last = PyTuple_GET_ITEM(from, 2);
  if (!read_constant(PyTuple_GET_ITEM(from, 0), first) || !read_constant(PyTuple_GET_ITEM(from, 1), second) || !first || !second)
    return false;
  if (!read_share(last, share) && (!read_constant(last, mix) || !mix)) return false;
  const auto type = in.logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto rows = first->sizes();
  if (first->dim() + 1 != std::max<int64_t>(in.logits.dim(), 1) || second->sizes() != rows) return false;
  if ((first->scalar_type() != at::kLong && first->scalar_type() != at::kInt) || second->scalar_type() != first->scalar_type())
    return false;
  if (mix && (mix->scalar_type() != type || (mix->dim() > 0 && mix->sizes() != rows))) return false;

  at::AutoDispatchBelowAutograd below;
  at::DimVector both{2}, steps{1};  // of one value for all rows
  both.append(rows.begin(), rows.end()), steps.append(rows.size(), 0);
  in.target = at::empty(both, first->options());
  const int64_t bytes = first->nbytes();
  for (int i = 0; i < 2; ++i) {
    const Tensor& label = i ? *second : *first;
    if (label.is_contiguous())
      std::copy_n(static_cast<const char*>(label.const_data_ptr()), bytes, static_cast<char*>(in.target.mutable_data_ptr()) + i * bytes);
    else
      in.target.select(0, i).copy_(label);
  }
  const Tensor shares = mix ? mix->contiguous() : Tensor();
  const Tensor weights = at::empty({2, mix ? shares.numel() : 1}, in.logits.options().dtype(type));
  if (type == at::kDouble)
    share_out<double>(shares, share, weights);
  else
    share_out<float>(shares, share, weights);
  in.sample_weight = mix && mix->dim() > 0 ? weights.view(both) : weights.as_strided(both, steps);
  return true;
}

bool read_target(PyObject* from, bool packed, Inputs& in) {
  if (PyTuple_CheckExact(from)) return read_mixture(from, in);
  if (!read_tensor(from, in.target) || in.target.requires_grad()) return false;
  return packed || in.target.is_floating_point() || in.target.dim() < std::max<int64_t>(in.logits.dim(), 1);
}

// Options of fastsoftloss/ops.py.
bool read_options(PyObject* from, Options& to) {
  if (!PyTuple_Check(from) || PyTuple_GET_SIZE(from) != 6) return false;
  const auto whole = [&](int i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(from, i)); };
  const auto real = [&](int i) { return PyFloat_AsDouble(PyTuple_GET_ITEM(from, i)); };
  to = {whole(0), whole(1), real(2), whole(3), real(4), real(5)};
  return true;
}

const char kDoc[] =
    "cross_entropy(logits, target, weight, sample_weight, options, parts, packed)\n--\n\n"
    "The loss, or (loss, parts), of plain CPU tensors as the operator fastsoftloss::cross_entropy takes them, or of a mixture,\n"
    "which may come as reference.pack_mixture gives it where `packed` says so;\n"
    "differentiable by logits; None where something is not plain, which fastsoftloss.ops takes. RuntimeError where the operator refuses.";

PyObject* cross_entropy(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Inputs in;
  if (count != 7 || !read_options(args[4], in.options)) {
    PyErr_SetString(PyExc_TypeError, "cross_entropy takes logits, target, weight, sample_weight, a tuple of six options, parts and packed");
    return nullptr;
  }
  if (PyErr_Occurred()) return nullptr;
  constexpr c10::DispatchKeySet kTracers({DispatchKey::FuncTorchDynamicLayerFrontMode, DispatchKey::Tracer});
  const bool transformed = c10::impl::tls_local_dispatch_key_set().included_.has_any(kTracers) || at::impl::torch_function_mode_enabled() ||
                           c10::impl::dispatch_mode_enabled();
  if (transformed || !read_tensor(args[0], in.logits) || !read_constant(args[2], in.weight) || !read_constant(args[3], in.sample_weight) ||
      (PyTuple_CheckExact(args[1]) && in.sample_weight) || !read_target(args[1], args[6] == Py_True, in))
    Py_RETURN_NONE;
  const bool wants_parts = PyObject_IsTrue(args[5]) == 1;
  Tensor loss, parts;
  {
    pybind11::gil_scoped_release no_gil;
    if (in.logits.requires_grad() && at::GradMode::is_enabled()) {
      loss = CrossEntropy::apply(in.logits, in, wants_parts ? &parts : nullptr);
    } else {
      Outputs out = forward(in, wants_parts, false);
      loss = std::move(out.loss), parts = std::move(out.parts);
    }
  }
  if (!wants_parts) return THPVariable_Wrap(std::move(loss));
  return Py_BuildValue("(NN)", THPVariable_Wrap(std::move(loss)), THPVariable_Wrap(std::move(parts)));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {{"cross_entropy", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(cross_entropy)), METH_FASTCALL, kDoc},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_autograd", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

#define FSL_INIT(name) PyInit_##name
#define FSL_INIT_OF(name) FSL_INIT(name)
PyMODINIT_FUNC FSL_INIT_OF(FSL_MODULE)() { return PyModule_Create(&module); }
