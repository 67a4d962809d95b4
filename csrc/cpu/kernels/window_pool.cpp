#include "window_pool.h"

#include "tiles.h"

namespace mf::MF_ISA {
namespace {

// The rows and columns of a window that lie in the image.
struct Inside {
  int64_t top, bottom, left, right;
};

// body(tile, place of the window's first pixel in the image, place in the result, what lies in the image) for
// every window; the first pixel itself may lie in the padding.
template <typename T, typename Body>
MF_INLINE void each_window(const Windows& s, const Body& body) {
  constexpr int64_t size = Vec<T>::size;
  for (int64_t row = 0; row < s.rows; ++row) {
    const int64_t y = row * s.step_y - s.pad_y;
    const int64_t top = y < 0 ? -y : 0, bottom = y + s.kh > s.height ? s.height - y : s.kh;
    for (int64_t column = 0; column < s.columns; ++column) {
      const int64_t x = column * s.step_x - s.pad_x;
      const Inside in{top, bottom, x < 0 ? -x : 0, x + s.kw > s.width ? s.width - x : s.kw};
      const int64_t from = (y * s.width + x) * s.channels, to = (row * s.columns + column) * s.channels;
      int64_t c = 0;
      for (; c + size <= s.channels; c += size) {
        body(Whole<T>{}, from + c, to + c, in);
      }
      if (c < s.channels) {
        body(Part<T>{static_cast<int>(s.channels - c)}, from + c, to + c, in);
      }
    }
  }
}

// body(position in the window, offset of the pixel from its first) for what lies in the image.
template <typename Body>
MF_INLINE void each_pixel(const Windows& s, const Inside& in, const Body& body) {
  for (int64_t i = in.top; i < in.bottom; ++i) {
    for (int64_t j = in.left; j < in.right; ++j) {
      body(i * s.kw + j, (i * s.width + j) * s.channels);
    }
  }
}

// gx: the sum over all windows of what share(tile, place in the result) gives their positions.
template <typename T, typename Share>
MF_INLINE void place(const Windows& s, T* gx, const Share& share) {
  const bool whole = s.apart() && s.step_y == s.kh && s.step_x == s.kw && s.pad_y == 0 && s.pad_x == 0 &&
                     s.rows * s.kh == s.height && s.columns * s.kw == s.width;
  if (!whole) {
    std::memset(gx, 0, s.height * s.width * s.channels * sizeof(T));
  }
  const bool add = !s.apart();
  each_window<T>(s, [&](auto tile, int64_t from, int64_t to, const Inside& in) {
    const auto part = share(tile, to);
    each_pixel(s, in, [&](int64_t position, int64_t offset) {
      T* at = gx + from + offset;
      const Vec<T> g = part(position);
      tile.store(add ? tile.load(at) + g : g, at);
    });
  });
}

}  // namespace

template <typename T>
void window_max(const Windows& s, const T* x, T* y, uint8_t* index) {
  using V = Vec<T>;
  each_window<T>(s, [&](auto tile, int64_t from, int64_t to, const Inside& in) {
    const int64_t first = in.top * s.kw + in.left;
    V best = tile.load(x + from + (in.top * s.width + in.left) * s.channels);
    Lanes<T> at = Lanes<T>{} + static_cast<int>(first);
    each_pixel(s, in, [&](int64_t position, int64_t offset) {
      const V next = tile.load(x + from + offset);
      const Lanes<T> better = (next.v > best.v) | ((next.v != next.v) & (best.v == best.v));
      best = choose<T>(better, next, best);
      at = better ? Lanes<T>{} + static_cast<int>(position) : at;
    });
    tile.store(best, y + to);
    tile.store_index(at, index + to);
  });
}

template <typename T>
void window_max_pick(const Windows& s, const T* u, const uint8_t* index, T* uy) {
  using V = Vec<T>;
  each_window<T>(s, [&](auto tile, int64_t from, int64_t to, const Inside& in) {
    const Lanes<T> at = tile.load_index(index + to);
    V picked = V::zero();
    each_pixel(s, in, [&](int64_t position, int64_t offset) {
      picked = choose<T>(at == Lanes<T>{} + static_cast<int>(position), tile.load(u + from + offset), picked);
    });
    tile.store(picked, uy + to);
  });
}

template <typename T>
void window_max_place(const Windows& s, const T* gy, const uint8_t* index, T* gx) {
  place<T>(s, gx, [&](auto tile, int64_t to) {
    const Vec<T> g = tile.load(gy + to);
    const Lanes<T> at = tile.load_index(index + to);
    return
        [=](int64_t position) { return choose<T>(at == Lanes<T>{} + static_cast<int>(position), g, Vec<T>::zero()); };
  });
}

template <typename T>
void window_mean(const Windows& s, const T* x, T* y) {
  const Vec<T> share = Vec<T>::broadcast(T(1) / static_cast<T>(s.kh * s.kw));
  each_window<T>(s, [&](auto tile, int64_t from, int64_t to, const Inside& in) {
    // Row by row: means over whole images are long sums.
    Vec<T> total = Vec<T>::zero();
    for (int64_t i = in.top; i < in.bottom; ++i) {
      Vec<T> line = Vec<T>::zero();
      for (int64_t j = in.left; j < in.right; ++j) {
        line += tile.load(x + from + (i * s.width + j) * s.channels);
      }
      total += line;
    }
    tile.store(total * share, y + to);
  });
}

template <typename T>
void window_mean_place(const Windows& s, const T* gy, T* gx) {
  const Vec<T> share = Vec<T>::broadcast(T(1) / static_cast<T>(s.kh * s.kw));
  place<T>(s, gx, [&](auto tile, int64_t to) {
    const Vec<T> g = tile.load(gy + to) * share;
    return [=](int64_t) { return g; };
  });
}

#define MF_INSTANTIATE(T)                                                          \
  template void window_max<T>(const Windows&, const T*, T*, uint8_t*);             \
  template void window_max_pick<T>(const Windows&, const T*, const uint8_t*, T*);  \
  template void window_max_place<T>(const Windows&, const T*, const uint8_t*, T*); \
  template void window_mean<T>(const Windows&, const T*, T*);                      \
  template void window_mean_place<T>(const Windows&, const T*, T*);
MF_INSTANTIATE(float)
MF_INSTANTIATE(double)

}  // namespace mf::MF_ISA
