// mamlpp_fast::pointwise and its derivatives: mamlpp_fast/ops/pointwise.py.

#include "kernels/pointwise.h"

#include <ATen/core/Tensor.h>

#include <initializer_list>

#include "arguments.h"

namespace mf::of_pointwise {
namespace {

using at::Tensor;

Function check(int64_t function, std::initializer_list<const Tensor*> tensors) {
  TORCH_CHECK_VALUE(function >= 0 && function < kFunctions, "function: expected 0 to ", kFunctions - 1, ", got ",
                    function);
  const Tensor& x = **tensors.begin();
  const auto type = check_float("x", x);
  for (const Tensor* t : tensors) check_like("pointwise", *t, x.sizes(), type);
  return static_cast<Function>(function);
}

/// work(type, begin, elements) over parts of a tensor.
template <typename Work>
void spread(const Tensor& x, const Work& work) {
  constexpr int64_t kPart = 1 << 13;  // a multiple of every register, so that results do not depend on threads
  const int64_t n = x.numel();
  at::parallel_for(0, (n + kPart - 1) / kPart, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPart, last = end * kPart < n ? end * kPart : n;
    typed(x, [&](auto type) { work(type, first, last - first); });
  });
}

void pointwise(const Tensor& x, int64_t function, double a, Tensor& y) {
  const Function f = check(function, {&x, &y});
  spread(x, [&]<typename T>(Type<T>, int64_t i, int64_t n) {
    static const auto run = MF_DISPATCH(pointwise<T>);
    run(f, static_cast<T>(a), x.const_data_ptr<T>() + i, y.mutable_data_ptr<T>() + i, n);
  });
}

void pointwise_slope(const Tensor& x, const Tensor& g, int64_t function, double a, Tensor& out) {
  const Function f = check(function, {&x, &g, &out});
  spread(x, [&]<typename T>(Type<T>, int64_t i, int64_t n) {
    static const auto run = MF_DISPATCH(pointwise_slope<T>);
    run(f, static_cast<T>(a), x.const_data_ptr<T>() + i, g.const_data_ptr<T>() + i, out.mutable_data_ptr<T>() + i, n);
  });
}

void pointwise_bend(const Tensor& x, const Tensor& g_dot, const Tensor& g, const Tensor& u, int64_t function, double a,
                    Tensor& out) {
  const Function f = check(function, {&x, &g_dot, &g, &u, &out});
  spread(x, [&]<typename T>(Type<T>, int64_t i, int64_t n) {
    static const auto run = MF_DISPATCH(pointwise_bend<T>);
    run(f, static_cast<T>(a), x.const_data_ptr<T>() + i, g_dot.const_data_ptr<T>() + i, g.const_data_ptr<T>() + i,
        u.const_data_ptr<T>() + i, out.mutable_data_ptr<T>() + i, n);
  });
}

[[maybe_unused]] const bool registered =
    implement("pointwise", &pointwise, "pointwise_slope", &pointwise_slope, "pointwise_bend", &pointwise_bend);

}  // namespace
}  // namespace mf::of_pointwise
