// Plain-data interface between csrc/cpu/task_conv2d.cpp and the convolution kernels, which are compiled once per
// instruction set. Nothing here may instantiate a template of the standard library: the linker would be free to keep
// the copy built for the widest instruction set.
#pragma once

#include <cstdint>

#include "isa.h"

namespace mf::conv {

constexpr int kMaxTaps = 49;  // bits of a mask of 64

/// Two bfloat16, the first in the low half. Where a kernel's T is Pair, its channels_in and src_image count pairs.
enum class Pair : uint32_t {};

/// Destination pixels of one image whose valid taps are the same, so that padding costs neither branches nor products.
struct PixelClass {
  const int64_t* src;  ///< [count] element offset, in one source image, of the pixel that `delta` is relative to
  const int64_t* dst;  ///< [count] element offset of the destination pixel in its image
  int64_t count;
  int taps;
  int tap[kMaxTaps];        ///< valid taps in ascending order
  int64_t delta[kMaxTaps];  ///< element offset of each valid tap's source pixel from `src`
};

/// A convolution of [tasks, images, height, width, ci] with [tasks, kh, kw, ci, co].
struct Shape {
  int64_t tasks, images, height, width, ci, kh, kw, co, out_height, out_width, stride, pad_y, pad_x;
};

/// One or two pairs, whose products are added up.
struct Operands {
  const void* a[2];
  const void* b[2];
  int pairs;
};

/// out[dst] = sum over pairs, taps, source channels of a[src + delta] * weight: forward and to-input. The shape is of
/// the forward convolution; a is [tasks, images, source pixels, channels_in], b the weights.
struct Gather : Operands, Shape {
  void* out = nullptr;  ///< [tasks, images, destination pixels, channels_out]
  int64_t parts = 0;    ///< a unit of work is one of `parts` ranges of a task's images, or of their pixels
  int64_t channels_in = 0, channels_out = 0;
  int64_t src_image = 0, dst_image = 0;  ///< elements of one image
  int taps = 0;
  bool transposed = false;  ///< to-input: channels_out of the weights are reduced and taps run backwards
  const PixelClass* classes = nullptr;
  int num_classes = 0;
};

/// out[tap, ci, co] = sum over pairs, images, pixels of x * g: to-weight. a is x, of Pair bfloat16 values, and b is g.
struct Outer : Operands, Shape {
  void* out = nullptr;
  int64_t parts = 0,
          row_parts = 1;  ///< a unit of work is a range of output channels of a task and one of input channels
};

/// Stride-1 3x3 convolution in the Winograd domain. The shape is of this product: for the gradient to the input, of the
/// convolution of g, with padding 2 - p. For to-weight, b is g and `out` the weight gradient.
struct Winograd : Operands, Shape {
  void* out = nullptr;
  int64_t parts = 0;
  bool transposed = false;  ///< to-input: the weights lie as those of the forward convolution
};

constexpr int64_t kBeyond = 16;  ///< elements behind the products of conv_sum_taps that are read, and have no effect

/// Kernels of one instruction set and element type; results of Pair are float. `run` works on units [begin, end) with
/// `scratch` elements of private memory aligned to 64 bytes; results never depend on how units are spread over threads.
template <class T>
struct Kernels {
  int64_t (*gather_scratch)(const Gather&);
  void (*gather)(const Gather&, int64_t begin, int64_t end, T* scratch);
  int64_t (*outer_scratch)(const Outer&);
  void (*outer)(const Outer&, int64_t begin, int64_t end, T* scratch);
  int64_t panel;  ///< output channels a unit of `outer` works on at a time
  int64_t rows;   ///< and input channels; 0 where it takes no range of them
};

/// For float alone.
struct WinogradKernels {
  int64_t (*scratch)(const Winograd&);
  void (*run)(const Winograd&, int64_t begin, int64_t end, float* scratch);
  int64_t (*weight_scratch)(const Winograd&);
  void (*weight_run)(const Winograd&, int64_t begin, int64_t end, float* scratch);
  double (*fma_peak)(int64_t iterations);
};

}  // namespace mf::conv

// conv_kernels<Pair> is all null, bf16_peak 0, at levels without bfloat16 products.
// conv_sum_taps is for stride 1 and so few output channels that they leave most of a register empty: first come every
// pixel's products with the weights of all taps, [height, width, kh, kw, co], as of a 1x1 kernel; it sums them, shifted
// by tap.
MF_KERNEL(template <class T> mf::conv::Kernels<T> conv_kernels(); mf::conv::WinogradKernels winograd_kernels();
          template <class T> void conv_sum_taps(const mf::conv::Shape& s, const T* products, T* out);
          double bf16_peak(int64_t iterations);)
