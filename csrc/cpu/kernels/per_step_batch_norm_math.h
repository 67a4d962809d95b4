// The arithmetic of batch norm's three orders on one register, apart from how a tensor is walked.
//
// Names and formulas: docs/derivations/per_step_batch_norm.md. d = x − mean; sums are of g, g·d, u, u·d, u·g.
// A structure of constants is filled from `at(i)`: a broadcast value of one channel, or as many channels as lanes.
#pragma once

#include "per_step_batch_norm.h"
#include "tiles.h"

namespace mf::MF_ISA {

using bn::Call;
using bn::Problem;

// One channel of one task.
template <typename T>
struct Channel {
  double mean, rstd, scale, a, b, count;

  Channel(const Problem<T>& p, int64_t t, int64_t c) {
    const int64_t i = t * p.channels + c;
    const int64_t row = t * p.row_stride + c;
    mean = p.mean[i];
    rstd = p.rstd[i];
    scale = static_cast<T>(p.gamma[row] * p.rstd[i]);
    a = p.a != nullptr ? p.a[row] : 0.0;
    b = p.b != nullptr ? p.b[row] : 0.0;
    count = static_cast<double>(p.images * p.pixels);
  }
};

// z, the value before the leaky ReLU, in the same rounding in all orders: its sign decides the slope.
template <typename T, bool kLeaky>
struct Normal {
  Vec<T> mean, scale, beta, slope;

  Normal() = default;
  template <typename At>
  MF_INLINE Normal(At at, T slope_) : mean(at(0)), scale(at(1)), beta(at(2)), slope(Vec<T>::broadcast(slope_)) {}

  MF_INLINE Vec<T> z(Vec<T> d) const { return fma(d, scale, beta); }
  MF_INLINE Vec<T> gate(Vec<T> d, Vec<T> value) const {
    if constexpr (kLeaky) {
      return where_positive(z(d), value, value * slope);
    } else {
      return value;
    }
  }
};

// An order's results of `lanes` from the values at `i`; inputs and outputs are as the order has them.
template <typename O, typename S, typename Lanes>
MF_INLINE void apply_at(const Call<S>& p, const typename O::Constants& k, Lanes lanes, int64_t i) {
  using V = Vec<Compute<S>>;
  const S* inputs[3] = {p.x, p.gy, p.u};
  V in[O::kInputs], out[O::kOutputs];
  for (int j = 0; j < O::kInputs; ++j) {
    in[j] = lanes.load(inputs[j] + i);
  }
  O::apply(k, in, out);
  for (int j = 0; j < O::kOutputs; ++j) {
    lanes.store(out[j], p.out[j] + i);
  }
}

// The first three constants of every order.
template <typename T>
MF_INLINE void set_normal(const Problem<T>& p, int64_t t, int64_t c, T* constants, int64_t stride) {
  const int64_t i = t * p.channels + c;
  const int64_t row = t * p.row_stride + c;
  constants[0] = p.mean[i];
  constants[stride] = p.gamma[row] * p.rstd[i];
  constants[2 * stride] = p.beta[row];
}

template <typename T>
MF_INLINE void set_statistics(const Problem<T>& p, int64_t t, int64_t c, double mean, double squares) {
  const int64_t i = t * p.channels + c;
  const double var = squares / static_cast<double>(p.images * p.pixels);
  p.mean[i] = static_cast<T>(mean);
  p.var[i] = static_cast<T>(var);
  p.rstd[i] = static_cast<T>(1.0 / __builtin_sqrt(var + p.eps));
}

template <typename T, bool kLeaky>
struct Forward {
  static constexpr int kInputs = 1;
  static constexpr int kOutputs = 1;

  struct Constants : Normal<T, kLeaky> {
    using Normal<T, kLeaky>::Normal;
  };

  static MF_INLINE void apply(const Constants& k, const Vec<T>* in, Vec<T>* out) {
    const Vec<T> z = k.z(in[0] - k.mean);
    out[0] = kLeaky ? where_positive(z, z, z * k.slope) : z;
  }
};

template <typename T, bool kLeaky>
struct Backward {
  // kChains, kStrip: how many sets of sums fit in the registers, in one channel's plane and in rows of channels.
  static constexpr int kInputs = 2;
  static constexpr int kOutputs = 1;
  static constexpr int kSums = 2;
  static constexpr int kChains = 2;
  static constexpr int kStrip = 2;

  struct Constants : Normal<T, kLeaky> {
    Vec<T> d, one;
    template <typename At>
    MF_INLINE Constants(At at, T slope) : Normal<T, kLeaky>(at, slope), d(at(3)), one(at(4)) {}
  };

  // `keep` clears lanes that do not count.
  template <typename Keep>
  static MF_INLINE void reduce(const Normal<T, kLeaky>& k, const Vec<T>* in, Keep keep, Vec<T>* sums) {
    const Vec<T> d = in[0] - k.mean;
    const Vec<T> g = k.gate(d, keep(in[1]));
    sums[0] += g;
    sums[1] = fma(g, d, sums[1]);
  }

  static MF_INLINE void finish(const Problem<T>& p, int64_t t, int64_t c, const double* sums, T* constants,
                               int64_t stride) {
    const Channel<T> ch(p, t, c);
    const int64_t i = t * p.channels + c;
    p.affine[0][i] = static_cast<T>(sums[1] * ch.rstd);
    p.affine[1][i] = static_cast<T>(sums[0]);
    const double mean_g = sums[0] / ch.count;
    const double q = sums[1] * ch.rstd / ch.count;
    constants[3 * stride] = static_cast<T>(-ch.scale * ch.rstd * q);
    constants[4 * stride] = static_cast<T>(-ch.scale * mean_g);
  }

  static MF_INLINE void apply(const Constants& k, const Vec<T>* in, Vec<T>* out) {
    const Vec<T> d = in[0] - k.mean;
    out[0] = fma(k.gate(d, in[1]), k.scale, fma(d, k.d, k.one));
  }
};

template <typename T, bool kLeaky>
struct DoubleBackward {
  static constexpr int kInputs = 3;
  static constexpr int kOutputs = 2;
  static constexpr int kSums = 5;
  static constexpr int kChains = 1;
  static constexpr int kStrip = 1;

  // c_g = scale·u + g·d + g_one, c_x = g·g + u·u + d·d + one, each constant named after what it multiplies.
  struct Constants : Normal<T, kLeaky> {
    Vec<T> g, g_one, u, d, one;
    template <typename At>
    MF_INLINE Constants(At at, T slope)
        : Normal<T, kLeaky>(at, slope), g(at(3)), g_one(at(4)), u(at(5)), d(at(6)), one(at(7)) {}
  };

  template <typename Keep>
  static MF_INLINE void reduce(const Normal<T, kLeaky>& k, const Vec<T>* in, Keep keep, Vec<T>* sums) {
    const Vec<T> d = in[0] - k.mean;
    const Vec<T> g = k.gate(d, keep(in[1]));
    const Vec<T> u = keep(in[2]);
    sums[0] += g;
    sums[1] = fma(g, d, sums[1]);
    sums[2] += u;
    sums[3] = fma(u, d, sums[3]);
    sums[4] = fma(u, g, sums[4]);
  }

  static MF_INLINE void finish(const Problem<T>& problem, int64_t task, int64_t c, const double* sums, T* constants,
                               int64_t stride) {
    const Channel<T> ch(problem, task, c);
    const double p = sums[0] / ch.count;
    const double q = sums[1] * ch.rstd / ch.count;
    const double r = sums[2] / ch.count;
    const double t = sums[3] * ch.rstd / ch.count;
    const double w = sums[4] / ch.count;
    const double s = ch.scale;
    problem.affine[0][task * problem.channels + c] = static_cast<T>(ch.count * ch.rstd * (w - r * p - t * q));
    constants[3 * stride] = static_cast<T>(ch.rstd * (ch.a - s * t));
    constants[4 * stride] = static_cast<T>(ch.b - s * r);
    constants[5 * stride] = static_cast<T>(-s * ch.rstd * q);
    constants[6 * stride] = static_cast<T>(-ch.rstd * ch.rstd * (s * (w - r * p - 3 * t * q) + ch.a * q));
    constants[7 * stride] = static_cast<T>(ch.rstd * (s * (t * p + q * r) - ch.a * p));
  }

  static MF_INLINE void apply(const Constants& k, const Vec<T>* in, Vec<T>* out) {
    const Vec<T> d = in[0] - k.mean;
    const Vec<T> g = k.gate(d, in[1]);
    out[0] = k.gate(d, fma(in[2], k.scale, fma(d, k.g, k.g_one)));
    out[1] = fma(g, k.g, fma(in[2], k.u, fma(d, k.d, k.one)));
  }
};

// Running mean and sum of squared deviations; `add` is Chan's formula.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  MF_INLINE void add(double other_count, double other_mean, double other_squares) {
    const double total = count + other_count;
    const double delta = other_mean - mean;
    const double share = other_count / total;
    mean += delta * share;
    squares += other_squares + delta * delta * count * share;
    count = total;
  }
};

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// The function for contiguous tensors.
template <typename S, bool kLeaky>
bn::Pass<S> plane_kernel(bn::Order order);

}  // namespace mf::MF_ISA
