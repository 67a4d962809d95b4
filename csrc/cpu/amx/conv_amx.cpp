// Direct convolutions in tiles: pixels gathered by class for forward and to-input, outer products over pixels for
// to-weight. Pair counts channels in pairs, everything else here in values.

#include "conv_amx.h"

#include "kernels/conv_bf16.h"
#include "tiles.h"

namespace mf::amxbf16::conv {
namespace {

using mf::conv::Gather;
using mf::conv::Outer;
using mf::conv::PixelClass;

/// Pairs of channels a product reduces: an equal share of them, for a tile's unfilled columns would need zeros.
int64_t pairs_of_product(int64_t channel_pairs) {
  int64_t products = divide_up(channel_pairs, kTilePairs);
  while (channel_pairs % products != 0) ++products;
  return channel_pairs / products;
}

int64_t packed_elements(const Gather& p) { return p.channels_out * p.taps * p.channels_in; }

/// Packs the weights of one task to [tile of 16 channels out][tap][pair of channels in][16].
void pack_weights(const Gather& p, const Pair* w, Pair* to) {
  const int64_t ci = p.channels_in, co = p.channels_out;
  for (int64_t o = 0; o < co; o += kTileRows)
    for (int tap = 0; tap < p.taps; ++tap, to += ci * kTileRows) {
      if (p.transposed) {
        transpose(w + ((p.taps - 1 - tap) * co + o) * ci, ci, kTileRows, ci, to, kTileRows);
      } else {
        const uint16_t* from = reinterpret_cast<const uint16_t*>(w + tap * ci * co) + o;
        for (int64_t c = 0; c < ci; ++c) interleave(to + c * kTileRows, from + 2 * c * co, co, kTileRows);
      }
    }
}

/// The rows of one class's tiles: `length` items in each of `lines`, the items a constant step apart.
struct Grid {
  bool over_images;  ///< a line is one pixel of all images; else one row of pixels of one image
  int64_t lines, rows_per_image, row, length, src_step, dst_step;
  int64_t tiles, rows;  ///< of a line; the last tile reaches back into the one before
};

Grid grid_of(const Gather& p, const PixelClass& cls, int64_t images) {
  int64_t row = 1;
  const auto steps = [&](int64_t i, int64_t src, int64_t dst) {
    return cls.src[i] - cls.src[i - 1] == src && cls.dst[i] - cls.dst[i - 1] == dst;
  };
  const int64_t src = cls.count > 1 ? cls.src[1] - cls.src[0] : 0, dst = cls.count > 1 ? cls.dst[1] - cls.dst[0] : 0;
  while (row < cls.count && steps(row, src, dst)) ++row;
  bool regular = cls.count % row == 0;
  for (int64_t i = row + 1; regular && i < cls.count; ++i) regular = i % row == 0 || steps(i, src, dst);
  const int64_t row_tiles = divide_up(row, kTileRows), image_tiles = divide_up(images, kTileRows);
  Grid g{};
  g.over_images = !regular || image_tiles * row < row_tiles * images;
  g.row = row;
  g.rows_per_image = cls.count / row;
  g.lines = g.over_images ? cls.count : images * g.rows_per_image;
  g.length = g.over_images ? images : row;
  g.src_step = g.over_images ? p.src_image : src;
  g.dst_step = g.over_images ? p.dst_image : dst;
  g.tiles = g.over_images ? image_tiles : row_tiles;
  g.rows = divide_up(g.length, g.tiles);
  return g;
}

void clear_class(const Gather& p, const PixelClass& cls, int64_t images, float* out) {
  for (int64_t n = 0; n < images; ++n)
    for (int64_t i = 0; i < cls.count; ++i)
      memset(out + n * p.dst_image + cls.dst[i], 0, p.channels_out * sizeof(float));
}

void gather_class(const Gather& p, const PixelClass& cls, int64_t first, int64_t last, int64_t task,
                  const Pair* const* packed, Tiles& tiles) {
  const int64_t images = last - first, product = pairs_of_product(p.channels_in);
  float* out = static_cast<float*>(p.out) + (task * p.images + first) * p.dst_image;
  if (cls.taps == 0) return clear_class(p, cls, images, out);
  const Grid grid = grid_of(p, cls, images);
  tiles.shape(grid.rows, product);
  Run runs[mf::conv::kMaxTaps];
  for (int t = 0; t < cls.taps; ++t)
    runs[t] = {cls.delta[t] * 2, cls.tap[t] * p.channels_in * kTileRows * 2, p.channels_in / product};
  TileBlock block{};
  block.pairs = p.pairs;
  block.stride = grid.src_step * 2;
  block.step_a = product * 2;
  block.step_b = product * kTileRows * 2;
  block.out_stride = grid.dst_step;
  const int64_t column = p.taps * p.channels_in * kTileRows, total = grid.lines * grid.tiles;
  for (int64_t o = 0; o < p.channels_out; o += 2 * kTileRows) {
    const int64_t columns = o + kTileRows < p.channels_out ? 2 : 1;
    for (int64_t at = 0; at < total; at += 2) {
      const int64_t count = at + 1 < total ? 2 : 1;
      for (int64_t m = 0; m < count; ++m) {
        const int64_t line = (at + m) / grid.tiles, tile = (at + m) % grid.tiles;
        const int64_t item = tile + 1 < grid.tiles ? tile * grid.rows : grid.length - grid.rows;
        const int64_t image = grid.over_images ? 0 : line / grid.rows_per_image;
        const int64_t pixel = grid.over_images ? line : line % grid.rows_per_image * grid.row;
        const int64_t src = image * p.src_image + cls.src[pixel] + item * grid.src_step;
        for (int pair = 0; pair < p.pairs; ++pair)
          block.sides[pair].a[m] =
              static_cast<const uint16_t*>(p.a[pair]) + 2 * ((task * p.images + first) * p.src_image + src);
        block.out[m] = out + image * p.dst_image + cls.dst[pixel] + item * grid.dst_step + o;
      }
      for (int pair = 0; pair < p.pairs; ++pair)
        for (int64_t n = 0; n < columns; ++n)
          block.sides[pair].b[n] = reinterpret_cast<const uint16_t*>(packed[pair] + (o / kTileRows + n) * column);
      pick_tiles(count, columns)(block, runs, cls.taps);
    }
  }
}

int64_t gather_scratch(const Gather& p) { return p.pairs * packed_elements(p); }

void gather(const Gather& p, int64_t begin, int64_t end, Pair* scratch) {
  Pair* packed[2] = {scratch, scratch + packed_elements(p)};
  int64_t ready = -1;
  Tiles tiles;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t task = unit / p.parts, part = unit % p.parts;
    const int64_t first = part * p.images / p.parts, last = (part + 1) * p.images / p.parts;
    if (task != ready) {
      for (int pair = 0; pair < p.pairs; ++pair)
        pack_weights(p, static_cast<const Pair*>(p.b[pair]) + task * packed_elements(p), packed[pair]);
      publish();
      ready = task;
    }
    for (int c = 0; c < p.num_classes; ++c) gather_class(p, p.classes[c], first, last, task, packed, tiles);
  }
}

/// To-weight reduces over positions: pixels in rows of `pitch`, images of a group innermost. A row's right padding is
/// the next one's left, so a tap is one constant shift of `x`; `g` is zero there. Both are padded with zeros to whole
/// tiles.
struct Positions {
  explicit Positions(const Outer& p)
      : pitch(p.width + p.pad_x),
        groups(divide_up(p.images, kRowPositions / pitch > 1 ? kRowPositions / pitch : 1)),
        group(divide_up(p.images, groups)),
        count(round_up(((p.out_height - 1) * pitch + p.out_width) * group)),
        lead(round_up((p.pad_y * pitch + p.pad_x) * group)) {
    const int64_t reach = ((p.kh - 1 - p.pad_y) * pitch + p.kw - 1 - p.pad_x) * group;
    const int64_t source = p.height * pitch * group;
    // An odd number of cache lines: rows of a tile spread over all sets of the cache.
    row = (round_up(lead + (count + reach > source ? count + reach : source)) / kTileValues | 1) * kTileValues;
  }

  static constexpr int64_t kRowPositions = 100;  ///< rows so short that the three of a tap's kernel column stay in L1
  static int64_t round_up(int64_t n) { return divide_up(n, kTileValues) * kTileValues; }

  int64_t pitch, groups, group, count, lead;
  int64_t row;  ///< values of one channel of x
};

/// The value vectors of positions [begin, begin + 32): `zeros` beside the image and below.
void find_positions(int64_t begin, int64_t images, int64_t pitch, int64_t height, int64_t width, int64_t channels,
                    const uint16_t* values, const uint16_t* zeros, const uint16_t** to) {
  int64_t image = begin % images, x = begin / images % pitch, y = begin / images / pitch;
  for (int i = 0; i < kTileValues; ++i) {
    to[i] = x < width && y < height ? values + ((image * height + y) * width + x) * channels : zeros;
    if (++image < images) continue;
    image = 0;
    if (++x < pitch) continue;
    x = 0;
    ++y;
  }
}

MF_INLINE void zip(Pair* to, const uint16_t* a, const uint16_t* b) {
  for (int c = 0; c < kTileRows; ++c) to[c] = static_cast<Pair>(a[c] | uint32_t{b[c]} << 16);
}

/// x to [channel][position].
void pack_source(const Outer& p, const Positions& at, int64_t images, const uint16_t* x, const uint16_t* zeros,
                 uint16_t* to) {
  const int64_t filled = Positions::round_up(p.height * at.pitch * images);
  for (int64_t c = 0; c < p.ci; ++c) {
    uint16_t* row = to + c * at.row;
    memset(row, 0, at.lead * sizeof(uint16_t));
    if (at.lead + filled < at.row) memset(row + at.lead + filled, 0, (at.row - at.lead - filled) * sizeof(uint16_t));
  }
  const uint16_t* from[kTileValues];
  for (int64_t q = 0; q < filled; q += kTileValues) {
    find_positions(q, images, at.pitch, p.height, p.width, p.ci, x, zeros, from);
    for (int64_t c = 0; c < p.ci; c += kTileRows) {
      alignas(64) Pair pairs[kTilePairs * kTileRows];
      for (int i = 0; i < kTilePairs; ++i) zip(pairs + i * kTileRows, from[2 * i] + c, from[2 * i + 1] + c);
      transpose_square(pairs, kTileRows, reinterpret_cast<Pair*>(to + c * at.row + at.lead + q), at.row / 2);
    }
  }
}

/// Channels [begin, end) of g to [tile of 16 channels][pair of positions][16].
void pack_grad(const Outer& p, const Positions& at, int64_t images, int64_t begin, int64_t end, const uint16_t* g,
               const uint16_t* zeros, Pair* to) {
  const uint16_t* from[kTileValues];
  for (int64_t q = 0; q < at.count; q += kTileValues) {
    find_positions(q, images, at.pitch, p.out_height, p.out_width, p.co, g, zeros, from);
    for (int64_t o = begin; o < end; o += kTileRows) {
      Pair* tile = to + ((o - begin) * at.count / 2) + q / 2 * kTileRows;
      for (int i = 0; i < kTilePairs; ++i) zip(tile + i * kTileRows, from[2 * i] + o, from[2 * i + 1] + o);
    }
  }
}

int64_t outer_scratch(const Outer& p) {
  const Positions at(p);
  return (p.ci * at.row + p.co * at.count + (p.ci > p.co ? p.ci : p.co)) / 2;
}

/// Adds `columns` tiles of `rows` rows.
void add_rows(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < columns * kTileRows; c += kTileRows) {
      float* sum = to + i * to_stride + c;
      (Vec<float>::load(sum) + Vec<float>::load(from + i * from_stride + c)).store(sum);
    }
}

/// Adds one group of images to the gradients of channels out [begin, end), or begins them.
void outer_group(const Outer& p, const Positions& at, int64_t images, int64_t begin, int64_t end,
                 const uint16_t* source, const uint16_t* grad, float* out, bool accumulate) {
  constexpr int64_t kChunk = 8 * kTileValues;  // both operands of a block stay in L1 for all taps
  TileBlock block{};
  block.pairs = 1;
  block.stride = at.row;
  block.step_a = kTileValues;
  block.step_b = kTileValues * kTileRows;
  for (int64_t q = 0; q < at.count; q += kChunk) {
    const int64_t stop = q + kChunk < at.count ? q + kChunk : at.count;
    for (int64_t o = begin; o < end; o += 2 * kTileRows)
      for (int64_t c = 0; c < p.ci; c += 2 * kTileRows) {
        const int64_t rows = c + kTileRows < p.ci ? 2 : 1, columns = o + kTileRows < end ? 2 : 1;
        for (int64_t m = 0; m < rows; ++m) block.sides[0].a[m] = source + (c + m * kTileRows) * at.row + at.lead;
        for (int64_t n = 0; n < columns; ++n) block.sides[0].b[n] = grad + (o - begin + n * kTileRows) * at.count;
        for (int64_t tap = 0; tap < p.kh * p.kw; ++tap) {
          // Only the rows of g under which this tap's source row is inside the image.
          const int64_t dy = tap / p.kw - p.pad_y, dx = tap % p.kw - p.pad_x;
          const int64_t y_end = p.height - dy < p.out_height ? p.height - dy : p.out_height;
          int64_t from = (dy < 0 ? -dy : 0) * at.pitch * images / kTileValues * kTileValues;
          int64_t to = Positions::round_up(y_end * at.pitch * images);
          if (from < q) from = q;
          if (to > stop) to = stop;
          const bool more = accumulate || q > 0;
          if (from >= to && more) continue;
          const Run run{from + (dy * at.pitch + dx) * images, from * kTileRows,
                        from < to ? (to - from) / kTileValues : 0};
          // Adding whole chunks, not continuing their chain, keeps the rounding error of long reductions small.
          alignas(64) float sums[2][kTileRows * 2 * kTileRows];
          float* to_out = out + (tap * p.ci + c) * p.co + o;
          block.out_stride = more ? 2 * kTileRows : p.co;
          for (int64_t m = 0; m < rows; ++m) block.out[m] = more ? sums[m] : to_out + m * kTileRows * p.co;
          pick_tiles(rows, columns)(block, &run, 1);
          if (more) add_rows(sums[0], 2 * kTileRows, rows * kTileRows, columns, to_out, p.co);
        }
      }
  }
}

void outer(const Outer& p, int64_t begin, int64_t end, Pair* scratch) {
  const Positions at(p);
  uint16_t* source = reinterpret_cast<uint16_t*>(scratch);
  uint16_t* grad = source + p.ci * at.row;
  uint16_t* zeros = grad + p.co * at.count;
  memset(zeros, 0, (p.ci > p.co ? p.ci : p.co) * sizeof(uint16_t));
  Tiles tiles;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t task = unit / p.parts, part = unit % p.parts, columns = p.co / kTileRows;
    const int64_t o = part * columns / p.parts * kTileRows, o_end = (part + 1) * columns / p.parts * kTileRows;
    float* out = static_cast<float*>(p.out) + task * p.kh * p.kw * p.ci * p.co;
    for (int pair = 0; pair < p.pairs; ++pair)
      for (int64_t n = 0; n < p.images; n += at.group) {
        const int64_t images = n + at.group < p.images ? at.group : p.images - n, image = task * p.images + n;
        const uint16_t* x = static_cast<const uint16_t*>(p.a[pair]) + image * p.height * p.width * p.ci;
        const uint16_t* g = static_cast<const uint16_t*>(p.b[pair]) + image * p.out_height * p.out_width * p.co;
        pack_source(p, at, images, x, zeros, source);
        pack_grad(p, at, images, o, o_end, g, zeros, reinterpret_cast<Pair*>(grad));
        publish();
        tiles.shape(kTileRows, kTilePairs);
        outer_group(p, at, images, o, o_end, source, grad, out, pair > 0 || n > 0);
      }
  }
}

}  // namespace
}  // namespace mf::amxbf16::conv

namespace mf::amxbf16 {

// Kernels of up to 9 taps, as tested on such a machine.
bool conv_serves(const mf::conv::Gather& p) {
  return p.taps <= 9 && p.channels_out % conv::kTileRows == 0 &&
         conv::pairs_of_product(p.channels_in) >= conv::kTilePairs / 2;
}

bool conv_serves(const mf::conv::Outer& p) {
  return p.kh * p.kw <= 9 && p.stride == 1 && p.ci % conv::kTileRows == 0 && p.co % conv::kTileRows == 0;
}

mf::conv::Kernels<mf::conv::Pair> conv_tiles() {
  return {conv::gather_scratch, conv::gather, conv::outer_scratch, conv::outer, conv::kTileRows, 0};
}

double bf16_peak(int64_t iterations) {
  conv::Tiles tiles;
  tiles.shape(conv::kTileRows, conv::kTilePairs);
  alignas(64) float out[2 * conv::kTileRows * conv::kTileRows] = {};
  alignas(64) const uint16_t zeros[conv::kTileRows * conv::kTileValues] = {};
  _tile_loadd(4, zeros, 64);
  _tile_loadd(5, zeros, 64);
  _tile_loadd(6, zeros, 64);
  _tile_loadd(7, zeros, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < iterations; ++k) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, 128);
  return 4.0 * 2 * conv::kTileRows * conv::kTileRows * conv::kTileValues * static_cast<double>(iterations);
}

}  // namespace mf::amxbf16
