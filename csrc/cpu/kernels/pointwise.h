// Smooth functions of one number, with their first two derivatives: f(x), g f'(x), and g_dot f'(x) + g u f''(x).
#pragma once

#include "isa.h"

namespace mf {

// In the order of mamlpp_fast/ops/pointwise.py; `a` is the scale of elu, and what sine and cosine multiply x by.
enum class Function : int { gelu, gelu_tanh, silu, sigmoid, tanh, elu, sine, cosine };
constexpr int kFunctions = 8;

}  // namespace mf

MF_KERNEL(template <typename T> void pointwise(mf::Function f, T a, const T* x, T* y, int64_t n);
          template <typename T> void pointwise_slope(mf::Function f, T a, const T* x, const T* g, T* out, int64_t n);
          template <typename T> void pointwise_bend(mf::Function f, T a, const T* x, const T* g_dot, const T* g,
                                                    const T* u, T* out, int64_t n);)
