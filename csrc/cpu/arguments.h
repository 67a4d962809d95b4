// What the operations do with their arguments alike: checks, the element type as a type of C++, tasks in parallel,
// memory of a thread.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <vector>

#include "registry.h"

namespace mf {

/// Raises unless a tensor is contiguous and of this shape and type.
inline void check_like(const char* name, const at::Tensor& t, at::IntArrayRef shape, at::ScalarType type) {
  TORCH_CHECK_VALUE(t.sizes() == shape && t.is_contiguous(), name, ": expected contiguous ", shape, ", got ", t.sizes(),
                    " of strides ", t.strides());
  TORCH_CHECK_TYPE(t.scalar_type() == type, name, ": expected ", type, ", got ", t.scalar_type());
}

/// Raises unless a tensor holds float32 or float64; gives its type.
inline at::ScalarType check_float(const char* name, const at::Tensor& t) {
  const auto type = t.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, name, ": expected float32 or float64, got ", type);
  return type;
}

constexpr int64_t kGrain = 16384;  ///< elements below which a second thread does not pay

/// Whether a tensor is its values, next to each other in memory, and nothing else.
inline bool bare(const at::Tensor& t) {
  return t.has_storage() && t.layout() == at::kStrided && t.is_cpu() && t.is_contiguous() && !t.is_neg() &&
         !t._is_zerotensor() && !t.unsafeGetTensorImpl()->is_python_dispatch() &&
         (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble);
}

/// A contiguous buffer of the wanted type; `finish` rounds it into the result if that is another tensor.
struct Result {
  Result(const at::Tensor& out, at::ScalarType type)
      : result(out),
        buffer(out.scalar_type() == type && out.is_contiguous() ? out : empty(out.sizes(), out.options().dtype(type))) {
  }
  void finish() const {
    if (!buffer.is_same(result)) result.copy_(buffer);
  }
  /// Where a row of the last axis' length begins.
  template <typename T>
  T* row(int64_t i) const {
    return buffer.mutable_data_ptr<T>() + i * buffer.size(-1);
  }
  at::Tensor result, buffer;
};

template <typename T>
struct Type {
  using type = T;
};

/// Calls `work` with Type<double> for float64, else with Type<float>.
template <typename Work>
void typed(const at::Tensor& t, const Work& work) {
  t.scalar_type() == at::kDouble ? work(Type<double>{}) : work(Type<float>{});
}

/// work(i) for every i below `count`, in parallel.
template <typename Work>
void each(int64_t count, const Work& work) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i);
  });
}

/// Memory the calling thread keeps from call to call, for one call at a time.
template <typename T>
T* scratch(int64_t elements) {
  static thread_local std::vector<T> kept;
  if (static_cast<int64_t>(kept.size()) < elements) kept.resize(static_cast<size_t>(elements));
  return kept.data();
}

}  // namespace mf
