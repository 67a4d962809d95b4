// Batch norm with training statistics in three orders on the CPU: checks, layouts, allocation, threads. Schemas and
// shapes are in mamlpp_fast/ops/per_step_batch_norm.py, the derivation in docs/derivations/per_step_batch_norm.md.

#include "kernels/per_step_batch_norm.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "arguments.h"

namespace mf::of_per_step_batch_norm {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using Step = std::optional<int64_t>;

// Bytes of x in a piece of a channels-last tensor, and the most pieces of a task.
constexpr int64_t kPieceBytes = 131072;
constexpr int64_t kMaxPieces = 64;

struct Layout {
  int64_t tasks, images, channels, pixels, axis;
  bool channels_last;      // memory order of the results
  at::ScalarType compute;  // float32, or float64 of float64
  at::ScalarType stored;   // as kernels read and write images: bfloat16 where all are, else the type above
  at::DimVector strides;   // of the results

  // One pixel a row: a channel's values lie apart in either order, so it is walked by rows.
  bool by_rows() const { return channels_last || pixels == 1; }
};

// Of x, and of the tensors of its shape that are read with it.
Layout layout_of(const Tensor& x, std::initializer_list<Tensor> others = {}) {
  Layout l{};
  const int64_t dim = x.dim();
  l.axis = dim == 5 ? 2 : 1;
  l.tasks = dim == 5 ? x.size(0) : 1;
  l.images = x.size(l.axis - 1);
  l.channels = x.size(l.axis);
  l.pixels = dim == 2 ? 1 : x.size(dim - 2) * x.size(dim - 1);
  l.channels_last = dim > 2 && !x.is_contiguous() && x.stride(l.axis) == 1;
  l.compute = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto is_bf16 = [](const Tensor& t) { return t.scalar_type() == at::kBFloat16; };
  l.stored = is_bf16(x) && std::all_of(others.begin(), others.end(), is_bf16) ? at::kBFloat16 : l.compute;
  l.strides.resize(dim);
  int64_t stride = 1;
  if (l.channels_last) {
    l.strides[l.axis] = 1;
    stride = std::max<int64_t>(l.channels, 1);
  }
  for (int64_t i = dim - 1; i >= 0; --i) {
    if (l.channels_last && i == l.axis) {
      continue;
    }
    l.strides[i] = stride;
    stride *= std::max<int64_t>(x.size(i), 1);
  }
  return l;
}

void check(const Tensor& x, const Tensor& weight, const Tensor& bias, Step step) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
                   "x: expected float64, float32, bfloat16 or float16, got ", type);
  TORCH_CHECK_VALUE(x.dim() == 2 || x.dim() == 4 || x.dim() == 5,
                    "x: expected shape [N, C], [N, C, H, W] or [T, N, C, H, W], got ", x.sizes());
  const bool tasks = x.dim() == 5;
  const int64_t channels = x.size(tasks ? 2 : 1);
  if (step.has_value()) {
    TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == channels, "weight: expected shape [steps, ", channels,
                      "] with a step, got ", weight.sizes());
    TORCH_CHECK_VALUE(*step >= 0 && *step < weight.size(0), "step: expected 0 <= step < ", weight.size(0), ", got ",
                      *step);
  } else {
    const bool shared = weight.dim() == 1 && weight.size(0) == channels;
    const bool own = tasks && weight.dim() == 2 && weight.size(0) == x.size(0) && weight.size(1) == channels;
    TORCH_CHECK_VALUE(shared || own, "weight: expected shape [", channels, "]",
                      tasks ? c10::str(" or [", x.size(0), ", ", channels, "]") : "", " without a step, got ",
                      weight.sizes());
  }
  TORCH_CHECK_VALUE(bias.sizes() == weight.sizes(), "bias: expected the shape ", weight.sizes(), " of weight, got ",
                    bias.sizes());
  const int64_t per_channel = x.numel() / std::max<int64_t>(channels, 1);
  TORCH_CHECK_VALUE(per_channel >= (tasks ? 2 * x.size(0) : 2),
                    "x: expected more than one value per channel, got shape ", x.sizes());
}

// The values without gaps, as kernels read them.
Tensor dense(const Tensor& t, const Layout& l) {
  if (t.scalar_type() == l.stored && t.strides() == at::IntArrayRef(l.strides)) {
    return t;
  }
  const Tensor values = t.to(l.stored);
  return l.channels_last ? values.movedim(l.axis, -1).contiguous().movedim(-1, l.axis) : values.contiguous();
}

Tensor result_like(const Tensor& x, const Layout& l) {
  return empty_strided(x.sizes(), l.strides, x.options().dtype(l.stored));
}

Tensor narrow(const Tensor& result, const Tensor& x) { return result.to(x.scalar_type()); }

Tensor statistic(const Tensor& x, const Layout& l) {
  const auto options = x.options().dtype(l.compute);
  return x.dim() == 5 ? empty({l.tasks, l.channels}, options) : empty({l.channels}, options);
}

// The rows an order reads of weight, or of a tensor of its shape.
Tensor rows(const Tensor& weight, const Layout& l) { return weight.to(l.compute).contiguous(); }

template <typename T>
const T* row(const Tensor& contiguous, Step step, const Layout& l) {
  return contiguous.const_data_ptr<T>() + step.value_or(0) * l.channels;
}

// Where kernels write the gradient of weight or bias, [tasks, channels], and how it becomes one of that shape.
class AffineGradient {
 public:
  AffineGradient(const Tensor& weight, Step step, const Layout& l) : step_(step) {
    result_ = step.has_value() ? zeros(weight.sizes(), weight.options()) : empty(weight.sizes(), weight.options());
    const bool sums_tasks = l.tasks != 1 && (step.has_value() || weight.dim() == 1);
    direct_ = !sums_tasks && weight.scalar_type() == l.compute;
    rows_ = !direct_           ? empty({l.tasks, l.channels}, weight.options().dtype(l.compute))
            : step.has_value() ? result_.select(0, *step)
                               : result_;
  }

  template <typename T>
  T* data() const {
    return rows_.mutable_data_ptr<T>();
  }

  Tensor result() const {
    if (!direct_) {
      Tensor target = step_.has_value() ? result_.select(0, *step_) : result_;
      target.copy_(target.dim() == 1 ? rows_.sum(0) : rows_);
    }
    return result_;
  }

 private:
  Step step_;
  Tensor result_, rows_;
  bool direct_;
};

template <typename S>
const S* images(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}

template <typename S>
S* out(const Tensor& result) {
  return static_cast<S*>(result.mutable_data_ptr());
}

template <typename S>
bn::Call<S> call(const Layout& l, const Tensor& x, const Tensor& gamma, const Tensor& beta, Step step, double slope) {
  using T = Compute<S>;
  bn::Call<S> p{};
  p.tasks = l.tasks;
  p.images = l.images;
  p.channels = l.channels;
  p.pixels = l.pixels;
  p.x = images<S>(x);
  p.gamma = row<T>(gamma, step, l);
  p.beta = row<T>(beta, step, l);
  p.row_stride = !step.has_value() && gamma.dim() == 2 ? l.channels : 0;
  p.slope = static_cast<T>(slope);
  return p;
}

template <typename S>
void run(bn::Call<S>& p, const Layout& l, bn::Order order, const Tensor& x) {
  using T = Compute<S>;
  const auto kernels = MF_DISPATCH(batch_norm_kernels<S>)(order, p.slope != T{1});
  const int64_t rows = l.images * l.pixels;
  if (l.channels == 0) {
    return;
  }
  if (!l.by_rows()) {
    at::parallel_for(0, l.tasks * l.channels, std::max<int64_t>(1, kGrain / rows),
                     [&](int64_t begin, int64_t end) { kernels.planes(p, begin, end); });
    return;
  }
  const int64_t by_size = kPieceBytes / (l.channels * static_cast<int64_t>(sizeof(T)));
  p.piece_rows = std::max({by_size, (rows + kMaxPieces - 1) / kMaxPieces, int64_t{1}});
  p.pieces = (rows + p.piece_rows - 1) / p.piece_rows;
  const Tensor sums = empty({l.tasks * p.pieces * bn::kMaxSums * l.channels}, x.options().dtype(at::kDouble));
  const Tensor constants = empty({l.tasks * bn::kMaxConstants * l.channels}, x.options().dtype(l.compute));
  p.sums = sums.mutable_data_ptr<double>();
  p.constants = constants.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, kGrain / (p.piece_rows * l.channels));
  const int64_t items = l.tasks * p.pieces;
  at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernels.sums(p, begin, end); });
  kernels.combine(p);
  at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernels.apply(p, begin, end); });
}

template <typename F>
auto for_type(at::ScalarType type, F f) {
  return type == at::kDouble ? f(double{}) : type == at::kBFloat16 ? f(Bf16{}) : f(float{});
}

/// An order's kernels on x, weight and bias; fill(call) names what else they read and write.
template <typename Fill>
void compute(const Layout& l, bn::Order order, const Tensor& x, const Tensor& weight, const Tensor& bias, Step step,
             double slope, const Fill& fill) {
  const Tensor in = dense(x, l), gamma = rows(weight, l), beta = rows(bias, l);
  for_type(l.stored, [&](auto zero) {
    bn::Call<decltype(zero)> p = call<decltype(zero)>(l, in, gamma, beta, step, slope);
    fill(p);
    run(p, l, order, x);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& bias, Step step,
                                                   double eps, double slope) {
  check(x, weight, bias, step);
  const Layout l = layout_of(x);
  const Tensor y = result_like(x, l);
  const Tensor mean = statistic(x, l);
  const Tensor rstd = statistic(x, l);
  const Tensor var = statistic(x, l);
  compute(l, bn::Order::forward, x, weight, bias, step, slope, [&]<typename S>(bn::Call<S>& p) {
    using T = Compute<S>;
    p.eps = eps;
    p.mean = mean.mutable_data_ptr<T>();
    p.rstd = rstd.mutable_data_ptr<T>();
    p.var = var.mutable_data_ptr<T>();
    p.out[0] = out<S>(y);
  });
  return {narrow(y, x), mean, rstd, var};
}

void check_saved(const Tensor& x, const Layout& l, const Tensor& mean, const Tensor& rstd) {
  for (const Tensor* t : {&mean, &rstd}) {
    TORCH_CHECK_VALUE(t->scalar_type() == l.compute && t->is_contiguous() && t->numel() == l.tasks * l.channels,
                      "mean, rstd: expected what per_step_batch_norm returned for x of shape ", x.sizes(), ", got ",
                      t->sizes(), " of ", t->scalar_type());
  }
}

void check_like(const Tensor& t, const Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(t.sizes() == like.sizes(), name, ": expected shape ", like.sizes(), ", got ", t.sizes());
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& gy, const Tensor& x, const Tensor& weight, const Tensor& bias,
                                            const Tensor& mean, const Tensor& rstd, Step step, double slope) {
  check(x, weight, bias, step);
  check_like(gy, x, "gy");
  const Layout l = layout_of(x, {gy});
  check_saved(x, l, mean, rstd);
  const Tensor grad = dense(gy, l);
  const Tensor gx = result_like(x, l);
  const AffineGradient ggamma(weight, step, l);
  const AffineGradient gbeta(bias, step, l);
  compute(l, bn::Order::backward, x, weight, bias, step, slope, [&]<typename S>(bn::Call<S>& p) {
    using T = Compute<S>;
    p.gy = images<S>(grad);
    p.mean = const_cast<T*>(mean.const_data_ptr<T>());
    p.rstd = const_cast<T*>(rstd.const_data_ptr<T>());
    p.out[0] = out<S>(gx);
    p.affine[0] = ggamma.data<T>();
    p.affine[1] = gbeta.data<T>();
  });
  return {narrow(gx, x), ggamma.result(), gbeta.result()};
}

std::tuple<Tensor, Tensor, Tensor> double_backward(const OptTensor& u, const OptTensor& a, const OptTensor& b,
                                                   const Tensor& gy, const Tensor& x, const Tensor& weight,
                                                   const Tensor& bias, const Tensor& mean, const Tensor& rstd,
                                                   Step step, double slope) {
  check(x, weight, bias, step);
  check_like(gy, x, "gy");
  const Layout l = layout_of(x, {gy, u.value_or(x)});
  check_saved(x, l, mean, rstd);
  const Tensor grad = dense(gy, l);
  if (u.has_value()) {
    check_like(*u, x, "u");
  }
  const Tensor tangent = u.has_value() ? dense(*u, l) : result_like(x, l).zero_();
  const auto optional_rows = [&](const OptTensor& t, const char* name) {
    if (!t.has_value()) {
      return Tensor();
    }
    check_like(*t, weight, name);
    return rows(*t, l);
  };
  const Tensor of_ggamma = optional_rows(a, "a");
  const Tensor of_gbeta = optional_rows(b, "b");
  const Tensor c_gy = result_like(x, l);
  const Tensor c_x = result_like(x, l);
  const AffineGradient c_gamma(weight, step, l);
  compute(l, bn::Order::double_backward, x, weight, bias, step, slope, [&]<typename S>(bn::Call<S>& p) {
    using T = Compute<S>;
    p.gy = images<S>(grad);
    p.u = images<S>(tangent);
    p.a = of_ggamma.defined() ? row<T>(of_ggamma, step, l) : nullptr;
    p.b = of_gbeta.defined() ? row<T>(of_gbeta, step, l) : nullptr;
    p.mean = const_cast<T*>(mean.const_data_ptr<T>());
    p.rstd = const_cast<T*>(rstd.const_data_ptr<T>());
    p.out[0] = out<S>(c_gy);
    p.out[1] = out<S>(c_x);
    p.affine[0] = c_gamma.data<T>();
  });
  return {narrow(c_gy, x), narrow(c_x, x), c_gamma.result()};
}

[[maybe_unused]] const bool registered = implement("per_step_batch_norm", &forward, "per_step_batch_norm_backward",
                                                   &backward, "per_step_batch_norm_double_backward", &double_backward);

}  // namespace
}  // namespace mf::of_per_step_batch_norm
