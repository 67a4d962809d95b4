// The LSLR update on runs of elements that share one rate, or have one each (`rates`). Any of the outputs may be an
// input of the same call.
#pragma once

#include "isa.h"

MF_KERNEL(
    // out = theta - rate * grad
    template <typename T> void lslr_update(const T* theta, const T* grad, T rate, T* out, int64_t n);
    template <typename T> void lslr_update_each(const T* theta, const T* grad, const T* rates, T* out, int64_t n);

    // ggrad = -rate * gout; the sum of -gout * grad is returned, or added to `grates` element by element.
    template <typename T> T lslr_update_backward(const T* gout, const T* grad, T rate, T* ggrad, int64_t n);
    template <typename T>
    void lslr_update_backward_each(const T* gout, const T* grad, const T* rates, T* ggrad, T* grates, int64_t n);

    // cgout = -rate * a - b * grad, cgrad = -b * gout; the sum of -a * gout as above.
    template <typename T>
    T lslr_update_double_backward(const T* a, T b, const T* gout, const T* grad, T rate, T* cgout, T* cgrad, int64_t n);
    template <typename T>
    void lslr_update_double_backward_each(const T* a, const T* b, const T* gout, const T* grad, const T* rates,
                                          T* cgout, T* cgrad, T* crates, int64_t n);)
