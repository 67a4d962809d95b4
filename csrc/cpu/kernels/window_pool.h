// Maxima and means over windows of one channels-last image [height, width, channels]; the result is [rows, columns,
// channels]. What lies in the padding is in no maximum, and a zero of a mean. Formulas: mamlpp_fast/ops/window_pool.py.
#pragma once

#include "isa.h"

namespace mf {

struct Windows {
  int64_t height, width, channels, rows, columns;
  int64_t kh, kw, step_y, step_x, pad_y, pad_x;
  bool apart() const { return step_y >= kh && step_x >= kw; }  ///< no pixel is in two windows
};

}  // namespace mf

MF_KERNEL(
    // index: position row * kw + column of the maximum in its window, the first of equal ones; a NaN is one.
    template <typename T> void window_max(const Windows& s, const T* x, T* y, uint8_t* index);
    // uy: what u has where the maxima are.
    template <typename T> void window_max_pick(const Windows& s, const T* u, const uint8_t* index, T* uy);
    // gx: the sums of gy over the windows whose maximum a pixel is.
    template <typename T> void window_max_place(const Windows& s, const T* gy, const uint8_t* index, T* gx);

    template <typename T> void window_mean(const Windows& s, const T* x, T* y);
    template <typename T> void window_mean_place(const Windows& s, const T* gy, T* gx);)
