// row_moments.h and row_loss.h for NumPy, without torch: the moments of a slice, merged in the order that a test asks for.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "../csrc/row_loss.h"

namespace py = pybind11;
using namespace fastsoftloss;

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// The straight way, term by term; classes at -inf are not there.
template <class T>
RowMoments<T> moments(const Array<T>& logits, const Array<T>& weight) {
  RowMoments<T> r;
  const auto z = logits.template unchecked<1>(), w = weight.template unchecked<1>();
  for (py::ssize_t i = 0; i < z.shape(0); ++i) {
    if (z(i) == -Limits<T>::infinity()) continue;
    RowMoments<T> one;
    one.n = 1, one.m = z(i), one.s1 = 1, one.s2 = 1, one.sw = w(i);
    r = merge<kAllMoments>(r, one);
  }
  return r;
}

template <class T>
RowMoments<T> merged(const RowMoments<T>& a, const RowMoments<T>& b) {
  return merge<kAllMoments>(a, b);
}

// The part with one class more; then what lies between its m and the new one, and the class's x and e.
template <class T>
py::tuple with_class(const RowMoments<T>& part, T z, T w) {
  const With<T> r = with<kAllMoments>(part, z, w);
  return py::make_tuple(r.all, r.down, r.e_down, r.x, r.e);
}

// Loss, cross-entropy, diversity; then the gradient over all classes, as spread makes it.
template <class T>
py::tuple row_loss(const RowMoments<T>& r, const Array<T>& logits, int64_t y, T row_weight, T scale, int diversity, double diversity_weight,
                   double smoothing, double z_loss, const Array<T>& weight, bool weighted) {
  const auto z = logits.template unchecked<1>(), w = weight.template unchecked<1>();
  LossOptions o;
  o.diversity = static_cast<Diversity>(diversity);
  o.diversity_weight = diversity_weight, o.label_smoothing = smoothing, o.z_loss = z_loss;
  o.classes = double(z.shape(0)), o.class_weights = weighted, o.class_weight_sum = weighted ? 0 : o.classes;
  if (weighted)
    for (py::ssize_t j = 0; j < z.shape(0); ++j) o.class_weight_sum += w(j);
  const RowLoss<T> out = finish(r, z(y), weighted ? w(y) : T(1), row_weight, scale, o);
  const RowGradient<T>& g = out.gradient;
  Array<T> gradient(z.shape(0));
  auto dz = gradient.template mutable_unchecked<1>();
  for (py::ssize_t j = 0; j < z.shape(0); ++j) {
    const T x = z(j) - r.m, e = fastsoftloss::exp(x);
    const bool there = z(j) != -Limits<T>::infinity();
    dz(j) = j == y ? g.label : (there ? e * (g.a + g.b * e + g.t * x) + g.e0 + g.e1 * x : g.masked) + g.ew * w(j);
  }
  return py::make_tuple(out.loss, out.cross_entropy, out.diversity, gradient);
}

template <class T>
void bind(py::module_& m, const char* name) {
  py::class_<RowMoments<T>>(m, name)
      .def(py::init<>())
      .def_readonly("n", &RowMoments<T>::n)
      .def_readonly("m", &RowMoments<T>::m)
      .def_readonly("s1", &RowMoments<T>::s1)
      .def_readonly("s2", &RowMoments<T>::s2)
      .def_readonly("sx", &RowMoments<T>::sx)
      .def_readonly("mean", &RowMoments<T>::mean)
      .def_readonly("m2", &RowMoments<T>::m2)
      .def_readonly("sw", &RowMoments<T>::sw)
      .def_readonly("swx", &RowMoments<T>::swx)
      .def_static("of", &moments<T>)
      .def("merge", &merged<T>)
      .def("with_class", &with_class<T>)
      .def("loss", &row_loss<T>);
}

PYBIND11_MODULE(headers_module, m) {
  bind<float>(m, "Float");
  bind<double>(m, "Double");
}
