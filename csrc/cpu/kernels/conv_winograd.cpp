// Winograd forms F(4x4, 3x3) and F(3x3, 3x3) of the stride-1 3x3 products: forward, to-input and to-weight.
//
// Everything between the transforms is a batch of matrix products, one for each point. Tiles are transformed,
// multiplied and transformed back in chunks that stay in the second-level cache. A second operand pair joins in the
// transformed domain, before the one output transform.

#include "conv_kernels.h"
#include "conv_micro.h"

namespace mf::MF_ISA::conv {
namespace {

using V = Vec<float>;
using Problem = mf::conv::Winograd;
constexpr int W = kLanes<float>;

MF_INLINE V times(float c, V x) { return V::broadcast(c) * x; }
/// c * x + y
MF_INLINE V plus(float c, V x, V y) { return fma(V::broadcast(c), x, y); }

/// One-dimensional transforms of F(m, 3), named as in the derivation: B^T on data, G on filters, A^T on products, and
/// the transposed A and G^T of the weight gradient.
template <int M>
struct Transform;

/// Points 0, 2/3, -2/3, 3/2, -3/2 and infinity: less than half the rounding error of 0, 1, -1, 2, -2 and infinity. The
/// pairs share their even and odd parts; the product of their squares is 1.
template <>
struct Transform<4> {
  static constexpr float a = 2.f / 3, b = 3.f / 2, aa = 4.f / 9, bb = 9.f / 4, aaa = 8.f / 27, bbb = 27.f / 8;
  static constexpr float both = 97.f / 36;                 // aa + bb
  static constexpr float na = -81.f / 130, nb = 8.f / 65;  // 1 / (2 aa (aa - bb)), 1 / (2 bb (bb - aa))

  static MF_INLINE void data(const V* d, V* t) {
    t[0] = plus(-both, d[2], d[0] + d[4]);
    t[5] = plus(-both, d[3], d[1] + d[5]);
    const V even_a = plus(-bb, d[2], d[4]), odd_a = plus(-bb, d[1], d[3]);
    t[1] = plus(a, odd_a, even_a);
    t[2] = plus(-a, odd_a, even_a);
    const V even_b = plus(-aa, d[2], d[4]), odd_b = plus(-aa, d[1], d[3]);
    t[3] = plus(b, odd_b, even_b);
    t[4] = plus(-b, odd_b, even_b);
  }
  static MF_INLINE void filter(const V* g, V* t) {
    const V even_a = times(na, plus(aa, g[2], g[0])), even_b = times(nb, plus(bb, g[2], g[0]));
    t[0] = g[0];
    t[1] = plus(na * a, g[1], even_a);
    t[2] = plus(-na * a, g[1], even_a);
    t[3] = plus(nb * b, g[1], even_b);
    t[4] = plus(-nb * b, g[1], even_b);
    t[5] = g[2];
  }
  static MF_INLINE void output(const V* t, V* y) {
    const V even_a = t[1] + t[2], odd_a = t[1] - t[2], even_b = t[3] + t[4], odd_b = t[3] - t[4];
    y[0] = t[0] + even_a + even_b;
    y[1] = plus(b, odd_b, times(a, odd_a));
    y[2] = plus(bb, even_b, times(aa, even_a));
    y[3] = plus(bbb, odd_b, plus(aaa, odd_a, t[5]));
  }
  static MF_INLINE void gradient(const V* y, V* t) {
    const V even_a = plus(aa, y[2], y[0]), odd_a = plus(aaa, y[3], times(a, y[1]));
    const V even_b = plus(bb, y[2], y[0]), odd_b = plus(bbb, y[3], times(b, y[1]));
    t[0] = y[0];
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = y[3];
  }
  static MF_INLINE void filter_gradient(const V* t, V* g) {
    const V even_a = times(na, t[1] + t[2]), odd_a = t[1] - t[2], even_b = times(nb, t[3] + t[4]), odd_b = t[3] - t[4];
    g[0] = t[0] + even_a + even_b;
    g[1] = plus(nb * b, odd_b, times(na * a, odd_a));
    g[2] = plus(bb, even_b, plus(aa, even_a, t[5]));
  }
};

/// Points 0, 1, -1/2, -3/2 and infinity.
template <>
struct Transform<3> {
  static constexpr float n0 = -4.f / 3, n1 = 4.f / 15, n2 = 4.f / 3, n3 = -4.f / 15;

  static MF_INLINE void data(const V* d, V* t) {
    t[0] = plus(-0.75f, d[0], plus(-1.25f, d[1], d[2] + d[3]));
    t[1] = plus(0.75f, d[1], plus(2.f, d[2], d[3]));
    t[2] = plus(-1.5f, d[1], plus(0.5f, d[2], d[3]));
    t[3] = plus(-0.5f, d[1] + d[2], d[3]);
    t[4] = plus(-0.75f, d[1], plus(-1.25f, d[2], d[3] + d[4]));
  }
  static MF_INLINE void filter(const V* g, V* t) {
    t[0] = times(n0, g[0]);
    t[1] = times(n1, g[0] + g[1] + g[2]);
    t[2] = times(n2, plus(0.25f, g[2], plus(-0.5f, g[1], g[0])));
    t[3] = times(n3, plus(2.25f, g[2], plus(-1.5f, g[1], g[0])));
    t[4] = g[2];
  }
  static MF_INLINE void output(const V* t, V* y) {
    y[0] = (t[0] + t[1]) + (t[2] + t[3]);
    y[1] = plus(-1.5f, t[3], plus(-0.5f, t[2], t[1]));
    y[2] = plus(2.25f, t[3], plus(0.25f, t[2], t[1] + t[4]));
  }
  static MF_INLINE void gradient(const V* y, V* t) {
    t[0] = y[0];
    t[1] = y[0] + y[1] + y[2];
    t[2] = plus(0.25f, y[2], plus(-0.5f, y[1], y[0]));
    t[3] = plus(2.25f, y[2], plus(-1.5f, y[1], y[0]));
    t[4] = y[2];
  }
  static MF_INLINE void filter_gradient(const V* t, V* g) {
    const V u1 = times(n1, t[1]), u2 = times(n2, t[2]), u3 = times(n3, t[3]);
    g[0] = plus(n0, t[0], u1 + (u2 + u3));
    g[1] = plus(-1.5f, u3, plus(-0.5f, u2, u1));
    g[2] = plus(2.25f, u3, plus(0.25f, u2, u1 + t[4]));
  }
};

using Line = void (*)(const V*, V*);

/// Applies a one-dimensional transform from I to O points along both axes of a tile: reads `load(row, column)` once
/// each, gives every result to `store(row, column, value)`. Neither tile is held as a whole: registers are few.
template <int I, int O, Line line, class Load, class Store>
MF_INLINE void both_axes(const Load& load, const Store& store) {
  V half[O][I];
#pragma GCC unroll 8
  for (int c = 0; c < I; ++c) {
    V column[I], result[O];
#pragma GCC unroll 8
    for (int r = 0; r < I; ++r) column[r] = load(r, c);
    line(column, result);
#pragma GCC unroll 8
    for (int r = 0; r < O; ++r) half[r][c] = result[r];
  }
#pragma GCC unroll 8
  for (int r = 0; r < O; ++r) {
    V result[O];
    line(half[r], result);
#pragma GCC unroll 8
    for (int c = 0; c < O; ++c) store(r, c, result[c]);
  }
}

template <int M>
struct Sizes {
  static constexpr int side = M + 2, points = side * side;

  explicit Sizes(const Problem& p)
      : rows(divide_up(p.out_height, M)), columns(divide_up(p.out_width, M)), per_image(rows * columns) {}

  int64_t rows, columns, per_image;
};

/// Products summed one after the other before they join the rest: sums of sums round less. Twice as long, a random
/// network's meta-gradient errs twice as much; an iteration takes 2 % less.
constexpr int64_t kChain = 16;

/// acc[i][v] += sum over k < length of a(i, k) * b[k][v], b [length, NV vectors]. a(i, k) is a[i * pitch + k];
/// `Turned`, a[k * pitch + i].
template <int MR, int NV, bool Turned>
MF_INLINE void accumulate_chain(V (&acc)[MR][NV], const float* a, int64_t pitch, const float* b, int64_t length) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < length; ++k) {
    V right[NV];
    for (int v = 0; v < NV; ++v) right[v] = V::load(b + (k * NV + v) * W);
    for (int i = 0; i < MR; ++i) {
      const V left = V::broadcast(Turned ? a[k * pitch + i] : a[i * pitch + k]);
      for (int v = 0; v < NV; ++v) acc[i][v] = fma(left, right[v], acc[i][v]);
    }
  }
}

/// out[i][:] (+)= a(i, :) * b for `blocks` blocks of MR rows, chain by chain. Blocks, chains and strides are known here
/// and not to the caller of a block: a sixth less time than one call a chain.
template <int MR, int NV, bool Turned>
void product_blocks(const float* a, int64_t pitch, const float* b, int64_t length, float* out, int64_t out_pitch,
                    int64_t blocks, bool accumulate) {
  for (int64_t n = 0; n < blocks; ++n) {
    for (int64_t k = 0; k < length; k += kChain) {
      V acc[MR][NV];
      for (int i = 0; i < MR; ++i)
        for (int v = 0; v < NV; ++v) acc[i][v] = V::zero();
      const float* from = a + (Turned ? k * pitch : k);
      const float* right = b + k * NV * W;
      if (length - k >= kChain) {
        accumulate_chain<MR, NV, Turned>(acc, from, pitch, right, kChain);
      } else {
        accumulate_chain<MR, NV, Turned>(acc, from, pitch, right, length - k);
      }
      const bool add = accumulate || k > 0;
      for (int i = 0; i < MR; ++i)
        for (int v = 0; v < NV; ++v) {
          float* to = out + i * out_pitch + v * W;
          (add ? V::load(to) + acc[i][v] : acc[i][v]).store(to);
        }
    }
    a += Turned ? MR : MR * pitch;
    out += MR * out_pitch;
  }
}

/// The product of one point and one panel of NV vectors: `rows` rows, the last of them in a block of their own.
template <int NV, bool Turned>
void product(const float* a, int64_t pitch, const float* b, int64_t length, float* out, int64_t out_pitch, int64_t rows,
             bool accumulate) {
  const int64_t blocks = rows / kMaxRows, done = blocks * kMaxRows;
  product_blocks<kMaxRows, NV, Turned>(a, pitch, b, length, out, out_pitch, blocks, accumulate);
  constexpr decltype(&product_blocks<1, NV, Turned>) last[] = {
      product_blocks<1, NV, Turned>, product_blocks<2, NV, Turned>, product_blocks<3, NV, Turned>,
      product_blocks<4, NV, Turned>, product_blocks<5, NV, Turned>};
  static_assert(kMaxRows == 6);
  if (done < rows)
    last[rows - done - 1](a + (Turned ? done : done * pitch), pitch, b, length, out + done * out_pitch, out_pitch, 1,
                          accumulate);
}

template <bool Turned>
auto pick_product(int vectors) {
  if constexpr (kMaxVectors > 2) {
    if (vectors == 4) return product<4, Turned>;
    if (vectors == 3) return product<3, Turned>;
  }
  return vectors == 2 ? product<2, Turned> : product<1, Turned>;
}

/// Elements between the planes of two points: never a multiple of 4096 bytes, or all planes would share cache sets.
inline int64_t plane(int64_t tiles, int64_t channels) {
  const int64_t n = round_line<float>(tiles * channels);
  return n % 512 == 0 ? n + 16 : n;
}

/// Tiles worked on at a time: with their products they should stay in the second-level cache; the transformed weights
/// stream past them.
template <int M>
int64_t chunk_tiles(const Problem& p) {
  constexpr int64_t kCacheBytes = 416 << 10, kLeast = 4 * kMaxRows, kMost = 16 * kMaxRows;
  const int64_t tile_bytes = (p.pairs * p.ci + p.co) * Sizes<M>::points * int64_t{sizeof(float)};
  const int64_t fits = kCacheBytes / tile_bytes / kMaxRows * kMaxRows;
  return fits < kLeast ? kLeast : fits > kMost ? kMost : fits;
}

/// [panel][channel][panel width] for every point: weights of one task, transformed.
template <int M>
void transform_weights(const Problem& p, const float* w, float* to, int64_t to_stride, float* turned) {
  using S = Sizes<M>;
  const int64_t ci = p.ci, co = p.co, stride = ci * co;
  if (p.transposed) {
    for (int tap = 0; tap < 9; ++tap) transpose(w + (8 - tap) * stride, ci, co, ci, turned + tap * stride, co);
    w = turned;
  }
  const Panels<float> panels(co);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t width = panels.width(panel), o = panels.begin(panel);
    for (int64_t c = 0; c < ci; ++c)
      for (int64_t v = 0; v < width; v += W) {
        const float* from = w + c * co + o + v;
        float* place = to + o * ci + c * width + v;
        both_axes<3, S::side, Transform<M>::filter>(
            [=](int r, int s) { return V::load(from + (r * 3 + s) * stride); },
            [=](int r, int s, V u) { u.store(place + (r * S::side + s) * to_stride); });
      }
  }
}

constexpr int64_t kAhead = 16;  // channels: the next cache line of each pixel, which no hardware prefetcher expects

/// Transforms patches of side `From` at `step` pixels into planes [points][channel group][tile][channel of the group];
/// pixels outside read zeros.
template <int From, int To, Line line>
void transform_patches(const float* images, int64_t height, int64_t width, int64_t channels, int64_t step,
                       int64_t padding, int64_t columns, int64_t per_image, int64_t first, int64_t count,
                       int64_t channel_begin, int64_t channel_count, const float* zeros, float* to, int64_t stride,
                       int64_t group, int64_t tiles) {
  for (int64_t t = 0; t < count; ++t) {
    const int64_t image = (first + t) / per_image, tile = (first + t) % per_image;
    const int64_t y0 = tile / columns * step - padding, x0 = tile % columns * step - padding;
    const float* origin = images + image * height * width * channels + channel_begin;
    const float* pixel[From][From];
    for (int r = 0; r < From; ++r)
      for (int c = 0; c < From; ++c) {
        const int64_t y = y0 + r, x = x0 + c;
        const bool inside = y >= 0 && y < height && x >= 0 && x < width;
        pixel[r][c] = inside ? origin + (y * width + x) * channels : zeros;
      }
    for (int64_t v = 0; v < channel_count; v += W) {
      const int64_t g = v / group * group, own = channel_count - g < group ? channel_count - g : group;
      float* place = to + g * tiles + t * own + v - g;
      both_axes<From, To, line>(
          [&](int r, int c) {
            __builtin_prefetch(pixel[r][c] + v + kAhead);
            return V::load(pixel[r][c] + v);
          },
          [=](int r, int c, V x) { x.store(place + (r * To + c) * stride); });
    }
  }
}

template <int M>
void store_outputs(const Problem& p, const Sizes<M>& sizes, const float* products, int64_t stride, float* images,
                   int64_t first, int64_t count) {
  using S = Sizes<M>;
  const int64_t co = p.co;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t image = (first + t) / sizes.per_image, tile = (first + t) % sizes.per_image;
    const int64_t y0 = tile / sizes.columns * M, x0 = tile % sizes.columns * M;
    const int rows = static_cast<int>(p.out_height - y0 < M ? p.out_height - y0 : M);
    const int columns = static_cast<int>(p.out_width - x0 < M ? p.out_width - x0 : M);
    const int64_t pitch = p.out_width;
    float* origin = images + ((image * p.out_height + y0) * p.out_width + x0) * co;
    for (int64_t v = 0; v < co; v += W) {
      const float* from = products + t * co + v;
      both_axes<S::side, M, Transform<M>::output>(
          [=](int r, int c) { return V::load(from + (r * S::side + c) * stride); },
          [=](int r, int c, V y) {
            if (r < rows && c < columns) y.store(origin + (r * pitch + c) * co + v);
          });
    }
  }
}

template <int M>
int64_t scratch(const Problem& p) {
  const int64_t weights = p.ci * p.co, zeros = round_line<float>(p.ci);
  return zeros +
         Sizes<M>::points *
             (p.pairs * (plane(p.ci, p.co) + plane(chunk_tiles<M>(p), p.ci)) + plane(chunk_tiles<M>(p), p.co)) +
         (p.transposed ? 9 * weights : 0);
}

template <int M>
void run(const Problem& p, int64_t begin, int64_t end, float* memory) {
  constexpr int points = Sizes<M>::points, side = Sizes<M>::side;
  const Sizes<M> sizes(p);
  const int64_t ci = p.ci, co = p.co, weights = ci * co;
  const int64_t tiles = chunk_tiles<M>(p);
  const int64_t data_stride = plane(tiles, ci), product_stride = plane(tiles, co), filter_stride = plane(ci, co);
  const int64_t source_image = p.height * p.width * ci, out_image = p.out_height * p.out_width * co;
  float* zeros = memory;
  float* filters = zeros + round_line<float>(ci);
  float* data = filters + p.pairs * points * filter_stride;
  float* products = data + p.pairs * points * data_stride;
  float* turned = products + points * product_stride;
  memset(zeros, 0, ci * sizeof(float));
  const Panels<float> panels(co);
  int64_t ready = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t task = unit / p.parts, part = unit % p.parts;
    if (task != ready) {
      for (int pair = 0; pair < p.pairs; ++pair)
        transform_weights<M>(p, static_cast<const float*>(p.b[pair]) + task * 9 * weights,
                             filters + pair * points * filter_stride, filter_stride, turned);
      ready = task;
    }
    const int64_t total = p.images * sizes.per_image;
    const int64_t first = part * total / p.parts, last = (part + 1) * total / p.parts;
    const int64_t chunks = divide_up(last - first, tiles);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t at = first + chunk * tiles, count = last - at < tiles ? last - at : tiles;
      for (int pair = 0; pair < p.pairs; ++pair)
        transform_patches<side, side, Transform<M>::data>(
            static_cast<const float*>(p.a[pair]) + task * p.images * source_image, p.height, p.width, ci, M, p.pad_y,
            sizes.columns, sizes.per_image, at, count, 0, ci, zeros, data + pair * points * data_stride, data_stride,
            ci, tiles);
      for (int k = 0; k < points; ++k)
        for (int64_t panel = 0; panel < panels.count; ++panel) {
          const int64_t o = panels.begin(panel);
          for (int pair = 0; pair < p.pairs; ++pair)
            pick_product<false>(panels.vectors(panel))(data + (pair * points + k) * data_stride, ci,
                                                       filters + (pair * points + k) * filter_stride + o * ci, ci,
                                                       products + k * product_stride + o, co, count, pair > 0);
        }
      store_outputs<M>(p, sizes, products, product_stride, static_cast<float*>(p.out) + task * p.images * out_image, at,
                       count);
    }
  }
}

/// Tiles one visit of an accumulator block reduces; fixed, because the order of summation follows it.
constexpr int64_t kWeightTiles = 4 * kChain;

/// Weight gradient: G^T [ sum over tiles (B^T x B) * (A g A^T) ] G, channels of g in ranges of 16.
template <int M>
int64_t weight_scratch(const Problem& p) {
  const int64_t zeros = round_line<float>(p.ci > p.co ? p.ci : p.co);
  return zeros + Sizes<M>::points * (plane(kWeightTiles, p.ci) + plane(kWeightTiles, p.co) + plane(p.ci, p.co));
}

template <int M>
void weight_run(const Problem& p, int64_t begin, int64_t end, float* memory) {
  constexpr int points = Sizes<M>::points, side = Sizes<M>::side;
  const Sizes<M> sizes(p);
  const int64_t ci = p.ci, co = p.co;
  const int64_t source_image = p.height * p.width * ci, out_image = p.out_height * p.out_width * co;
  const int64_t zero_count = round_line<float>(ci > co ? ci : co);
  memset(memory, 0, zero_count * sizeof(float));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t task = unit / p.parts, part = unit % p.parts;
    const int64_t o = part * (co / 16) / p.parts * 16, own = (part + 1) * (co / 16) / p.parts * 16 - o;
    const int64_t tiles = kWeightTiles;
    const int64_t data_stride = plane(tiles, ci), grad_stride = plane(tiles, own), sum_stride = plane(ci, own);
    float* data = memory + zero_count;
    float* grads = data + points * data_stride;
    float* sums = grads + points * grad_stride;
    const Panels<float> panels(own);
    const int64_t total = p.images * sizes.per_image, chunks = divide_up(total, tiles);
    for (int pair = 0; pair < p.pairs; ++pair)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t at = chunk * tiles, count = total - at < tiles ? total - at : tiles;
        transform_patches<side, side, Transform<M>::data>(
            static_cast<const float*>(p.a[pair]) + task * p.images * source_image, p.height, p.width, ci, M, p.pad_y,
            sizes.columns, sizes.per_image, at, count, 0, ci, memory, data, data_stride, ci, tiles);
        transform_patches<M, side, Transform<M>::gradient>(
            static_cast<const float*>(p.b[pair]) + task * p.images * out_image, p.out_height, p.out_width, co, M, 0,
            sizes.columns, sizes.per_image, at, count, o, own, memory, grads, grad_stride, kPanel<float>, tiles);
        for (int k = 0; k < points; ++k)
          for (int64_t panel = 0; panel < panels.count; ++panel) {
            const int64_t column = panels.begin(panel);
            pick_product<true>(panels.vectors(panel))(data + k * data_stride, ci,
                                                      grads + k * grad_stride + column * tiles, count,
                                                      sums + k * sum_stride + column, own, ci, pair + chunk > 0);
          }
      }
    float* out = static_cast<float*>(p.out) + task * 9 * ci * co + o;
    for (int64_t c = 0; c < ci; ++c)
      for (int64_t v = 0; v < own; v += W) {
        const float* from = sums + c * own + v;
        both_axes<side, 3, Transform<M>::filter_gradient>(
            [=](int r, int s) { return V::load(from + (r * side + s) * sum_stride); },
            [=](int r, int s, V g) { g.store(out + ((r * 3 + s) * ci + c) * co + v); });
      }
  }
}

/// Independent multiply-adds in registers alone; returns the floating-point operations done.
double fma_peak(int64_t iterations) {
  constexpr int chains = 12;
  V acc[chains];
  V factor = V::broadcast(0.999f), term = V::broadcast(0.001f);
  for (int i = 0; i < chains; ++i) acc[i] = V::broadcast(static_cast<float>(i));
  for (int64_t k = 0; k < iterations; ++k) {
    for (int i = 0; i < chains; ++i) acc[i] = fma(acc[i], factor, term);
  }
  float total = 0;
  for (int i = 0; i < chains; ++i) total += acc[i].sum();
  return total == 12345.f ? 0 : 2.0 * W * chains * static_cast<double>(iterations);
}

}  // namespace
}  // namespace mf::MF_ISA::conv

namespace mf::MF_ISA {

mf::conv::WinogradKernels winograd_kernels() {
  using namespace conv;
  return {{scratch<3>, run<3>, weight_scratch<3>, weight_run<3>},
          {scratch<4>, run<4>, weight_scratch<4>, weight_run<4>},
          fma_peak};
}

}  // namespace mf::MF_ISA
