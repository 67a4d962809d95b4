// The derivatives of batch norm for CPU tensors, as mamlpp_fast/ops/per_step_batch_norm.py registers them in Python for
// every device: the same chain of operations, without the interpreter, which at 14x14 pixels takes as long as the
// arithmetic.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "recorded.h"

namespace mf {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using OptTensor = std::optional<Tensor>;
using Step = std::optional<int64_t>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four call_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, Step step, double eps, double slope) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("mamlpp_fast::per_step_batch_norm", "")
          .typed<Four(const Tensor&, const Tensor&, const Tensor&, std::optional<int64_t>, double, double)>();
  return op.call(x, weight, bias, step, eps, slope);
}

Three call_backward(const Tensor& gy, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                    const Tensor& rstd, Step step, double slope) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mamlpp_fast::per_step_batch_norm_backward", "")
                             .typed<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                          const Tensor&, std::optional<int64_t>, double)>();
  return op.call(gy, x, weight, bias, mean, rstd, step, slope);
}

Three call_double_backward(const OptTensor& u, const OptTensor& a, const OptTensor& b, const Tensor& gy,
                           const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                           const Tensor& rstd, Step step, double slope) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("mamlpp_fast::per_step_batch_norm_double_backward", "")
          .typed<Three(const OptTensor&, const OptTensor&, const OptTensor&, const Tensor&, const Tensor&,
                       const Tensor&, const Tensor&, const Tensor&, const Tensor&, std::optional<int64_t>, double)>();
  return op.call(u, a, b, gy, x, weight, bias, mean, rstd, step, slope);
}

bool requires_grad(const Tensor& t) { return t.requires_grad(); }
bool requires_grad(const OptTensor& t) { return t.has_value() && t->requires_grad(); }
using mf::has_tangent;  // else the next one hides it, and calls itself
bool has_tangent(const OptTensor& t) { return t.has_value() && has_tangent(*t); }

// Whether autograd records the call. What has no rule is refused in the words of mamlpp_fast/ops/_library.py: forward
// mode would give a derivative of zero.
template <typename... Tensors>
bool recorded(const char* name, const Tensors&... tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(tensors) || ...), name,
                              ": forward-mode derivatives (torch.func.jvp, jacfwd) are not implemented; use "
                              "torch.autograd.grad");
  if (!at::GradMode::is_enabled() || !(requires_grad(tensors) || ...)) {
    return false;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(!under_torch_func(), name,
                              ": torch.func.grad does not pass through it; use torch.autograd.grad(..., "
                              "create_graph=True)");
  return true;
}

OptTensor optional(const Tensor& t) { return t.defined() ? OptTensor(t) : std::nullopt; }

class ForwardNode : public Function<ForwardNode> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                               Step step, double eps, double slope) {
    at::AutoDispatchBelowAutograd below;
    auto [y, mean, rstd, var] = call_forward(x, weight, bias, step, eps, slope);
    ctx->saved_data["step"] = step;
    ctx->saved_data["slope"] = slope;
    ctx->mark_non_differentiable({mean, rstd, var});
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({x, weight, bias, mean, rstd});
    return {y, mean, rstd, var};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) {
      return variable_list(6);
    }
    const variable_list s = ctx->get_saved_variables();
    auto [gx, gweight, gbias] =
        call_backward(grads[0], s[0], s[1], s[2], s[3], s[4], ctx->saved_data["step"].toOptional<int64_t>(),
                      ctx->saved_data["slope"].toDouble());
    return {gx, gweight, gbias, Tensor(), Tensor(), Tensor()};
  }
};

class BackwardNode : public Function<BackwardNode> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& gy, const Tensor& x, const Tensor& weight,
                               const Tensor& bias, const Tensor& mean, const Tensor& rstd, Step step, double slope) {
    at::AutoDispatchBelowAutograd below;
    auto [gx, gweight, gbias] = call_backward(gy, x, weight, bias, mean, rstd, step, slope);
    ctx->saved_data["step"] = step;
    ctx->saved_data["slope"] = slope;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({gy, x, weight, bias, mean, rstd});
    return {gx, gweight, gbias};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(8);
    if (grads[0].defined() || grads[1].defined() || grads[2].defined()) {
      const variable_list s = ctx->get_saved_variables();
      std::tie(result[0], result[1], result[2]) = call_double_backward(
          optional(grads[0]), optional(grads[1]), optional(grads[2]), s[0], s[1], s[2], s[3], s[4], s[5],
          ctx->saved_data["step"].toOptional<int64_t>(), ctx->saved_data["slope"].toDouble());
    }
    return result;
  }
};

class DoubleBackwardNode : public Function<DoubleBackwardNode> {
 public:
  static variable_list forward(AutogradContext*, const OptTensor& u, const OptTensor& a, const OptTensor& b,
                               const Tensor& gy, const Tensor& x, const Tensor& weight, const Tensor& bias,
                               const Tensor& mean, const Tensor& rstd, Step step, double slope) {
    at::AutoDispatchBelowAutograd below;
    auto [c_gy, c_x, c_weight] = call_double_backward(u, a, b, gy, x, weight, bias, mean, rstd, step, slope);
    return {c_gy, c_x, c_weight};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "per_step_batch_norm: the third derivative is not implemented; "
                                "differentiate torch.nn.functional.batch_norm instead");
  }
};

Four forward(const Tensor& x, const Tensor& weight, const Tensor& bias, Step step, double eps, double slope) {
  if (!recorded("per_step_batch_norm", x, weight, bias)) {
    at::AutoDispatchBelowAutograd below;
    return call_forward(x, weight, bias, step, eps, slope);
  }
  const variable_list r = ForwardNode::apply(x, weight, bias, step, eps, slope);
  return {r[0], r[1], r[2], r[3]};
}

Three backward(const Tensor& gy, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
               const Tensor& rstd, Step step, double slope) {
  if (!recorded("per_step_batch_norm_backward", gy, x, weight, bias)) {
    at::AutoDispatchBelowAutograd below;
    return call_backward(gy, x, weight, bias, mean, rstd, step, slope);
  }
  const variable_list r = BackwardNode::apply(gy, x, weight, bias, mean, rstd, step, slope);
  return {r[0], r[1], r[2]};
}

Three double_backward(const OptTensor& u, const OptTensor& a, const OptTensor& b, const Tensor& gy, const Tensor& x,
                      const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& rstd, Step step,
                      double slope) {
  if (!recorded("per_step_batch_norm_double_backward", u, a, b, gy, x, weight, bias)) {
    at::AutoDispatchBelowAutograd below;
    return call_double_backward(u, a, b, gy, x, weight, bias, mean, rstd, step, slope);
  }
  const variable_list r = DoubleBackwardNode::apply(u, a, b, gy, x, weight, bias, mean, rstd, step, slope);
  return {r[0], r[1], r[2]};
}

}  // namespace
}  // namespace mf

TORCH_LIBRARY_IMPL(mamlpp_fast, AutogradCPU, m) {
  m.impl("per_step_batch_norm", mf::forward);
  m.impl("per_step_batch_norm_backward", mf::backward);
  m.impl("per_step_batch_norm_double_backward", mf::double_backward);
}
