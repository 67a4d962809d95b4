// First layer without its feature map: kernels on one padded, channels-last image [H, W, Ci] of a task, whose patches
// of K = kh * kw * Ci values meet weights [K, C]. Rows of weights, shifts and sums are `stride` apart, C rounded up to
// whole registers, and are read and written whole. Formulas: docs/derivations/conv_norm_act_pool.md.
#pragma once

#include "isa.h"

namespace mf {

struct FirstLayer {
  int64_t height, width, ci;  // padded image
  int64_t kh, kw, co, stride = 0;
  int64_t rows = 0, columns = 0;  // of the pooled result
  int64_t values() const { return kh * kw * ci; }
  int64_t out_height() const { return height - kh + 1; }
  int64_t out_width() const { return width - kw + 1; }
};

}  // namespace mf

MF_KERNEL(
    // Sums over an image's patches of their values [K] and of products of two of them [K, K] (upper triangle), added to
    // both; `panel` is scratch of patch_panel() doubles.
    template <typename T>
    void patch_moments(const FirstLayer& s, const T* image, double* sums, double* products, double* panel);
    int64_t patch_panel(const FirstLayer& s);

    // y = leaky(max over the window of w . patch + shift), `index` the first maximum's position.
    template <typename T> void first_layer_forward(const FirstLayer& s, const T* image, const T* w, const T* shift,
                                                   T slope, T* y, uint8_t* index);

    // With g = gy * (derivative of the leaky ReLU): sums [K + 1, C] of g * (value of the chosen patch), then of g.
    template <typename T> void first_layer_sums(const FirstLayer& s, const T* image, const T* gy, const T* y,
                                                const uint8_t* index, T slope, T* sums);

    // uy = (derivative of the leaky ReLU) * (w . chosen patch + shift)
    template <typename T> void first_layer_tangent(const FirstLayer& s, const T* image, const T* w, const T* shift,
                                                   const T* y, const uint8_t* index, T slope, T* uy);)
