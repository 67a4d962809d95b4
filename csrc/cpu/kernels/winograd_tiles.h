// Tiles of Winograd's form F(4x4, 3x3): which there are, and their transforms between images and planes of products.
#pragma once

#include "conv_kernels.h"
#include "conv_micro.h"
#include "winograd_transforms.h"

namespace mf::MF_ISA::conv::winograd {

using Problem = mf::conv::Winograd;
constexpr int W = kLanes<float>;
constexpr int kPoints = kSide * kSide;

/// Tiles are short in y or x, that is, of `rest` pixels, where they are the last ones of an axis that 4 does not
/// divide: 4 kinds. As the rows of a product they are in the order short in y, whole, short in x, short in both, so
/// that those that use a point are neighbours.
struct Tiles {
  explicit Tiles(const Problem& p)
      : rows(divide_up(p.out_height, kPixels)),
        columns(divide_up(p.out_width, kPixels)),
        per_image(rows * columns),
        rest(static_cast<int>(p.out_height % kPixels > p.out_width % kPixels ? p.out_height % kPixels
                                                                             : p.out_width % kPixels)),
        short_y(p.out_height % kPixels > 0),
        short_x(p.out_width % kPixels > 0) {}

  int kind(int64_t y, int64_t x) const {
    const bool in_y = short_y && y + 1 == rows, in_x = short_x && x + 1 == columns;
    return in_x ? 2 + in_y : 1 - in_y;
  }

  int64_t rows, columns, per_image;
  int rest;
  bool short_y, short_x;
};

/// Tiles [first, first + count) of a task's images as rows of products.
struct Chunk {
  Chunk(const Tiles& tiles, int64_t first, int64_t count) : tiles(tiles), first(first), count(count) {
    int64_t of_kind[4] = {};
    visit([&](int64_t, int64_t, int64_t, int kind, int64_t) { ++of_kind[kind]; });
    for (int kind = 0; kind < 4; ++kind) begin[kind + 1] = begin[kind] + of_kind[kind];
  }
  /// Calls see(image, y, x, kind, row) for every tile in the order of memory.
  template <class See>
  void visit(const See& see) const {
    int64_t row[4] = {begin[0], begin[1], begin[2], begin[3]};
    int64_t image = first / tiles.per_image, y = first % tiles.per_image / tiles.columns, x = first % tiles.columns;
    for (int64_t n = 0; n < count; ++n) {
      const int kind = tiles.kind(y, x);
      see(image, y * kPixels, x * kPixels, kind, row[kind]++);
      if (++x == tiles.columns) x = 0, ++y;
      if (y == tiles.rows) y = 0, ++image;
    }
  }
  /// The rows that use a point are [from(point), to(point)).
  int64_t from(int point) const { return uses(tiles.rest, point / kSide) ? 0 : begin[1]; }
  int64_t to(int point) const {
    const bool in_y = uses(tiles.rest, point / kSide), in_x = uses(tiles.rest, point % kSide);
    return begin[!in_x ? 2 : in_y ? 4 : 3];
  }

  const Tiles& tiles;
  int64_t first, count, begin[5] = {};
};

/// Transforms a register of weights, into the points that tiles of up to in_y x in_x pixels use.
[[gnu::noinline]] inline void transform_weight(const float* from, int64_t from_stride, float* to, int64_t to_stride,
                                               int in_y, int in_x) {
  both_axes<Filter, Filter>([=](int r, int s) { return V::load(from + (r * 3 + s) * from_stride); },
                            [=](int r, int s, V u) {
                              if (uses(in_y, r) && uses(in_x, s)) u.store(to + (r * kSide + s) * to_stride);
                            });
}

/// [panel][channel][panel width] for every point: weights of one task, transformed. Those that are turned for the
/// gradient to the input are so a square of every tap at a time, in `turned`, which stays in the first-level cache.
inline void transform_weights(const Problem& p, const Tiles& tiles, const float* w, float* to, int64_t to_stride,
                              float* turned) {
  const int64_t ci = p.ci, co = p.co, stride = ci * co;
  const int in_y = p.out_height < kPixels ? tiles.rest : kPixels, in_x = p.out_width < kPixels ? tiles.rest : kPixels;
  const auto transform = [=](const float* from, int64_t from_stride, float* place) {
    transform_weight(from, from_stride, place, to_stride, in_y, in_x);
  };
  const Panels<float> panels(co);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t width = panels.width(panel), o = panels.begin(panel);
    float* const place = to + o * ci;
    if (!p.transposed) {
      for (int64_t c = 0; c < ci; ++c)
        for (int64_t v = 0; v < width; v += W) transform(w + c * co + o + v, stride, place + c * width + v);
      continue;
    }
    for (int64_t c = 0; c < ci; c += W)
      for (int64_t v = 0; v < width; v += W) {
        for (int tap = 0; tap < 9; ++tap)
          transpose_square(w + (8 - tap) * stride + (o + v) * ci + c, ci, turned + tap * W * W, W);
        for (int i = 0; i < W; ++i) transform(turned + i * W, W * W, place + (c + i) * width + v);
      }
  }
}

/// Where patches of channels [channel_begin, channel_begin + channel_count) come from, pixels outside of the images
/// being zeros, and planes [points][channel group][tile][channel of the group] that their transforms go to.
struct Patches {
  const float* images;
  int64_t height, width, channels, padding, channel_begin, channel_count;
  const float* zeros;
  float* to;
  int64_t stride, group, tiles;
};

/// Pointers to the first channel of the rows x columns pixels from (y0, x0) on.
[[gnu::noinline]] inline void find_pixels(const Patches& p, int64_t image, int64_t y0, int64_t x0, int rows,
                                          int columns, const float* (*pixel)[kSide]) {
  const float* origin = p.images + image * p.height * p.width * p.channels + p.channel_begin;
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) {
      const int64_t y = y0 + r, x = x0 + c;
      const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
      pixel[r][c] = inside ? origin + (y * p.width + x) * p.channels : p.zeros;
    }
}

/// Transforms one patch into a row of the planes.
template <class Rows, class Columns>
void transform_patch(const Patches& p, int64_t image, int64_t y0, int64_t x0, int64_t row) {
  const float* pixel[kSide][kSide];
  find_pixels(p, image, y0 - p.padding, x0 - p.padding, Rows::in, Columns::in, pixel);
  const int64_t stride = p.stride;
  for (int64_t v = 0; v < p.channel_count; v += W) {
    const int64_t g = v / p.group * p.group, left = p.channel_count - g, own = left < p.group ? left : p.group;
    float* place = p.to + g * p.tiles + row * own + v - g;
    // What the next patch has and this one has not; in vain behind the last one of a row, which short ones are.
    if constexpr (Columns::pixels == kPixels) {
      for (int r = 0; r < Rows::in; ++r)
        for (int c = Columns::in - kPixels; c < Columns::in; ++c)
          __builtin_prefetch(pixel[r][c] + v + kPixels * p.channels);
    }
    both_axes<Rows, Columns>([&](int r, int c) { return V::load(pixel[r][c] + v); },
                             [=](int r, int c, V x) { x.store(place + (r * kSide + c) * stride); });
  }
}

/// Transforms the products of one tile, in a row of planes of `pitch` elements a row, into pixels of an image.
template <class Rows, class Columns>
void store_tile(const Problem& p, const float* products, int64_t stride, float* images, int64_t image, int64_t y0,
                int64_t x0) {
  const int64_t co = p.co, row = p.out_width * co;
  const int rows = static_cast<int>(p.out_height - y0 < Rows::out ? p.out_height - y0 : Rows::out);
  const int columns = static_cast<int>(p.out_width - x0 < Columns::out ? p.out_width - x0 : Columns::out);
  float* origin = images + ((image * p.out_height + y0) * p.out_width + x0) * co;
  for (int64_t v = 0; v < co; v += W) {
    const float* from = products + v;
    both_axes<Rows, Columns>([=](int r, int c) { return V::load(from + (r * kSide + c) * stride); },
                             [=](int r, int c, V y) {
                               if (r < rows && c < columns) y.store(origin + r * row + c * co + v);
                             });
  }
}

/// For tiles that are short by M: the function of each kind, in the order of Chunk.
template <template <int> class Line, int M>
constexpr decltype(&transform_patch<Line<4>, Line<4>>) kPatch[] = {
    transform_patch<Line<M>, Line<4>>, transform_patch<Line<4>, Line<4>>, transform_patch<Line<4>, Line<M>>,
    transform_patch<Line<M>, Line<M>>};
template <int M>
constexpr decltype(&store_tile<Output<4>, Output<4>>) kStore[] = {
    store_tile<Output<M>, Output<4>>, store_tile<Output<4>, Output<4>>, store_tile<Output<4>, Output<M>>,
    store_tile<Output<M>, Output<M>>};

template <template <int> class Line>
void transform_patches(const Patches& p, const Chunk& chunk) {
  const int rest = chunk.tiles.rest;
  const auto* const kinds = rest == 3 ? kPatch<Line, 3> : rest == 2 ? kPatch<Line, 2> : kPatch<Line, 1>;
  chunk.visit([&](int64_t image, int64_t y, int64_t x, int kind, int64_t row) { kinds[kind](p, image, y, x, row); });
}

inline void store_outputs(const Problem& p, const float* products, int64_t pitch, int64_t stride, float* images,
                          const Chunk& chunk) {
  const int rest = chunk.tiles.rest;
  const auto* const kinds = rest == 3 ? kStore<3> : rest == 2 ? kStore<2> : kStore<1>;
  chunk.visit([&](int64_t image, int64_t y, int64_t x, int kind, int64_t row) {
    kinds[kind](p, products + row * pitch, stride, images, image, y, x);
  });
}

}  // namespace mf::MF_ISA::conv::winograd
