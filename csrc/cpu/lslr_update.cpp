// mamlpp_fast::lslr_update and its derivatives: mamlpp_fast/ops/lslr_update.py; formulas in
// docs/derivations/lslr_update.md.
//
// The flat buffer is cut into pieces of at most kPiece elements of one segment. A (task, piece) leaves one partial sum
// and the partials are added in order, so results depend neither on the number of threads nor on their timing.

#include "kernels/lslr_update.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"

namespace mf::of_lslr_update {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

constexpr int64_t kPiece = 8192;

struct Piece {
  int64_t begin, end, segment;
};

at::ScalarType wide_type(std::initializer_list<Tensor> tensors) {
  at::ScalarType type = at::kFloat;
  for (const Tensor& t : tensors) type = c10::promoteTypes(type, t.scalar_type());
  return type;
}

/// Rows [tasks, P] of the wanted type, elements next to each other, rows any distance apart.
struct Rows {
  Rows(const Tensor& t, at::ScalarType type) : tensor(t.dim() == 1 ? t.unsqueeze(0) : t) {
    tensor = tensor.to(type);
    if (tensor.size(1) > 1 && tensor.stride(1) != 1) tensor = tensor.contiguous();
  }
  template <typename T>
  const T* row(int64_t task) const {
    return tensor.const_data_ptr<T>() + task * tensor.stride(0);
  }
  Tensor tensor;
};

/// The step's rates, of segments or of elements, in the wanted type.
Tensor step_row(const Tensor& rates, const OptTensor& offsets, int64_t step, at::ScalarType type) {
  const Tensor row = offsets.has_value() ? rates.select(1, step) : rates.dim() == 1 ? rates : rates.select(0, step);
  return row.to(type).contiguous();
}

struct Layout {
  int64_t tasks, size, step;
  std::vector<Piece> pieces;
  bool each;            // a rate for every element
  at::ScalarType type;  // of the arithmetic
  Tensor row;           // the step's rates
};

/// Checks the arguments and cuts the flat buffer; `others` count too for the type of the arithmetic.
Layout lay_out(const Tensor& like, const Tensor& grad, const Tensor& rates, const OptTensor& offsets, int64_t step,
               std::initializer_list<Tensor> others = {}) {
  TORCH_CHECK_VALUE(like.dim() == 1 || like.dim() == 2, "theta: expected [P] or [tasks, P], got ", like.sizes());
  TORCH_CHECK_VALUE(grad.sizes() == like.sizes(), "grad: expected ", like.sizes(), " like theta, got ", grad.sizes());
  const at::ScalarType type = c10::promoteTypes(wide_type({like, grad, rates}), wide_type(others));
  Layout layout{like.dim() == 1 ? 1 : like.size(0), like.size(-1), step, {}, !offsets.has_value(), type, {}};
  const auto cut = [&](int64_t begin, int64_t end, int64_t segment) {
    for (; begin < end; begin += kPiece) layout.pieces.push_back({begin, std::min(end, begin + kPiece), segment});
  };
  if (layout.each) {
    TORCH_CHECK_VALUE((rates.dim() == 1 || rates.dim() == 2) && rates.size(-1) == layout.size, "rates: expected [",
                      layout.size, "] or [K, ", layout.size, "], got ", rates.sizes());
    TORCH_CHECK_VALUE(step >= 0 && step < (rates.dim() == 2 ? rates.size(0) : 1), "step: has no rate, got ", step);
    cut(0, layout.size, 0);
  } else {
    TORCH_CHECK_VALUE(rates.dim() == 2 && offsets->dim() == 1 && offsets->scalar_type() == at::kLong &&
                          offsets->size(0) == rates.size(0) + 1,
                      "rates, offsets: expected [L, K] and int64 [L + 1], got ", rates.sizes(), " and ",
                      offsets->scalar_type(), " ", offsets->sizes());
    TORCH_CHECK_VALUE(step >= 0 && step < rates.size(1), "step: expected 0 <= step < ", rates.size(1), ", got ", step);
    const Tensor ends = offsets->contiguous();
    const int64_t* end = ends.const_data_ptr<int64_t>();
    const int64_t segments = rates.size(0);
    TORCH_CHECK_VALUE(end[0] == 0 && end[segments] == layout.size && std::is_sorted(end, end + segments + 1),
                      "offsets: expected to rise from 0 to ", layout.size, ", got ",
                      at::IntArrayRef(end, segments + 1));
    for (int64_t s = 0; s < segments; ++s) cut(end[s], end[s + 1], s);
  }
  layout.row = step_row(rates, offsets, step, type);
  return layout;
}

/// Runs work(task, piece number) for all, in equal shares.
template <typename Work>
void for_each_piece(const Layout& layout, const Work& work) {
  const int64_t pieces = static_cast<int64_t>(layout.pieces.size());
  if (pieces == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain * pieces / std::max<int64_t>(1, layout.size));
  at::parallel_for(0, layout.tasks * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i / pieces, i % pieces);
  });
}

/// Adds a work's partial sums [task, piece] up by segment and writes the step's entries of `out`.
template <typename T, typename Work>
void reduce_pieces(const Layout& layout, const Tensor& out, const Work& work) {
  const int64_t pieces = static_cast<int64_t>(layout.pieces.size());
  std::vector<T> partial(static_cast<size_t>(layout.tasks * pieces));
  for_each_piece(layout, [&](int64_t task, int64_t i) { partial[task * pieces + i] = work(task, layout.pieces[i]); });
  const Tensor sums = zeros({out.size(0)}, out.options().dtype(at::kDouble));
  double* sum = sums.mutable_data_ptr<double>();
  for (int64_t task = 0; task < layout.tasks; ++task)
    for (int64_t i = 0; i < pieces; ++i) sum[layout.pieces[i].segment] += partial[task * pieces + i];
  out.select(1, layout.step).copy_(sums);
}

/// Per-element rates: a piece goes through all tasks in turn, adding to its part of one buffer [P].
template <typename T, typename Work>
void reduce_tasks(const Layout& layout, const Tensor& out, const Work& work) {
  const Tensor sums = zeros({layout.size}, out.options().dtype(layout.type));
  T* sum = sums.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, kGrain / kPiece / std::max<int64_t>(1, layout.tasks));
  at::parallel_for(0, static_cast<int64_t>(layout.pieces.size()), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t task = 0; task < layout.tasks; ++task) work(task, layout.pieces[i], sum + layout.pieces[i].begin);
  });
  (out.dim() == 1 ? out : out.select(0, layout.step)).copy_(sums);
}

template <typename T>
void update(const Layout& layout, const Rows& theta, const Rows& grad, const Result& out) {
  static const auto one_rate = MF_DISPATCH(lslr_update<T>);
  static const auto rate_each = MF_DISPATCH(lslr_update_each<T>);
  const T* rate = layout.row.const_data_ptr<T>();
  for_each_piece(layout, [&](int64_t task, int64_t i) {
    const Piece p = layout.pieces[i];
    const T *x = theta.row<T>(task) + p.begin, *g = grad.row<T>(task) + p.begin;
    T* y = out.row<T>(task) + p.begin;
    if (layout.each)
      rate_each(x, g, rate + p.begin, y, p.end - p.begin);
    else
      one_rate(x, g, rate[p.segment], y, p.end - p.begin);
  });
}

void lslr_update_out(const Tensor& theta, const Tensor& grad, const Tensor& rates, const OptTensor& offsets,
                     int64_t step, Tensor& out) {
  const Layout layout = lay_out(theta, grad, rates, offsets, step);
  TORCH_CHECK_VALUE(out.sizes() == theta.sizes(), "out: expected ", theta.sizes(), ", got ", out.sizes());
  const Rows x(theta, layout.type), g(grad, layout.type);
  const Result result(out, layout.type);
  typed(layout.row, [&]<typename T>(Type<T>) { update<T>(layout, x, g, result); });
  result.finish();
}

Tensor lslr_update(const Tensor& theta, const Tensor& grad, const Tensor& rates, const OptTensor& offsets,
                   int64_t step) {
  Tensor out = empty(theta.sizes(), theta.options());
  lslr_update_out(theta, grad, rates, offsets, step, out);
  return out;
}

template <typename T>
void backward(const Layout& layout, const Rows& gout, const Rows& grad, const Result& ggrad, const Tensor& grates) {
  static const auto one_rate = MF_DISPATCH(lslr_update_backward<T>);
  static const auto rate_each = MF_DISPATCH(lslr_update_backward_each<T>);
  const T* rate = layout.row.const_data_ptr<T>();
  const auto at = [](const Rows& rows, int64_t task, Piece p) { return rows.row<T>(task) + p.begin; };
  if (layout.each) {
    reduce_tasks<T>(layout, grates, [&](int64_t task, Piece p, T* sum) {
      rate_each(at(gout, task, p), at(grad, task, p), rate + p.begin, ggrad.row<T>(task) + p.begin, sum,
                p.end - p.begin);
    });
  } else {
    reduce_pieces<T>(layout, grates, [&](int64_t task, Piece p) {
      return one_rate(at(gout, task, p), at(grad, task, p), rate[p.segment], ggrad.row<T>(task) + p.begin,
                      p.end - p.begin);
    });
  }
}

void lslr_update_backward_out(const Tensor& gout, const Tensor& grad, const Tensor& rates, const OptTensor& offsets,
                              int64_t step, Tensor& ggrad, Tensor& grates) {
  const Layout layout = lay_out(gout, grad, rates, offsets, step);
  TORCH_CHECK_VALUE(ggrad.sizes() == gout.sizes(), "ggrad: expected ", gout.sizes(), ", got ", ggrad.sizes());
  TORCH_CHECK_VALUE(grates.sizes() == rates.sizes(), "grates: expected ", rates.sizes(), ", got ", grates.sizes());
  const Rows go(gout, layout.type), g(grad, layout.type);
  const Result result(ggrad, layout.type);
  typed(layout.row, [&]<typename T>(Type<T>) { backward<T>(layout, go, g, result, grates); });
  result.finish();
}

std::tuple<Tensor, Tensor> lslr_update_backward(const Tensor& gout, const Tensor& grad, const Tensor& rates,
                                                const OptTensor& offsets, int64_t step) {
  Tensor ggrad = empty(gout.sizes(), gout.options()), grates = zeros(rates.sizes(), rates.options());
  lslr_update_backward_out(gout, grad, rates, offsets, step, ggrad, grates);
  return {ggrad, grates};
}

template <typename T>
void double_backward(const Layout& layout, const Rows& a, const Tensor& row_b, const Rows& gout, const Rows& grad,
                     const Result& cgout, const Result& cgrad, const Tensor& crates) {
  static const auto one_rate = MF_DISPATCH(lslr_update_double_backward<T>);
  static const auto rate_each = MF_DISPATCH(lslr_update_double_backward_each<T>);
  const T *rate = layout.row.const_data_ptr<T>(), *b = row_b.const_data_ptr<T>();
  const auto at = [](const Rows& rows, int64_t task, Piece p) { return rows.row<T>(task) + p.begin; };
  if (layout.each) {
    reduce_tasks<T>(layout, crates, [&](int64_t task, Piece p, T* sum) {
      rate_each(at(a, task, p), b + p.begin, at(gout, task, p), at(grad, task, p), rate + p.begin,
                cgout.row<T>(task) + p.begin, cgrad.row<T>(task) + p.begin, sum, p.end - p.begin);
    });
  } else {
    reduce_pieces<T>(layout, crates, [&](int64_t task, Piece p) {
      return one_rate(at(a, task, p), b[p.segment], at(gout, task, p), at(grad, task, p), rate[p.segment],
                      cgout.row<T>(task) + p.begin, cgrad.row<T>(task) + p.begin, p.end - p.begin);
    });
  }
}

std::tuple<Tensor, Tensor, Tensor> lslr_update_double_backward(const Tensor& a, const Tensor& b, const Tensor& gout,
                                                               const Tensor& grad, const Tensor& rates,
                                                               const OptTensor& offsets, int64_t step) {
  const Layout layout = lay_out(gout, grad, rates, offsets, step, {a, b});
  TORCH_CHECK_VALUE(a.sizes() == gout.sizes() && b.sizes() == rates.sizes(), "a, b: expected ", gout.sizes(), " and ",
                    rates.sizes(), ", got ", a.sizes(), " and ", b.sizes());
  const at::ScalarType type = layout.type;
  const Rows along(a, type), go(gout, type), g(grad, type);
  const Tensor row_b = step_row(b, offsets, step, type);
  const Result cgout(empty(gout.sizes(), gout.options()), type), cgrad(empty(grad.sizes(), grad.options()), type);
  const Tensor crates = zeros(rates.sizes(), rates.options());
  typed(row_b, [&]<typename T>(Type<T>) { double_backward<T>(layout, along, row_b, go, g, cgout, cgrad, crates); });
  cgout.finish();
  cgrad.finish();
  return {cgout.result, cgrad.result, crates};
}

[[maybe_unused]] const bool registered = implement(
    "lslr_update", &lslr_update, "lslr_update_out", &lslr_update_out, "lslr_update_backward", &lslr_update_backward,
    "lslr_update_backward_out", &lslr_update_backward_out, "lslr_update_double_backward", &lslr_update_double_backward);

}  // namespace
}  // namespace mf::of_lslr_update
