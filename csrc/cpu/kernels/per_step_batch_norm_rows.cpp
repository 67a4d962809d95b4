// Channels-last tensors [T, M, C]: rows of channels, cut into pieces at places that depend on the shape alone, so that
// sums do not depend on the number of threads. Sums of the pieces, their combination, the elementwise pass.
#include "per_step_batch_norm_math.h"

namespace mf::MF_ISA {
namespace {

// Bytes and rows of what is read from L1 as one block; a lane sums at most kBlockRows in T before double.
constexpr int64_t kBlockBytes = 16384;
constexpr int64_t kBlockRows = 64;

// Calls f(lanes, Constant<registers>, c, from) over all channels, kStrip registers at a time where there are as many.
// The last register starts early, on channels already done: lanes before `from` must not be added again.
template <int kStrip, typename T, typename F>
MF_INLINE void for_channels(int64_t channels, F f) {
  constexpr int64_t kWidth = Vec<T>::size;
  int64_t c = 0;
  if constexpr (kStrip > 1) {
    for (; c + kStrip * kWidth <= channels; c += kStrip * kWidth) {
      f(Whole<T>{}, Constant<kStrip>{}, c, 0);
    }
  }
  for (; c + kWidth <= channels; c += kWidth) {
    f(Whole<T>{}, Constant<1>{}, c, 0);
  }
  if (c < channels) {
    if (channels >= kWidth) {
      f(Whole<T>{}, Constant<1>{}, channels - kWidth, static_cast<int>(kWidth - (channels - c)));
    } else {
      f(Part<T>{static_cast<int>(channels)}, Constant<1>{}, int64_t{0}, 0);
    }
  }
}

struct Piece {
  int64_t task, begin, end;  // rows of the task
};

template <typename T>
MF_INLINE Piece piece(const Problem<T>& p, int64_t item) {
  const int64_t rows = p.images * p.pixels;
  const int64_t begin = item % p.pieces * p.piece_rows;
  return {item / p.pieces, begin, begin + p.piece_rows < rows ? begin + p.piece_rows : rows};
}

template <typename T>
MF_INLINE int64_t block_rows(const Problem<T>& p, int inputs) {
  const int64_t rows = kBlockBytes / (p.channels * static_cast<int64_t>(sizeof(T)) * inputs);
  return rows < 16 ? 16 : rows > kBlockRows ? kBlockRows : rows;
}

template <typename T>
MF_INLINE double* sums_of(const Problem<T>& p, int64_t item) {
  return p.sums + item * bn::kMaxSums * p.channels;
}

// sums[0]: mean of the piece, sums[1]: its squared deviations. Two passes over each block, which is then in L1; the
// second corrects the rounding of the first's mean.
template <typename S>
void moments(const Call<S>& p, int64_t first, int64_t last) {
  using T = Compute<S>;
  using V = Vec<T>;
  const int64_t step = block_rows(p, 1);
  for (int64_t item = first; item < last; ++item) {
    const Piece part = piece(p, item);
    double* means = sums_of(p, item);
    double* squares = means + p.channels;
    for (int64_t row = part.begin; row < part.end; row += step) {
      const int64_t rows = row + step < part.end ? step : part.end - row;
      const S* x = p.x + (part.task * p.images * p.pixels + row) * p.channels;
      const double count = static_cast<double>(rows);
      const double before = static_cast<double>(row - part.begin);
      const double share = count / (before + count);
      for_channels<4, T>(p.channels, [&](auto lanes, auto strip, int64_t c, int from) __attribute__((always_inline)) {
        constexpr int kStrip = decltype(strip)::value;
        V centre[kStrip], rest[kStrip], spread[kStrip];
        for (int j = 0; j < kStrip; ++j) {
          centre[j] = rest[j] = spread[j] = V::zero();
        }
        for (int64_t m = 0; m < rows; ++m) {
          for (int j = 0; j < kStrip; ++j) {
            centre[j] += lanes.load(x + m * p.channels + c + j * V::size);
          }
        }
        for (int j = 0; j < kStrip; ++j) {
          centre[j] = centre[j] / V::broadcast(static_cast<T>(rows));
        }
        for (int64_t m = 0; m < rows; ++m) {
          for (int j = 0; j < kStrip; ++j) {
            const V d = lanes.load(x + m * p.channels + c + j * V::size) - centre[j];
            rest[j] += d;
            spread[j] = fma(d, d, spread[j]);
          }
        }
        for (int j = 0; j < kStrip; ++j) {
          T near[V::size], shifts[V::size], spreads[V::size];
          centre[j].store(near);
          rest[j].store(shifts);
          spread[j].store(spreads);
          double* mean = means + c + j * V::size;
          double* square = squares + c + j * V::size;
          for (int i = from; i < lanes.n; ++i) {
            const double shift = shifts[i] / count;
            const double block_squares = spreads[i] - shift * shift * count;
            if (before == 0) {
              mean[i] = near[i] + shift;
              square[i] = block_squares;
            } else {
              const double delta = near[i] + shift - mean[i];
              mean[i] += delta * share;
              square[i] += block_squares + delta * delta * before * share;
            }
          }
        }
      });
    }
  }
}

template <typename S>
void combine_moments(const Call<S>& p) {
  using T = Compute<S>;
  const double rows = static_cast<double>(p.images * p.pixels);
  for (int64_t t = 0; t < p.tasks; ++t) {
    double* means = sums_of(p, t * p.pieces);
    double* squares = means + p.channels;
    for (int64_t k = 1; k < p.pieces; ++k) {
      const double* mean = sums_of(p, t * p.pieces + k);
      const double* square = mean + p.channels;
      const double before = static_cast<double>(k * p.piece_rows);
      const double after = k + 1 < p.pieces ? before + static_cast<double>(p.piece_rows) : rows;
      const double share = (after - before) / after;
      for (int64_t c = 0; c < p.channels; ++c) {
        const double delta = mean[c] - means[c];
        means[c] += delta * share;
        squares[c] += square[c] + delta * delta * before * share;
      }
    }
    T* constants = p.constants + t * bn::kMaxConstants * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) {
      set_statistics(p, t, c, means[c], squares[c]);
      set_normal(p, t, c, constants + c, p.channels);
    }
  }
}

template <template <typename, bool> typename Order, typename S, bool kLeaky>
void sums(const Call<S>& p, int64_t first, int64_t last) {
  using T = Compute<S>;
  using O = Order<T, kLeaky>;
  using V = Vec<T>;
  const S* inputs[3] = {p.x, p.gy, p.u};
  const int64_t step = block_rows(p, O::kInputs);
  for (int64_t item = first; item < last; ++item) {
    const Piece part = piece(p, item);
    const T* mean = p.mean + part.task * p.channels;
    const T* rstd = p.rstd + part.task * p.channels;
    const T* gamma = p.gamma + part.task * p.row_stride;
    const T* beta = p.beta + part.task * p.row_stride;
    double* totals = sums_of(p, item);
    for (int64_t i = 0; i < O::kSums * p.channels; ++i) {
      totals[i] = 0;
    }
    for (int64_t row = part.begin; row < part.end; row += step) {
      const int64_t rows = row + step < part.end ? step : part.end - row;
      const int64_t base = (part.task * p.images * p.pixels + row) * p.channels;
      for_channels<O::kStrip, T>(
          p.channels, [&](auto lanes, auto strip, int64_t c, int from) __attribute__((always_inline)) {
            constexpr int kStrip = decltype(strip)::value;
            Normal<T, kLeaky> normal[kStrip];
            V acc[kStrip][O::kSums];
            for (int j = 0; j < kStrip; ++j) {
              const int64_t at = c + j * V::size;
              normal[j].mean = lanes.load(mean + at);
              normal[j].scale = lanes.load(gamma + at) * lanes.load(rstd + at);
              normal[j].beta = lanes.load(beta + at);
              normal[j].slope = V::broadcast(p.slope);
              for (V& v : acc[j]) {
                v = V::zero();
              }
            }
            for (int64_t m = 0; m < rows; ++m) {
              for (int j = 0; j < kStrip; ++j) {
                V in[O::kInputs];
                for (int k = 0; k < O::kInputs; ++k) {
                  in[k] = lanes.load(inputs[k] + base + m * p.channels + c + j * V::size);
                }
                O::reduce(normal[j], in, [](V v) __attribute__((always_inline)) { return v; }, acc[j]);
              }
            }
            for (int j = 0; j < kStrip; ++j) {
              for (int k = 0; k < O::kSums; ++k) {
                T values[V::size];
                acc[j][k].store(values);
                double* total = totals + k * p.channels + c + j * V::size;
                for (int i = from; i < lanes.n; ++i) {
                  total[i] += values[i];
                }
              }
            }
          });
    }
  }
}

template <typename O, typename S>
void combine(const Call<S>& p) {
  using T = Compute<S>;
  for (int64_t t = 0; t < p.tasks; ++t) {
    double* totals = sums_of(p, t * p.pieces);
    for (int64_t k = 1; k < p.pieces; ++k) {
      const double* part = sums_of(p, t * p.pieces + k);
      for (int64_t i = 0; i < O::kSums * p.channels; ++i) {
        totals[i] += part[i];
      }
    }
    T* constants = p.constants + t * bn::kMaxConstants * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) {
      double channel[O::kSums];
      for (int j = 0; j < O::kSums; ++j) {
        channel[j] = totals[j * p.channels + c];
      }
      set_normal(p, t, c, constants + c, p.channels);
      O::finish(p, t, c, channel, constants + c, p.channels);
    }
  }
}

template <typename O, typename S>
void apply(const Call<S>& p, int64_t first, int64_t last) {
  using T = Compute<S>;
  for (int64_t item = first; item < last; ++item) {
    const Piece part = piece(p, item);
    const T* constants = p.constants + part.task * bn::kMaxConstants * p.channels;
    const int64_t rows = part.task * p.images * p.pixels;
    for (int64_t row = rows + part.begin; row < rows + part.end; ++row) {
      const int64_t base = row * p.channels;
      for_channels<1, T>(p.channels, [&](auto lanes, auto, int64_t c, int) __attribute__((always_inline)) {
        const auto load = [&](int i)
                              __attribute__((always_inline)) { return lanes.load(constants + i * p.channels + c); };
        const typename O::Constants k(load, p.slope);
        apply_at<O>(p, k, lanes, base + c);
      });
    }
  }
}

template <template <typename, bool> typename Order, typename S, bool kLeaky>
bn::Kernels<S> derivative() {
  using O = Order<Compute<S>, kLeaky>;
  return {nullptr, sums<Order, S, kLeaky>, combine<O, S>, apply<O, S>};
}

template <typename S, bool kLeaky>
bn::Kernels<S> row_kernels(bn::Order order) {
  switch (order) {
    case bn::Order::backward:
      return derivative<Backward, S, kLeaky>();
    case bn::Order::double_backward:
      return derivative<DoubleBackward, S, kLeaky>();
    default:
      return {nullptr, moments<S>, combine_moments<S>, apply<Forward<Compute<S>, kLeaky>, S>};
  }
}

}  // namespace

template <typename S>
bn::Kernels<S> batch_norm_kernels(bn::Order order, bool leaky) {
  bn::Kernels<S> kernels = leaky ? row_kernels<S, true>(order) : row_kernels<S, false>(order);
  kernels.planes = leaky ? plane_kernel<S, true>(order) : plane_kernel<S, false>(order);
  return kernels;
}

template bn::Kernels<float> batch_norm_kernels<float>(bn::Order, bool);
template bn::Kernels<double> batch_norm_kernels<double>(bn::Order, bool);
template bn::Kernels<Bf16> batch_norm_kernels<Bf16>(bn::Order, bool);

}  // namespace mf::MF_ISA
