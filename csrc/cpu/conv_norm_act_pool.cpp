// mamlpp_fast::patch_moments and conv_norm_act_pool in four orders: mamlpp_fast/ops/conv_norm_act_pool.py; formulas in
// docs/derivations/conv_norm_act_pool.md.
//
// Passes over the images run in parallel, their partial sums are added up in order and in double precision, and what
// happens per channel is double precision throughout. Results depend neither on the number of threads nor on timing.

#include "kernels/conv_norm_act_pool.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.h"

namespace mf::of_conv_norm_act_pool {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

constexpr int64_t kRegister = 16;  // channels of the widest register

struct Problem {
  int64_t tasks, images;
  FirstLayer s;
  int64_t image() const { return s.height * s.width * s.ci; }
  int64_t pooled() const { return s.rows * s.columns * s.co; }
  double elements() const { return static_cast<double>(images * s.out_height() * s.out_width()); }
  int64_t moments() const { return (s.values() + 2) * s.values(); }
};

Problem check(const Tensor& padded, const Tensor& moments, const Tensor& w, double slope) {
  TORCH_CHECK_VALUE(padded.dim() == 5 && w.dim() == 5 && w.size(0) == padded.size(0) && w.size(3) == padded.size(4),
                    "padded, w: expected [T, N, H, W, Ci] and [T, kh, kw, Ci, C], got ", padded.sizes(), " and ",
                    w.sizes());
  TORCH_CHECK_VALUE(w.size(1) * w.size(2) <= 9, "w: expected at most 9 taps, got ", w.sizes());
  TORCH_CHECK_VALUE(slope >= 0, "slope: expected at least 0, got ", slope);
  const int64_t co = w.size(4);
  Problem p{padded.size(0), padded.size(1), {padded.size(2), padded.size(3), padded.size(4), w.size(1), w.size(2), co}};
  p.s.stride = (co + kRegister - 1) / kRegister * kRegister;
  p.s.rows = p.s.out_height() / 2;
  p.s.columns = p.s.out_width() / 2;
  TORCH_CHECK_VALUE(p.s.out_height() >= 2 && p.s.out_width() >= 2,
                    "padded: expected at least 2x2 outputs to pool, got images ", padded.sizes());
  const auto type = check_float("padded", padded);
  check_like("padded", padded, padded.sizes(), type);
  check_like("w", w, w.sizes(), type);
  check_like("moments", moments, {p.tasks, p.s.values() + 2, p.s.values()}, at::kDouble);
  return p;
}

void check_pooled(const Problem& p, const char* name, const Tensor& t, at::ScalarType type) {
  check_like(name, t, {p.tasks, p.images, p.s.rows, p.s.columns, p.s.co}, type);
}

void check_rows(const Problem& p, std::initializer_list<std::pair<const char*, const Tensor&>> rows,
                const Tensor& like) {
  for (const auto& [name, row] : rows) check_like(name, row, {p.tasks, p.s.co}, like.scalar_type());
}

/// gamma or beta, [C] or [T, C].
template <typename T>
struct AffineRow {
  AffineRow(const Problem& p, const char* name, const Tensor& t)
      : data(t.const_data_ptr<T>()), task_stride(t.dim() == 2 ? t.stride(0) : 0), stride(t.stride(-1)) {
    TORCH_CHECK_VALUE((t.dim() == 1 || (t.dim() == 2 && t.size(0) == p.tasks)) && t.size(-1) == p.s.co, name,
                      ": expected [", p.s.co, "] or [", p.tasks, ", ", p.s.co, "], got ", t.sizes());
  }
  double operator()(int64_t task, int64_t c) const { return data[task * task_stride + c * stride]; }
  const T* data;
  int64_t task_stride, stride;
};

/// The direction of gamma or beta, where it has one.
template <typename T>
std::optional<AffineRow<T>> direction(const Problem& p, const char* name, const OptTensor& t) {
  if (!t) return std::nullopt;
  return AffineRow<T>(p, name, *t);
}

using Row = std::vector<double>;

/// Closed forms of one task's weights [K, C] in double precision.
class Closed {
 public:
  Closed(const Problem& p, const Tensor& moments, int64_t task)
      : s_(p.s), data_(moments.const_data_ptr<double>() + task * p.moments()) {}
  const double* true_mean() const { return data_; }
  const double* centred_mean() const { return data_ + s_.values(); }

  /// covariance · a
  template <typename T>
  Row covariance(const T* a) const {
    const int64_t values = s_.values(), co = s_.co;
    const double* matrix = data_ + 2 * values;
    Row out(static_cast<size_t>(values * co), 0.0);
    for (int64_t i = 0; i < values; ++i)
      for (int64_t j = 0; j < values; ++j) {
        const double factor = matrix[i * values + j];
        for (int64_t c = 0; c < co; ++c) out[i * co + c] += factor * static_cast<double>(a[j * co + c]);
      }
    return out;
  }
  /// Σ_k a[k, c] b[k, c], of each channel.
  template <typename A, typename B>
  Row dot(const A* a, const B* b) const {
    Row out(static_cast<size_t>(s_.co), 0.0);
    for (int64_t k = 0; k < s_.values(); ++k)
      for (int64_t c = 0; c < s_.co; ++c)
        out[c] += static_cast<double>(a[k * s_.co + c]) * static_cast<double>(b[k * s_.co + c]);
    return out;
  }
  /// Σ_k mean[k] a[k, c], of each channel.
  template <typename A>
  Row along(const double* mean, const A* a) const {
    Row out(static_cast<size_t>(s_.co), 0.0);
    for (int64_t k = 0; k < s_.values(); ++k)
      for (int64_t c = 0; c < s_.co; ++c) out[c] += mean[k] * static_cast<double>(a[k * s_.co + c]);
    return out;
  }

 private:
  const FirstLayer& s_;
  const double* data_;
};

template <typename Work>
void each_image(const Problem& p, const Work& work) {
  each(p.tasks * p.images, [&](int64_t i) { work(i / p.images, i); });
}

/// The rows [K, stride] and [stride] of one task that a pass over its images reads.
template <typename T>
struct Folded {
  Folded(const Problem& p) : p(p), data(scratch<T>(p.tasks * (p.s.values() + 1) * p.s.stride)) {}
  T* weights(int64_t task) const { return data + task * (p.s.values() + 1) * p.s.stride; }
  T* shift(int64_t task) const { return weights(task) + p.s.values() * p.s.stride; }

  /// weights = matrix; shift = level − mean · matrix, with the weights as they were rounded.
  template <typename Matrix, typename Level>
  void fill(int64_t task, const Closed& closed, const Matrix& matrix, const Level& level) const {
    T *w = weights(task), *b = shift(task);
    std::fill(w, b + p.s.stride, T{0});
    Row away(static_cast<size_t>(p.s.co), 0.0);
    for (int64_t k = 0; k < p.s.values(); ++k)
      for (int64_t c = 0; c < p.s.co; ++c) {
        w[k * p.s.stride + c] = static_cast<T>(matrix(k, c));
        away[c] += closed.centred_mean()[k] * static_cast<double>(w[k * p.s.stride + c]);
      }
    for (int64_t c = 0; c < p.s.co; ++c) b[c] = static_cast<T>(level(c) - away[c]);
  }
  const Problem& p;
  T* data;
};

template <typename T>
void moments_of(const Problem& p, const Tensor& images, int64_t padding, Tensor& padded, Tensor& moments) {
  static const auto add_image = MF_DISPATCH(patch_moments<T>);
  static const auto panel_size = MF_DISPATCH(patch_panel);
  const FirstLayer& s = p.s;
  const int64_t values = s.values(), height = s.height - 2 * padding, width = s.width - 2 * padding;
  const int64_t pixels = p.images * height * width;
  const T* from = images.const_data_ptr<T>();
  T* to = padded.mutable_data_ptr<T>();
  double* out = moments.mutable_data_ptr<double>();
  each(p.tasks, [&](int64_t task) {
    // Sums of every sixteenth pixel, for one addition does not wait for the last then.
    constexpr int64_t kSums = 16;
    Row sums(static_cast<size_t>(kSums * s.ci), 0.0), centre(static_cast<size_t>(s.ci), 0.0);
    const T* all = from + task * pixels * s.ci;
    for (int64_t i = 0; i < pixels * s.ci; i += kSums * s.ci)
      for (int64_t k = 0; k < std::min(kSums, pixels - i / s.ci) * s.ci; ++k)
        sums[k] += static_cast<double>(all[i + k]);
    for (int64_t k = 0; k < kSums * s.ci; ++k) centre[k % s.ci] += sums[k];
    std::vector<T> shift(static_cast<size_t>(s.ci));
    for (int64_t c = 0; c < s.ci; ++c) shift[c] = static_cast<T>(centre[c] / static_cast<double>(pixels));
    double *true_mean = out + task * p.moments(), *mean = true_mean + values, *covariance = mean + values;
    std::fill(mean, covariance + values * values, 0.0);
    double* panel = scratch<double>(panel_size(s));
    for (int64_t n = 0; n < p.images; ++n) {
      T* image = to + (task * p.images + n) * p.image();
      for (int64_t y = 0; y < s.height; ++y)
        for (int64_t x = 0; x < s.width; ++x)
          for (int64_t c = 0; c < s.ci; ++c) image[(y * s.width + x) * s.ci + c] = T{0} - shift[c];
      for (int64_t y = 0; y < height; ++y) {
        const T* row = all + (n * height + y) * width * s.ci;
        T* inside = image + ((y + padding) * s.width + padding) * s.ci;
        for (int64_t i = 0; i < width * s.ci; ++i) inside[i] += row[i];
      }
      add_image(s, image, mean, covariance, panel);
    }
    for (int64_t k = 0; k < values; ++k) {
      mean[k] /= p.elements();
      true_mean[k] = mean[k] + static_cast<double>(shift[k % s.ci]);
    }
    for (int64_t i = 0; i < values; ++i)
      for (int64_t j = i; j < values; ++j) {
        double& upper = covariance[i * values + j];
        upper = upper / p.elements() - mean[i] * mean[j];
        covariance[j * values + i] = upper;
      }
  });
}

template <typename T>
void forward(const Problem& p, const Tensor& padded, const Tensor& moments, const Tensor& w_, const Tensor& gamma_,
             const Tensor& beta_, double eps, T slope, Tensor& y, Tensor& index, Tensor& mean, Tensor& rstd) {
  static const auto pass = MF_DISPATCH(first_layer_forward<T>);
  const AffineRow<T> gamma(p, "gamma", gamma_), beta(p, "beta", beta_);
  const Folded<T> folded(p);
  const int64_t co = p.s.co;
  each(p.tasks, [&](int64_t task) {
    const Closed closed(p, moments, task);
    const T* w = w_.const_data_ptr<T>() + task * p.s.values() * co;
    const Row variance = closed.dot(w, closed.covariance(w).data()), means = closed.along(closed.true_mean(), w);
    Row scale(static_cast<size_t>(co));
    for (int64_t c = 0; c < co; ++c) {
      const double inverse = 1.0 / std::sqrt(std::max(variance[c], 0.0) + eps);
      mean.mutable_data_ptr<T>()[task * co + c] = static_cast<T>(means[c]);
      rstd.mutable_data_ptr<T>()[task * co + c] = static_cast<T>(inverse);
      scale[c] = gamma(task, c) * inverse;
    }
    folded.fill(
        task, closed, [&](int64_t k, int64_t c) { return scale[c] * static_cast<double>(w[k * co + c]); },
        [&](int64_t c) { return beta(task, c); });
  });
  each_image(p, [&](int64_t task, int64_t i) {
    pass(p.s, padded.const_data_ptr<T>() + i * p.image(), folded.weights(task), folded.shift(task), slope,
         y.mutable_data_ptr<T>() + i * p.pooled(), index.mutable_data_ptr<uint8_t>() + i * p.pooled());
  });
}

/// What the orders after the first share: B = Σ g (patch − mean) [K, C] and Σ g [C] of every task.
template <typename T, typename Use>
void with_sums(const Problem& p, const Tensor& gy, const Tensor& y, const Tensor& index, const Tensor& padded,
               const Tensor& moments, T slope, const Use& use) {
  static const auto pass = MF_DISPATCH(first_layer_sums<T>);
  const int64_t values = p.s.values(), size = (values + 1) * p.s.stride;
  T* parts = scratch<T>(p.tasks * p.images * size);
  each_image(p, [&](int64_t, int64_t i) {
    pass(p.s, padded.const_data_ptr<T>() + i * p.image(), gy.const_data_ptr<T>() + i * p.pooled(),
         y.const_data_ptr<T>() + i * p.pooled(), index.const_data_ptr<uint8_t>() + i * p.pooled(), slope,
         parts + i * size);
  });
  each(p.tasks, [&](int64_t task) {
    const Closed closed(p, moments, task);
    Row b(static_cast<size_t>((values + 1) * p.s.co), 0.0);
    for (int64_t n = 0; n < p.images; ++n)
      for (int64_t k = 0; k <= values; ++k)
        for (int64_t c = 0; c < p.s.co; ++c)
          b[k * p.s.co + c] += static_cast<double>(parts[(task * p.images + n) * size + k * p.s.stride + c]);
    const double* total = b.data() + values * p.s.co;
    for (int64_t k = 0; k < values; ++k)
      for (int64_t c = 0; c < p.s.co; ++c) b[k * p.s.co + c] -= closed.centred_mean()[k] * total[c];
    use(task, closed, b.data(), total);
  });
}

template <typename T>
void backward(const Problem& p, const Tensor& gy, const Tensor& y, const Tensor& index, const Tensor& padded,
              const Tensor& moments, const Tensor& w_, const Tensor& gamma_, const Tensor& rstd_, T slope, Tensor& gw,
              Tensor& sums, Tensor& ggamma, Tensor& gbeta) {
  const AffineRow<T> gamma(p, "gamma", gamma_);
  const int64_t co = p.s.co, size = p.s.values() * co;
  const auto finish = [&](int64_t task, const Closed& closed, const double* b, const double* total) {
    const T *w = w_.const_data_ptr<T>() + task * size, *rstd = rstd_.const_data_ptr<T>() + task * co;
    const Row cw = closed.covariance(w), wb = closed.dot(w, b);
    T *out = gw.mutable_data_ptr<T>() + task * size, *kept = sums.mutable_data_ptr<T>() + task * size;
    for (int64_t k = 0; k < p.s.values(); ++k)
      for (int64_t c = 0; c < co; ++c) {
        const double inverse = rstd[c];
        const int64_t i = k * co + c;
        kept[i] = static_cast<T>(b[i]);
        out[i] = static_cast<T>(gamma(task, c) * inverse * (b[i] - inverse * inverse * wb[c] * cw[i]));
      }
    for (int64_t c = 0; c < co; ++c) {
      ggamma.mutable_data_ptr<T>()[task * co + c] = static_cast<T>(static_cast<double>(rstd[c]) * wb[c]);
      gbeta.mutable_data_ptr<T>()[task * co + c] = static_cast<T>(total[c]);
    }
  };
  with_sums<T>(p, gy, y, index, padded, moments, slope, finish);
}

template <typename T>
void tangent(const Problem& p, const Tensor& v_, const Tensor& y, const Tensor& index, const Tensor& padded,
             const Tensor& moments, const Tensor& w_, const Tensor& gamma_, const Tensor& rstd_, T slope,
             const OptTensor& gamma_dot_, const OptTensor& beta_dot_, Tensor& uy, Tensor& t) {
  static const auto pass = MF_DISPATCH(first_layer_tangent<T>);
  const AffineRow<T> gamma(p, "gamma", gamma_);
  const auto gamma_dot = direction<T>(p, "gamma_dot", gamma_dot_), beta_dot = direction<T>(p, "beta_dot", beta_dot_);
  const Folded<T> folded(p);
  const int64_t co = p.s.co, size = p.s.values() * co;
  each(p.tasks, [&](int64_t task) {
    const Closed closed(p, moments, task);
    const T *w = w_.const_data_ptr<T>() + task * size, *v = v_.const_data_ptr<T>() + task * size;
    const T* rstd = rstd_.const_data_ptr<T>() + task * co;
    Row along = closed.dot(v, closed.covariance(w).data());
    for (int64_t c = 0; c < co; ++c) {
      along[c] *= static_cast<double>(rstd[c]);
      t.mutable_data_ptr<T>()[task * co + c] = static_cast<T>(along[c]);
    }
    folded.fill(
        task, closed,
        [&](int64_t k, int64_t c) {
          const double inverse = rstd[c], wk = w[k * co + c], vk = v[k * co + c];
          const double folded_dot = gamma(task, c) * inverse * (vk - along[c] * inverse * wk);
          return gamma_dot ? folded_dot + (*gamma_dot)(task, c) * inverse * wk : folded_dot;
        },
        [&](int64_t c) { return beta_dot ? (*beta_dot)(task, c) : 0.0; });
  });
  each_image(p, [&](int64_t task, int64_t i) {
    pass(p.s, padded.const_data_ptr<T>() + i * p.image(), folded.weights(task), folded.shift(task),
         y.const_data_ptr<T>() + i * p.pooled(), index.const_data_ptr<uint8_t>() + i * p.pooled(), slope,
         uy.mutable_data_ptr<T>() + i * p.pooled());
  });
}

template <typename T>
void backward_tangent(const Problem& p, const Tensor& gy_dot, const Tensor& v_, const Tensor& y, const Tensor& index,
                      const Tensor& padded, const Tensor& moments, const Tensor& w_, const Tensor& gamma_,
                      const Tensor& rstd_, T slope, const Tensor& sums, const Tensor& t_, const OptTensor& gamma_dot_,
                      Tensor& gw_dot, Tensor& ggamma_dot, Tensor& gbeta_dot) {
  const AffineRow<T> gamma(p, "gamma", gamma_);
  const auto gamma_dot = direction<T>(p, "gamma_dot", gamma_dot_);
  const int64_t co = p.s.co, size = p.s.values() * co;
  const double m = p.elements();
  const auto finish = [&](int64_t task, const Closed& closed, const double* b_dot, const double* total) {
    const T *w = w_.const_data_ptr<T>() + task * size, *v = v_.const_data_ptr<T>() + task * size;
    const T *b = sums.const_data_ptr<T>() + task * size, *rstd = rstd_.const_data_ptr<T>() + task * co;
    const Row cw = closed.covariance(w), cv = closed.covariance(v);
    const Row wb = closed.dot(w, b), wb_dot = closed.dot(w, b_dot), vb = closed.dot(v, b);
    T* out = gw_dot.mutable_data_ptr<T>() + task * size;
    for (int64_t c = 0; c < co; ++c) {
      const double inverse = rstd[c], t = t_.const_data_ptr<T>()[task * co + c];
      const double q = inverse * wb[c] / m, q_dot = inverse * (wb_dot[c] + vb[c]) / m - inverse * t * q;
      const double scale = gamma(task, c) * inverse;
      for (int64_t k = 0; k < p.s.values(); ++k) {
        const int64_t i = k * co + c;
        const double dense = (2 * inverse * q * t - q_dot) * cw[i] - q * cv[i];
        double g = scale * (b_dot[i] - inverse * t * static_cast<double>(b[i]) + inverse * m * dense);
        if (gamma_dot) g += (*gamma_dot)(task, c) * inverse * (static_cast<double>(b[i]) - inverse * m * q * cw[i]);
        out[i] = static_cast<T>(g);
      }
      ggamma_dot.mutable_data_ptr<T>()[task * co + c] = static_cast<T>(q_dot * m);
      gbeta_dot.mutable_data_ptr<T>()[task * co + c] = static_cast<T>(total[c]);
    }
  };
  with_sums<T>(p, gy_dot, y, index, padded, moments, slope, finish);
}

void patch_moments_op(const Tensor& images, int64_t kh, int64_t kw, int64_t padding, Tensor& padded, Tensor& moments) {
  TORCH_CHECK_VALUE(images.dim() == 5 && kh * kw <= 9 && padding >= 0, "images: expected [T, N, H, W, Ci], got ",
                    images.sizes());
  Problem p{images.size(0),
            images.size(1),
            {images.size(2) + 2 * padding, images.size(3) + 2 * padding, images.size(4), kh, kw, 0, 0, 0, 0}};
  TORCH_CHECK_VALUE(p.elements() > 0, "images: expected at least one patch, got ", images.sizes());
  check_like("images", images, images.sizes(), padded.scalar_type());
  check_like("padded", padded, {p.tasks, p.images, p.s.height, p.s.width, p.s.ci}, images.scalar_type());
  check_like("moments", moments, {p.tasks, p.s.values() + 2, p.s.values()}, at::kDouble);
  typed(images, [&]<typename T>(Type<T>) { moments_of<T>(p, images, padding, padded, moments); });
}

void conv_norm_act_pool(const Tensor& padded, const Tensor& moments, const Tensor& w, const Tensor& gamma,
                        const Tensor& beta, double eps, double slope, Tensor& y, Tensor& index, Tensor& mean,
                        Tensor& rstd) {
  const Problem p = check(padded, moments, w, slope);
  check_pooled(p, "y", y, padded.scalar_type());
  check_pooled(p, "index", index, at::kByte);
  check_rows(p, {{"mean", mean}, {"rstd", rstd}}, padded);
  typed(padded, [&]<typename T>(Type<T>) {
    forward<T>(p, padded, moments, w, gamma, beta, eps, static_cast<T>(slope), y, index, mean, rstd);
  });
}

/// Checks the arguments that the orders after the first have in common.
Problem check_saved(const Tensor& pooled, const Tensor& y, const Tensor& index, const Tensor& padded,
                    const Tensor& moments, const Tensor& w, const Tensor& rstd, double slope) {
  const Problem p = check(padded, moments, w, slope);
  check_pooled(p, "y", y, padded.scalar_type());
  check_pooled(p, "index", index, at::kByte);
  check_pooled(p, "gradient or tangent", pooled, padded.scalar_type());
  check_rows(p, {{"rstd", rstd}}, padded);
  return p;
}

void conv_norm_act_pool_backward(const Tensor& gy, const Tensor& y, const Tensor& index, const Tensor& padded,
                                 const Tensor& moments, const Tensor& w, const Tensor& gamma, const Tensor& rstd,
                                 double slope, Tensor& gw, Tensor& sums, Tensor& ggamma, Tensor& gbeta) {
  const Problem p = check_saved(gy, y, index, padded, moments, w, rstd, slope);
  check_like("gw", gw, w.sizes(), w.scalar_type());
  check_like("sums", sums, {p.tasks, p.s.values(), p.s.co}, w.scalar_type());
  check_rows(p, {{"ggamma", ggamma}, {"gbeta", gbeta}}, w);
  typed(padded, [&]<typename T>(Type<T>) {
    backward<T>(p, gy, y, index, padded, moments, w, gamma, rstd, static_cast<T>(slope), gw, sums, ggamma, gbeta);
  });
}

void conv_norm_act_pool_tangent(const Tensor& v, const Tensor& y, const Tensor& index, const Tensor& padded,
                                const Tensor& moments, const Tensor& w, const Tensor& gamma, const Tensor& rstd,
                                double slope, Tensor& uy, Tensor& t, const OptTensor& gamma_dot,
                                const OptTensor& beta_dot) {
  const Problem p = check_saved(uy, y, index, padded, moments, w, rstd, slope);
  check_like("v", v, w.sizes(), w.scalar_type());
  check_rows(p, {{"t", t}}, w);
  typed(padded, [&]<typename T>(Type<T>) {
    tangent<T>(p, v, y, index, padded, moments, w, gamma, rstd, static_cast<T>(slope), gamma_dot, beta_dot, uy, t);
  });
}

void conv_norm_act_pool_backward_tangent(const Tensor& gy_dot, const Tensor& v, const Tensor& y, const Tensor& index,
                                         const Tensor& padded, const Tensor& moments, const Tensor& w,
                                         const Tensor& gamma, const Tensor& rstd, double slope, const Tensor& sums,
                                         const Tensor& t, Tensor& gw_dot, Tensor& ggamma_dot, Tensor& gbeta_dot,
                                         const OptTensor& gamma_dot) {
  const Problem p = check_saved(gy_dot, y, index, padded, moments, w, rstd, slope);
  check_like("v", v, w.sizes(), w.scalar_type());
  check_like("sums", sums, {p.tasks, p.s.values(), p.s.co}, w.scalar_type());
  check_like("gw_dot", gw_dot, w.sizes(), w.scalar_type());
  check_rows(p, {{"t", t}, {"ggamma_dot", ggamma_dot}, {"gbeta_dot", gbeta_dot}}, w);
  typed(padded, [&]<typename T>(Type<T>) {
    backward_tangent<T>(p, gy_dot, v, y, index, padded, moments, w, gamma, rstd, static_cast<T>(slope), sums, t,
                        gamma_dot, gw_dot, ggamma_dot, gbeta_dot);
  });
}

[[maybe_unused]] const bool registered =
    implement("patch_moments", &patch_moments_op, "conv_norm_act_pool", &conv_norm_act_pool,
              "conv_norm_act_pool_backward", &conv_norm_act_pool_backward, "conv_norm_act_pool_tangent",
              &conv_norm_act_pool_tangent, "conv_norm_act_pool_backward_tangent", &conv_norm_act_pool_backward_tangent);

}  // namespace
}  // namespace mf::of_conv_norm_act_pool
