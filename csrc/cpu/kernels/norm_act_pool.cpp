#include "norm_act_pool.h"

#include "tiles.h"

namespace mf::MF_ISA {
namespace {

// Neighbouring channels that are taken pixel by pixel, so that memory is read in order; their sums stay in the first
// cache.
constexpr int kRegisters = 16;

// body(register number, first channel, Whole or Part) over channels begin to end.
template <typename T, typename Body>
MF_INLINE void each_register(int64_t begin, int64_t end, const Body& body) {
  constexpr int64_t size = Vec<T>::size;
  int j = 0;
  int64_t c = begin;
  for (; c + size <= end; c += size) {
    body(j++, c, Whole<T>{});
  }
  if (c < end) {
    body(j, c, Part<T>{static_cast<int>(end - c)});
  }
}

// body(first channel, end) over tiles of channels.
template <typename T, typename Body>
MF_INLINE void each_tile(int64_t channels, const Body& body) {
  constexpr int64_t size = kRegisters * Vec<T>::size;
  for (int64_t c = 0; c < channels; c += size) {
    body(c, c + size < channels ? c + size : channels);
  }
}

// Sums over a run of pixels, or a row of windows, which are then added up: an error like that of a pairwise sum.
template <typename T, int N>
struct Sums {
  Vec<T> v[N][kRegisters];

  MF_INLINE void clear() {
    for (int i = 0; i < N; ++i) {
      for (int j = 0; j < kRegisters; ++j) {
        v[i][j] = Vec<T>::zero();
      }
    }
  }
  // rows[i] = or += the sums of these channels
  MF_INLINE void put(T* const (&rows)[N], int64_t begin, int64_t end, bool first) const {
    each_register<T>(begin, end, [&](int j, int64_t c, auto tile) {
      for (int i = 0; i < N; ++i) {
        T* at = rows[i] + c;
        tile.store(first ? v[i][j] : v[i][j] + tile.load(at), at);
      }
    });
  }
};

constexpr int64_t kBlock = 32;
constexpr int64_t kRun = 8;  // pixels whose sums stay in registers

// Fills rows with sums over all pixels: body(sums, channel, tile, place of the element).
template <typename T, int N, typename Body>
MF_INLINE void sum_pixels(const PoolShape& s, T* const (&rows)[N], const Body& body) {
  const int64_t pixels = s.height * s.width;
  each_tile<T>(s.channels, [&](int64_t first, int64_t last) {
    Sums<T, N> sums;
    for (int64_t begin = 0; begin < pixels; begin += kBlock) {
      const int64_t end = begin + kBlock < pixels ? begin + kBlock : pixels;
      sums.clear();
      for (int64_t run = begin; run < end; run += kRun) {
        const int64_t stop = run + kRun < end ? run + kRun : end;
        each_register<T>(first, last, [&](int j, int64_t c, auto tile) {
          Vec<T> run_sums[N];
          for (int i = 0; i < N; ++i) {
            run_sums[i] = sums.v[i][j];
          }
          for (int64_t pixel = run; pixel < stop; ++pixel) {
            body(run_sums, c, tile, pixel * s.channels + c);
          }
          for (int i = 0; i < N; ++i) {
            sums.v[i][j] = run_sums[i];
          }
        });
      }
      sums.put(rows, first, last, begin == 0);
    }
  });
}

template <typename T, typename Tile>
struct Gate {
  Vec<T> mean, scale, beta, slope;

  MF_INLINE Gate(const Tile& tile, const NormRows<T>& n, int64_t c)
      : mean(tile.load(n.mean + c)),
        scale(tile.load(n.scale + c)),
        beta(tile.load(n.beta + c)),
        slope(Vec<T>::broadcast(n.slope)) {}
  // Before the leaky ReLU, of a centred z.
  MF_INLINE Vec<T> value(Vec<T> centred) const { return fma(centred, scale, beta); }
  // g through the leaky ReLU.
  MF_INLINE Vec<T> pass(Vec<T> centred, Vec<T> g) const { return where_positive(value(centred), g, g * slope); }
};

// Where the elements of a window lie, from its first.
template <bool Pool>
struct Window {
  static constexpr int size = Pool ? 4 : 1;
  static constexpr int64_t stride = Pool ? 2 : 1;
  int64_t offset[4];

  explicit Window(const PoolShape& s)
      : offset{0, s.channels, s.width * s.channels, s.width * s.channels + s.channels} {}

  template <typename T, typename Tile>
  MF_INLINE Lanes<T> index(const Tile& tile, const uint8_t* p, int64_t pooled) const {
    if constexpr (Pool) {
      return tile.load_index(p + pooled);
    } else {
      return Lanes<T>{};
    }
  }
  template <typename T, typename Tile>
  MF_INLINE Vec<T> pick(const Tile& tile, const T* p, Lanes<T> index) const {
    Vec<T> v = tile.load(p);
    for (int k = 1; k < size; ++k) {
      v = choose<T>(index == Lanes<T>{} + k, tile.load(p + offset[k]), v);
    }
    return v;
  }
};

// body(register number, channel, tile, place of the window in the dense grid, in the pooled one) for one row of
// windows.
template <typename T, bool Pool, typename Body>
MF_INLINE void each_window(const PoolShape& s, int64_t row, int64_t first, int64_t last, const Body& body) {
  constexpr int64_t stride = Window<Pool>::stride;
  for (int64_t column = 0; column < s.columns; ++column) {
    const int64_t dense = (row * stride * s.width + column * stride) * s.channels;
    const int64_t pooled = (row * s.columns + column) * s.channels;
    each_register<T>(first, last, [&](int j, int64_t c, auto tile) { body(j, c, tile, dense + c, pooled + c); });
  }
}

template <typename T, bool Pool, typename Body>
MF_INLINE void each_window(const PoolShape& s, const Body& body) {
  for (int64_t row = 0; row < s.rows; ++row) {
    each_window<T, Pool>(s, row, 0, s.channels, body);
  }
}

// Fills rows with sums over all windows: body(sums, register number, channel, tile, dense place, pooled place).
template <typename T, bool Pool, int N, typename Body>
MF_INLINE void sum_windows(const PoolShape& s, T* const (&rows)[N], const Body& body) {
  each_tile<T>(s.channels, [&](int64_t first, int64_t last) {
    Sums<T, N> sums;
    for (int64_t row = 0; row < s.rows; ++row) {
      sums.clear();
      each_window<T, Pool>(s, row, first, last, [&](int j, int64_t c, auto tile, int64_t dense, int64_t pooled) {
        body(sums, j, c, tile, dense, pooled);
      });
      sums.put(rows, first, last, row == 0);
    }
  });
}

// body(channel, tile, place) for every element that no window holds.
template <typename T, bool Pool, typename Body>
MF_INLINE void each_left_over(const PoolShape& s, const Body& body) {
  if constexpr (Pool) {
    for (int64_t row = 0; row < s.height; ++row) {
      for (int64_t column = row < 2 * s.rows ? 2 * s.columns : 0; column < s.width; ++column) {
        each_register<T>(0, s.channels,
                         [&](int, int64_t c, auto tile) { body(c, tile, (row * s.width + column) * s.channels + c); });
      }
    }
  }
}

template <typename T, bool Pool>
void forward(const PoolShape& s, const NormRows<T>& n, const T* z, T* y, uint8_t* index) {
  using V = Vec<T>;
  const Window<Pool> window(s);
  each_window<T, Pool>(s, [&](int, int64_t c, auto tile, int64_t dense, int64_t pooled) {
    const Gate<T, decltype(tile)> gate(tile, n, c);
    const auto after = [&](int k) {
      const V a = gate.value(tile.load(z + dense + window.offset[k]) - gate.mean);
      return where_positive(a, a, a * gate.slope);
    };
    V best = after(0);
    Lanes<T> at{};
    for (int k = 1; k < window.size; ++k) {
      const V next = after(k);
      const Lanes<T> above = next.v > best.v;
      best = choose<T>(above, next, best);
      at = above ? Lanes<T>{} + k : at;
    }
    tile.store(best, y + pooled);
    if constexpr (Pool) {
      tile.store_index(at, index + pooled);
    }
  });
}

template <typename T, bool Pool>
void backward_sums(const PoolShape& s, const NormRows<T>& n, const T* gy, const T* z, const uint8_t* index, T* h,
                   T* hz) {
  using V = Vec<T>;
  const Window<Pool> window(s);
  T* const rows[2] = {h, hz};
  sum_windows<T, Pool>(s, rows, [&](auto& sums, int j, int64_t c, auto tile, int64_t dense, int64_t pooled) {
    const Gate<T, decltype(tile)> gate(tile, n, c);
    const Lanes<T> at = window.template index<T>(tile, index, pooled);
    const V centred = window.pick(tile, z + dense, at) - gate.mean;
    const V g = gate.pass(centred, tile.load(gy + pooled));
    sums.v[0][j] += g;
    sums.v[1][j] = fma(g, centred, sums.v[1][j]);
  });
}

template <typename T, bool Pool>
void backward(const PoolShape& s, const NormRows<T>& n, const T* gy, const T* z, const uint8_t* index, const T* along,
              const T* constant, T* gz) {
  using V = Vec<T>;
  const Window<Pool> window(s);
  each_window<T, Pool>(s, [&](int, int64_t c, auto tile, int64_t dense, int64_t pooled) {
    const Gate<T, decltype(tile)> gate(tile, n, c);
    const V by_z = tile.load(along + c), level = tile.load(constant + c);
    const Lanes<T> at = window.template index<T>(tile, index, pooled);
    const V picked = window.pick(tile, z + dense, at) - gate.mean;
    const V g = gate.pass(picked, tile.load(gy + pooled)) * gate.scale;
    for (int k = 0; k < window.size; ++k) {
      const V share = Pool ? choose<T>(at == Lanes<T>{} + k, g, V::zero()) : g;
      const V centred = tile.load(z + dense + window.offset[k]) - gate.mean;
      tile.store(fma(centred, by_z, level) + share, gz + dense + window.offset[k]);
    }
  });
  each_left_over<T, Pool>(s, [&](int64_t c, auto tile, int64_t i) {
    const V centred = tile.load(z + i) - tile.load(n.mean + c);
    tile.store(fma(centred, tile.load(along + c), tile.load(constant + c)), gz + i);
  });
}

template <typename T, bool Pool>
void tangent(const PoolShape& s, const NormRows<T>& n, const T* u, const T* z, const uint8_t* index, const T* along,
             const T* constant, T* uy) {
  using V = Vec<T>;
  const Window<Pool> window(s);
  each_window<T, Pool>(s, [&](int, int64_t c, auto tile, int64_t dense, int64_t pooled) {
    const Gate<T, decltype(tile)> gate(tile, n, c);
    const Lanes<T> at = window.template index<T>(tile, index, pooled);
    const V centred = window.pick(tile, z + dense, at) - gate.mean;
    const V smooth = fma(centred, tile.load(along + c), tile.load(constant + c));
    const V picked = window.pick(tile, u + dense, at);
    tile.store(gate.pass(centred, fma(picked, gate.scale, smooth)), uy + pooled);
  });
}

template <typename T, bool Pool>
void backward_tangent_sums(const PoolShape& s, const NormRows<T>& n, const T* gy_dot, const T* gy, const T* u,
                           const T* z, const uint8_t* index, T* out) {
  using V = Vec<T>;
  const Window<Pool> window(s);
  T* const rows[5] = {out, out + s.channels, out + 2 * s.channels, out + 3 * s.channels, out + 4 * s.channels};
  sum_windows<T, Pool>(s, rows, [&](auto& sums, int j, int64_t c, auto tile, int64_t dense, int64_t pooled) {
    const Gate<T, decltype(tile)> gate(tile, n, c);
    const Lanes<T> at = window.template index<T>(tile, index, pooled);
    const V centred = window.pick(tile, z + dense, at) - gate.mean;
    const V g = gate.pass(centred, tile.load(gy + pooled));
    const V g_dot = gate.pass(centred, tile.load(gy_dot + pooled));
    sums.v[0][j] += g;
    sums.v[1][j] = fma(g, centred, sums.v[1][j]);
    sums.v[2][j] = fma(g, window.pick(tile, u + dense, at), sums.v[2][j]);
    sums.v[3][j] += g_dot;
    sums.v[4][j] = fma(g_dot, centred, sums.v[4][j]);
  });
}

template <typename T, bool Pool>
void backward_tangent(const PoolShape& s, const NormRows<T>& n, const T* gy_dot, const T* gy, const T* u, const T* z,
                      const uint8_t* index, const T* rows, T* gz_dot) {
  using V = Vec<T>;
  const Window<Pool> window(s);
  const T *along_h = rows, *along_u = rows + s.channels, *along = rows + 2 * s.channels,
          *constant = rows + 3 * s.channels;
  each_window<T, Pool>(s, [&](int, int64_t c, auto tile, int64_t dense, int64_t pooled) {
    const Gate<T, decltype(tile)> gate(tile, n, c);
    const V by_u = tile.load(along_u + c), by_z = tile.load(along + c), level = tile.load(constant + c);
    const Lanes<T> at = window.template index<T>(tile, index, pooled);
    const V picked = window.pick(tile, z + dense, at) - gate.mean;
    const V h = tile.load(gy + pooled) * tile.load(along_h + c);
    const V g = gate.pass(picked, fma(tile.load(gy_dot + pooled), gate.scale, h));
    for (int k = 0; k < window.size; ++k) {
      const int64_t i = dense + window.offset[k];
      const V share = Pool ? choose<T>(at == Lanes<T>{} + k, g, V::zero()) : g;
      const V smooth = fma(tile.load(u + i), by_u, fma(tile.load(z + i) - gate.mean, by_z, level));
      tile.store(smooth + share, gz_dot + i);
    }
  });
  each_left_over<T, Pool>(s, [&](int64_t c, auto tile, int64_t i) {
    const V centred = tile.load(z + i) - tile.load(n.mean + c);
    const V smooth = fma(centred, tile.load(along + c), tile.load(constant + c));
    tile.store(fma(tile.load(u + i), tile.load(along_u + c), smooth), gz_dot + i);
  });
}

}  // namespace

template <typename T>
void nap_moments(const PoolShape& s, const T* z, T* mean, T* rest, T* squares) {
  using V = Vec<T>;
  T* const means[1] = {mean};
  sum_pixels<T>(s, means, [&](auto& sums, int64_t, auto tile, int64_t i) { sums[0] += tile.load(z + i); });
  for (int64_t c = 0; c < s.channels; ++c) {
    mean[c] /= static_cast<T>(s.height * s.width);
  }
  T* const deviations[2] = {rest, squares};
  sum_pixels<T>(s, deviations, [&](auto& sums, int64_t c, auto tile, int64_t i) {
    const V d = tile.load(z + i) - tile.load(mean + c);
    sums[0] += d;
    sums[1] = fma(d, d, sums[1]);
  });
}

template <typename T>
void nap_tangent_sums(const PoolShape& s, const NormRows<T>& n, const T* u, const T* z, T* us, T* uz) {
  using V = Vec<T>;
  T* const rows[2] = {us, uz};
  sum_pixels<T>(s, rows, [&](auto& sums, int64_t c, auto tile, int64_t i) {
    const V along = tile.load(u + i);
    sums[0] += along;
    sums[1] = fma(along, tile.load(z + i) - tile.load(n.mean + c), sums[1]);
  });
}

// The public form of a kernel that comes with and without the pool.
#define MF_POOLED(name, inner, parameters, arguments)              \
  template <typename T>                                            \
  void name parameters {                                           \
    s.pool ? inner<T, true> arguments : inner<T, false> arguments; \
  }
MF_POOLED(nap_forward, forward, (const PoolShape& s, const NormRows<T>& n, const T* z, T* y, uint8_t* index),
          (s, n, z, y, index))
MF_POOLED(nap_backward_sums, backward_sums,
          (const PoolShape& s, const NormRows<T>& n, const T* gy, const T* z, const uint8_t* index, T* h, T* hz),
          (s, n, gy, z, index, h, hz))
MF_POOLED(nap_backward, backward,
          (const PoolShape& s, const NormRows<T>& n, const T* gy, const T* z, const uint8_t* index, const T* along,
           const T* constant, T* gz),
          (s, n, gy, z, index, along, constant, gz))
MF_POOLED(nap_tangent, tangent,
          (const PoolShape& s, const NormRows<T>& n, const T* u, const T* z, const uint8_t* index, const T* along,
           const T* constant, T* uy),
          (s, n, u, z, index, along, constant, uy))
MF_POOLED(nap_backward_tangent_sums, backward_tangent_sums,
          (const PoolShape& s, const NormRows<T>& n, const T* gy_dot, const T* gy, const T* u, const T* z,
           const uint8_t* index, T* sums),
          (s, n, gy_dot, gy, u, z, index, sums))
MF_POOLED(nap_backward_tangent, backward_tangent,
          (const PoolShape& s, const NormRows<T>& n, const T* gy_dot, const T* gy, const T* u, const T* z,
           const uint8_t* index, const T* rows, T* gz_dot),
          (s, n, gy_dot, gy, u, z, index, rows, gz_dot))

#define MF_INSTANTIATE(T)                                                                                             \
  template void nap_moments<T>(const PoolShape&, const T*, T*, T*, T*);                                               \
  template void nap_forward<T>(const PoolShape&, const NormRows<T>&, const T*, T*, uint8_t*);                         \
  template void nap_backward_sums<T>(const PoolShape&, const NormRows<T>&, const T*, const T*, const uint8_t*, T*,    \
                                     T*);                                                                             \
  template void nap_backward<T>(const PoolShape&, const NormRows<T>&, const T*, const T*, const uint8_t*, const T*,   \
                                const T*, T*);                                                                        \
  template void nap_tangent_sums<T>(const PoolShape&, const NormRows<T>&, const T*, const T*, T*, T*);                \
  template void nap_tangent<T>(const PoolShape&, const NormRows<T>&, const T*, const T*, const uint8_t*, const T*,    \
                               const T*, T*);                                                                         \
  template void nap_backward_tangent_sums<T>(const PoolShape&, const NormRows<T>&, const T*, const T*, const T*,      \
                                             const T*, const uint8_t*, T*);                                           \
  template void nap_backward_tangent<T>(const PoolShape&, const NormRows<T>&, const T*, const T*, const T*, const T*, \
                                        const uint8_t*, const T*, T*);
MF_INSTANTIATE(float)
MF_INSTANTIATE(double)

}  // namespace mf::MF_ISA
