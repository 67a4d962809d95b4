// mamlpp_fast::window_max, window_mean and what belongs to them: mamlpp_fast/ops/window_pool.py. An image is a unit of
// work, so that results do not depend on the number of threads.

#include "kernels/window_pool.h"

#include <ATen/core/Tensor.h>

#include "arguments.h"

namespace mf::of_window_pool {
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
  const auto type = check_float("window pool", dense);
  check_like("window pool", dense, dense.sizes(), type);
  check_like("window pool", pooled, expected, type);
  if (index != nullptr) check_like("index", *index, expected, at::kByte);
  return {{height, width, dense.size(4), rows, columns, w[0], w[1], w[2], w[3], w[4], w[5]},
          dense.size(0) * dense.size(1),
          height * width * dense.size(4),
          rows * columns * dense.size(4)};
}

/// work(from, to, dense, pooled) for every image: the values of both tensors, and where the image begins in them.
template <typename Work>
void each_image(const Problem& p, const Tensor& from, const Tensor& to, const Work& work) {
  typed(from, [&]<typename T>(Type<T>) {
    const T* in = from.const_data_ptr<T>();
    T* out = to.mutable_data_ptr<T>();
    each(p.images, [&](int64_t i) { work(in, out, i * p.dense, i * p.pooled); });
  });
}

void window_max(const Tensor& x, at::IntArrayRef window, Tensor& y, Tensor& index) {
  const Problem p = check(x, window, y, &index);
  uint8_t* at = index.mutable_data_ptr<uint8_t>();
  each_image(p, x, y, [&]<typename T>(const T* from, T* to, int64_t dense, int64_t pooled) {
    static const auto run = MF_DISPATCH(window_max<T>);
    run(p.windows, from + dense, to + pooled, at + pooled);
  });
}

void window_max_pick(const Tensor& u, const Tensor& index, at::IntArrayRef window, Tensor& uy) {
  const Problem p = check(u, window, uy, &index);
  const uint8_t* at = index.const_data_ptr<uint8_t>();
  each_image(p, u, uy, [&]<typename T>(const T* from, T* to, int64_t dense, int64_t pooled) {
    static const auto run = MF_DISPATCH(window_max_pick<T>);
    run(p.windows, from + dense, at + pooled, to + pooled);
  });
}

void window_max_place(const Tensor& gy, const Tensor& index, at::IntArrayRef window, Tensor& gx) {
  const Problem p = check(gx, window, gy, &index);
  const uint8_t* at = index.const_data_ptr<uint8_t>();
  each_image(p, gy, gx, [&]<typename T>(const T* from, T* to, int64_t dense, int64_t pooled) {
    static const auto run = MF_DISPATCH(window_max_place<T>);
    run(p.windows, from + pooled, at + pooled, to + dense);
  });
}

void window_mean(const Tensor& x, at::IntArrayRef window, Tensor& y) {
  const Problem p = check(x, window, y, nullptr);
  each_image(p, x, y, [&]<typename T>(const T* from, T* to, int64_t dense, int64_t pooled) {
    static const auto run = MF_DISPATCH(window_mean<T>);
    run(p.windows, from + dense, to + pooled);
  });
}

void window_mean_place(const Tensor& gy, at::IntArrayRef window, Tensor& gx) {
  const Problem p = check(gx, window, gy, nullptr);
  each_image(p, gy, gx, [&]<typename T>(const T* from, T* to, int64_t dense, int64_t pooled) {
    static const auto run = MF_DISPATCH(window_mean_place<T>);
    run(p.windows, from + pooled, to + dense);
  });
}

[[maybe_unused]] const bool registered =
    implement("window_max", &window_max, "window_max_pick", &window_max_pick, "window_max_place", &window_max_place,
              "window_mean", &window_mean, "window_mean_place", &window_mean_place);

}  // namespace
}  // namespace mf::of_window_pool
