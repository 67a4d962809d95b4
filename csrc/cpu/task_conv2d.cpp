// Task-batched convolutions on the CPU: checks, geometry, choice of algorithm, threads. Schemas are defined in
// mamlpp_fast/ops/task_conv2d.py; derivation in docs/derivations/task_conv2d.md.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "amx/conv_amx.h"
#include "arguments.h"
#include "conv_choice.h"
#include "kernels/conv_kernels.h"

namespace mf::of_task_conv2d {
namespace {

using at::Tensor;
using conv::Operands;
using conv::Product;
using conv::Shape;
using OptTensor = std::optional<Tensor>;

template <class T>
const conv::Kernels<T>& kernels() {
  static const conv::Kernels<T> chosen = MF_DISPATCH(conv_kernels<T>)();
  return chosen;
}

const conv::WinogradKernels& winograd() {
  static const conv::WinogradKernels chosen = MF_DISPATCH(winograd_kernels)();
  return chosen;
}

/// The kernels for one product: tiles where this machine has them and they serve it.
template <class T, class Problem>
const conv::Kernels<T>& kernels_for([[maybe_unused]] const Problem& p) {
#ifdef MF_HAVE_AMXBF16
  if constexpr (std::is_same_v<T, conv::Pair>) {
    static const conv::Kernels<T> tiles = amxbf16::conv_tiles();
    if (isa() == Isa::amxbf16 && amxbf16::conv_serves(p)) return tiles;
  }
#endif
  return kernels<T>();
}

double bf16_peak(int64_t iterations) {
#ifdef MF_HAVE_AMXBF16
  if (isa() == Isa::amxbf16) return amxbf16::bf16_peak(iterations);
#endif
  return MF_DISPATCH(bf16_peak)(iterations);
}

/// Memory a thread keeps from call to call.
class Scratch {
 public:
  template <class T>
  T* get(int64_t elements) {
    const size_t bytes = static_cast<size_t>(elements) * sizeof(T);
    if (bytes > size_) {
      const size_t size = (bytes + 4095) / 4096 * 4096;
      memory_.reset(std::aligned_alloc(64, size));
      TORCH_CHECK(memory_ != nullptr, "task_conv2d: out of memory for ", size, " bytes of scratch");
      size_ = size;
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

thread_local Scratch kernel_scratch, tap_products, tap_weights, turned_weights;
thread_local Scratch widened[4];

/// The shape of x [T,N,H,W,Ci] * w [T,kh,kw,Ci,Co]; an axis along which the kernel is one pixel is not padded.
Shape shape_of(at::IntArrayRef x, at::IntArrayRef w, int64_t stride, int64_t padding) {
  const auto pad = [&](int64_t kernel) { return kernel > 1 ? padding : 0; };
  Shape s{x[0], x[1], x[2], x[3], x[4], w[1], w[2], w[4], 0, 0, stride, pad(w[1]), pad(w[2])};
  if (stride < 1) return s;  // which the caller refuses
  s.out_height = (s.height + 2 * s.pad_y - s.kh) / stride + 1;
  s.out_width = (s.width + 2 * s.pad_x - s.kw) / stride + 1;
  return s;
}

/// Checks one convolution x [T,N,H,W,Ci] * w [T,kh,kw,Ci,Co] = y [T,N,Ho,Wo,Co], whichever of the three is the result.
Shape check(const Tensor& x, const Tensor& w, const Tensor& y, int64_t stride, int64_t padding) {
  TORCH_CHECK_VALUE(x.dim() == 5 && w.dim() == 5 && y.dim() == 5,
                    "task_conv2d: expected activations [T,N,H,W,C] and weights [T,kh,kw,Ci,Co], got ", x.sizes(), ", ",
                    w.sizes(), " and ", y.sizes());
  Shape s = shape_of(x.sizes(), w.sizes(), stride, padding);
  TORCH_CHECK_VALUE(stride >= 1 && padding >= 0 && s.pad_y < s.kh && s.pad_x < s.kw && padding < std::max(s.kh, s.kw),
                    "stride, padding: expected stride >= 1, 0 <= padding < kernel, got ", stride, ", ", padding);
  TORCH_CHECK_VALUE(s.kh * s.kw <= conv::kMaxTaps, "w: expected at most ", conv::kMaxTaps, " taps, got ", s.kh, " x ",
                    s.kw);
  const std::vector<int64_t> expected{s.tasks, s.images, s.out_height, s.out_width, s.co};
  TORCH_CHECK_VALUE(s.height + 2 * s.pad_y >= s.kh && s.width + 2 * s.pad_x >= s.kw && w.size(0) == s.tasks &&
                        w.size(3) == s.ci && y.sizes() == at::IntArrayRef(expected),
                    "task_conv2d: expected output ", at::IntArrayRef(expected), " of ", x.sizes(), " and ", w.sizes(),
                    ", got ", y.sizes());
  return s;
}

void check_pair(const Tensor& a, const Tensor& b, const OptTensor& a2, const OptTensor& b2, const Tensor& out) {
  TORCH_CHECK_VALUE(a2.has_value() == b2.has_value(), "second operand pair: expected both tensors or neither, got one");
  const auto check_one = [&](const Tensor& t, const Tensor& like) {
    TORCH_CHECK_VALUE(t.sizes() == like.sizes(), "second operand pair: expected shape ", like.sizes(), ", got ",
                      t.sizes());
    TORCH_CHECK_VALUE(t.is_contiguous(), "task_conv2d: expected contiguous tensors, got strides ", t.strides());
    TORCH_CHECK_TYPE(
        t.scalar_type() == out.scalar_type() || (t.scalar_type() == at::kBFloat16 && out.scalar_type() == at::kFloat),
        "task_conv2d: expected operands of ", out.scalar_type(), ", got ", t.scalar_type());
  };
  check_one(a, a);
  check_one(b, b);
  if (a2.has_value()) {
    check_one(*a2, a);
    check_one(*b2, b);
  }
  TORCH_CHECK_VALUE(out.is_contiguous(), "out: expected a contiguous tensor, got strides ", out.strides());
  TORCH_CHECK_TYPE(out.scalar_type() == at::kFloat || out.scalar_type() == at::kDouble,
                   "out: expected float32 or float64, got ", out.scalar_type());
}

/// The operand's values, bfloat16 widened into kept memory.
const void* operand(const Tensor& t, int slot) {
  if (t.scalar_type() != at::kBFloat16) return t.const_data_ptr();
  const int64_t n = t.numel();
  float* to = widened[slot].get<float>(n);
  const c10::BFloat16* from = t.const_data_ptr<c10::BFloat16>();
  at::parallel_for(0, n, 1 << 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = static_cast<float>(from[i]);
  });
  return to;
}

/// Pointers to the operands, `as_is` or widened.
Operands operands(const Tensor& a, const Tensor& b, const OptTensor& a2, const OptTensor& b2, bool as_is) {
  const auto pointer = [&](const Tensor& t, int slot) { return as_is ? t.const_data_ptr() : operand(t, slot); };
  Operands o{{pointer(a, 0), nullptr}, {pointer(b, 1), nullptr}, 1};
  if (a2.has_value()) {
    o.a[1] = pointer(*a2, 2);
    o.b[1] = pointer(*b2, 3);
    o.pairs = 2;
  }
  return o;
}

/// Whether this machine multiplies bfloat16 and the operands can be read in pairs.
bool readable_in_pairs(const Tensor& a, const Tensor& b, const OptTensor& a2, const OptTensor& b2) {
  const auto readable = [](const Tensor& t) {
    return t.scalar_type() == at::kBFloat16 &&
           reinterpret_cast<uintptr_t>(t.const_data_ptr()) % sizeof(conv::Pair) == 0;
  };
  return kernels<conv::Pair>().gather != nullptr && readable(a) && readable(b) &&
         (!a2.has_value() || (readable(*a2) && readable(*b2)));
}

/// Whether a layer's operands should be rounded to bfloat16: always for tiles, in pairs where they are faster than
/// float32's forms; where nothing multiplies bfloat16 it would only be widened again.
bool pays_in_bfloat16(const Shape& s) {
  return isa() == Isa::amxbf16 || (kernels<conv::Pair>().gather != nullptr && conv::pairs_pay(s));
}

/// Ranges a task is cut into so that the threads get equal shares; results do not depend on it.
int64_t parts_for(int64_t tasks, int64_t at_most) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  return std::max<int64_t>(1, std::min(at_most, threads / std::gcd(tasks, threads)));
}

/// Runs `work(begin, end, scratch)` over all units with `elements` of scratch for each thread.
template <class T, class Work>
void run_units(int64_t units, int64_t elements, const Work& work) {
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) { work(begin, end, kernel_scratch.get<T>(elements)); });
}

/// Pixel classes of one convolution geometry, built once and kept.
struct Geometry {
  std::vector<conv::PixelClass> classes;
  std::vector<std::vector<int64_t>> offsets;
};

/// Groups destination pixels by their valid taps. Forward: source pixel = dst * stride + tap - padding.
/// To-input: source pixel = (dst + padding - tap) / stride where that divides, taps counted backwards.
Geometry build_geometry(const Shape& s, bool to_input) {
  const int64_t height = to_input ? s.height : s.out_height, width = to_input ? s.width : s.out_width;
  const int64_t source_height = to_input ? s.out_height : s.height, source_width = to_input ? s.out_width : s.width;
  const int64_t source_channels = to_input ? s.co : s.ci, channels = to_input ? s.ci : s.co;
  const int64_t taps = s.kh * s.kw;
  const auto source = [&](int64_t at, int64_t tap, int64_t size, int64_t padding) -> int64_t {
    if (!to_input) {
      const int64_t p = at * s.stride + tap - padding;
      return p < size ? p : -1;
    }
    const int64_t p = at + padding - tap;
    return p >= 0 && p % s.stride == 0 && p / s.stride < size ? p / s.stride : -1;
  };
  std::map<uint64_t, std::vector<std::pair<int64_t, int64_t>>> by_mask;
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x) {
      uint64_t mask = 0;
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t tap = to_input ? taps - 1 - t : t;
        if (source(y, tap / s.kw, source_height, s.pad_y) >= 0 && source(x, tap % s.kw, source_width, s.pad_x) >= 0)
          mask |= uint64_t{1} << t;
      }
      by_mask[mask].emplace_back(y, x);
    }
  Geometry geometry;
  for (const auto& [mask, pixels] : by_mask) {
    conv::PixelClass cls{};
    const auto place = [&](int64_t t, const std::pair<int64_t, int64_t>& pixel) {
      const int64_t tap = to_input ? taps - 1 - t : t;
      return (source(pixel.first, tap / s.kw, source_height, s.pad_y) * source_width +
              source(pixel.second, tap % s.kw, source_width, s.pad_x)) *
             source_channels;
    };
    for (int t = 0; t < taps; ++t)
      if (mask >> t & 1) {
        cls.tap[cls.taps] = t;
        cls.delta[cls.taps] = place(t, pixels.front()) - place(cls.tap[0], pixels.front());
        ++cls.taps;
      }
    std::vector<int64_t> src, dst;
    for (const auto& pixel : pixels) {
      src.push_back(cls.taps > 0 ? place(cls.tap[0], pixel) : 0);
      dst.push_back((pixel.first * width + pixel.second) * channels);
    }
    cls.count = static_cast<int64_t>(pixels.size());
    geometry.offsets.push_back(std::move(src));
    cls.src = geometry.offsets.back().data();
    geometry.offsets.push_back(std::move(dst));
    cls.dst = geometry.offsets.back().data();
    geometry.classes.push_back(cls);
  }
  return geometry;
}

const Geometry& geometry_of(const Shape& s, bool to_input) {
  thread_local std::map<std::vector<int64_t>, Geometry> kept;
  const std::vector<int64_t> key{s.height, s.width, s.ci, s.co, s.kh, s.kw, s.stride, s.pad_y, s.pad_x, to_input};
  auto found = kept.find(key);
  if (found == kept.end()) {
    if (kept.size() >= 256) kept.clear();
    found = kept.emplace(key, build_geometry(s, to_input)).first;
  }
  return found->second;
}

conv::Gather gather_problem(const Shape& s, const Operands& o, bool to_input, const Geometry& geometry, int64_t parts,
                            void* out) {
  conv::Gather p{o, s, out, parts};
  p.channels_in = to_input ? s.co : s.ci;
  p.channels_out = to_input ? s.ci : s.co;
  p.src_image = to_input ? s.out_height * s.out_width * s.co : s.height * s.width * s.ci;
  p.dst_image = to_input ? s.height * s.width * s.ci : s.out_height * s.out_width * s.co;
  p.taps = static_cast<int>(s.kh * s.kw);
  p.transposed = to_input;
  p.classes = geometry.classes.data();
  p.num_classes = static_cast<int>(geometry.classes.size());
  return p;
}

template <class T>
void gather(const Shape& s, const Operands& o, bool to_input, void* out) {
  const Geometry& geometry = geometry_of(s, to_input);
  const conv::Gather p = gather_problem(s, o, to_input, geometry, parts_for(s.tasks, s.images), out);
  const conv::Kernels<T>& k = kernels_for<T>(p);
  run_units<T>(p.tasks * p.parts, k.gather_scratch(p),
               [&](int64_t begin, int64_t end, T* scratch) { k.gather(p, begin, end, scratch); });
}

template <class T>
void outer(const Shape& s, const Operands& o, void* out) {
  conv::Outer p{o, s, out};
  const conv::Kernels<T>& k = kernels_for<T>(p);
  p.parts = parts_for(s.tasks, (s.co + k.panel - 1) / k.panel);
  p.row_parts = k.rows == 0 ? 1 : parts_for(s.tasks * p.parts, (s.ci + k.rows - 1) / k.rows);
  run_units<T>(p.tasks * p.parts * p.row_parts, k.outer_scratch(p),
               [&](int64_t begin, int64_t end, T* scratch) { k.outer(p, begin, end, scratch); });
}

int64_t registers(int64_t lanes) { return (lanes + 15) / 16; }

/// Whether the forward pays as a product with all taps at once and a sum: conv_sum_taps.
bool better_by_taps(const Shape& s) {
  const int64_t taps = s.kh * s.kw;
  const int64_t direct = taps * s.ci * registers(s.co), by_taps = s.ci * registers(taps * s.co) + 2 * taps;
  return s.stride == 1 && s.ci > 4 && 2 * direct > 3 * by_taps;
}

/// With stride 1, the convolution that leads from the output back to the input.
Shape turned(const Shape& s) {
  return {s.tasks, s.images, s.out_height,       s.out_width,       s.co, s.kh, s.kw, s.ci, s.height,
          s.width, 1,        s.kh - 1 - s.pad_y, s.kw - 1 - s.pad_x};
}

/// Forward, an image a unit.
template <class T>
void gather_by_taps(const Shape& s, const Operands& o, T* out) {
  static const auto sum = MF_DISPATCH(conv_sum_taps<T>);
  const int64_t taps = s.kh * s.kw, weights = taps * s.ci * s.co, pixels = s.height * s.width;
  T* const arranged = tap_weights.get<T>(o.pairs * s.tasks * weights);  // [pair, task, ci, tap, co]
  for (int64_t n = 0; n < o.pairs * s.tasks; ++n)
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t c = 0; c < s.ci; ++c)
        std::copy_n(static_cast<const T*>(o.b[n / s.tasks]) + n % s.tasks * weights + (tap * s.ci + c) * s.co, s.co,
                    arranged + n * weights + (c * taps + tap) * s.co);
  const Shape one{1, 1, s.height, s.width, s.ci, 1, 1, taps * s.co, s.height, s.width, 1, 0, 0};
  const Geometry& geometry = geometry_of(one, false);
  at::parallel_for(0, s.tasks * s.images, 1, [&](int64_t begin, int64_t end) {
    T* const products = tap_products.get<T>(pixels * taps * s.co + conv::kBeyond);
    std::fill_n(products + pixels * taps * s.co, conv::kBeyond, T(0));
    for (int64_t unit = begin; unit < end; ++unit) {
      Operands image = o;
      for (int i = 0; i < o.pairs; ++i) {
        image.a[i] = static_cast<const T*>(o.a[i]) + unit * pixels * s.ci;
        image.b[i] = arranged + (i * s.tasks + unit / s.images) * weights;
      }
      const conv::Gather p = gather_problem(one, image, false, geometry, 1, products);
      const conv::Kernels<T>& k = kernels<T>();
      k.gather(p, 0, 1, kernel_scratch.get<T>(k.gather_scratch(p)));
      sum(s, products, out + unit * s.out_height * s.out_width * s.co);
    }
  });
}

/// Whether to-weight takes x and g in each other's places, as the products of fewer registers: where the output has few
/// channels most lanes of a register of them would be empty.
bool better_swapped(const Shape& s) {
  return s.stride == 1 && s.ci > 4 && 3 * s.co * registers(s.ci) < 2 * s.ci * registers(s.co);
}

/// To-weight as the convolution of g with x: its result has the taps backwards and the channels exchanged.
template <class T>
void outer_swapped(const Shape& s, const Operands& o, T* out) {
  const Operands operands{{o.b[0], o.b[1]}, {o.a[0], o.a[1]}, o.pairs};
  const int64_t taps = s.kh * s.kw;
  T* const found = turned_weights.get<T>(s.tasks * taps * s.ci * s.co);
  outer<T>(turned(s), operands, found);
  for (int64_t task = 0; task < s.tasks; ++task)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const T* from = found + (task * taps + taps - 1 - tap) * s.co * s.ci;
      T* to = out + (task * taps + tap) * s.ci * s.co;
      for (int64_t i = 0; i < s.ci; ++i)
        for (int64_t k = 0; k < s.co; ++k) to[i * s.co + k] = from[k * s.ci + i];
    }
}

void winograd_run(const Shape& s, const Operands& o, Product product, void* out) {
  const bool to_input = product == Product::to_input, weight = product == Product::to_weight;
  const int64_t parts = parts_for(s.tasks, weight ? s.co / 16 : s.images);
  const conv::Winograd p{o, to_input ? turned(s) : s, out, parts, to_input};
  const conv::WinogradKernels& k = winograd();
  run_units<float>(
      p.tasks * p.parts, weight ? k.weight_scratch(p) : k.scratch(p),
      [&](int64_t begin, int64_t end, float* scratch) { (weight ? k.weight_run : k.run)(p, begin, end, scratch); });
}

/// Checks the operands beside the shape, and computes.
void dispatch(const Shape& s, Product product, const Tensor& a, const Tensor& b, const OptTensor& a2,
              const OptTensor& b2, const Tensor& out) {
  check_pair(a, b, a2, b2, out);
  if (out.numel() == 0) return;
  if (s.images == 0) {  // the gradient of weights that nothing was seen by
    out.zero_();
    return;
  }
  void* data = out.mutable_data_ptr();
  const bool to_weight = product == Product::to_weight, to_input = product == Product::to_input;
  const bool tiled = out.scalar_type() == at::kFloat && conv::choose(s, product).tiled;
  // The direct form in bfloat16 is faster than Winograd's in float32.
  if ((!tiled || conv::winograd_setting() < 0) && readable_in_pairs(a, b, a2, b2)) {
    const Operands o = operands(a, b, a2, b2, true);
    if (to_weight) return outer<conv::Pair>(s, o, data);
    Shape paired = s;
    int64_t& reduced = to_input ? paired.co : paired.ci;
    if (reduced % 2 == 0) {
      reduced /= 2;
      return gather<conv::Pair>(paired, o, to_input, data);
    }
  }
  const Operands o = operands(a, b, a2, b2, false);
  const auto direct = [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    if (!to_weight && !to_input && better_by_taps(s)) return gather_by_taps<T>(s, o, to);
    if (!to_weight) return gather<T>(s, o, to_input, to);
    better_swapped(s) ? outer_swapped<T>(s, o, to) : outer<T>(s, o, to);
  };
  if (out.scalar_type() == at::kDouble) return direct(static_cast<double*>(data));
  if (tiled) return winograd_run(s, o, product, data);
  direct(static_cast<float*>(data));
}

void task_conv2d(const Tensor& x, const Tensor& w, const OptTensor& x2, const OptTensor& w2, int64_t stride,
                 int64_t padding, Tensor& out) {
  dispatch(check(x, w, out, stride, padding), Product::forward, x, w, x2, w2, out);
}

void task_conv2d_to_input(const Tensor& g, const Tensor& w, const OptTensor& g2, const OptTensor& w2, int64_t stride,
                          int64_t padding, Tensor& out) {
  dispatch(check(out, w, g, stride, padding), Product::to_input, g, w, g2, w2, out);
}

void task_conv2d_to_weight(const Tensor& x, const Tensor& g, const OptTensor& x2, const OptTensor& g2, int64_t stride,
                           int64_t padding, Tensor& out) {
  dispatch(check(x, out, g, stride, padding), Product::to_weight, x, g, x2, g2, out);
}

/// Multiply-adds of a product, up to which two threads take less time for two products if each takes one of them: they
/// meet once then, and nothing is packed twice.
constexpr int64_t kBeside = int64_t{1} << 26;

/// Both gradients of a convolution.
void task_conv2d_gradients(const Tensor& x, const Tensor& w, const Tensor& g, const OptTensor& x2, const OptTensor& w2,
                           const OptTensor& g2, int64_t stride, int64_t padding, Tensor& gx, Tensor& gw) {
  const Shape s = check(gx, w, g, stride, padding);
  check(x, gw, g, stride, padding);
  const bool beside = s.tasks == 1 && at::get_num_threads() == 2 && conv::direct_cost(s) <= kBeside;
  const auto one = [&](int64_t which) {
    which == 0 ? task_conv2d_to_input(g, w, g2, w2, stride, padding, gx)
               : task_conv2d_to_weight(x, g, x2, g2, stride, padding, gw);
  };
  if (beside) return each(2, one);
  for (int64_t which : {0, 1}) one(which);
}

// Floating-point operations of `iterations` rounds of independent multiply-adds in registers, for timing the peaks.
double fma_peak(int64_t iterations) { return winograd().fma_peak(iterations); }

bool task_conv2d_pays_in_bfloat16(int64_t images, at::IntArrayRef image, int64_t ci, at::IntArrayRef kernel, int64_t co,
                                  int64_t stride, int64_t padding) {
  TORCH_CHECK_VALUE(image.size() == 2 && kernel.size() == 2 && stride >= 1,
                    "task_conv2d_pays_in_bfloat16: expected two sizes of image and of kernel and stride >= 1, got ",
                    image, ", ", kernel, " and ", stride);
  return pays_in_bfloat16(
      shape_of({1, images, image[0], image[1], ci}, {1, kernel[0], kernel[1], ci, co}, stride, padding));
}

[[maybe_unused]] const bool registered =
    implement("task_conv2d", &task_conv2d, "task_conv2d_to_input", &task_conv2d_to_input, "task_conv2d_to_weight",
              &task_conv2d_to_weight, "task_conv2d_gradients", &task_conv2d_gradients) &&
    implement_all("fma_peak(int iterations) -> float", &fma_peak) &&
    implement_all("bf16_peak(int iterations) -> float", &bf16_peak) &&
    implement_all(
        "task_conv2d_pays_in_bfloat16(int images, int[2] image, int ci, int[2] kernel, int co, int stride, "
        "int padding) -> bool",
        &task_conv2d_pays_in_bfloat16);

}  // namespace
}  // namespace mf::of_task_conv2d
