#include "norm_act_pool.h"

#include "vec.h"

namespace mf::MF_ISA {
namespace {

template <typename T>
using Lanes = decltype(typename Vec<T>::Register{} > typename Vec<T>::Register{});

template <typename T>
MF_INLINE Vec<T> choose(Lanes<T> mask, Vec<T> yes, Vec<T> no) {
  return {mask ? yes.v : no.v};
}

// `count` whole registers of neighbouring channels.
template <typename T, int N>
struct Whole {
  using V = Vec<T>;
  static constexpr int count = N;
  typedef uint8_t Bytes __attribute__((vector_size(V::size)));

  MF_INLINE V load(const T* p) const { return V::load(p); }
  MF_INLINE void store(V v, T* p) const { v.store(p); }
  MF_INLINE Lanes<T> load_index(const uint8_t* p) const {
    Bytes bytes;
    __builtin_memcpy(&bytes, p, sizeof(bytes));
    return __builtin_convertvector(bytes, Lanes<T>);
  }
  MF_INLINE void store_index(Lanes<T> index, uint8_t* p) const {
    const Bytes bytes = __builtin_convertvector(index, Bytes);
    __builtin_memcpy(p, &bytes, sizeof(bytes));
  }
};

// The last channels, fewer than a register.
template <typename T>
struct Part {
  using V = Vec<T>;
  static constexpr int count = 1;
  int n;

  MF_INLINE V load(const T* p) const { return V::load(p, n); }
  MF_INLINE void store(V v, T* p) const { v.store(p, n); }
  MF_INLINE Lanes<T> load_index(const uint8_t* p) const {
    Lanes<T> index{};
    for (int i = 0; i < n; ++i) {
      index[i] = p[i];
    }
    return index;
  }
  MF_INLINE void store_index(Lanes<T> index, uint8_t* p) const {
    for (int i = 0; i < n; ++i) {
      p[i] = static_cast<uint8_t>(index[i]);
    }
  }
};

// body(first channel, Whole or Part) over all channels, N registers at a time as long as they last.
template <typename T, int N, typename Body>
MF_INLINE void each_tile(int64_t channels, const Body& body) {
  constexpr int64_t size = Vec<T>::size;
  int64_t c = 0;
  for (; c + N * size <= channels; c += N * size) {
    body(c, Whole<T, N>{});
  }
  for (; c + size <= channels; c += size) {
    body(c, Whole<T, 1>{});
  }
  if (c < channels) {
    body(c, Part<T>{static_cast<int>(channels - c)});
  }
}

// A row of channels, a tile of it in registers.
template <typename T, typename Tile>
struct Row {
  Vec<T> v[Tile::count];

  static MF_INLINE Row load(const Tile& tile, const T* p) {
    Row r;
    for (int j = 0; j < Tile::count; ++j) {
      r.v[j] = tile.load(p + j * Vec<T>::size);
    }
    return r;
  }
  static MF_INLINE Row zero() {
    Row r;
    for (int j = 0; j < Tile::count; ++j) {
      r.v[j] = Vec<T>::zero();
    }
    return r;
  }
  // p = or += this
  MF_INLINE void put(const Tile& tile, T* p, bool first) const {
    for (int j = 0; j < Tile::count; ++j) {
      T* at = p + j * Vec<T>::size;
      tile.store(first ? v[j] : v[j] + tile.load(at), at);
    }
  }
};

// Sums are formed over a block of pixels, or a row of windows, in registers and these are then added up: an error like
// that of a pairwise sum, and the block is still in the first cache when the next tile of channels reads it.
constexpr int64_t kBlock = 32;

// body(tile, first channel, first pixel, last pixel, whether this is the first block)
template <typename T, int N, typename Body>
MF_INLINE void each_block(const PoolShape& s, const Body& body) {
  const int64_t pixels = s.height * s.width;
  for (int64_t begin = 0; begin < pixels; begin += kBlock) {
    const int64_t end = begin + kBlock < pixels ? begin + kBlock : pixels;
    each_tile<T, N>(s.channels, [&](int64_t c, auto tile) { body(tile, c, begin, end, begin == 0); });
  }
}

template <typename T, typename Tile>
struct Gate {
  Row<T, Tile> mean, scale, beta;
  Vec<T> slope;

  MF_INLINE Gate(const Tile& tile, const NormRows<T>& n, int64_t c)
      : mean(Row<T, Tile>::load(tile, n.mean + c)),
        scale(Row<T, Tile>::load(tile, n.scale + c)),
        beta(Row<T, Tile>::load(tile, n.beta + c)),
        slope(Vec<T>::broadcast(n.slope)) {}
  // Before the leaky ReLU, of a centred z.
  MF_INLINE Vec<T> value(int j, Vec<T> centred) const { return fma(centred, scale.v[j], beta.v[j]); }
  // g through the leaky ReLU.
  MF_INLINE Vec<T> pass(int j, Vec<T> centred, Vec<T> g) const {
    return where_positive(value(j, centred), g, g * slope);
  }
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
  MF_INLINE Vec<T> pick(const Tile& tile, const T* p, Lanes<T> index) const {
    Vec<T> v = tile.load(p);
    for (int k = 1; k < size; ++k) {
      v = choose<T>(index == Lanes<T>{} + k, tile.load(p + offset[k]), v);
    }
    return v;
  }
};

// body(tile, c, row, at) for every row of windows; at(column) gives the places of a window in the dense and pooled
// grid.
template <typename T, int N, bool Pool, typename Body>
MF_INLINE void each_row(const PoolShape& s, const Body& body) {
  for (int64_t row = 0; row < s.rows; ++row) {
    each_tile<T, N>(s.channels, [&](int64_t c, auto tile) {
      const int64_t dense = row * Window<Pool>::stride * s.width * s.channels + c;
      const int64_t pooled = row * s.columns * s.channels + c;
      body(tile, c, dense, pooled, row == 0);
    });
  }
}

// body(tile, c, first, last) for the runs of pixels that no window holds.
template <typename T, int N, typename Body>
MF_INLINE void each_left_over(const PoolShape& s, const Body& body) {
  const int64_t even = 2 * s.rows;
  each_tile<T, N>(s.channels, [&](int64_t c, auto tile) {
    if (s.width > 2 * s.columns) {
      for (int64_t row = 0; row < even; ++row) {
        body(tile, c, row * s.width + 2 * s.columns, (row + 1) * s.width);
      }
    }
    body(tile, c, even * s.width, s.height * s.width);
  });
}

template <typename T, bool Pool>
void forward(const PoolShape& s, const NormRows<T>& n, const T* z, T* y, uint8_t* index) {
  using V = Vec<T>;
  const Window<Pool> window(s);
  each_row<T, 2, Pool>(s, [&](auto tile, int64_t c, int64_t dense, int64_t pooled, bool) {
    const Gate<T, decltype(tile)> gate(tile, n, c);
    for (int64_t column = 0; column < s.columns; ++column) {
      const int64_t from = dense + column * window.stride * s.channels, to = pooled + column * s.channels;
      for (int j = 0; j < tile.count; ++j) {
        const T* p = z + from + j * V::size;
        const auto after = [&](int k) {
          const V a = gate.value(j, tile.load(p + window.offset[k]) - gate.mean.v[j]);
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
        tile.store(best, y + to + j * V::size);
        if constexpr (Pool) {
          tile.store_index(at, index + to + j * V::size);
        }
      }
    }
  });
}

template <typename T, bool Pool>
void backward_sums(const PoolShape& s, const NormRows<T>& n, const T* gy, const T* z, const uint8_t* index, T* h,
                   T* hz) {
  using V = Vec<T>;
  const Window<Pool> window(s);
  each_row<T, 2, Pool>(s, [&](auto tile, int64_t c, int64_t dense, int64_t pooled, bool first) {
    using R = Row<T, decltype(tile)>;
    const Gate<T, decltype(tile)> gate(tile, n, c);
    R sum = R::zero(), sum_z = R::zero();
    for (int64_t column = 0; column < s.columns; ++column) {
      const int64_t from = dense + column * window.stride * s.channels, to = pooled + column * s.channels;
      for (int j = 0; j < tile.count; ++j) {
        Lanes<T> at{};
        if constexpr (Pool) {
          at = tile.load_index(index + to + j * V::size);
        }
        const V centred = window.pick(tile, z + from + j * V::size, at) - gate.mean.v[j];
        const V g = gate.pass(j, centred, tile.load(gy + to + j * V::size));
        sum.v[j] += g;
        sum_z.v[j] = fma(g, centred, sum_z.v[j]);
      }
    }
    sum.put(tile, h + c, first);
    sum_z.put(tile, hz + c, first);
  });
}

template <typename T, bool Pool>
void backward(const PoolShape& s, const NormRows<T>& n, const T* gy, const T* z, const uint8_t* index, const T* along,
              const T* constant, T* gz) {
  using V = Vec<T>;
  const Window<Pool> window(s);
  each_row<T, 2, Pool>(s, [&](auto tile, int64_t c, int64_t dense, int64_t pooled, bool) {
    using R = Row<T, decltype(tile)>;
    const Gate<T, decltype(tile)> gate(tile, n, c);
    const R slope = R::load(tile, along + c), level = R::load(tile, constant + c);
    for (int64_t column = 0; column < s.columns; ++column) {
      const int64_t from = dense + column * window.stride * s.channels, to = pooled + column * s.channels;
      for (int j = 0; j < tile.count; ++j) {
        const int64_t place = from + j * V::size;
        Lanes<T> at{};
        if constexpr (Pool) {
          at = tile.load_index(index + to + j * V::size);
        }
        V centred[window.size];
        for (int k = 0; k < window.size; ++k) {
          centred[k] = tile.load(z + place + window.offset[k]) - gate.mean.v[j];
        }
        V picked = centred[0];
        for (int k = 1; k < window.size; ++k) {
          picked = choose<T>(at == Lanes<T>{} + k, centred[k], picked);
        }
        const V g = gate.pass(j, picked, tile.load(gy + to + j * V::size)) * gate.scale.v[j];
        for (int k = 0; k < window.size; ++k) {
          const V share = Pool ? choose<T>(at == Lanes<T>{} + k, g, V::zero()) : g;
          tile.store(fma(centred[k], slope.v[j], level.v[j]) + share, gz + place + window.offset[k]);
        }
      }
    }
  });
  if constexpr (Pool) {
    each_left_over<T, 2>(s, [&](auto tile, int64_t c, int64_t begin, int64_t end) {
      using R = Row<T, decltype(tile)>;
      const R mean = R::load(tile, n.mean + c), slope = R::load(tile, along + c), level = R::load(tile, constant + c);
      for (int64_t place = begin * s.channels + c; place < end * s.channels; place += s.channels) {
        for (int j = 0; j < tile.count; ++j) {
          const int64_t i = place + j * V::size;
          tile.store(fma(tile.load(z + i) - mean.v[j], slope.v[j], level.v[j]), gz + i);
        }
      }
    });
  }
}

template <typename T, bool Pool>
void tangent(const PoolShape& s, const NormRows<T>& n, const T* u, const T* z, const uint8_t* index, const T* along,
             const T* constant, T* uy) {
  using V = Vec<T>;
  const Window<Pool> window(s);
  each_row<T, 2, Pool>(s, [&](auto tile, int64_t c, int64_t dense, int64_t pooled, bool) {
    using R = Row<T, decltype(tile)>;
    const Gate<T, decltype(tile)> gate(tile, n, c);
    const R slope = R::load(tile, along + c), level = R::load(tile, constant + c);
    for (int64_t column = 0; column < s.columns; ++column) {
      const int64_t from = dense + column * window.stride * s.channels, to = pooled + column * s.channels;
      for (int j = 0; j < tile.count; ++j) {
        Lanes<T> at{};
        if constexpr (Pool) {
          at = tile.load_index(index + to + j * V::size);
        }
        const V centred = window.pick(tile, z + from + j * V::size, at) - gate.mean.v[j];
        const V picked = window.pick(tile, u + from + j * V::size, at);
        const V value = fma(picked, gate.scale.v[j], fma(centred, slope.v[j], level.v[j]));
        tile.store(gate.pass(j, centred, value), uy + to + j * V::size);
      }
    }
  });
}

template <typename T, bool Pool>
void backward_tangent_sums(const PoolShape& s, const NormRows<T>& n, const T* gy_dot, const T* gy, const T* u,
                           const T* z, const uint8_t* index, T* sums) {
  using V = Vec<T>;
  const Window<Pool> window(s);
  each_row<T, 2, Pool>(s, [&](auto tile, int64_t c, int64_t dense, int64_t pooled, bool first) {
    using R = Row<T, decltype(tile)>;
    const Gate<T, decltype(tile)> gate(tile, n, c);
    R sum[5] = {R::zero(), R::zero(), R::zero(), R::zero(), R::zero()};
    for (int64_t column = 0; column < s.columns; ++column) {
      const int64_t from = dense + column * window.stride * s.channels, to = pooled + column * s.channels;
      for (int j = 0; j < tile.count; ++j) {
        Lanes<T> at{};
        if constexpr (Pool) {
          at = tile.load_index(index + to + j * V::size);
        }
        const V centred = window.pick(tile, z + from + j * V::size, at) - gate.mean.v[j];
        const V g = gate.pass(j, centred, tile.load(gy + to + j * V::size));
        const V g_dot = gate.pass(j, centred, tile.load(gy_dot + to + j * V::size));
        sum[0].v[j] += g;
        sum[1].v[j] = fma(g, centred, sum[1].v[j]);
        sum[2].v[j] = fma(g, window.pick(tile, u + from + j * V::size, at), sum[2].v[j]);
        sum[3].v[j] += g_dot;
        sum[4].v[j] = fma(g_dot, centred, sum[4].v[j]);
      }
    }
    for (int i = 0; i < 5; ++i) {
      sum[i].put(tile, sums + i * s.channels + c, first);
    }
  });
}

template <typename T, bool Pool>
void backward_tangent(const PoolShape& s, const NormRows<T>& n, const T* gy_dot, const T* gy, const T* u, const T* z,
                      const uint8_t* index, const T* rows, T* gz_dot) {
  using V = Vec<T>;
  const Window<Pool> window(s);
  const T *along_h = rows, *along_u = rows + s.channels, *along = rows + 2 * s.channels,
          *constant = rows + 3 * s.channels;
  each_row<T, 1, Pool>(s, [&](auto tile, int64_t c, int64_t dense, int64_t pooled, bool) {
    const Gate<T, decltype(tile)> gate(tile, n, c);
    const V by_h = tile.load(along_h + c), by_u = tile.load(along_u + c), by_z = tile.load(along + c),
            level = tile.load(constant + c);
    for (int64_t column = 0; column < s.columns; ++column) {
      const int64_t from = dense + column * window.stride * s.channels, to = pooled + column * s.channels;
      Lanes<T> at{};
      if constexpr (Pool) {
        at = tile.load_index(index + to);
      }
      V centred[window.size];
      for (int k = 0; k < window.size; ++k) {
        centred[k] = tile.load(z + from + window.offset[k]) - gate.mean.v[0];
      }
      V picked = centred[0];
      for (int k = 1; k < window.size; ++k) {
        picked = choose<T>(at == Lanes<T>{} + k, centred[k], picked);
      }
      const V g = gate.pass(0, picked, fma(tile.load(gy_dot + to), gate.scale.v[0], tile.load(gy + to) * by_h));
      for (int k = 0; k < window.size; ++k) {
        const V share = Pool ? choose<T>(at == Lanes<T>{} + k, g, V::zero()) : g;
        const V smooth = fma(tile.load(u + from + window.offset[k]), by_u, fma(centred[k], by_z, level));
        tile.store(smooth + share, gz_dot + from + window.offset[k]);
      }
    }
  });
  if constexpr (Pool) {
    each_left_over<T, 1>(s, [&](auto tile, int64_t c, int64_t begin, int64_t end) {
      const V mean = tile.load(n.mean + c), by_u = tile.load(along_u + c), by_z = tile.load(along + c),
              level = tile.load(constant + c);
      for (int64_t i = begin * s.channels + c; i < end * s.channels; i += s.channels) {
        tile.store(fma(tile.load(u + i), by_u, fma(tile.load(z + i) - mean, by_z, level)), gz_dot + i);
      }
    });
  }
}

}  // namespace

template <typename T>
void nap_moments(const PoolShape& s, const T* z, T* mean, T* rest, T* squares) {
  using V = Vec<T>;
  const T elements = static_cast<T>(s.height * s.width);
  each_block<T, 4>(s, [&](auto tile, int64_t c, int64_t begin, int64_t end, bool first) {
    using R = Row<T, decltype(tile)>;
    R sum = R::zero();
    for (int64_t i = begin * s.channels + c; i < end * s.channels; i += s.channels) {
      for (int j = 0; j < tile.count; ++j) {
        sum.v[j] += tile.load(z + i + j * V::size);
      }
    }
    sum.put(tile, mean + c, first);
  });
  for (int64_t c = 0; c < s.channels; ++c) {
    mean[c] /= elements;
  }
  each_block<T, 4>(s, [&](auto tile, int64_t c, int64_t begin, int64_t end, bool first) {
    using R = Row<T, decltype(tile)>;
    const R centre = R::load(tile, mean + c);
    R sum = R::zero(), square = R::zero();
    for (int64_t i = begin * s.channels + c; i < end * s.channels; i += s.channels) {
      for (int j = 0; j < tile.count; ++j) {
        const V d = tile.load(z + i + j * V::size) - centre.v[j];
        sum.v[j] += d;
        square.v[j] = fma(d, d, square.v[j]);
      }
    }
    sum.put(tile, rest + c, first);
    square.put(tile, squares + c, first);
  });
}

template <typename T>
void nap_tangent_sums(const PoolShape& s, const NormRows<T>& n, const T* u, const T* z, T* us, T* uz) {
  using V = Vec<T>;
  each_block<T, 4>(s, [&](auto tile, int64_t c, int64_t begin, int64_t end, bool first) {
    using R = Row<T, decltype(tile)>;
    const R mean = R::load(tile, n.mean + c);
    R sum = R::zero(), sum_z = R::zero();
    for (int64_t i = begin * s.channels + c; i < end * s.channels; i += s.channels) {
      for (int j = 0; j < tile.count; ++j) {
        const V along = tile.load(u + i + j * V::size);
        sum.v[j] += along;
        sum_z.v[j] = fma(along, tile.load(z + i + j * V::size) - mean.v[j], sum_z.v[j]);
      }
    }
    sum.put(tile, us + c, first);
    sum_z.put(tile, uz + c, first);
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
