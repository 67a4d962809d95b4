// Linear head and softmax cross-entropy on one task: features [N, F], classes O. Everything runs along F, so weights
// are taken and left transposed, [O, F]. Formulas: docs/derivations/linear_cross_entropy.md.
#pragma once

#include "isa.h"

namespace mf {

struct Head {
  int64_t images, features, classes;
};

}  // namespace mf

MF_KERNEL(
    // out [columns, rows] = x [rows, columns], transposed.
    template <typename T> void head_transpose(const T* x, int64_t rows, int64_t columns, T* out);

    // z [N, O] += f . wt
    template <typename T> void head_products(const Head& s, const T* f, const T* wt, T* z);

    // out [rows, F] (+)= sum over terms t of factors[r * row + t * term] * x[t, :].
    template <typename T> void head_combine(int64_t rows, int64_t terms, int64_t features, const T* factors,
                                            int64_t row, int64_t term, const T* x, bool add, T* out);

    // p = softmax(z), gz = scale * (p - target); returns the sum of target * log(p).
    template <typename T> T head_softmax(const Head& s, const T* z, const T* target, T scale, T* p, T* gz);

    // gz_dot, in place of z_dot: scale * p * (z_dot - sum of p * z_dot).
    template <typename T> void head_softmax_tangent(const Head& s, const T* p, T scale, T* z_dot);)
