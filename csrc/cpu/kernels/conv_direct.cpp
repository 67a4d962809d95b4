// Direct convolutions: pixels gathered by class for forward and to-input, outer products over pixels for to-weight.

#include "conv_bf16.h"
#include "conv_kernels.h"
#include "conv_micro.h"

namespace mf::MF_ISA::conv {
namespace {

using mf::conv::Gather;
using mf::conv::Outer;
using mf::conv::PixelClass;

/// Source channels reduced in one visit of a block: their weight panel must stay close to the core.
template <class T>
int64_t channel_block(int taps, int64_t channels) {
  constexpr int64_t kPanelBytes = 80 << 10;
  const int64_t fits = kPanelBytes / static_cast<int64_t>(taps * kPanel<T> * sizeof(T));
  return divide_up(channels, divide_up(channels, fits > 16 ? fits : 16));
}

template <class T>
int64_t packed_elements(const Gather& p) {
  return round_line<T>(divide_up(p.channels_out, kPanel<T>) * kPanel<T> * p.taps * p.channels_in);
}

/// Packs the weights of one task to [panel][channel block][tap][channel][panel width].
template <class T>
void pack_weights(const Gather& p, const T* w, T* to) {
  const Panels<T> panels(p.channels_out);
  const int64_t ci = p.channels_in, co = p.channels_out, step = channel_block<T>(p.taps, ci);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t width = panels.width(panel), lanes = panels.lanes(panel), o = panels.begin(panel);
    for (int64_t c = 0; c < ci; c += step) {
      const int64_t n = c + step < ci ? step : ci - c;
      for (int tap = 0; tap < p.taps; ++tap) {
        if (p.transposed) {
          const T* from = w + (p.taps - 1 - tap) * ci * co;
          if (lanes < width) memset(to, 0, n * width * sizeof(T));
          transpose(from + o * ci + c, ci, lanes, n, to, width);
          to += n * width;
        } else {
          const Stored<T>* from = reinterpret_cast<const Stored<T>*>(w + (tap * ci + c) * co) + o;
          for (int64_t k = 0; k < n; ++k, to += width) copy_padded(to, from + k * kValues<T> * co, co, lanes, width);
        }
      }
    }
  }
}

/// Whether the weights of a task are read as they lie, [tap][channel][panel width] already.
template <class T>
bool read_unpacked(const Gather& p) {
  const Panels<T> panels(p.channels_out);
  return kValues<T> == 1 && !p.transposed && panels.count == 1 && panels.lanes(0) == panels.width(0);
}

template <class T, int Step>
void accumulate_block(const Block<T>& block, int rows, int64_t lanes, int vectors, const Segment* segments,
                      int64_t count, int64_t step_a, const T* panel, int64_t step_b, bool accumulate) {
  const Multiply<T> kernel = pick<T, kCompiledStep<T, Step>>(rows, vectors);
  if (lanes == vectors * kLanes<T>) {
    kernel(block, segments, count, step_a, panel, step_b, accumulate);
  } else {
    multiply_partial(kernel, block, rows, lanes, segments, count, step_a, panel, step_b, accumulate);
  }
}

/// A part of the pixels of a class, those of a task's images behind each other.
template <class T>
void gather_class(const Gather& p, const PixelClass& cls, int64_t part, int64_t task, int64_t panel,
                  const T* const* weights_of) {
  const Panels<T> panels(p.channels_out);
  const int64_t ci = p.channels_in, step = channel_block<T>(p.taps, ci);
  const int64_t width = panels.width(panel), lanes = panels.lanes(panel), o = panels.begin(panel);
  const int64_t first = p.images * cls.count * part / p.parts, last = p.images * cls.count * (part + 1) / p.parts;
  const int64_t total = last - first, blocks = divide_up(total, kMaxRows);
  const bool unpacked = read_unpacked<T>(p);
  Acc<T>* out = static_cast<Acc<T>*>(p.out) + task * p.images * p.dst_image + o;
  for (int64_t c = 0; c < ci; c += step) {
    const int64_t n = c + step < ci ? step : ci - c;
    Segment segments[mf::conv::kMaxTaps];
    int count = 0;
    for (int t = 0; t < cls.taps; ++t) {
      const int64_t row = unpacked ? cls.tap[t] * ci + c : c * p.taps + cls.tap[t] * n;
      const Segment next{cls.delta[t] + c, row * width, n};
      if (count > 0 && segments[count - 1].a + segments[count - 1].len == next.a &&
          segments[count - 1].b + segments[count - 1].len * width == next.b) {
        segments[count - 1].len += n;
      } else {
        segments[count++] = next;
      }
    }
    int64_t pixel = first % cls.count, image = first / cls.count, done = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int rows = static_cast<int>(total * (b + 1) / blocks - done);
      done += rows;
      int64_t src[kMaxRows];
      Block<T> block;
      for (int i = 0; i < rows; ++i) {
        src[i] = image * p.src_image + cls.src[pixel];
        block.out[i] = out + image * p.dst_image + cls.dst[pixel];
        if (++pixel == cls.count) {
          pixel = 0;
          ++image;
        }
      }
      for (int pair = 0; pair < p.pairs; ++pair) {
        const T* a = static_cast<const T*>(p.a[pair]) + task * p.images * p.src_image;
        for (int i = 0; i < rows; ++i) block.rows[i] = a + src[i];
        const T* weights = weights_of[pair] + o * p.taps * ci;
        accumulate_block<T, 1>(block, rows, lanes, panels.vectors(panel), segments, count, 1, weights, width,
                               pair > 0 || c > 0);
      }
    }
  }
}

/// Forward of a first layer: so few products for each output that the images are padded rather than classified.
bool few_channels(const Gather& p) { return !p.transposed && p.channels_in <= 4; }

/// A block of MR neighbouring pixels of a padded image; `run` source values for each of the kernel's rows.
template <class T, int MR, int NV>
void multiply_row(const T* source, int64_t pixel_step, int64_t kernel_rows, int64_t run, int64_t row_step,
                  const T* panel, Acc<T>* out, int64_t out_step, bool accumulate) {
  constexpr int W = kLanes<T>;
  Vec<Acc<T>> acc[MR][NV];
  const T* row[MR];
  for (int i = 0; i < MR; ++i) {
    row[i] = source + i * pixel_step;
    for (int v = 0; v < NV; ++v) acc[i][v] = Vec<Acc<T>>::zero();
  }
  for (int64_t r = 0; r < kernel_rows; ++r)
#pragma GCC unroll 3
    for (int64_t k = r * row_step; k < r * row_step + run; ++k, panel += NV * W) {
      Vec<T> right[NV];
      for (int v = 0; v < NV; ++v) right[v] = Vec<T>::load(panel + v * W);
      for (int i = 0; i < MR; ++i) {
        const Vec<T> left = Vec<T>::broadcast(row[i][k]);
        for (int v = 0; v < NV; ++v) acc[i][v] = fma(left, right[v], acc[i][v]);
      }
    }
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) {
      Acc<T>* to = out + i * out_step + v * W;
      (accumulate ? Vec<Acc<T>>::load(to) + acc[i][v] : acc[i][v]).store(to);
    }
}

template <class T>
using MultiplyRow = decltype(&multiply_row<T, 1, 1>);

template <class T, int NV>
MultiplyRow<T> pick_row(int rows) {
  constexpr MultiplyRow<T> kernels[] = {multiply_row<T, 1, NV>, multiply_row<T, 2, NV>, multiply_row<T, 3, NV>,
                                        multiply_row<T, 4, NV>, multiply_row<T, 5, NV>, multiply_row<T, 6, NV>};
  return kernels[rows - 1];
}

template <class T>
MultiplyRow<T> pick_row(int rows, int vectors) {
  if constexpr (kMaxVectors<T> > 2) {
    if (vectors == 4) return pick_row<T, 4>(rows);
    if (vectors == 3) return pick_row<T, 3>(rows);
  }
  return vectors == 2 ? pick_row<T, 2>(rows) : pick_row<T, 1>(rows);
}

template <class T>
int64_t padded_elements(const Gather& p) {
  return round_line<T>((p.height + 2 * p.pad_y) * (p.width + 2 * p.pad_x) * p.channels_in);
}

template <class T>
void gather_few(const Gather& p, int64_t image, const T* const* packed, T* padded) {
  const Panels<T> panels(p.channels_out);
  const int64_t ci = p.channels_in, co = p.channels_out, pitch = (p.width + 2 * p.pad_x) * ci;
  const int64_t blocks = divide_up(p.out_width, kMaxRows);
  for (int pair = 0; pair < p.pairs; ++pair) {
    const T* a = static_cast<const T*>(p.a[pair]) + image * p.src_image;
    for (int64_t y = 0; y < p.height; ++y)
      memcpy(padded + (y + p.pad_y) * pitch + p.pad_x * ci, a + y * p.width * ci, p.width * ci * sizeof(T));
    Acc<T>* out = static_cast<Acc<T>*>(p.out) + image * p.dst_image;
    for (int64_t y = 0; y < p.out_height; ++y)
      for (int64_t b = 0, x = 0; b < blocks; ++b) {
        const int rows = static_cast<int>(p.out_width * (b + 1) / blocks - x);
        const T* source = padded + y * p.stride * pitch + x * p.stride * ci;
        Acc<T>* to = out + (y * p.out_width + x) * co;
        x += rows;
        for (int64_t panel = 0; panel < panels.count; ++panel) {
          const int64_t o = panels.begin(panel), lanes = panels.lanes(panel), width = panels.width(panel);
          const MultiplyRow<T> kernel = pick_row<T>(rows, panels.vectors(panel));
          const T* weights = packed[pair] + o * p.taps * ci;
          if (lanes == width) {
            kernel(source, p.stride * ci, p.kh, p.kw * ci, pitch, weights, to + o, co, pair > 0);
            continue;
          }
          alignas(64) Acc<T> tile[kMaxRows * kPanel<T>];
          kernel(source, p.stride * ci, p.kh, p.kw * ci, pitch, weights, tile, width, false);
          for (int i = 0; i < rows; ++i)
            for (int64_t c = 0; c < lanes; ++c) {
              Acc<T>& value = to[i * co + o + c];
              value = pair > 0 ? value + tile[i * width + c] : tile[i * width + c];
            }
        }
      }
  }
}

template <class T>
int64_t gather_scratch(const Gather& p) {
  return p.pairs * packed_elements<T>(p) + (few_channels(p) ? padded_elements<T>(p) : 0);
}

template <class T>
void gather(const Gather& p, int64_t begin, int64_t end, T* scratch) {
  T* const packed[2] = {scratch, scratch + packed_elements<T>(p)};
  const T* weights[2] = {packed[0], packed[1]};
  T* padded = scratch + p.pairs * packed_elements<T>(p);
  if (few_channels(p)) memset(padded, 0, padded_elements<T>(p) * sizeof(T));
  int64_t ready = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t task = unit / p.parts, part = unit % p.parts;
    if (task != ready) {
      const int64_t size = p.taps * p.channels_in * p.channels_out;
      for (int pair = 0; pair < p.pairs; ++pair) {
        const T* own = static_cast<const T*>(p.b[pair]) + task * size;
        if (read_unpacked<T>(p)) {
          weights[pair] = own;
        } else {
          pack_weights<T>(p, own, packed[pair]);
        }
      }
      ready = task;
    }
    if (few_channels(p)) {
      const int64_t first = part * p.images / p.parts, last = (part + 1) * p.images / p.parts;
      for (int64_t n = first; n < last; ++n) gather_few<T>(p, task * p.images + n, weights, padded);
      continue;
    }
    for (int64_t panel = 0; panel < divide_up(p.channels_out, kPanel<T>); ++panel)
      for (int c = 0; c < p.num_classes; ++c) gather_class<T>(p, p.classes[c], part, task, panel, weights);
  }
}

/// Pixels one visit of an accumulator block reduces: `images` images, or pairs of them, times `rows` output rows.
struct Chunk {
  int64_t images, rows, source_rows;
};

template <class T>
Chunk chunk_of(const Outer& p) {
  constexpr int64_t kPixels = 256;
  const int64_t pixels = p.out_height * p.out_width, elements = divide_up(p.images, kValues<T>);
  Chunk chunk;
  chunk.images = pixels < kPixels ? kPixels / pixels : 1;
  if (chunk.images > elements) chunk.images = elements;
  chunk.rows = p.out_height;
  if (pixels > kPixels + kPixels / 2) {
    const int64_t fits = kPixels / p.out_width;
    chunk.rows = fits > 1 ? fits : 1;
  }
  chunk.source_rows = (chunk.rows - 1) * p.stride + p.kh;
  return chunk;
}

/// Few input channels: rows of the block are (tap, channel) pairs over one padded image, `g` is packed only where it
/// must be.
bool few_channels(const Outer& p) { return p.ci <= 4; }

int64_t padded_width(const Outer& p) { return p.width + 2 * p.pad_x; }
int64_t padded_height(const Outer& p) { return p.height + 2 * p.pad_y; }

template <class T>
int64_t outer_scratch(const Outer& p) {
  if (few_channels(p)) {
    return round_line<T>(padded_height(p) * padded_width(p) * p.ci) + p.out_height * p.out_width * kPanel<T> +
           round_line<T>(p.out_height * sizeof(Segment));
  }
  const Chunk chunk = chunk_of<T>(p);
  const int64_t source = chunk.images * chunk.source_rows * p.width * divide_up(p.ci, kMaxRows) * kMaxRows;
  const int64_t grad = chunk.images * chunk.rows * p.out_width * divide_up(p.co, kPanel<T>) * kPanel<T>;
  const int64_t segments = p.kh * p.kw * chunk.rows * p.out_width * sizeof(Segment) / sizeof(T);
  return round_line<T>(source) + round_line<T>(grad) + round_line<T>(segments);
}

template <class T>
void outer_few(const Outer& p, int64_t task, int64_t panel_begin, int64_t panel_end, T* scratch) {
  const Panels<T> panels(p.co);
  const int64_t pw = padded_width(p), ph = padded_height(p), pixels = p.out_height * p.out_width;
  T* padded = scratch;
  T* grad = padded + round_line<T>(ph * pw * p.ci);
  Segment* segments = reinterpret_cast<Segment*>(grad + pixels * kPanel<T>);
  const int64_t rows = p.kh * p.kw * p.ci, blocks = divide_up(rows, kMaxRows);
  Acc<T>* out = static_cast<Acc<T>*>(p.out) + task * rows * p.co;
  memset(padded, 0, ph * pw * p.ci * sizeof(T));
  for (int pair = 0; pair < p.pairs; ++pair) {
    for (int64_t n = 0; n < p.images; n += kValues<T>) {
      const int64_t x_image = p.height * p.width * p.ci, g_image = pixels * p.co;
      const Stored<T>* x = static_cast<const Stored<T>*>(p.a[pair]) + (task * p.images + n) * x_image;
      const Stored<T>* g = static_cast<const Stored<T>*>(p.b[pair]) + (task * p.images + n) * g_image;
      const int64_t x_next = n + 1 < p.images ? x_image : 0, g_next = n + 1 < p.images ? g_image : 0;
      for (int64_t y = 0; y < p.height; ++y)
        copy_padded(padded + ((y + p.pad_y) * pw + p.pad_x) * p.ci, x + y * p.width * p.ci, x_next, p.width * p.ci,
                    p.width * p.ci);
      for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
        const int64_t lanes = panels.lanes(panel), width = panels.width(panel), o = panels.begin(panel);
        const bool direct = kValues<T> == 1 && lanes == width;
        if (!direct)
          for (int64_t q = 0; q < pixels; ++q) copy_padded(grad + q * width, g + q * p.co + o, g_next, lanes, width);
        const int64_t step_b = direct ? p.co : width;
        for (int64_t y = 0; y < p.out_height; ++y)
          segments[y] = {y * p.stride * pw * p.ci, y * p.out_width * step_b, p.out_width};
        for (int64_t b = 0, row = 0; b < blocks; ++b) {
          Block<T> block;
          const int size = static_cast<int>(rows * (b + 1) / blocks - row);
          for (int i = 0; i < size; ++i, ++row) {
            const int64_t tap = row / p.ci;
            block.rows[i] = padded + ((tap / p.kw) * pw + tap % p.kw) * p.ci + row % p.ci;
            block.out[i] = out + row * p.co + o;
          }
          accumulate_block<T, kAnyStep>(block, size, lanes, panels.vectors(panel), segments, p.out_height,
                                        p.stride * p.ci, direct ? reinterpret_cast<const T*>(g) + o : grad, step_b,
                                        pair > 0 || n > 0);
        }
      }
    }
  }
}

/// Appends the pixel runs of one tap: images are innermost in both packed operands, so a row is a single run.
int64_t tap_segments(const Outer& p, int64_t tap, int64_t images, int64_t row_begin, int64_t row_end,
                     int64_t source_begin, int64_t panel_width, Segment* to) {
  int64_t count = 0;
  const int64_t dy = tap / p.kw - p.pad_y, dx = tap % p.kw - p.pad_x;
  const int64_t x_begin = dx < 0 ? divide_up(-dx, p.stride) : 0;
  const int64_t x_fits = p.width - dx <= 0 ? 0 : (p.width - dx - 1) / p.stride + 1;
  const int64_t x_end = x_fits < p.out_width ? x_fits : p.out_width, run = p.stride == 1 ? x_end - x_begin : 1;
  for (int64_t y = row_begin; y < row_end; ++y) {
    const int64_t sy = y * p.stride + dy;
    if (sy < 0 || sy >= p.height) continue;
    for (int64_t x = x_begin; x < x_end; x += run) {
      const Segment next{((sy - source_begin) * p.width + x * p.stride + dx) * images * kMaxRows,
                         ((y - row_begin) * p.out_width + x) * images * panel_width, run * images};
      if (count > 0 && to[count - 1].a + to[count - 1].len * kMaxRows == next.a &&
          to[count - 1].b + to[count - 1].len * panel_width == next.b) {
        to[count - 1].len += next.len;
      } else {
        to[count++] = next;
      }
    }
  }
  return count;
}

template <class T>
void outer_chunk(const Outer& p, int64_t task, int pair, int64_t first, int64_t images, int64_t row_begin,
                 int64_t row_end, int64_t panel_begin, int64_t panel_end, int64_t row_part, bool accumulate,
                 T* scratch) {
  const Panels<T> panels(p.co);
  const Chunk chunk = chunk_of<T>(p);
  const int64_t row_blocks = divide_up(p.ci, kMaxRows), taps = p.kh * p.kw;
  const int64_t block_begin = row_part * row_blocks / p.row_parts;
  const int64_t block_end = (row_part + 1) * row_blocks / p.row_parts;
  int64_t source_begin = row_begin * p.stride - p.pad_y;
  int64_t source_end = (row_end - 1) * p.stride - p.pad_y + p.kh;
  if (source_begin < 0) source_begin = 0;
  if (source_end > p.height) source_end = p.height;
  const int64_t source_pixels = (source_end - source_begin) * p.width, pixels = (row_end - row_begin) * p.out_width;

  T* source = scratch;
  T* grad = source + round_line<T>(chunk.images * chunk.source_rows * p.width * row_blocks * kMaxRows);
  Segment* segments = reinterpret_cast<Segment*>(
      grad + round_line<T>(chunk.images * chunk.rows * p.out_width * panels.count * kPanel<T>));

  const int64_t source_size = source_pixels * images * kMaxRows;
  for (int64_t n = 0; n < images; ++n) {
    const int64_t image = (first + n) * kValues<T>, x_image = p.height * p.width * p.ci;
    const int64_t g_image = p.out_height * p.out_width * p.co;
    const int64_t x_next = image + 1 < p.images ? x_image : 0, g_next = image + 1 < p.images ? g_image : 0;
    const Stored<T>* x =
        static_cast<const Stored<T>*>(p.a[pair]) + (task * p.images + image) * x_image + source_begin * p.width * p.ci;
    for (int64_t q = 0; q < source_pixels; ++q) {
      T* to = source + block_begin * source_size + (q * images + n) * kMaxRows;
      int64_t c = block_begin * kMaxRows;
      const int64_t end = block_end * kMaxRows;
      for (; c < end && c + kMaxRows <= p.ci; c += kMaxRows, to += source_size) copy_rows(to, x + q * p.ci + c, x_next);
      if (c < end) copy_padded(to, x + q * p.ci + c, x_next, p.ci - c, p.ci - c);
    }
    const Stored<T>* g =
        static_cast<const Stored<T>*>(p.b[pair]) + (task * p.images + image) * g_image + row_begin * p.out_width * p.co;
    T* panel_to = grad;
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t width = panels.width(panel);
      for (int64_t q = 0; q < pixels; ++q)
        copy_padded(panel_to + (q * images + n) * width, g + q * p.co + panels.begin(panel), g_next,
                    panels.lanes(panel), width);
      panel_to += pixels * images * width;
    }
  }
  const T* panel_from = grad;
  const int64_t tap_capacity = chunk.rows * p.out_width;
  int64_t counts[mf::conv::kMaxTaps] = {}, ready = 0;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t width = panels.width(panel);
    for (int64_t tap = 0; tap < taps && width != ready; ++tap)
      counts[tap] =
          tap_segments(p, tap, images, row_begin, row_end, source_begin, width, segments + tap * tap_capacity);
    ready = width;
    for (int64_t tap = 0; tap < taps; ++tap) {
      Acc<T>* out = static_cast<Acc<T>*>(p.out) + (task * taps + tap) * p.ci * p.co + panels.begin(panel);
      for (int64_t b = block_begin; b < block_end; ++b) {
        const int rows = static_cast<int>(p.ci - b * kMaxRows < kMaxRows ? p.ci - b * kMaxRows : kMaxRows);
        Block<T> block;
        for (int i = 0; i < rows; ++i) {
          block.rows[i] = source + b * source_size + i;
          block.out[i] = out + (b * kMaxRows + i) * p.co;
        }
        accumulate_block<T, kMaxRows>(block, rows, panels.lanes(panel), panels.vectors(panel),
                                      segments + tap * tap_capacity, counts[tap], kMaxRows, panel_from, width,
                                      accumulate);
      }
    }
    panel_from += pixels * images * width;
  }
}

template <class T>
void outer(const Outer& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t panels = divide_up(p.co, kPanel<T>), elements = divide_up(p.images, kValues<T>);
  const Chunk chunk = chunk_of<T>(p);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row_part = unit % p.row_parts, part = unit / p.row_parts % p.parts;
    const int64_t task = unit / (p.row_parts * p.parts);
    const int64_t panel_begin = part * panels / p.parts, panel_end = (part + 1) * panels / p.parts;
    if (few_channels(p)) {
      outer_few<T>(p, task, panel_begin, panel_end, scratch);
      continue;
    }
    bool accumulate = false;
    for (int pair = 0; pair < p.pairs; ++pair)
      for (int64_t n = 0; n < elements; n += chunk.images)
        for (int64_t y = 0; y < p.out_height; y += chunk.rows) {
          const int64_t images = n + chunk.images < elements ? chunk.images : elements - n;
          const int64_t rows = y + chunk.rows < p.out_height ? y + chunk.rows : p.out_height;
          outer_chunk<T>(p, task, pair, n, images, y, rows, panel_begin, panel_end, row_part, accumulate, scratch);
          accumulate = true;
        }
  }
}

}  // namespace

}  // namespace mf::MF_ISA::conv

namespace mf::MF_ISA {

template <class T>
mf::conv::Kernels<T> conv_kernels() {
  return {conv::gather_scratch<T>, conv::gather<T>, conv::outer_scratch<T>,
          conv::outer<T>,          conv::kPanel<T>, conv::kMaxRows};
}
template mf::conv::Kernels<float> conv_kernels<float>();
template mf::conv::Kernels<double> conv_kernels<double>();
#ifdef __AVX512BF16__
template mf::conv::Kernels<mf::conv::Pair> conv_kernels<mf::conv::Pair>();
#else
template <>
mf::conv::Kernels<mf::conv::Pair> conv_kernels<mf::conv::Pair>() {
  return {};
}
#endif

}  // namespace mf::MF_ISA
