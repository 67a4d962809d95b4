// Blocks of AMX tiles: up to 2 x 2 accumulators, every product of a row tile with a column tile.
//
// A tile product takes max(rows, pairs) cycles, whichever of its sides are filled. It sums its pairs first, even and
// odd ones apart, and adds one number to the float32 accumulator, so chains of roundings are short; denormals are
// zeros.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mf::amxbf16::conv {

constexpr int kTileRows = 16;    ///< of a tile, and float32 columns of an accumulator
constexpr int kTilePairs = 16;   ///< bfloat16 pairs of a tile's row
constexpr int kTileValues = 32;  ///< the same in values

/// The intrinsics of some compilers name neither the memory they read nor its order: keeps earlier stores before them.
inline void publish() { __asm__ volatile("" ::: "memory"); }

/// Shapes of all tiles of this thread, until destroyed: accumulators 0..3, row tiles 4 and 5, column tiles 6 and 7.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() {
    if (rows_ != 0) _tile_release();
  }

  /// `rows` of accumulators and row tiles, `pairs` reduced by a product.
  void shape(int64_t rows, int64_t pairs) {
    if (rows == rows_ && pairs == pairs_) return;
    rows_ = rows;
    pairs_ = pairs;
    alignas(64) Config config{};
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      const bool left = tile == 4 || tile == 5, right = tile > 5;
      config.row_bytes[tile] = static_cast<uint16_t>(left ? pairs * 4 : 64);
      config.rows[tile] = static_cast<uint8_t>(right ? pairs : rows);
    }
    publish();
    _tile_loadconfig(&config);
  }

 private:
  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64);

  int64_t rows_ = 0, pairs_ = 0;
};

/// `len` products, the first at value offset `a` of every row tile and `b` of every column tile.
struct Run {
  int64_t a, b, len;
};

/// Operands of a block, bfloat16 values: row tiles have rows `stride` values apart, column tiles are dense.
struct Side {
  const uint16_t* a[2];
  const uint16_t* b[2];
};

struct TileBlock {
  Side sides[2];  ///< both operand pairs
  int pairs;
  int64_t stride, step_a, step_b;  ///< values between rows of a row tile, and between a run's products
  float* out[2];                   ///< accumulators' rows for each row tile; column tiles are kTileRows apart
  int64_t out_stride;
};

/// out[m][n] = sum over sides and runs of a[m] b[n], for M row tiles and N column tiles.
template <int M, int N>
void multiply_tiles(const TileBlock& block, const Run* runs, int64_t count) {
  const int64_t stride = block.stride * 2, out_stride = block.out_stride * 4;
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  if constexpr (M > 1) _tile_zero(2);
  if constexpr (M > 1 && N > 1) _tile_zero(3);
  for (int pair = 0; pair < block.pairs; ++pair)
    for (int64_t r = 0; r < count; ++r) {
      const Side& side = block.sides[pair];
      const uint16_t *a0 = side.a[0] + runs[r].a, *b0 = side.b[0] + runs[r].b;
      const uint16_t* a1 = M > 1 ? side.a[1] + runs[r].a : nullptr;
      const uint16_t* b1 = N > 1 ? side.b[1] + runs[r].b : nullptr;
      for (int64_t k = 0; k < runs[r].len; ++k) {
        _tile_loadd(6, b0 + k * block.step_b, 64);
        _tile_loadd(4, a0 + k * block.step_a, stride);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (N > 1) {
          _tile_loadd(7, b1 + k * block.step_b, 64);
          _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (M > 1) {
          _tile_loadd(5, a1 + k * block.step_a, stride);
          _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
  _tile_stored(0, block.out[0], out_stride);
  if constexpr (N > 1) _tile_stored(1, block.out[0] + kTileRows, out_stride);
  if constexpr (M > 1) _tile_stored(2, block.out[1], out_stride);
  if constexpr (M > 1 && N > 1) _tile_stored(3, block.out[1] + kTileRows, out_stride);
}

using MultiplyTiles = void (*)(const TileBlock&, const Run*, int64_t);

inline MultiplyTiles pick_tiles(int64_t row_tiles, int64_t column_tiles) {
  constexpr MultiplyTiles kernels[2][2] = {{multiply_tiles<1, 1>, multiply_tiles<1, 2>},
                                           {multiply_tiles<2, 1>, multiply_tiles<2, 2>}};
  return kernels[row_tiles - 1][column_tiles - 1];
}

}  // namespace mf::amxbf16::conv
