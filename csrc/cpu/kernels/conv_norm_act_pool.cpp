#include "conv_norm_act_pool.h"

#include "tiles.h"

namespace mf::MF_ISA {
namespace {

// Registers of channels that are worked on together: four pixels of a window times these are accumulators.
constexpr int kMost = MF_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kTaps = 9;  // of the largest kernel

// Where the values of a patch lie from its first, and the four patches of a window from the window's.
struct Places {
  explicit MF_INLINE Places(const FirstLayer& s) {
    for (int64_t k = 0; k < 4; ++k) {
      patch[k] = ((k / 2) * s.width + k % 2) * s.ci;
    }
  }
  int64_t patch[4];
};

// body(register number, Whole or Part) for R registers, of which `left` channels exist.
template <typename T, int R, typename Body>
MF_INLINE void each(int64_t left, const Body& body) {
  constexpr int size = Vec<T>::size;
  for (int r = 0; r < R; ++r) {
    if (left >= (r + 1) * size) {
      body(r, Whole<T>{});
    } else {
      body(r, Part<T>{static_cast<int>(left - r * size)});
    }
  }
}

// Calls body(std::integral_constant<int, R>, first channel) for blocks of R registers that cover all channels.
template <typename T, int Most, typename Body>
MF_INLINE void each_block(int64_t channels, const Body& body) {
  constexpr int64_t size = Vec<T>::size;
  int64_t c = 0;
  for (; channels - c > (Most - 1) * size; c += Most * size) {
    body(std::integral_constant<int, Most>{}, c);
  }
  if constexpr (Most > 1) {
    const int64_t registers = (channels - c + size - 1) / size;
    if constexpr (Most > 3) {
      if (registers == 3) return body(std::integral_constant<int, 3>{}, c);
    }
    if constexpr (Most > 2) {
      if (registers == 2) return body(std::integral_constant<int, 2>{}, c);
    }
    if (registers == 1) body(std::integral_constant<int, 1>{}, c);
  }
}

template <typename T>
MF_INLINE const T* window(const FirstLayer& s, const T* image, int64_t row, int64_t column) {
  return image + (2 * row * s.width + 2 * column) * s.ci;
}

// z[k][r] = shift + w . patch of the window's pixel k.
template <typename T, int R>
MF_INLINE void products(const FirstLayer& s, const Places& places, const T* at, const T* w, const T* shift,
                        Vec<T> (&z)[4][R]) {
  using V = Vec<T>;
  for (int r = 0; r < R; ++r) {
    for (int k = 0; k < 4; ++k) {
      z[k][r] = V::load(shift + r * V::size);
    }
  }
  for (int64_t i = 0; i < s.kh; ++i) {
    const T* line = at + i * s.width * s.ci;
    for (int64_t j = 0; j < s.kw * s.ci; ++j, w += s.stride) {
      V x[4];
      for (int k = 0; k < 4; ++k) {
        x[k] = V::broadcast(line[places.patch[k] + j]);
      }
      for (int r = 0; r < R; ++r) {
        const V weight = V::load(w + r * V::size);
        for (int k = 0; k < 4; ++k) {
          z[k][r] = fma(weight, x[k], z[k][r]);
        }
      }
    }
  }
}

// body(window's first value, place of the result) for all windows.
template <typename T, typename Body>
MF_INLINE void each_window(const FirstLayer& s, const T* image, const Body& body) {
  for (int64_t row = 0; row < s.rows; ++row) {
    for (int64_t column = 0; column < s.columns; ++column) {
      body(window(s, image, row, column), (row * s.columns + column) * s.co);
    }
  }
}

// body(z[4][R], register number, Whole or Part, place of the result) for the products of all windows.
template <typename T, int R, typename Body>
MF_INLINE void each_product(const FirstLayer& s, const T* image, const T* w, const T* shift, int64_t left,
                            const Body& body) {
  const Places places(s);
  each_window(s, image, [&](const T* at, int64_t to) {
    Vec<T> z[4][R];
    products<T, R>(s, places, at, w, shift, z);
    each<T, R>(left, [&](int r, auto tile) { body(z, r, tile, to + r * Vec<T>::size); });
  });
}

template <typename T, int R>
void forward(const FirstLayer& s, const T* image, const T* w, const T* shift, T slope, T* y, uint8_t* index,
             int64_t left) {
  using V = Vec<T>;
  const V leak = V::broadcast(slope);
  each_product<T, R>(s, image, w, shift, left, [&](const auto& z, int r, auto tile, int64_t i) {
    V best = z[0][r];
    Lanes<T> position{};
    for (int k = 1; k < 4; ++k) {
      const Lanes<T> above = z[k][r].v > best.v;
      best = choose<T>(above, z[k][r], best);
      position = above ? Lanes<T>{} + k : position;
    }
    tile.store(where_positive(best, best, best * leak), y + i);
    tile.store_index(position, index + i);
  });
}

template <typename T, int R>
void tangent(const FirstLayer& s, const T* image, const T* w, const T* shift, const T* y, const uint8_t* index, T slope,
             T* uy, int64_t left) {
  using V = Vec<T>;
  const V leak = V::broadcast(slope);
  each_product<T, R>(s, image, w, shift, left, [&](const auto& z, int r, auto tile, int64_t i) {
    const Lanes<T> position = tile.load_index(index + i);
    V picked = z[0][r];
    for (int k = 1; k < 4; ++k) {
      picked = choose<T>(position == Lanes<T>{} + k, z[k][r], picked);
    }
    tile.store(where_positive(tile.load(y + i), picked, picked * leak), uy + i);
  });
}

// Sums of one input channel's taps, and of g where `total` is wanted; a row of windows at a time.
template <typename T, int R>
void sums(const FirstLayer& s, const T* image, const T* gy, const T* y, const uint8_t* index, T slope, int64_t channel,
          T* out, T* total, int64_t left) {
  using V = Vec<T>;
  const Places places(s);
  const V leak = V::broadcast(slope);
  const int taps = static_cast<int>(s.kh * s.kw);
  int64_t tap[kTaps];
  for (int q = 0; q < taps; ++q) {
    tap[q] = (q / s.kw * s.width + q % s.kw) * s.ci + channel;
  }
  for (int64_t row = 0; row < s.rows; ++row) {
    V sum[kTaps][R], all[R];
    for (int r = 0; r < R; ++r) {
      all[r] = V::zero();
      for (int q = 0; q < kTaps; ++q) {
        sum[q][r] = V::zero();
      }
    }
    for (int64_t column = 0; column < s.columns; ++column) {
      const T* at = window(s, image, row, column);
      const int64_t from = (row * s.columns + column) * s.co;
      V g[4][R];
      each<T, R>(left, [&](int r, auto tile) {
        const int64_t i = from + r * V::size;
        const V whole = tile.load(gy + i);
        const V gated = where_positive(tile.load(y + i), whole, whole * leak);
        const Lanes<T> position = tile.load_index(index + i);
        all[r] += gated;
        for (int k = 0; k < 4; ++k) {
          g[k][r] = choose<T>(position == Lanes<T>{} + k, gated, V::zero());
        }
      });
      const auto add = [&](int q) {
        for (int k = 0; k < 4; ++k) {
          const V x = V::broadcast(at[places.patch[k] + tap[q]]);
          for (int r = 0; r < R; ++r) {
            sum[q][r] = fma(g[k][r], x, sum[q][r]);
          }
        }
      };
      if (taps == kTaps) {
        for (int q = 0; q < kTaps; ++q) {
          add(q);
        }
      } else {
        for (int q = 0; q < taps; ++q) {
          add(q);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      const auto put = [&](V value, T* to) {
        to += r * V::size;
        (row == 0 ? value : value + V::load(to)).store(to);
      };
      for (int q = 0; q < taps; ++q) {
        put(sum[q][r], out + (q * s.ci + channel) * s.stride);
      }
      if (total != nullptr) {
        put(all[r], total);
      }
    }
  }
}

}  // namespace

int64_t patch_panel(const FirstLayer& s) {
  constexpr int64_t size = Vec<double>::size;
  const int64_t values = s.values();
  return values * ((s.out_width() + size - 1) / size * size) + values * (values + 3) / 2 * size;
}

template <typename T>
void patch_moments(const FirstLayer& s, const T* image, double* sums, double* products, double* panel) {
  using V = Vec<double>;
  constexpr int kBlock = 4;
  const int64_t values = s.values(), width = s.out_width(), stride = (width + V::size - 1) / V::size * V::size;
  const int64_t run = s.kw * s.ci;
  // A register for each sum, whose elements are added up at the end: of a row of a small image that would take longer
  // than the products. First those of the values, then those of the products, in their order.
  double* const found = panel + values * stride;
  for (int64_t i = 0; i < values * (values + 3) / 2 * V::size; ++i) found[i] = 0;
  for (int64_t row = 0; row < s.out_height(); ++row) {
    // A row of the kernel meets the row of the image that the next one has met.
    const int64_t known = row == 0 ? 0 : values - run;
    std::memmove(panel, panel + run * stride, known * stride * sizeof(double));
    for (int64_t q = 0; q < values; ++q) {
      const T* from = image + (row + q / run) * s.width * s.ci + q % run;
      if (q >= known) {
        for (int64_t x = 0; x < width; ++x) panel[q * stride + x] = static_cast<double>(from[x * s.ci]);
        for (int64_t x = width; x < stride; ++x) panel[q * stride + x] = 0;
      }
      V total = V::load(found + q * V::size);
      for (int64_t x = 0; x < stride; x += V::size) total += V::load(panel + q * stride + x);
      total.store(found + q * V::size);
    }
    double* to = found + values * V::size;
    for (int64_t p = 0; p < values; ++p) {
      const double* a = panel + p * stride;
      int64_t q = p;
      for (; q + kBlock <= values; q += kBlock, to += kBlock * V::size) {
        V sum[kBlock];
        for (int b = 0; b < kBlock; ++b) sum[b] = V::load(to + b * V::size);
        for (int64_t x = 0; x < stride; x += V::size) {
          const V left = V::load(a + x);
          for (int b = 0; b < kBlock; ++b) sum[b] = fma(left, V::load(panel + (q + b) * stride + x), sum[b]);
        }
        for (int b = 0; b < kBlock; ++b) sum[b].store(to + b * V::size);
      }
      for (; q < values; ++q, to += V::size) {
        V sum = V::load(to);
        for (int64_t x = 0; x < stride; x += V::size) {
          sum = fma(V::load(a + x), V::load(panel + q * stride + x), sum);
        }
        sum.store(to);
      }
    }
  }
  const double* from = found;
  for (int64_t q = 0; q < values; ++q, from += V::size) sums[q] += V::load(from).sum();
  for (int64_t p = 0; p < values; ++p) {
    for (int64_t q = p; q < values; ++q, from += V::size) products[p * values + q] += V::load(from).sum();
  }
}

template <typename T>
void first_layer_forward(const FirstLayer& s, const T* image, const T* w, const T* shift, T slope, T* y,
                         uint8_t* index) {
  each_block<T, kMost>(s.co, [&](auto registers, int64_t c) {
    forward<T, registers.value>(s, image, w + c, shift + c, slope, y + c, index + c, s.co - c);
  });
}

template <typename T>
void first_layer_tangent(const FirstLayer& s, const T* image, const T* w, const T* shift, const T* y,
                         const uint8_t* index, T slope, T* uy) {
  each_block<T, kMost>(s.co, [&](auto registers, int64_t c) {
    tangent<T, registers.value>(s, image, w + c, shift + c, y + c, index + c, slope, uy + c, s.co - c);
  });
}

template <typename T>
void first_layer_sums(const FirstLayer& s, const T* image, const T* gy, const T* y, const uint8_t* index, T slope,
                      T* out) {
  each_block<T, kMost / 2>(s.co, [&](auto registers, int64_t c) {
    for (int64_t channel = 0; channel < s.ci; ++channel) {
      T* total = channel == 0 ? out + s.values() * s.stride + c : nullptr;
      sums<T, registers.value>(s, image, gy + c, y + c, index + c, slope, channel, out + c, total, s.co - c);
    }
  });
}

#define MF_INSTANTIATE(T)                                                                                            \
  template void patch_moments<T>(const FirstLayer&, const T*, double*, double*, double*);                            \
  template void first_layer_forward<T>(const FirstLayer&, const T*, const T*, const T*, T, T*, uint8_t*);            \
  template void first_layer_sums<T>(const FirstLayer&, const T*, const T*, const T*, const uint8_t*, T, T*);         \
  template void first_layer_tangent<T>(const FirstLayer&, const T*, const T*, const T*, const T*, const uint8_t*, T, \
                                       T*);
MF_INSTANTIATE(float)
MF_INSTANTIATE(double)

}  // namespace mf::MF_ISA
