// mamlpp_fast::window_max, window_mean and what belongs to them: mamlpp_fast/ops/window_pool.py. An image is a unit of
// work, so that results do not depend on the number of threads.

#include "kernels/window_pool.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "typed.h"

namespace mf {
namespace {

using at::Tensor;

struct Problem {
  Windows windows;
  int64_t images, dense, pooled;
};

/// Checks images [T, N, H, W, C] against what is pooled of them.
Problem check(const Tensor& dense, at::IntArrayRef w, const Tensor& pooled, const Tensor* index) {
  TORCH_CHECK_VALUE(dense.dim() == 5 && w.size() == 6,
                    "window pool: expected [T, N, H, W, C] and a window of six, got ", dense.sizes(), " and ", w);
  const int64_t height = dense.size(2), width = dense.size(3);
  TORCH_CHECK_VALUE(
      w[0] > 0 && w[1] > 0 && (index == nullptr || w[0] * w[1] <= 256) && w[2] > 0 && w[3] > 0 && w[4] >= 0 &&
          w[5] >= 0 && 2 * w[4] <= w[0] && 2 * w[5] <= w[1] && height + 2 * w[4] >= w[0] && width + 2 * w[5] >= w[1],
      "window: expected a window within the image, of 256 pixels at most for a maximum, padding of half at most, got ",
      w, " of ", dense.sizes());
  const int64_t rows = (height + 2 * w[4] - w[0]) / w[2] + 1, columns = (width + 2 * w[5] - w[1]) / w[3] + 1;
  const int64_t expected[] = {dense.size(0), dense.size(1), rows, columns, dense.size(4)};
  TORCH_CHECK_VALUE(pooled.sizes() == at::IntArrayRef(expected), "window pool: expected ", at::IntArrayRef(expected),
                    ", got ", pooled.sizes());
  TORCH_CHECK_TYPE((dense.scalar_type() == at::kFloat || dense.scalar_type() == at::kDouble) &&
                       pooled.scalar_type() == dense.scalar_type(),
                   "window pool: expected float32 or float64, got ", dense.scalar_type(), " and ",
                   pooled.scalar_type());
  TORCH_CHECK_VALUE(dense.is_contiguous() && pooled.is_contiguous(), "window pool: expected contiguous tensors");
  if (index != nullptr) {
    TORCH_CHECK_VALUE(index->sizes() == pooled.sizes() && index->is_contiguous(), "index: expected contiguous ",
                      pooled.sizes(), ", got ", index->sizes());
    TORCH_CHECK_TYPE(index->scalar_type() == at::kByte, "index: expected uint8, got ", index->scalar_type());
  }
  return {{height, width, dense.size(4), rows, columns, w[0], w[1], w[2], w[3], w[4], w[5]},
          dense.size(0) * dense.size(1),
          height * width * dense.size(4),
          rows * columns * dense.size(4)};
}

template <typename Work>
void each_image(const Problem& p, const Work& work) {
  at::parallel_for(0, p.images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i * p.dense, i * p.pooled);
  });
}

void window_max(const Tensor& x, at::IntArrayRef window, Tensor& y, Tensor& index) {
  const Problem p = check(x, window, y, &index);
  typed(x, [&](auto type) {
    using T = typename decltype(type)::type;
    static const auto run = MF_DISPATCH(window_max<T>);
    const T* from = x.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    uint8_t* at = index.mutable_data_ptr<uint8_t>();
    each_image(p, [&](int64_t dense, int64_t pooled) { run(p.windows, from + dense, to + pooled, at + pooled); });
  });
}

void window_max_pick(const Tensor& u, const Tensor& index, at::IntArrayRef window, Tensor& uy) {
  const Problem p = check(u, window, uy, &index);
  typed(u, [&](auto type) {
    using T = typename decltype(type)::type;
    static const auto run = MF_DISPATCH(window_max_pick<T>);
    const T* from = u.const_data_ptr<T>();
    T* to = uy.mutable_data_ptr<T>();
    const uint8_t* at = index.const_data_ptr<uint8_t>();
    each_image(p, [&](int64_t dense, int64_t pooled) { run(p.windows, from + dense, at + pooled, to + pooled); });
  });
}

void window_max_place(const Tensor& gy, const Tensor& index, at::IntArrayRef window, Tensor& gx) {
  const Problem p = check(gx, window, gy, &index);
  typed(gx, [&](auto type) {
    using T = typename decltype(type)::type;
    static const auto run = MF_DISPATCH(window_max_place<T>);
    const T* from = gy.const_data_ptr<T>();
    T* to = gx.mutable_data_ptr<T>();
    const uint8_t* at = index.const_data_ptr<uint8_t>();
    each_image(p, [&](int64_t dense, int64_t pooled) { run(p.windows, from + pooled, at + pooled, to + dense); });
  });
}

void window_mean(const Tensor& x, at::IntArrayRef window, Tensor& y) {
  const Problem p = check(x, window, y, nullptr);
  typed(x, [&](auto type) {
    using T = typename decltype(type)::type;
    static const auto run = MF_DISPATCH(window_mean<T>);
    const T* from = x.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    each_image(p, [&](int64_t dense, int64_t pooled) { run(p.windows, from + dense, to + pooled); });
  });
}

void window_mean_place(const Tensor& gy, at::IntArrayRef window, Tensor& gx) {
  const Problem p = check(gx, window, gy, nullptr);
  typed(gx, [&](auto type) {
    using T = typename decltype(type)::type;
    static const auto run = MF_DISPATCH(window_mean_place<T>);
    const T* from = gy.const_data_ptr<T>();
    T* to = gx.mutable_data_ptr<T>();
    each_image(p, [&](int64_t dense, int64_t pooled) { run(p.windows, from + pooled, to + dense); });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mamlpp_fast, CPU, m) {
  m.impl("window_max", &window_max);
  m.impl("window_max_pick", &window_max_pick);
  m.impl("window_max_place", &window_max_place);
  m.impl("window_mean", &window_mean);
  m.impl("window_mean_place", &window_mean_place);
}

}  // namespace mf
