// mamlpp_fast::linear_cross_entropy in four orders: mamlpp_fast/ops/linear_cross_entropy.py; formulas in
// docs/derivations/linear_cross_entropy.md. Tasks run in parallel, each on one thread.

#include "kernels/linear_cross_entropy.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

#include "arguments.h"

namespace mf::of_linear_cross_entropy {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

class Problem {
 public:
  Problem(const Tensor& f, const Tensor& weight) : tasks(f.size(0)), type(check_float("f", f)) {
    TORCH_CHECK_VALUE(f.dim() == 3 && weight.dim() == 3 && weight.size(0) == tasks && weight.size(1) == f.size(2),
                      "f, weight: expected [T, N, F] and [T, F, O], got ", f.sizes(), " and ", weight.sizes());
    s = {f.size(1), f.size(2), weight.size(2)};
    features("f", f);
    weights("weight", weight);
  }
  void features(const char* name, const OptTensor& t) const { check(name, t, {tasks, s.images, s.features}); }
  void weights(const char* name, const OptTensor& t) const { check(name, t, {tasks, s.features, s.classes}); }
  void bias(const char* name, const OptTensor& t) const { check(name, t, {tasks, s.classes}); }
  void logits(const char* name, const OptTensor& t) const { check(name, t, {tasks, s.images, s.classes}); }
  void check(const char* name, const OptTensor& t, at::IntArrayRef shape) const {
    if (t.has_value()) check_like(name, *t, shape, type);
  }

  Head s;
  int64_t tasks;
  at::ScalarType type;
};

/// A tensor's part [size] of a task; null where there is no tensor.
template <typename T>
const T* part(const OptTensor& t, int64_t task) {
  return t.has_value() && t->numel() ? t->const_data_ptr<T>() + task * (t->numel() / t->size(0)) : nullptr;
}
template <typename T>
T* result(const OptTensor& t, int64_t task) {
  return t.has_value() && t->numel() ? t->mutable_data_ptr<T>() + task * (t->numel() / t->size(0)) : nullptr;
}

/// z = f1 . w1 + f2 . w2 + bias, each where present.
template <typename T>
void products(const Head& s, const T* f1, const T* w1, const T* f2, const T* w2, const T* bias, T* z) {
  static const auto transpose = MF_DISPATCH(head_transpose<T>);
  static const auto product = MF_DISPATCH(head_products<T>);
  for (int64_t i = 0; i < s.images * s.classes; ++i) z[i] = bias ? bias[i % s.classes] : T{0};
  T* wt = scratch<T>(s.features * s.classes);
  const auto add = [&](const T* f, const T* w) {
    if (!f || !w) return;
    transpose(w, s.features, s.classes, wt);
    product(s, f, wt, z);
  };
  add(f1, w1);
  add(f2, w2);
}

template <typename T>
void forward(const Problem& p, const Tensor& f, const Tensor& weight, const OptTensor& bias, const Tensor& target,
             const Tensor& scale_, const Tensor& logits, const Tensor& probabilities, const Tensor& gz,
             const OptTensor& loss) {
  static const auto softmax = MF_DISPATCH(head_softmax<T>);
  const T scale = scale_.const_data_ptr<T>()[0];
  each(p.tasks, [&](int64_t task) {
    T* z = result<T>(logits, task);
    products<T>(p.s, part<T>(f, task), part<T>(weight, task), nullptr, nullptr, part<T>(bias, task), z);
    const T chosen = softmax(p.s, z, part<T>(target, task), scale, result<T>(probabilities, task), result<T>(gz, task));
    if (loss.has_value()) *result<T>(loss, task) = -scale * chosen;
  });
}

template <typename T>
void tangent(const Problem& p, const OptTensor& f_dot, const OptTensor& weight_dot, const OptTensor& bias_dot,
             const Tensor& f, const Tensor& weight, const Tensor& probabilities, const Tensor& scale_,
             const Tensor& gz_dot) {
  static const auto softmax = MF_DISPATCH(head_softmax_tangent<T>);
  const T scale = scale_.const_data_ptr<T>()[0];
  each(p.tasks, [&](int64_t task) {
    T* z_dot = result<T>(gz_dot, task);
    products<T>(p.s, part<T>(f_dot, task), part<T>(weight, task), part<T>(f, task), part<T>(weight_dot, task),
                part<T>(bias_dot, task), z_dot);
    softmax(p.s, part<T>(probabilities, task), scale, z_dot);
  });
}

/// Gradients of f, weight and bias for a gradient g of the logits, plus those of the second pairs g0 with weight_dot
/// and f_dot.
template <typename T>
void gradients(const Problem& p, const Tensor& g, const OptTensor& g0, const OptTensor& f_dot,
               const OptTensor& weight_dot, const Tensor& f, const Tensor& weight, const OptTensor& gf,
               const OptTensor& gweight, const OptTensor& gbias) {
  static const auto transpose = MF_DISPATCH(head_transpose<T>);
  static const auto combine = MF_DISPATCH(head_combine<T>);
  const Head& s = p.s;
  each(p.tasks, [&](int64_t task) {
    const T *first = part<T>(g, task), *second = part<T>(g0, task);
    const T *v = part<T>(weight_dot, task), *u = part<T>(f_dot, task);
    T* wt = scratch<T>(s.features * s.classes);
    if (T* out = result<T>(gf, task)) {
      transpose(part<T>(weight, task), s.features, s.classes, wt);
      combine(s.images, s.classes, s.features, first, s.classes, 1, wt, false, out);
      if (v) {
        transpose(v, s.features, s.classes, wt);
        combine(s.images, s.classes, s.features, second, s.classes, 1, wt, true, out);
      }
    }
    if (T* out = result<T>(gweight, task)) {
      combine(s.classes, s.images, s.features, first, 1, s.classes, part<T>(f, task), false, wt);
      if (u) combine(s.classes, s.images, s.features, second, 1, s.classes, u, true, wt);
      transpose(wt, s.classes, s.features, out);
    }
    if (T* out = result<T>(gbias, task)) {
      std::fill(out, out + s.classes, T{0});
      for (int64_t i = 0; i < s.images * s.classes; ++i) out[i % s.classes] += first[i];
    }
  });
}

void linear_cross_entropy(const Tensor& f, const Tensor& weight, const OptTensor& bias, const Tensor& target,
                          const Tensor& scale, Tensor& logits, Tensor& probabilities, Tensor& gz,
                          const OptTensor& loss) {
  const Problem p(f, weight);
  p.bias("bias", bias);
  p.logits("target", target);
  p.check("scale", scale, {});
  p.logits("logits", logits);
  p.logits("probabilities", probabilities);
  p.logits("gz", gz);
  p.check("loss", loss, {p.tasks});
  const auto run = p.type == at::kDouble ? &forward<double> : &forward<float>;
  run(p, f, weight, bias, target, scale, logits, probabilities, gz, loss);
}

void linear_cross_entropy_backward(const Tensor& gz, const Tensor& f, const Tensor& weight, const OptTensor& gf,
                                   const OptTensor& gweight, const OptTensor& gbias) {
  const Problem p(f, weight);
  p.logits("gz", gz);
  p.features("gf", gf);
  p.weights("gweight", gweight);
  p.bias("gbias", gbias);
  const auto run = p.type == at::kDouble ? &gradients<double> : &gradients<float>;
  run(p, gz, {}, {}, {}, f, weight, gf, gweight, gbias);
}

void linear_cross_entropy_tangent(const OptTensor& f_dot, const OptTensor& weight_dot, const OptTensor& bias_dot,
                                  const Tensor& f, const Tensor& weight, const Tensor& probabilities,
                                  const Tensor& scale, Tensor& gz_dot) {
  const Problem p(f, weight);
  p.features("f_dot", f_dot);
  p.weights("weight_dot", weight_dot);
  p.bias("bias_dot", bias_dot);
  p.logits("probabilities", probabilities);
  p.check("scale", scale, {});
  p.logits("gz_dot", gz_dot);
  const auto run = p.type == at::kDouble ? &tangent<double> : &tangent<float>;
  run(p, f_dot, weight_dot, bias_dot, f, weight, probabilities, scale, gz_dot);
}

void linear_cross_entropy_backward_tangent(const Tensor& gz_dot, const Tensor& gz, const OptTensor& f_dot,
                                           const OptTensor& weight_dot, const Tensor& f, const Tensor& weight,
                                           const OptTensor& gf_dot, const OptTensor& gweight_dot,
                                           const OptTensor& gbias_dot) {
  const Problem p(f, weight);
  p.logits("gz_dot", gz_dot);
  p.logits("gz", gz);
  p.features("f_dot", f_dot);
  p.weights("weight_dot", weight_dot);
  p.features("gf_dot", gf_dot);
  p.weights("gweight_dot", gweight_dot);
  p.bias("gbias_dot", gbias_dot);
  const auto run = p.type == at::kDouble ? &gradients<double> : &gradients<float>;
  run(p, gz_dot, gz, f_dot, weight_dot, f, weight, gf_dot, gweight_dot, gbias_dot);
}

[[maybe_unused]] const bool registered =
    implement("linear_cross_entropy", &linear_cross_entropy, "linear_cross_entropy_backward",
              &linear_cross_entropy_backward, "linear_cross_entropy_tangent", &linear_cross_entropy_tangent,
              "linear_cross_entropy_backward_tangent", &linear_cross_entropy_backward_tangent);

}  // namespace
}  // namespace mf::of_linear_cross_entropy
