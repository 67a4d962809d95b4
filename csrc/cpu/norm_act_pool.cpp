// mamlpp_fast::norm_act_pool, its backward and the tangents of both: mamlpp_fast/ops/norm_act_pool.py; formulas in
// docs/derivations/norm_act_pool.md.
//
// Each order is a reduction, image by image, whose partial sums are added up in order and in double precision, and then
// an elementwise pass. Results depend neither on the number of threads nor on their timing.

#include "kernels/norm_act_pool.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.h"

namespace mf::of_norm_act_pool {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

struct Problem {
  int64_t tasks, images;
  PoolShape shape;
  int64_t group;  // neighbouring channels with one statistic
  int64_t dense() const { return shape.height * shape.width * shape.channels; }
  int64_t pooled() const { return shape.rows * shape.columns * shape.channels; }
  double elements() const { return static_cast<double>(group * images * shape.height * shape.width); }
  /// Replaces what every channel has by the sum over its group.
  void pool_groups(std::vector<double>& row) const {
    for (int64_t first = 0; first < shape.channels && group > 1; first += group) {
      double total = 0;
      for (int64_t c = first; c < first + group; ++c) total += row[c];
      for (int64_t c = first; c < first + group; ++c) row[c] = total;
    }
  }
};

void check_row(const Problem& p, const char* name, const Tensor& t) {
  const int64_t channels = p.shape.channels;
  const bool shared = t.dim() == 2 && t.size(0) > 0 && p.tasks % t.size(0) == 0;
  TORCH_CHECK_VALUE((t.dim() == 1 || shared) && t.size(-1) == channels, name, ": expected [", channels, "] or [",
                    p.tasks, ", ", channels, "], got ", t.sizes());
}

Problem check(const Tensor& z, const Tensor& gamma, const Tensor& beta, bool pool, int64_t group) {
  TORCH_CHECK_VALUE(z.dim() == 5, "z: expected [T, N, H, W, C], got ", z.sizes());
  const int64_t height = z.size(2), width = z.size(3), step = pool ? 2 : 1;
  const Problem p{z.size(0), z.size(1), {height, width, z.size(4), height / step, width / step, pool}, group};
  TORCH_CHECK_VALUE(group > 0 && z.size(4) % group == 0, "group: expected a divisor of ", z.size(4), ", got ", group);
  TORCH_CHECK_VALUE(p.elements() > 1, "z: expected more than one element per task and channel to normalise, got ",
                    z.sizes());
  TORCH_CHECK_VALUE(p.shape.rows > 0 && p.shape.columns > 0, "z: expected at least 2x2 pixels to pool, got ",
                    z.sizes());
  check_row(p, "gamma", gamma);
  check_row(p, "beta", beta);
  return p;
}

void check_shape(const char* name, const Tensor& t, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(t.sizes() == expected, name, ": expected ", expected, ", got ", t.sizes());
}

/// Statistics and gradients of rows: one for every task.
void check_rows(const Problem& p, std::initializer_list<std::pair<const char*, const Tensor&>> rows) {
  for (const auto& [name, row] : rows) check_shape(name, row, {p.tasks, p.shape.channels});
}

void check_pooled(const Problem& p, const char* name, const Tensor& t) {
  check_shape(name, t, {p.tasks, p.images, p.shape.rows, p.shape.columns, p.shape.channels});
}

void check_index(const Problem& p, const Tensor& index) {
  if (!p.shape.pool) return;
  check_pooled(p, "index", index);
  TORCH_CHECK_VALUE(index.scalar_type() == at::kByte && index.is_contiguous(), "index: expected contiguous uint8, got ",
                    index.scalar_type(), " of strides ", index.strides());
}

/// The values of an operand, contiguous and of type T.
template <typename T>
struct In {
  explicit In(const Tensor& t) : tensor(t.to(c10::CppTypeToScalarType<T>::value).contiguous()) {}
  const T* data() const { return tensor.const_data_ptr<T>(); }
  Tensor tensor;
};

/// Rows [C] or [T, C], or [R, C] with each row that of T / R neighbouring tasks.
template <typename T>
struct InRows : In<T> {
  InRows(const Problem& p, const Tensor& t)
      : In<T>(t), stride(t.dim() == 2 ? t.size(1) : 0), each(t.dim() == 2 && t.size(0) > 0 ? p.tasks / t.size(0) : 1) {}
  const T* row(int64_t task) const { return this->data() + task / each * stride; }
  int64_t stride, each;
};

/// The direction of a parameter, where it has one.
template <typename T>
std::optional<InRows<T>> direction(const Problem& p, const char* name, const OptTensor& t) {
  if (!t) return std::nullopt;
  check_row(p, name, *t);
  return InRows<T>(p, *t);
}

template <typename T>
struct Out : Result {
  explicit Out(const Tensor& t) : Result(t, c10::CppTypeToScalarType<T>::value) {}
  T* data() const { return buffer.template mutable_data_ptr<T>(); }
};

/// Partial sums of every image and rows of every task, in the calling thread's memory.
template <typename T>
class Scratch {
 public:
  Scratch(const Problem& p, int64_t sums, int64_t rows)
      : channels_(p.shape.channels), images_(p.images), sums_(sums), rows_(rows) {
    data_ = scratch<T>(p.tasks * (p.images * sums + rows) * channels_);
    rows_data_ = data_ + p.tasks * p.images * sums * channels_;
  }
  /// Sum number i of an image, numbered through all tasks.
  T* sum(int64_t image, int64_t i) const { return data_ + (image * sums_ + i) * channels_; }
  T* row(int64_t task, int64_t i) const { return rows_data_ + (task * rows_ + i) * channels_; }

  /// Sum number i over a task's images.
  std::vector<double> total(int64_t task, int64_t i) const {
    std::vector<double> total(static_cast<size_t>(channels_), 0.0);
    for (int64_t image = task * images_; image < (task + 1) * images_; ++image) {
      const T* part = sum(image, i);
      for (int64_t c = 0; c < channels_; ++c) total[c] += static_cast<double>(part[c]);
    }
    return total;
  }

 private:
  int64_t channels_, images_, sums_, rows_;
  T *data_, *rows_data_;
};

/// reduce(task, image) for all images, numbered through all tasks, then combine(task), then apply(task, image): whole
/// tasks in parallel where they fill the threads, so that a task's second pass finds its tensors in the cache; else
/// images.
template <typename Reduce, typename Combine, typename Apply>
void run(const Problem& p, const Reduce& reduce, const Combine& combine, const Apply& apply) {
  const int64_t threads = at::get_num_threads();
  if (p.tasks % threads == 0 || p.tasks >= 4 * threads) {
    return each(p.tasks, [&](int64_t task) {
      const int64_t first = task * p.images;
      for (int64_t image = first; image < first + p.images; ++image) reduce(task, image);
      combine(task);
      for (int64_t image = first; image < first + p.images; ++image) apply(task, image);
    });
  }
  const auto each_image = [&](const auto& work) {
    each(p.tasks * p.images, [&](int64_t image) { work(image / p.images, image); });
  };
  each_image(reduce);
  for (int64_t task = 0; task < p.tasks; ++task) combine(task);
  each_image(apply);
}

template <typename T>
void forward(const Problem& p, const Tensor& z_, const Tensor& gamma_, const Tensor& beta_, double eps, double slope,
             Tensor& y_, Tensor& index_, Tensor& mean_, Tensor& rstd_) {
  static const auto moments = MF_DISPATCH(nap_moments<T>);
  static const auto write = MF_DISPATCH(nap_forward<T>);
  const In<T> z(z_);
  const InRows<T> gamma(p, gamma_), beta(p, beta_);
  const Out<T> y(y_), mean(mean_), rstd(rstd_);
  const T* from = z.data();
  T *to = y.data(), *means = mean.data(), *rstds = rstd.data();
  uint8_t* index = p.shape.pool ? index_.mutable_data_ptr<uint8_t>() : nullptr;
  const int64_t channels = p.shape.channels;
  const double pixels = static_cast<double>(p.shape.height * p.shape.width);
  const Scratch<T> scratch(p, 3, 1);
  run(
      p,
      [&](int64_t, int64_t at) {
        moments(p.shape, from + at * p.dense(), scratch.sum(at, 0), scratch.sum(at, 1), scratch.sum(at, 2));
      },
      [&](int64_t t) {
        const auto image_mean = [&](int64_t i, int64_t c) {
          return static_cast<double>(scratch.sum(t * p.images + i, 0)[c]) +
                 static_cast<double>(scratch.sum(t * p.images + i, 1)[c]) / pixels;
        };
        std::vector<double> centre(static_cast<size_t>(channels), 0.0), squares = scratch.total(t, 2);
        for (int64_t i = 0; i < p.images; ++i)
          for (int64_t c = 0; c < channels; ++c) centre[c] += image_mean(i, c) / static_cast<double>(p.images);
        for (int64_t i = 0; i < p.images; ++i)
          for (int64_t c = 0; c < channels; ++c) {
            const double rest = static_cast<double>(scratch.sum(t * p.images + i, 1)[c]),
                         away = image_mean(i, c) - centre[c];
            squares[c] += pixels * away * away - rest * rest / pixels;
          }
        if (p.group > 1) {
          std::vector<double> common = centre;
          p.pool_groups(common);
          const double each = p.elements() / static_cast<double>(p.group);
          for (int64_t c = 0; c < channels; ++c) {
            const double level = common[c] / static_cast<double>(p.group), away = centre[c] - level;
            squares[c] += each * away * away;
            centre[c] = level;
          }
          p.pool_groups(squares);
        }
        for (int64_t c = 0; c < channels; ++c) {
          const double inverse = 1.0 / std::sqrt(squares[c] / p.elements() + eps);
          means[t * channels + c] = static_cast<T>(centre[c]);
          rstds[t * channels + c] = static_cast<T>(inverse);
          scratch.row(t, 0)[c] = static_cast<T>(inverse) * gamma.row(t)[c];
        }
      },
      [&](int64_t t, int64_t at) {
        const NormRows<T> rows{means + t * channels, scratch.row(t, 0), beta.row(t), static_cast<T>(slope)};
        write(p.shape, rows, from + at * p.dense(), to + at * p.pooled(),
              index == nullptr ? nullptr : index + at * p.pooled());
      });
  for (const Out<T>* out : {&y, &mean, &rstd}) out->finish();
}

/// What the orders after the first share.
template <typename T>
struct Saved {
  Saved(const Problem& p, const Tensor& z, const Tensor& index, const Tensor& mean, const Tensor& rstd,
        const Tensor& gamma, const Tensor& beta, double slope)
      : p(p), z(z), mean(p, mean), rstd(p, rstd), gamma(p, gamma), beta(p, beta), slope(static_cast<T>(slope)) {
    check_index(p, index);
    check_rows(p, {{"mean", mean}, {"rstd", rstd}});
    if (p.shape.pool) positions = index.const_data_ptr<uint8_t>();
  }
  /// Memory whose row 0 is a task's scale = gamma / sigma.
  Scratch<T> scratch(int64_t sums, int64_t rows) const {
    const Scratch<T> made(p, sums, rows);
    for (int64_t t = 0; t < p.tasks; ++t)
      for (int64_t c = 0; c < p.shape.channels; ++c) made.row(t, 0)[c] = gamma.row(t)[c] * rstd.row(t)[c];
    return made;
  }
  NormRows<T> rows(const Scratch<T>& scratch, int64_t task) const {
    return {mean.row(task), scratch.row(task, 0), beta.row(task), slope};
  }
  const T* image(int64_t at) const { return z.data() + at * p.dense(); }
  const uint8_t* index(int64_t at) const { return positions == nullptr ? nullptr : positions + at * p.pooled(); }

  const Problem& p;
  In<T> z;
  InRows<T> mean, rstd, gamma, beta;
  T slope;
  const uint8_t* positions = nullptr;
};

template <typename T>
void backward(const Problem& p, const Tensor& gy_, const Saved<T>& saved, Tensor& gz_, Tensor& ggamma_,
              Tensor& gbeta_) {
  static const auto sums = MF_DISPATCH(nap_backward_sums<T>);
  static const auto write = MF_DISPATCH(nap_backward<T>);
  const In<T> gy(gy_);
  const Out<T> gz(gz_), ggamma(ggamma_), gbeta(gbeta_);
  const int64_t channels = p.shape.channels;
  const Scratch<T> scratch = saved.scratch(2, 3);
  run(
      p,
      [&](int64_t t, int64_t at) {
        sums(p.shape, saved.rows(scratch, t), gy.data() + at * p.pooled(), saved.image(at), saved.index(at),
             scratch.sum(at, 0), scratch.sum(at, 1));
      },
      [&](int64_t t) {
        std::vector<double> h = scratch.total(t, 0), hz = scratch.total(t, 1);
        for (int64_t c = 0; c < channels; ++c) {
          const double scale = scratch.row(t, 0)[c];
          ggamma.data()[t * channels + c] = static_cast<T>(hz[c] * saved.rstd.row(t)[c]);
          gbeta.data()[t * channels + c] = static_cast<T>(h[c]);
          h[c] *= scale;
          hz[c] *= scale;
        }
        p.pool_groups(h);
        p.pool_groups(hz);
        for (int64_t c = 0; c < channels; ++c) {
          const double rstd = saved.rstd.row(t)[c];
          scratch.row(t, 1)[c] = static_cast<T>(-rstd * rstd * hz[c] / p.elements());
          scratch.row(t, 2)[c] = static_cast<T>(-h[c] / p.elements());
        }
      },
      [&](int64_t t, int64_t at) {
        write(p.shape, saved.rows(scratch, t), gy.data() + at * p.pooled(), saved.image(at), saved.index(at),
              scratch.row(t, 1), scratch.row(t, 2), gz.data() + at * p.dense());
      });
  for (const Out<T>* out : {&gz, &ggamma, &gbeta}) out->finish();
}

template <typename T>
void tangent(const Problem& p, const Tensor& u_, const Saved<T>& saved, const OptTensor& gamma_dot_,
             const OptTensor& beta_dot_, Tensor& uy_, Tensor& r_, Tensor& t_) {
  static const auto sums = MF_DISPATCH(nap_tangent_sums<T>);
  static const auto write = MF_DISPATCH(nap_tangent<T>);
  const In<T> u(u_);
  const auto gamma_dot = direction<T>(p, "gamma_dot", gamma_dot_), beta_dot = direction<T>(p, "beta_dot", beta_dot_);
  const Out<T> uy(uy_), r(r_), t_out(t_);
  const int64_t channels = p.shape.channels;
  const Scratch<T> scratch = saved.scratch(2, 3);
  run(
      p,
      [&](int64_t t, int64_t at) {
        sums(p.shape, saved.rows(scratch, t), u.data() + at * p.dense(), saved.image(at), scratch.sum(at, 0),
             scratch.sum(at, 1));
      },
      [&](int64_t t) {
        std::vector<double> us = scratch.total(t, 0), uz = scratch.total(t, 1);
        p.pool_groups(us);
        p.pool_groups(uz);
        for (int64_t c = 0; c < channels; ++c) {
          const double rstd = saved.rstd.row(t)[c], scale = scratch.row(t, 0)[c];
          const double mean_u = us[c] / p.elements(), mean_ux = uz[c] * rstd / p.elements();
          double by_z = -scale * rstd * mean_ux, level = -scale * mean_u;
          if (gamma_dot) by_z += rstd * static_cast<double>(gamma_dot->row(t)[c]);
          if (beta_dot) level += static_cast<double>(beta_dot->row(t)[c]);
          scratch.row(t, 1)[c] = static_cast<T>(by_z);
          scratch.row(t, 2)[c] = static_cast<T>(level);
          r.data()[t * channels + c] = static_cast<T>(mean_u);
          t_out.data()[t * channels + c] = static_cast<T>(mean_ux);
        }
      },
      [&](int64_t t, int64_t at) {
        write(p.shape, saved.rows(scratch, t), u.data() + at * p.dense(), saved.image(at), saved.index(at),
              scratch.row(t, 1), scratch.row(t, 2), uy.data() + at * p.pooled());
      });
  for (const Out<T>* out : {&uy, &r, &t_out}) out->finish();
}

template <typename T>
void backward_tangent(const Problem& p, const Tensor& gy_dot_, const Tensor& gy_, const Tensor& u_,
                      const Saved<T>& saved, const Tensor& r_, const Tensor& t_, const OptTensor& gamma_dot_,
                      Tensor& gz_dot_, Tensor& ggamma_dot_, Tensor& gbeta_dot_) {
  static const auto sums = MF_DISPATCH(nap_backward_tangent_sums<T>);
  static const auto write = MF_DISPATCH(nap_backward_tangent<T>);
  const In<T> gy_dot(gy_dot_), gy(gy_), u(u_);
  const InRows<T> r_in(p, r_), t_in(p, t_);
  const auto gamma_dot = direction<T>(p, "gamma_dot", gamma_dot_);
  const Out<T> gz_dot(gz_dot_), ggamma_dot(ggamma_dot_), gbeta_dot(gbeta_dot_);
  const int64_t channels = p.shape.channels;
  const double m = p.elements();
  const Scratch<T> scratch = saved.scratch(5, 5);
  run(
      p,
      [&](int64_t t, int64_t at) {
        sums(p.shape, saved.rows(scratch, t), gy_dot.data() + at * p.pooled(), gy.data() + at * p.pooled(),
             u.data() + at * p.dense(), saved.image(at), saved.index(at), scratch.sum(at, 0));
      },
      [&](int64_t task) {
        std::vector<double> total[5];
        for (int64_t i = 0; i < 5; ++i) total[i] = scratch.total(task, i);
        // Here h is the gradient of the value before the leaky ReLU; from here on scale * h, that of (z - mean).
        for (int64_t c = 0; c < channels; ++c) {
          const double rstd = saved.rstd.row(task)[c], scale = scratch.row(task, 0)[c];
          const double r = r_in.row(task)[c], t = t_in.row(task)[c];
          double by_h = -scale * rstd * t;
          const double turned = total[2][c] - r * total[0][c] - t * rstd * total[1][c];
          ggamma_dot.data()[task * channels + c] = static_cast<T>(rstd * (total[4][c] + turned));
          gbeta_dot.data()[task * channels + c] = static_cast<T>(total[3][c]);
          double h_dot = scale * total[3][c], hz_dot = scale * total[4][c];
          if (gamma_dot) {
            const double scale_dot = rstd * static_cast<double>(gamma_dot->row(task)[c]);
            by_h += scale_dot;
            h_dot += scale_dot * total[0][c];
            hz_dot += scale_dot * total[1][c];
          }
          scratch.row(task, 1)[c] = static_cast<T>(by_h);
          for (int64_t i = 0; i < 3; ++i) total[i][c] *= scale;
          total[3][c] = h_dot;
          total[4][c] = hz_dot;
        }
        for (auto& sum : total) p.pool_groups(sum);
        for (int64_t c = 0; c < channels; ++c) {
          const double rstd = saved.rstd.row(task)[c], r = r_in.row(task)[c], t = t_in.row(task)[c];
          const double p_ = total[0][c] / m, q = total[1][c] * rstd / m, w = total[2][c] / m;
          const double p_dot = total[3][c] / m, q_dot = rstd * (total[4][c] / m + w - r * p_ - t * q);
          scratch.row(task, 2)[c] = static_cast<T>(-rstd * q);
          scratch.row(task, 3)[c] = static_cast<T>(rstd * (2 * rstd * q * t - q_dot));
          scratch.row(task, 4)[c] = static_cast<T>(rstd * (q * r + t * p_) - p_dot);
        }
      },
      [&](int64_t t, int64_t at) {
        write(p.shape, saved.rows(scratch, t), gy_dot.data() + at * p.pooled(), gy.data() + at * p.pooled(),
              u.data() + at * p.dense(), saved.image(at), saved.index(at), scratch.row(t, 1),
              gz_dot.data() + at * p.dense());
      });
  for (const Out<T>* out : {&gz_dot, &ggamma_dot, &gbeta_dot}) out->finish();
}

void norm_act_pool(const Tensor& z, const Tensor& gamma, const Tensor& beta, double eps, double slope, bool pool,
                   Tensor& y, Tensor& index, Tensor& mean, Tensor& rstd, int64_t group) {
  const Problem p = check(z, gamma, beta, pool, group);
  check_pooled(p, "y", y);
  check_index(p, index);
  check_rows(p, {{"mean", mean}, {"rstd", rstd}});
  typed(z, [&]<typename T>(Type<T>) { forward<T>(p, z, gamma, beta, eps, slope, y, index, mean, rstd); });
}

void norm_act_pool_backward(const Tensor& gy, const Tensor& z, const Tensor& index, const Tensor& mean,
                            const Tensor& rstd, const Tensor& gamma, const Tensor& beta, double slope, bool pool,
                            Tensor& gz, Tensor& ggamma, Tensor& gbeta, int64_t group) {
  const Problem p = check(z, gamma, beta, pool, group);
  check_pooled(p, "gy", gy);
  check_shape("gz", gz, z.sizes());
  check_rows(p, {{"ggamma", ggamma}, {"gbeta", gbeta}});
  typed(z, [&]<typename T>(Type<T>) {
    const Saved<T> saved(p, z, index, mean, rstd, gamma, beta, slope);
    backward(p, gy, saved, gz, ggamma, gbeta);
  });
}

void norm_act_pool_tangent(const Tensor& u, const Tensor& z, const Tensor& index, const Tensor& mean,
                           const Tensor& rstd, const Tensor& gamma, const Tensor& beta, double slope, bool pool,
                           Tensor& uy, Tensor& r, Tensor& t, const OptTensor& gamma_dot, const OptTensor& beta_dot,
                           int64_t group) {
  const Problem p = check(z, gamma, beta, pool, group);
  check_shape("u", u, z.sizes());
  check_pooled(p, "uy", uy);
  check_rows(p, {{"r", r}, {"t", t}});
  typed(z, [&]<typename T>(Type<T>) {
    const Saved<T> saved(p, z, index, mean, rstd, gamma, beta, slope);
    tangent(p, u, saved, gamma_dot, beta_dot, uy, r, t);
  });
}

void norm_act_pool_backward_tangent(const Tensor& gy_dot, const Tensor& gy, const Tensor& u, const Tensor& z,
                                    const Tensor& index, const Tensor& mean, const Tensor& rstd, const Tensor& gamma,
                                    const Tensor& beta, double slope, const Tensor& r, const Tensor& t, bool pool,
                                    Tensor& gz_dot, Tensor& ggamma_dot, Tensor& gbeta_dot, const OptTensor& gamma_dot,
                                    int64_t group) {
  const Problem p = check(z, gamma, beta, pool, group);
  check_pooled(p, "gy_dot", gy_dot);
  check_pooled(p, "gy", gy);
  check_shape("u", u, z.sizes());
  check_shape("gz_dot", gz_dot, z.sizes());
  check_rows(p, {{"r", r}, {"t", t}, {"ggamma_dot", ggamma_dot}, {"gbeta_dot", gbeta_dot}});
  typed(z, [&]<typename T>(Type<T>) {
    const Saved<T> saved(p, z, index, mean, rstd, gamma, beta, slope);
    backward_tangent(p, gy_dot, gy, u, saved, r, t, gamma_dot, gz_dot, ggamma_dot, gbeta_dot);
  });
}

[[maybe_unused]] const bool registered = implement(
    "norm_act_pool", &norm_act_pool, "norm_act_pool_backward", &norm_act_pool_backward, "norm_act_pool_tangent",
    &norm_act_pool_tangent, "norm_act_pool_backward_tangent", &norm_act_pool_backward_tangent);

}  // namespace
}  // namespace mf::of_norm_act_pool
