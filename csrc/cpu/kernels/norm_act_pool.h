// Batch norm, leaky ReLU and 2x2 max-pool on one channels-last image [H, W, C]. Rows named after a statistic hold one
// value per channel. Sums are overwritten. Formulas: docs/derivations/norm_act_pool.md.
#pragma once

#include "isa.h"

namespace mf {

// Without the pool, rows = height and columns = width, and `index` is not touched.
struct PoolShape {
  int64_t height, width, channels, rows, columns;
  bool pool;
};

// What recovers a = scale * (z - mean) + beta, the value before the leaky ReLU; scale = gamma / sigma.
template <typename T>
struct NormRows {
  const T *mean, *scale, *beta;
  T slope;
};

}  // namespace mf

MF_KERNEL(
    // Mean of the image, rounded, and the sums of deviations from it and of their squares.
    template <typename T> void nap_moments(const PoolShape& s, const T* z, T* mean, T* rest, T* squares);

    template <typename T> void nap_forward(const PoolShape& s, const NormRows<T>& n, const T* z, T* y, uint8_t* index);

    // With h = gy * (derivative of the leaky ReLU): sums of h and h * (z - mean).
    template <typename T> void nap_backward_sums(const PoolShape& s, const NormRows<T>& n, const T* gy, const T* z,
                                                 const uint8_t* index, T* h, T* hz);
    // gz = scale * h + along * (z - mean) + constant
    template <typename T> void nap_backward(const PoolShape& s, const NormRows<T>& n, const T* gy, const T* z,
                                            const uint8_t* index, const T* along, const T* constant, T* gz);

    // Sums of u and u * (z - mean).
    template <typename T>
    void nap_tangent_sums(const PoolShape& s, const NormRows<T>& n, const T* u, const T* z, T* us, T* uz);
    // uy = (derivative of the leaky ReLU) * (scale * u + along * (z - mean) + constant)
    template <typename T> void nap_tangent(const PoolShape& s, const NormRows<T>& n, const T* u, const T* z,
                                           const uint8_t* index, const T* along, const T* constant, T* uy);

    // Sums [5][C]: h, h * (z - mean), h * u, h_dot, h_dot * (z - mean).
    template <typename T>
    void nap_backward_tangent_sums(const PoolShape& s, const NormRows<T>& n, const T* gy_dot, const T* gy, const T* u,
                                   const T* z, const uint8_t* index, T* sums);
    // gz_dot = scale * h_dot + along_h * h + along_u * u + along * (z - mean) + constant; `rows` holds the four.
    template <typename T>
    void nap_backward_tangent(const PoolShape& s, const NormRows<T>& n, const T* gy_dot, const T* gy, const T* u,
                              const T* z, const uint8_t* index, const T* rows, T* gz_dot);)
