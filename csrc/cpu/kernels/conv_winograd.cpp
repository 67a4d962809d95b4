// Winograd form F(4x4, 3x3) of the stride-1 3x3 products: forward, to-input and to-weight.
//
// Everything between the transforms is a batch of matrix products, one for each point. Tiles are transformed,
// multiplied and transformed back in chunks that stay in the second-level cache. A second operand pair joins in the
// transformed domain, before the one output transform. The last tile of an axis that 4 does not divide is F(3), F(2) or
// F(1), whose points are some of F(4)'s: they use the same weights, and take fewer products.

#include "conv_kernels.h"
#include "winograd_tiles.h"

namespace mf::MF_ISA::conv {
namespace {

using namespace winograd;

/// Products summed one after the other before they join the rest: sums of sums round less. Twice as long, a random
/// network's meta-gradient errs twice as much, for 1 % less time; half as long, products take 2 to 5 % more.
constexpr int64_t kChain = 16;

/// Memory that is wanted soon, brought into the second-level cache beside products, which leave the ways to memory
/// idle: a few lines with each chain, since lines asked for all at once would stall the products.
struct Ahead {
  static constexpr int64_t kLine = 64 / sizeof(float);

  void add(const float* begin, const float* end) {
    from[count] = begin;
    to[count++] = end;
    lines += divide_up(end - begin, kLine);
  }
  /// Shares what was added among so many calls of fetch.
  void spread(int64_t visits) { each = divide_up(lines, visits); }
  MF_INLINE void fetch() {
    for (int64_t n = each; n > 0; --n) {
      while (now < count && from[now] >= to[now]) ++now;
      if (now == count) {
        each = 0;
        return;
      }
      __builtin_prefetch(from[now], 0, 2);
      from[now] += kLine;
    }
  }

  const float *from[3] = {}, *to[3] = {};
  int count = 0, now = 0;
  int64_t lines = 0, each = 0;
};

/// Adds the pixel rows, of `row` elements, that tiles [first, first + count) cover with `above` to `below` of their own
/// first one.
void add_tiles(Ahead& ahead, const Tiles& tiles, const float* images, int64_t height, int64_t row, int64_t first,
               int64_t count, int64_t above, int64_t below) {
  const auto at = [&](int64_t tile, int64_t offset) {
    const int64_t y = tile % tiles.per_image / tiles.columns * kPixels + offset;
    return images + (tile / tiles.per_image * height + (y < 0 ? 0 : y > height ? height : y)) * row;
  };
  if (count > 0) ahead.add(at(first, above), at(first + count - 1, below));
}

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

/// acc[i][v] = sum over one chain, or over what is left of `length`.
template <int MR, int NV, bool Turned>
MF_INLINE void sum_chain(V (&acc)[MR][NV], const float* a, int64_t pitch, const float* b, int64_t length) {
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) acc[i][v] = V::zero();
  if (length >= kChain) {
    accumulate_chain<MR, NV, Turned>(acc, a, pitch, b, kChain);
  } else {
    accumulate_chain<MR, NV, Turned>(acc, a, pitch, b, length);
  }
}

/// The operands of one point's product, a pair or two: a [rows, length], `pitch` elements between rows, and b [length,
/// NV vectors].
struct Factors {
  const float* a[2];
  const float* b[2];
  int pairs;
  int64_t pitch, length;
  float* part;  ///< memory for the sums of a block of rows, as far apart as those of the result
};

/// out[i][:] = sum over pairs of a[i, :] * b for `blocks` blocks of MR rows from `row` on, chain by chain. Blocks,
/// chains and strides are known here and not to the caller of a block: a sixth less time than one call a chain. Until
/// the last chain sums stay in memory that every block uses again, so that `out` may lie in place of the first a.
template <int MR, int NV>
void product_blocks(const Factors& f, int64_t row, int64_t blocks, float* out, int64_t out_pitch, Ahead& ahead) {
  constexpr int64_t width = NV * W;
  for (int64_t n = 0; n < blocks; ++n, row += MR) {
    float* const own = out + row * out_pitch;
    for (int pair = 0; pair < f.pairs; ++pair)
      for (int64_t k = 0; k < f.length; k += kChain) {
        ahead.fetch();
        V acc[MR][NV];
        sum_chain<MR, NV, false>(acc, f.a[pair] + row * f.pitch + k, f.pitch, f.b[pair] + k * width, f.length - k);
        const bool first = pair + k == 0, last = pair + 1 == f.pairs && k + kChain >= f.length;
        const float* const before = first ? own : f.part;
        float* const after = last ? own : f.part;
        // Unrolled, or sums go through memory once more; `before` is no constant, or they stay in registers and spill.
        if (!first) {
#pragma GCC unroll 6
          for (int i = 0; i < MR; ++i)
            for (int v = 0; v < NV; ++v) {
              const int64_t at = i * out_pitch + v * W;
              (V::load(before + at) + acc[i][v]).store(after + at);
            }
        } else {
#pragma GCC unroll 6
          for (int i = 0; i < MR; ++i)
            for (int v = 0; v < NV; ++v) acc[i][v].store(after + i * out_pitch + v * W);
        }
      }
  }
}

/// The product of one point and one panel of NV vectors: `rows` rows, the last of them in a block of their own.
template <int NV>
void product(const Factors& f, int64_t rows, float* out, int64_t out_pitch, Ahead& ahead) {
  const int64_t blocks = rows / kMaxRows, done = blocks * kMaxRows;
  product_blocks<kMaxRows, NV>(f, 0, blocks, out, out_pitch, ahead);
  constexpr decltype(&product_blocks<1, NV>) last[] = {product_blocks<1, NV>, product_blocks<2, NV>,
                                                       product_blocks<3, NV>, product_blocks<4, NV>,
                                                       product_blocks<5, NV>};
  static_assert(kMaxRows == 6);
  if (done < rows) last[rows - done - 1](f, done, 1, out, out_pitch, ahead);
}

/// out[i][:] (+)= sum over k of a[k][i] * b[k][:] for `blocks` blocks of MR rows i; a [length, pitch]. All sums of a
/// point stay in `out`, which is read again soon.
template <int MR, int NV>
void turned_blocks(const float* a, int64_t pitch, const float* b, int64_t length, float* out, int64_t out_pitch,
                   int64_t blocks, bool accumulate, Ahead& ahead) {
  for (int64_t n = 0; n < blocks; ++n) {
    for (int64_t k = 0; k < length; k += kChain) {
      ahead.fetch();
      V acc[MR][NV];
      sum_chain<MR, NV, true>(acc, a + k * pitch, pitch, b + k * NV * W, length - k);
      const bool add = accumulate || k > 0;
      for (int i = 0; i < MR; ++i)
        for (int v = 0; v < NV; ++v) {
          float* to = out + i * out_pitch + v * W;
          (add ? V::load(to) + acc[i][v] : acc[i][v]).store(to);
        }
    }
    a += MR;
    out += MR * out_pitch;
  }
}

/// As `product`, of to-weight.
template <int NV>
void turned_product(const float* a, int64_t pitch, const float* b, int64_t length, float* out, int64_t out_pitch,
                    int64_t rows, bool accumulate, Ahead& ahead) {
  const int64_t blocks = rows / kMaxRows, done = blocks * kMaxRows;
  turned_blocks<kMaxRows, NV>(a, pitch, b, length, out, out_pitch, blocks, accumulate, ahead);
  constexpr decltype(&turned_blocks<1, NV>) last[] = {turned_blocks<1, NV>, turned_blocks<2, NV>, turned_blocks<3, NV>,
                                                      turned_blocks<4, NV>, turned_blocks<5, NV>};
  static_assert(kMaxRows == 6);
  if (done < rows)
    last[rows - done - 1](a + done, pitch, b, length, out + done * out_pitch, out_pitch, 1, accumulate, ahead);
}

/// Chains of a product, each of which fetches ahead.
inline int64_t chains(int64_t rows, int64_t length) { return divide_up(rows, kMaxRows) * divide_up(length, kChain); }

inline auto pick_product(int vectors) {
  if constexpr (kMaxVectors<float> > 2) {
    if (vectors == 4) return product<4>;
    if (vectors == 3) return product<3>;
  }
  return vectors == 2 ? product<2> : product<1>;
}

inline auto pick_turned(int vectors) {
  if constexpr (kMaxVectors<float> > 2) {
    if (vectors == 4) return turned_product<4>;
    if (vectors == 3) return turned_product<3>;
  }
  return vectors == 2 ? turned_product<2> : turned_product<1>;
}

/// Elements between the planes of two points: never a multiple of 4096 bytes, or all planes would share cache sets.
inline int64_t plane(int64_t tiles, int64_t channels) {
  const int64_t n = round_line<float>(tiles * channels);
  return n % 512 == 0 ? n + 16 : n;
}

inline int64_t part_size(const Problem& p) { return kMaxRows * round_line<float>(p.ci > p.co ? p.ci : p.co); }

/// Whether a point's products take the place of the first pair's transformed patches, rows of ci elements: their lines
/// are at hand then, and transformed weights have the more of the cache.
inline bool in_place(const Problem& p) { return p.co <= kPanel<float> && p.co <= p.ci; }

/// Tiles worked on at a time: with their products they should stay in the second-level cache; the transformed weights
/// stream past them.
int64_t chunk_tiles(const Problem& p) {
  constexpr int64_t kCacheBytes = 416 << 10, kLeast = 4 * kMaxRows, kMost = 16 * kMaxRows;
  const int64_t tile_bytes = (p.pairs * p.ci + p.co) * kPoints * int64_t{sizeof(float)};
  const int64_t fits = kCacheBytes / tile_bytes / kMaxRows * kMaxRows;
  return fits < kLeast ? kLeast : fits > kMost ? kMost : fits;
}

int64_t scratch(const Problem& p) {
  const int64_t zeros = round_line<float>(p.ci);
  return part_size(p) + zeros +
         kPoints * (p.pairs * (plane(p.ci, p.co) + plane(chunk_tiles(p), p.ci)) +
                    (in_place(p) ? 0 : plane(chunk_tiles(p), p.co))) +
         (p.transposed ? 9 * W * W : 0);
}

void run(const Problem& p, int64_t begin, int64_t end, float* memory) {
  const Tiles sizes(p);
  const int64_t ci = p.ci, co = p.co, weights = ci * co;
  const int64_t tiles = chunk_tiles(p);
  const bool inside = in_place(p);
  const int64_t data_stride = plane(tiles, ci), filter_stride = plane(ci, co);
  const int64_t product_stride = inside ? data_stride : plane(tiles, co), product_pitch = inside ? ci : co;
  const int64_t source_image = p.height * p.width * ci, out_image = p.out_height * p.out_width * co;
  float* partial = memory;
  float* zeros = partial + part_size(p);
  float* filters = zeros + round_line<float>(ci);
  float* data = filters + p.pairs * kPoints * filter_stride;
  float* products = inside ? data : data + p.pairs * kPoints * data_stride;
  float* turned = products + (inside ? p.pairs : 1) * kPoints * product_stride;
  memset(zeros, 0, ci * sizeof(float));
  const Panels<float> panels(co);
  int64_t ready = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t task = unit / p.parts, part = unit % p.parts;
    if (task != ready) {
      for (int pair = 0; pair < p.pairs; ++pair)
        transform_weights(p, sizes, static_cast<const float*>(p.b[pair]) + task * 9 * weights,
                          filters + pair * kPoints * filter_stride, filter_stride, turned);
      ready = task;
    }
    const int64_t total = p.images * sizes.per_image;
    const int64_t first = part * total / p.parts, last = (part + 1) * total / p.parts;
    const auto images = [&](int pair) { return static_cast<const float*>(p.a[pair]) + task * p.images * source_image; };
    const auto count_at = [=](int64_t at) { return last - at < tiles ? last - at : tiles; };
    float* out = static_cast<float*>(p.out) + task * p.images * out_image;
    for (int64_t at = first; at < last; at += tiles) {
      const int64_t count = count_at(at), next = at + count;
      const Chunk chunk(sizes, at, count);
      Ahead ahead;
      add_tiles(ahead, sizes, out, p.out_height, p.out_width * co, at, count, 0, kPixels);
      for (int pair = 0; pair < p.pairs; ++pair) {
        transform_patches<Data>({images(pair), p.height, p.width, ci, p.pad_y, 0, ci, zeros,
                                 data + pair * kPoints * data_stride, data_stride, ci, tiles},
                                chunk);
        add_tiles(ahead, sizes, images(pair), p.height, p.width * ci, next, count_at(next), -p.pad_y, kSide - p.pad_y);
      }
      int64_t visits = 0;
      for (int k = 0; k < kPoints; ++k) visits += chains(chunk.to(k) - chunk.from(k), ci);
      ahead.spread(visits * panels.count * p.pairs);
      for (int k = 0; k < kPoints; ++k)
        for (int64_t panel = 0; panel < panels.count; ++panel) {
          const int64_t o = panels.begin(panel);
          const int64_t row = chunk.from(k);
          const float* patches = data + k * data_stride + row * ci;
          const float* weight = filters + k * filter_stride + o * ci;
          const Factors f{{patches, patches + kPoints * data_stride},
                          {weight, weight + kPoints * filter_stride},
                          p.pairs,
                          ci,
                          ci,
                          partial};
          pick_product(panels.vectors(panel))(
              f, chunk.to(k) - row, products + k * product_stride + row * product_pitch + o, product_pitch, ahead);
        }
      store_outputs(p, products, product_pitch, product_stride, out, chunk);
    }
  }
}

/// Tiles worked on at a time; in whole chains, so that the order of summation does not follow it.
constexpr int64_t kWeightTiles = 2 * kChain;

/// Weight gradient: G^T [ sum over tiles (B^T x B) * (A g A^T) ] G, channels of g in ranges of 16.
int64_t weight_scratch(const Problem& p) {
  const int64_t zeros = round_line<float>(p.ci > p.co ? p.ci : p.co);
  return zeros + kPoints * (plane(kWeightTiles, p.ci) + plane(kWeightTiles, p.co) + plane(p.ci, p.co));
}

void weight_run(const Problem& p, int64_t begin, int64_t end, float* memory) {
  const Tiles sizes(p);
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
    float* grads = data + kPoints * data_stride;
    float* sums = grads + kPoints * grad_stride;
    const Panels<float> panels(own);
    const int64_t total = p.images * sizes.per_image;
    const auto count_at = [=](int64_t at) { return total - at < tiles ? total - at : tiles; };
    const auto images = [&](int pair) { return static_cast<const float*>(p.a[pair]) + task * p.images * source_image; };
    const auto outputs = [&](int pair) { return static_cast<const float*>(p.b[pair]) + task * p.images * out_image; };
    for (int pair = 0; pair < p.pairs; ++pair)
      for (int64_t at = 0; at < total; at += tiles) {
        const int64_t count = count_at(at);
        const Chunk chunk(sizes, at, count);
        transform_patches<Data>(
            {images(pair), p.height, p.width, ci, p.pad_y, 0, ci, memory, data, data_stride, ci, tiles}, chunk);
        transform_patches<Gradient>(
            {outputs(pair), p.out_height, p.out_width, co, 0, o, own, memory, grads, grad_stride, kPanel<float>, tiles},
            chunk);
        const int64_t next = at + count < total ? at + count : 0;
        const int of = next > 0 ? pair : pair + 1;
        Ahead ahead;
        if (of < p.pairs) {
          add_tiles(ahead, sizes, images(of), p.height, p.width * ci, next, count_at(next), -p.pad_y, kSide - p.pad_y);
          add_tiles(ahead, sizes, outputs(of), p.out_height, p.out_width * co, next, count_at(next), 0, kPixels);
          int64_t visits = 0;
          for (int k = 0; k < kPoints; ++k) visits += chains(ci, chunk.to(k) - chunk.from(k));
          ahead.spread(visits * panels.count);
        }
        for (int k = 0; k < kPoints; ++k)
          for (int64_t panel = 0; panel < panels.count; ++panel) {
            const int64_t column = panels.begin(panel), width = panels.width(panel);
            const int64_t row = chunk.from(k), length = chunk.to(k) - row;
            float* const sum = sums + k * sum_stride + column;
            if (length > 0) {
              pick_turned(panels.vectors(panel))(data + k * data_stride + row * ci, ci,
                                                 grads + k * grad_stride + column * tiles + row * width, length, sum,
                                                 own, ci, pair + at > 0, ahead);
            } else if (pair + at == 0) {  // nor do later chunks use it: the first tile is the largest
              for (int64_t c = 0; c < ci; ++c) memset(sum + c * own, 0, width * sizeof(float));
            }
          }
      }
    float* out = static_cast<float*>(p.out) + task * 9 * ci * co + o;
    for (int64_t c = 0; c < ci; ++c)
      for (int64_t v = 0; v < own; v += W) {
        const float* from = sums + c * own + v;
        both_axes<FilterGradient, FilterGradient>(
            [=](int r, int s) { return V::load(from + (r * kSide + s) * sum_stride); },
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
  return {scratch, run, weight_scratch, weight_run, fma_peak};
}

}  // namespace mf::MF_ISA
