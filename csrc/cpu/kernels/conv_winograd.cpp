// Winograd form F(2x2, 3x3) of the stride-1 3x3 products: forward, to-input and to-weight. Larger tiles multiply less
// and round five times worse.
//
// Everything between the transforms is a batch of matrix products, one for each of the 16 points, through the
// block kernel of conv_micro.h. A second operand pair joins in the transformed domain, before the one output transform.

#include "conv_kernels.h"
#include "conv_micro.h"

namespace mf::MF_ISA::conv {
namespace {

using V = Vec<float>;
using Problem = mf::conv::Winograd;
constexpr int W = kLanes<float>;
constexpr int M = 2;  // side of an output tile

MF_INLINE V times(float c, V x) { return V::broadcast(c) * x; }

/// One-dimensional transforms of F(m, 3), named as in the derivation: Bᵀ on data, G on filters, Aᵀ on products, and
/// the transposed A and Gᵀ of the weight gradient.
struct Transform {
  static MF_INLINE void data(const V* d, V* t) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[1] - d[3];
  }
  static MF_INLINE void filter(const V* g, V* t) {
    const V even = times(0.5f, g[0] + g[2]), odd = times(0.5f, g[1]);
    t[0] = g[0];
    t[1] = even + odd;
    t[2] = even - odd;
    t[3] = g[2];
  }
  static MF_INLINE void output(const V* t, V* y) {
    y[0] = t[0] + t[1] + t[2];
    y[1] = t[1] - t[2] - t[3];
  }
  static MF_INLINE void gradient(const V* y, V* t) {
    t[0] = y[0];
    t[1] = y[0] + y[1];
    t[2] = y[0] - y[1];
    t[3] = -y[1];
  }
  static MF_INLINE void filter_gradient(const V* t, V* g) {
    const V even = times(0.5f, t[1] + t[2]);
    g[0] = t[0] + even;
    g[1] = times(0.5f, t[1] - t[2]);
    g[2] = even + t[3];
  }
};

using Line = void (*)(const V*, V*);

/// Applies a one-dimensional transform from I to O points along both axes of a tile.
template <int I, int O, Line line>
MF_INLINE void both_axes(const V (&in)[I][I], V (&out)[O][O]) {
  V half[O][I];
  for (int c = 0; c < I; ++c) {
    V column[I], result[O];
    for (int r = 0; r < I; ++r) column[r] = in[r][c];
    line(column, result);
    for (int r = 0; r < O; ++r) half[r][c] = result[r];
  }
  for (int r = 0; r < O; ++r) line(half[r], out[r]);
}

struct Sizes {
  static constexpr int side = M + 2, points = side * side;

  explicit Sizes(const Problem& p)
      : rows(divide_up(p.out_height, M)), columns(divide_up(p.out_width, M)), per_image(rows * columns) {}

  int64_t rows, columns, per_image;
};

/// Elements between the planes of two points: never a multiple of 4096 bytes, or all planes would share cache sets.
inline int64_t plane(int64_t tiles, int64_t channels) {
  const int64_t n = round_line<float>(tiles * channels);
  return n % 1024 == 0 ? n + 16 : n % 512 == 0 ? n + 16 : n;
}

/// Tiles worked on at a time: transformed weights and tiles should share the second-level cache.
int64_t chunk_tiles(const Problem& p) {
  constexpr int64_t kCacheBytes = 416 << 10;
  const int64_t point_bytes = Sizes::points * static_cast<int64_t>(sizeof(float));
  const int64_t room = kCacheBytes - p.channels_in * p.channels_out * point_bytes;
  const int64_t fits = room / ((p.channels_in + p.channels_out) * point_bytes) / kMaxRows * kMaxRows;
  return fits < 4 * kMaxRows ? 4 * kMaxRows : fits > 8 * kMaxRows ? 8 * kMaxRows : fits;
}

/// [panel][channel][panel width] for every point: weights of one task, transformed.
void transform_weights(const Problem& p, const float* w, float* to, float* turned) {
  using S = Sizes;
  const int64_t ci = p.channels_in, co = p.channels_out, stride = ci * co;
  if (p.transposed) {
    for (int tap = 0; tap < 9; ++tap) transpose(w + (8 - tap) * stride, ci, co, ci, turned + tap * stride, co);
    w = turned;
  }
  const Panels<float> panels(co);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t width = panels.width(panel), o = panels.begin(panel);
    for (int64_t c = 0; c < ci; ++c)
      for (int64_t v = 0; v < width; v += W) {
        V g[3][3], u[S::side][S::side];
        for (int k = 0; k < 9; ++k) g[k / 3][k % 3] = V::load(w + k * stride + c * co + o + v);
        both_axes<3, S::side, Transform::filter>(g, u);
        for (int k = 0; k < S::points; ++k) u[k / S::side][k % S::side].store(to + k * stride + o * ci + c * width + v);
      }
  }
}

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
      V in[From][From], out[To][To];
      for (int r = 0; r < From; ++r)
        for (int c = 0; c < From; ++c) in[r][c] = V::load(pixel[r][c] + v);
      both_axes<From, To, line>(in, out);
      const int64_t g = v / group * group, own = channel_count - g < group ? channel_count - g : group;
      float* place = to + g * tiles + t * own + v - g;
      for (int k = 0; k < To * To; ++k) out[k / To][k % To].store(place + k * stride);
    }
  }
}

void store_outputs(const Problem& p, const Sizes& sizes, const float* products, int64_t stride, float* images,
                   int64_t first, int64_t count) {
  using S = Sizes;
  const int64_t co = p.channels_out;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t image = (first + t) / sizes.per_image, tile = (first + t) % sizes.per_image;
    const int64_t y0 = tile / sizes.columns * M, x0 = tile % sizes.columns * M;
    const int rows = static_cast<int>(p.out_height - y0 < M ? p.out_height - y0 : M);
    const int columns = static_cast<int>(p.out_width - x0 < M ? p.out_width - x0 : M);
    float* origin = images + ((image * p.out_height + y0) * p.out_width + x0) * co;
    for (int64_t v = 0; v < co; v += W) {
      V in[S::side][S::side], out[M][M];
      for (int k = 0; k < S::points; ++k) in[k / S::side][k % S::side] = V::load(products + k * stride + t * co + v);
      both_axes<S::side, M, Transform::output>(in, out);
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < columns; ++c) out[r][c].store(origin + (r * p.out_width + c) * co + v);
    }
  }
}

int64_t scratch(const Problem& p) {
  const int64_t weights = p.channels_in * p.channels_out, zeros = round_line<float>(p.channels_in);
  return zeros +
         Sizes::points *
             (p.pairs * (weights + plane(chunk_tiles(p), p.channels_in)) + plane(chunk_tiles(p), p.channels_out)) +
         (p.transposed ? 9 * weights : 0);
}

void run(const Problem& p, int64_t begin, int64_t end, float* memory) {
  constexpr int points = Sizes::points, side = Sizes::side;
  const Sizes sizes(p);
  const int64_t ci = p.channels_in, co = p.channels_out, weights = ci * co;
  const int64_t tiles = chunk_tiles(p);
  const int64_t data_stride = plane(tiles, ci), product_stride = plane(tiles, co);
  const int64_t source_image = p.height * p.width * ci, out_image = p.out_height * p.out_width * co;
  float* zeros = memory;
  float* filters = zeros + round_line<float>(ci);
  float* data = filters + p.pairs * points * weights;
  float* products = data + p.pairs * points * data_stride;
  float* turned = products + points * product_stride;
  memset(zeros, 0, ci * sizeof(float));
  const Panels<float> panels(co);
  int64_t ready = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t task = unit / p.parts, part = unit % p.parts;
    if (task != ready) {
      for (int pair = 0; pair < p.pairs; ++pair)
        transform_weights(p, static_cast<const float*>(p.w[pair]) + task * 9 * weights,
                          filters + pair * points * weights, turned);
      ready = task;
    }
    const int64_t total = p.images * sizes.per_image;
    const int64_t first = part * total / p.parts, last = (part + 1) * total / p.parts;
    const int64_t chunks = divide_up(last - first, tiles);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t at = first + chunk * tiles, count = last - at < tiles ? last - at : tiles;
      for (int pair = 0; pair < p.pairs; ++pair)
        transform_patches<side, side, Transform::data>(
            static_cast<const float*>(p.a[pair]) + task * p.images * source_image, p.height, p.width, ci, M, p.padding,
            sizes.columns, sizes.per_image, at, count, 0, ci, zeros, data + pair * points * data_stride, data_stride,
            ci, tiles);
      const int64_t blocks = divide_up(count, kMaxRows);
      for (int k = 0; k < points; ++k)
        for (int64_t panel = 0; panel < panels.count; ++panel) {
          const int64_t o = panels.begin(panel);
          const float* right = filters + k * weights + o * ci;
          const Segment segments[2] = {{0, 0, ci}, {points * data_stride, points * weights, ci}};
          for (int64_t b = 0, row = 0; b < blocks; ++b) {
            Block<float> block;
            const int rows = static_cast<int>(count * (b + 1) / blocks - row);
            for (int i = 0; i < rows; ++i, ++row) {
              block.rows[i] = data + k * data_stride + row * ci;
              block.out[i] = products + k * product_stride + row * co + o;
            }
            pick<float, 1>(rows, panels.vectors(panel))(block, segments, p.pairs, 1, right, 0, false);
          }
        }
      store_outputs(p, sizes, products, product_stride, static_cast<float*>(p.out) + task * p.images * out_image, at,
                    count);
    }
  }
}

/// Tiles one visit of an accumulator block reduces; fixed, because the order of summation follows it.
constexpr int64_t kWeightTiles = 48;

/// Weight gradient: G^T [ sum over tiles (B^T x B) * (A g A^T) ] G, channels of g in ranges of 16.
int64_t weight_scratch(const Problem& p) {
  const int64_t zeros = round_line<float>(p.channels_in > p.channels_out ? p.channels_in : p.channels_out);
  return zeros + Sizes::points * (plane(kWeightTiles, p.channels_in) + plane(kWeightTiles, p.channels_out) +
                                  p.channels_in * p.channels_out);
}

void weight_run(const Problem& p, int64_t begin, int64_t end, float* memory) {
  constexpr int points = Sizes::points, side = Sizes::side;
  const Sizes sizes(p);
  const int64_t ci = p.channels_in, co = p.channels_out;
  const int64_t source_image = p.height * p.width * ci, out_image = p.out_height * p.out_width * co;
  const int64_t zero_count = round_line<float>(ci > co ? ci : co);
  memset(memory, 0, zero_count * sizeof(float));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t task = unit / p.parts, part = unit % p.parts;
    const int64_t o = part * (co / 16) / p.parts * 16, own = (part + 1) * (co / 16) / p.parts * 16 - o;
    const int64_t tiles = kWeightTiles;
    const int64_t data_stride = plane(tiles, ci), grad_stride = plane(tiles, own), sum_stride = ci * own;
    float* data = memory + zero_count;
    float* grads = data + points * data_stride;
    float* sums = grads + points * grad_stride;
    const Panels<float> panels(own);
    const int64_t total = p.images * sizes.per_image, chunks = divide_up(total, tiles);
    const int64_t blocks = divide_up(ci, kMaxRows);
    for (int pair = 0; pair < p.pairs; ++pair)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t at = chunk * tiles, count = total - at < tiles ? total - at : tiles;
        transform_patches<side, side, Transform::data>(
            static_cast<const float*>(p.a[pair]) + task * p.images * source_image, p.height, p.width, ci, M, p.padding,
            sizes.columns, sizes.per_image, at, count, 0, ci, memory, data, data_stride, W, tiles);
        transform_patches<M, side, Transform::gradient>(
            static_cast<const float*>(p.w[pair]) + task * p.images * out_image, p.out_height, p.out_width, co, M, 0,
            sizes.columns, sizes.per_image, at, count, o, own, memory, grads, grad_stride, kPanel<float>, tiles);
        const Segment segment{0, 0, count};
        for (int k = 0; k < points; ++k)
          for (int64_t panel = 0; panel < panels.count; ++panel) {
            const int64_t column = panels.begin(panel);
            for (int64_t b = 0, row = 0; b < blocks; ++b) {
              Block<float> block;
              const int rows = static_cast<int>(ci * (b + 1) / blocks - row);
              for (int i = 0; i < rows; ++i, ++row) {
                block.rows[i] = data + k * data_stride + row / W * W * tiles + row % W;
                block.out[i] = sums + k * sum_stride + row * own + column;
              }
              pick<float, W>(rows, panels.vectors(panel))(
                  block, &segment, 1, W, grads + k * grad_stride + column * tiles, 0, pair > 0 || chunk > 0);
            }
          }
      }
    float* out = static_cast<float*>(p.out) + task * 9 * ci * co + o;
    for (int64_t c = 0; c < ci; ++c)
      for (int64_t v = 0; v < own; v += W) {
        V in[side][side], g[3][3];
        for (int k = 0; k < points; ++k) in[k / side][k % side] = V::load(sums + k * sum_stride + c * own + v);
        both_axes<side, 3, Transform::filter_gradient>(in, g);
        for (int k = 0; k < 9; ++k) g[k / 3][k % 3].store(out + (k * ci + c) * co + v);
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
  return {conv::scratch, conv::run, conv::weight_scratch, conv::weight_run, conv::fma_peak};
}

}  // namespace mf::MF_ISA
