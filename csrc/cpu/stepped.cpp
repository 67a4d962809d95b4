// An inner step p - rate * g of all parameters of a model as one node of autograd, and copies of them: PyTorch's own
// operations and their derivatives, to any order, but a graph of one node where each parameter would have one or more.
// Used by mamlpp_fast/ops/stepped.py.

#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <initializer_list>
#include <vector>

#include "arguments.h"
#include "recorded.h"

namespace mf {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

/// make(i) for every i below `count`.
template <typename Make>
variable_list made(size_t count, const Make& make) {
  variable_list all;
  all.reserve(count);
  for (size_t i = 0; i < count; ++i) all.push_back(make(i));
  return all;
}

variable_list plain(TensorList parameters, TensorList gradients, double rate) {
  return made(parameters.size(), [&](size_t i) { return at::add(parameters[i], gradients[i], -rate); });
}

variable_list plain_by_rates(TensorList parameters, TensorList gradients, TensorList rates) {
  return made(parameters.size(), [&](size_t i) {
    const Tensor &p = parameters[i], &g = gradients[i], &rate = rates[i];
    const bool one = g.layout() == at::kStrided && rate.device() == p.device();
    return one ? at::addcmul(p, rate, g, -1) : at::sub(p, at::mul(rate, g));
  });
}

class Stepped : public Function<Stepped> {
 public:
  static variable_list forward(AutogradContext* ctx, TensorList parameters, TensorList gradients, double rate) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->set_materialize_grads(false);
    ctx->saved_data["rate"] = rate;
    return plain(parameters, gradients, rate);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const size_t count = grads.size();
    const double rate = ctx->saved_data["rate"].toDouble();
    variable_list result(2 * count + 1);
    for (size_t i = 0; i < count; ++i) {
      if (!grads[i].defined()) continue;
      result[i] = grads[i];
      if (ctx->needs_input_grad(count + i)) result[count + i] = at::mul(grads[i], -rate);
    }
    return result;
  }
};

variable_list plain_copies(TensorList tensors) {
  return made(tensors.size(), [&](size_t i) { return at::clone(tensors[i]); });
}

class Copied : public Function<Copied> {
 public:
  static variable_list forward(AutogradContext* ctx, TensorList tensors) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->set_materialize_grads(false);
    return plain_copies(tensors);
  }

  static variable_list backward(AutogradContext*, const variable_list& grads) { return grads; }
};

/// -g * a and -g * b in one pass, where nobody records them and they lie as numbers next to each other.
bool products(const Tensor& g, const Tensor& a, const Tensor& b, Tensor& by_a, Tensor& by_b) {
  if (at::GradMode::is_enabled() || !bare(g) || !bare(a) || !bare(b)) return false;
  by_a = at::empty_like(g);
  by_b = at::empty_like(g);
  typed(g, [&]<typename T>(Type<T>) {
    const T *from = g.const_data_ptr<T>(), *left = a.const_data_ptr<T>(), *right = b.const_data_ptr<T>();
    T *to_a = by_a.mutable_data_ptr<T>(), *to_b = by_b.mutable_data_ptr<T>();
    at::parallel_for(0, g.numel(), kGrain, [&](int64_t begin, int64_t end) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) {
        to_a[i] = -from[i] * left[i];
        to_b[i] = -from[i] * right[i];
      }
    });
  });
  return true;
}

class SteppedByRates : public Function<SteppedByRates> {
 public:
  static variable_list forward(AutogradContext* ctx, TensorList parameters, TensorList gradients, TensorList rates) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->set_materialize_grads(false);
    const size_t count = gradients.size();
    variable_list saved(2 * count);  // what a derivative reads alone: the rest may change, as it may for PyTorch
    std::vector<int64_t> axes;
    for (size_t i = 0; i < count; ++i) {
      axes.push_back(rates[i].dim());
      if (rates[i].requires_grad()) saved[i] = gradients[i];
      if (gradients[i].requires_grad()) saved[count + i] = rates[i];
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["axes"] = std::move(axes);
    return plain_by_rates(parameters, gradients, rates);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const size_t count = grads.size();
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> axes = ctx->saved_data["axes"].toIntVector();
    variable_list result(3 * count);
    for (size_t i = 0; i < count; ++i) {
      if (!grads[i].defined()) continue;
      result[i] = grads[i];
      const bool moves = ctx->needs_input_grad(count + i), learned = ctx->needs_input_grad(2 * count + i);
      if (!moves && !learned) continue;
      const bool one = axes[i] < grads[i].dim();  // a number for all elements
      if (moves && learned && !one &&
          products(grads[i], saved[count + i], saved[i], result[count + i], result[2 * count + i])) {
        continue;
      }
      const Tensor down = at::neg(grads[i]);
      if (moves) result[count + i] = at::mul(down, saved[count + i]);
      if (!learned) continue;
      const Tensor each = at::mul(down, saved[i]);
      result[2 * count + i] = one ? at::sum(each) : each;
    }
    return result;
  }
};

using Lists = std::vector<variable_list>;  // parameters; for a step gradients, and perhaps rates

/// Whether autograd records a parameter's step and a node of ours may be it: real values of one shape and type, but
/// that a rate may be one number.
bool recorded(std::initializer_list<TensorList> lists, size_t i) {
  const Tensor& first = (*lists.begin())[i];
  bool wanted = false;
  int64_t place = 0;
  for (const TensorList& list : lists) {
    const Tensor& t = list[i];
    const bool number = ++place == 3 && t.dim() == 0;
    if (has_tangent(t) || t.unsafeGetTensorImpl()->is_python_dispatch() || t.layout() != at::kStrided ||
        t.is_complex() || t.scalar_type() != first.scalar_type() || t.device() != first.device() ||
        (!number && t.sizes() != first.sizes())) {
      return false;
    }
    wanted |= t.requires_grad();
  }
  return wanted;
}

/// `node` of the steps that autograd records, `plain` of the others: what takes no gradient has none afterwards.
template <typename Node, typename Plain>
variable_list divided(std::initializer_list<TensorList> lists, const Node& node, const Plain& plain) {
  const size_t count = lists.begin()->size();
  const bool any = at::GradMode::is_enabled() && !under_torch_func();
  std::vector<size_t> places[2];
  Lists parts[2] = {Lists(lists.size()), Lists(lists.size())};
  for (size_t i = 0; i < count; ++i) {
    const bool own = any && recorded(lists, i);
    places[own].push_back(i);
    auto part = parts[own].begin();
    for (const TensorList& list : lists) (part++)->push_back(list[i]);
  }
  variable_list made(count);
  const auto put = [&](const std::vector<size_t>& at, const variable_list& found) {
    for (size_t i = 0; i < at.size(); ++i) made[at[i]] = found[i];
  };
  if (!places[0].empty()) put(places[0], plain(parts[0]));
  if (!places[1].empty()) put(places[1], node(parts[1]));
  return made;
}

variable_list copied(TensorList tensors) {
  return divided(
      {tensors}, [](const Lists& l) { return Copied::apply(TensorList(l[0])); },
      [](const Lists& l) { return plain_copies(l[0]); });
}

variable_list stepped(TensorList parameters, TensorList gradients, double rate) {
  TORCH_CHECK_VALUE(parameters.size() == gradients.size(), "gradients: expected ", parameters.size(), ", got ",
                    gradients.size());
  return divided(
      {parameters, gradients}, [&](const Lists& l) { return Stepped::apply(TensorList(l[0]), TensorList(l[1]), rate); },
      [&](const Lists& l) { return plain(l[0], l[1], rate); });
}

variable_list stepped_by_rates(TensorList parameters, TensorList gradients, TensorList rates) {
  TORCH_CHECK_VALUE(parameters.size() == gradients.size() && parameters.size() == rates.size(),
                    "gradients, rates: expected ", parameters.size(), ", got ", gradients.size(), " and ",
                    rates.size());
  return divided(
      {parameters, gradients, rates},
      [](const Lists& l) { return SteppedByRates::apply(TensorList(l[0]), TensorList(l[1]), TensorList(l[2])); },
      [](const Lists& l) { return plain_by_rates(l[0], l[1], l[2]); });
}

}  // namespace

// Made of PyTorch's operations where no node of ours is: so each way of calling it, by whatever tensors, has a rule.
TORCH_LIBRARY_FRAGMENT(mamlpp_fast, m) {
  m.def("copied(Tensor[] tensors) -> Tensor[]", &copied);
  m.def("stepped(Tensor[] parameters, Tensor[] gradients, float rate) -> Tensor[]", &stepped);
  m.def("stepped_by_rates(Tensor[] parameters, Tensor[] gradients, Tensor[] rates) -> Tensor[]", &stepped_by_rates);
}

}  // namespace mf
