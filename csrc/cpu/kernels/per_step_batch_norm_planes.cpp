// Contiguous tensors [T, N, C, P]: a channel of a task is N planes of P elements, reduced and written by one thread
// while its data is in that core's L2.
#include "per_step_batch_norm_math.h"

namespace mf::MF_ISA {
namespace {

// Elements that the two passes of the variance read from L1 as one block.
template <typename T>
constexpr int64_t kMomentsBlock = 16384 / static_cast<int64_t>(sizeof(T));
// Elements one lane sums in T before its sum goes to double.
constexpr int64_t kLaneSum = 64;

// Clears lanes of a register that the tail of a plane does not own.
template <typename T>
struct KeepTail {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Bits Register __attribute__((vector_size(MF_VECTOR_BYTES)));
  Register mask;

  // Lanes [from, to).
  MF_INLINE KeepTail(int from, int to) {
    for (int i = 0; i < Vec<T>::size; ++i) {
      mask[i] = i >= from && i < to ? Bits{-1} : Bits{0};
    }
  }
  MF_INLINE Vec<T> operator()(Vec<T> v) const {
    return {reinterpret_cast<typename Vec<T>::Register>(reinterpret_cast<Register>(v.v) & mask)};
  }
};

struct KeepAll {
  template <typename V>
  MF_INLINE V operator()(V v) const {
    return v;
  }
};

// Calls f(lanes, offset, keep, chain) over n elements. The last, partly filled register starts early, on elements
// already seen, which `keep` clears (writing them twice is harmless); a plane narrower than a register is read by
// element.
template <typename T>
struct Walk {
  static constexpr int kWidth = Vec<T>::size;
  int64_t n, full;
  KeepTail<T> tail;

  explicit MF_INLINE Walk(int64_t n_)
      : n(n_),
        full(n_ / kWidth * kWidth),
        tail(n_ < kWidth ? 0 : kWidth - static_cast<int>(n_ - full), n_ < kWidth ? static_cast<int>(n_) : kWidth) {}

  // `chain` (0, 1) alternates, for sums that would otherwise wait for each other.
  template <typename F>
  MF_INLINE void operator()(F f) const {
    int64_t i = 0;
    for (; i + 2 * kWidth <= full; i += 2 * kWidth) {
      f(Whole<T>{}, i, KeepAll{}, Constant<0>{});
      f(Whole<T>{}, i + kWidth, KeepAll{}, Constant<1>{});
    }
    if (i < full) {
      f(Whole<T>{}, i, KeepAll{}, Constant<0>{});
    }
    if (full < n) {
      if (full > 0) {
        f(Whole<T>{}, n - kWidth, tail, Constant<1>{});
      } else {
        f(Part<T>{static_cast<int>(n)}, int64_t{0}, tail, Constant<1>{});
      }
    }
  }
};

// A block: images [n0, n1), pixels [p0, p1) of each, at most `limit` elements.
template <typename T, typename F>
MF_INLINE void for_blocks(const Problem<T>& p, int64_t limit, F f) {
  const int64_t pixels = p.pixels < limit ? p.pixels : limit;
  const int64_t images = pixels < p.pixels ? 1 : limit / pixels;
  for (int64_t n = 0; n < p.images; n += images) {
    const int64_t last = n + images < p.images ? n + images : p.images;
    for (int64_t i = 0; i < p.pixels; i += pixels) {
      f(n, last, i, i + pixels < p.pixels ? i + pixels : p.pixels);
    }
  }
}

template <typename T>
MF_INLINE int64_t plane(const Problem<T>& p, int64_t t, int64_t n, int64_t c) {
  return ((t * p.images + n) * p.channels + c) * p.pixels;
}

// Asks for the same pixels kAhead images further, up to a memory page of them: planes of a channel are too short and
// too far apart for the hardware to foresee the jump.
template <bool kWrite, typename S>
MF_INLINE void prefetch(const Call<S>& p, const S* pixels, int64_t n, int64_t count) {
  constexpr int64_t kAhead = 2;
  if (n + kAhead < p.images) {
    const char* from = reinterpret_cast<const char*>(pixels + kAhead * p.channels * p.pixels);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(S));
    for (int64_t i = 0; i < bytes && i < 4096; i += 64) {
      __builtin_prefetch(from + i, kWrite ? 1 : 0);
    }
  }
}

// Two passes over each block, whose second corrects the rounding of the first's mean.
template <typename S>
MF_INLINE void add_block(const Call<S>& p, int64_t t, int64_t c, int64_t n0, int64_t n1, int64_t p0, int64_t p1,
                         Moments& moments) {
  using T = Compute<S>;
  using V = Vec<T>;
  const Walk<T> walk(p1 - p0);
  const double count = static_cast<double>((n1 - n0) * (p1 - p0));
  V sum[2] = {V::zero(), V::zero()};
  for (int64_t n = n0; n < n1; ++n) {
    const S* x = p.x + plane(p, t, n, c) + p0;
    prefetch<false>(p, x, n, p1 - p0);
    walk([&](auto lanes, int64_t i, auto keep, auto chain)
             __attribute__((always_inline)) { sum[chain.value] += keep(lanes.load(x + i)); });
  }
  const T near = static_cast<T>(static_cast<double>((sum[0] + sum[1]).sum()) / count);
  const V centre = V::broadcast(near);
  V rest[2] = {V::zero(), V::zero()};
  V squares[2] = {V::zero(), V::zero()};
  for (int64_t n = n0; n < n1; ++n) {
    const S* x = p.x + plane(p, t, n, c) + p0;
    walk([&](auto lanes, int64_t i, auto keep, auto chain) __attribute__((always_inline)) {
      const V d = keep(lanes.load(x + i) - centre);
      rest[chain.value] += d;
      squares[chain.value] = fma(d, d, squares[chain.value]);
    });
  }
  const double shift = static_cast<double>((rest[0] + rest[1]).sum()) / count;
  const double spread = static_cast<double>((squares[0] + squares[1]).sum());
  moments.add(count, near + shift, spread - shift * shift * count);
}

template <typename O, typename S>
MF_INLINE void write(const Call<S>& p, int64_t t, int64_t c, const Compute<S>* constants) {
  using T = Compute<S>;
  using V = Vec<T>;
  const typename O::Constants k([&](int i) { return V::broadcast(constants[i]); }, p.slope);
  const Walk<T> walk(p.pixels);
  for (int64_t n = 0; n < p.images; ++n) {
    const int64_t base = plane(p, t, n, c);
    for (int j = 0; j < O::kOutputs; ++j) {
      prefetch<true>(p, p.out[j] + base, n, p.pixels);
    }
    walk([&](auto lanes, int64_t i, auto, auto) __attribute__((always_inline)) { apply_at<O>(p, k, lanes, base + i); });
  }
}

template <typename S, bool kLeaky>
void forward(const Call<S>& p, int64_t begin, int64_t end) {
  using T = Compute<S>;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t t = item / p.channels;
    const int64_t c = item % p.channels;
    Moments moments;
    for_blocks(p, kMomentsBlock<T>,
               [&](int64_t n0, int64_t n1, int64_t p0, int64_t p1) { add_block(p, t, c, n0, n1, p0, p1, moments); });
    set_statistics(p, t, c, moments.mean, moments.squares);
    T constants[bn::kMaxConstants];
    set_normal(p, t, c, constants, 1);
    write<Forward<T, kLeaky>>(p, t, c, constants);
  }
}

template <template <typename, bool> typename Order, typename S, bool kLeaky>
void differentiate(const Call<S>& p, int64_t begin, int64_t end) {
  using T = Compute<S>;
  using O = Order<T, kLeaky>;
  using V = Vec<T>;
  const S* inputs[3] = {p.x, p.gy, p.u};
  for (int64_t item = begin; item < end; ++item) {
    const int64_t t = item / p.channels;
    const int64_t c = item % p.channels;
    T constants[bn::kMaxConstants];
    set_normal(p, t, c, constants, 1);
    const Normal<T, kLeaky> normal([&](int i) { return V::broadcast(constants[i]); }, p.slope);
    double sums[O::kSums] = {};
    for_blocks(p, kLaneSum * V::size * O::kChains, [&](int64_t n0, int64_t n1, int64_t p0, int64_t p1) {
      const Walk<T> walk(p1 - p0);
      V part[2][O::kSums];
      for (int j = 0; j < O::kSums; ++j) {
        part[0][j] = part[1][j] = V::zero();
      }
      for (int64_t n = n0; n < n1; ++n) {
        const int64_t base = plane(p, t, n, c) + p0;
        for (int j = 0; j < O::kInputs; ++j) {
          prefetch<false>(p, inputs[j] + base, n, p1 - p0);
        }
        walk([&](auto lanes, int64_t i, auto keep, auto chain) __attribute__((always_inline)) {
          V in[O::kInputs];
          for (int j = 0; j < O::kInputs; ++j) {
            in[j] = lanes.load(inputs[j] + base + i);
          }
          O::reduce(normal, in, keep, part[O::kChains == 2 ? chain.value : 0]);
        });
      }
      for (int j = 0; j < O::kSums; ++j) {
        sums[j] += static_cast<double>((part[0][j] + part[1][j]).sum());
      }
    });
    O::finish(p, t, c, sums, constants, 1);
    write<O>(p, t, c, constants);
  }
}

}  // namespace

template <typename S, bool kLeaky>
bn::Pass<S> plane_kernel(bn::Order order) {
  switch (order) {
    case bn::Order::backward:
      return differentiate<Backward, S, kLeaky>;
    case bn::Order::double_backward:
      return differentiate<DoubleBackward, S, kLeaky>;
    default:
      return forward<S, kLeaky>;
  }
}

template bn::Pass<float> plane_kernel<float, false>(bn::Order);
template bn::Pass<float> plane_kernel<float, true>(bn::Order);
template bn::Pass<double> plane_kernel<double, false>(bn::Order);
template bn::Pass<double> plane_kernel<double, true>(bn::Order);
template bn::Pass<Bf16> plane_kernel<Bf16, false>(bn::Order);
template bn::Pass<Bf16> plane_kernel<Bf16, true>(bn::Order);

}  // namespace mf::MF_ISA
