// The element type of a tensor as a type of C++; for files that see torch's headers.
#pragma once

#include <ATen/core/Tensor.h>

namespace mf {

template <typename T>
struct Type {
  using type = T;
};

/// Calls `work` with Type<double> for float64, else with Type<float>.
template <typename Work>
void typed(const at::Tensor& t, const Work& work) {
  t.scalar_type() == at::kDouble ? work(Type<double>{}) : work(Type<float>{});
}

}  // namespace mf
