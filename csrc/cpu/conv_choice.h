// Which form of a convolution's products is the fastest, by its shape; docs/derivations/task_conv2d.md.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "kernels/conv_kernels.h"

namespace mf::conv {

/// MAMLPP_FAST_WINOGRAD: 0 asks for the direct form everywhere, 4 for Winograd's wherever it can be; else -1.
inline int64_t winograd_setting() {
  static const int64_t setting = []() -> int64_t {
    const char* text = std::getenv("MAMLPP_FAST_WINOGRAD");
    const std::string value = text == nullptr ? "" : text;
    return value == "0" ? 0 : value == "4" ? 4 : -1;
  }();
  return setting;
}

enum class Product { forward, to_input, to_weight };

/// Pairs of a pixel along one axis of the output and a tap that meets the image there.
inline int64_t valid_taps(int64_t size, int64_t out_size, int64_t kernel, int64_t stride, int64_t padding) {
  int64_t count = 0;
  for (int64_t tap = 0; tap < kernel; ++tap) {
    const int64_t begin = tap < padding ? (padding - tap + stride - 1) / stride : 0;
    const int64_t end = size + padding > tap ? (size + padding - tap - 1) / stride + 1 : 0;
    count += std::max<int64_t>(0, std::min(end, out_size) - begin);
  }
  return count;
}

/// Multiply-adds of a task in the direct form, which skips padding.
inline int64_t direct_cost(const Shape& s) {
  return s.images * valid_taps(s.height, s.out_height, s.kh, s.stride, s.pad_y) *
         valid_taps(s.width, s.out_width, s.kw, s.stride, s.pad_x) * s.ci * s.co;
}

/// Points of the tiles of an axis: 2 more than the pixels of each; those of 4 pixels and a rest.
inline int64_t axis_points(int64_t size, int64_t rest) { return size / 4 * 6 + (size % 4 > 0 ? rest + 2 : 0); }

/// A form of a product and the multiply-adds of the direct form that would take as long.
struct Choice {
  bool tiled;  ///< Winograd's form, and not the direct one
  int64_t cost;
};

/// The form that serves a product of float32 best, or that winograd_setting asks for.
inline Choice choose(const Shape& s, Product product) {
  const int64_t setting = winograd_setting();
  const Choice direct{false, direct_cost(s)};
  if (setting == 0 || s.kh != 3 || s.kw != 3 || s.stride != 1 || s.ci % 16 != 0 || s.co % 16 != 0) return direct;
  // Of a sum of so few terms the rounding of the transforms would show: over twice PyTorch's in a task of six.
  constexpr int64_t kFew = 240;
  if (setting < 0 && product == Product::to_weight && s.images * s.out_height * s.out_width < kFew) return direct;
  // Multiply-adds in whose time a value and a weight are transformed, as measured; see docs/derivations/task_conv2d.md.
  constexpr int64_t kValue = 8, kWeight = 11;
  const bool to_input = product == Product::to_input;
  const int64_t height = to_input ? s.height : s.out_height, width = to_input ? s.width : s.out_width;
  const int64_t rest = std::max(height % 4, width % 4);
  const int64_t rows = axis_points(height, rest), columns = axis_points(width, rest);
  const int64_t weights = std::min<int64_t>(6, rows) * std::min<int64_t>(6, columns) * s.ci * s.co;
  const int64_t cost = s.images * rows * columns * (s.ci * s.co + kValue * (s.ci + s.co)) + kWeight * weights;
  return setting > 0 || cost < direct.cost ? Choice{true, cost} : direct;
}

/// Whether a layer's three products take less time in pairs of bfloat16, operands rounded first, than in float32.
inline bool pairs_pay(const Shape& s) {
  // Times, of 1/100 of a multiply-add of the direct form in float32, as measured on Zen 5: of one in pairs, of one that
  // is counted for a Winograd form, and of rounding an activation and a gradient for what takes them of three products.
  constexpr int64_t kPairs = 60, kWinograd = 95, kRounded = 1500;
  int64_t pairs = 0, single = 0;
  for (const Product product : {Product::forward, Product::to_input, Product::to_weight}) {
    const Choice choice = choose(s, product);
    single += choice.cost * (choice.tiled ? kWinograd : 100);
    // Reduced channels go in pairs, images to-weight; where one is left over, all are widened.
    const int64_t reduced = product == Product::forward ? s.ci : product == Product::to_input ? s.co : 2;
    pairs += direct_cost(s) * (reduced % 2 == 0 ? kPairs : 100);
  }
  const int64_t values = s.images * (s.height * s.width * s.ci + s.out_height * s.out_width * s.co);
  return pairs + values * kRounded < single;
}

}  // namespace mf::conv
