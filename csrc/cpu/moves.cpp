// What goes between the tensors of a call and the memory of a program: parameters and cotangents into the kernels'
// layout, gradients out of it, and a batch's statistics into the running ones. Each in one call, for in a small network
// a call from Python for each tensor takes as long as the kernels. Used by mamlpp_fast/engine/fused/moves.py.

#include "kernels/moves.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.h"
#include "calls.h"

namespace mf {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

/// The share of a thread in so many elements, in whole cache lines of float.
std::pair<int64_t, int64_t> share(int64_t count, int64_t part, int64_t parts) {
  constexpr int64_t line = 16;
  const auto begin = [&](int64_t i) { return std::min(count, (count * i / parts + line - 1) / line * line); };
  return {begin(part), begin(part + 1)};
}

/// How a tensor lies for its owner and for the kernels; `split` and `order` as in steps/base.py, Slot.
class Arrangement {
 public:
  Arrangement(std::vector<int64_t> split, std::vector<int64_t> order)
      : split_(std::move(split)), order_(std::move(order)) {
    const bool matrix = order_ == std::vector<int64_t>{1, 0};
    if (matrix || order_ == std::vector<int64_t>{2, 3, 1, 0}) {
      // A weight [outputs, inputs, window], which the kernels have as [window, inputs, outputs].
      const int64_t outputs = split_[0], inputs = split_[1], window = matrix ? 1 : split_[2] * split_[3];
      for (int64_t i = 0; i < inputs; ++i)
        for (int64_t tap = 0; tap < window; ++tap) rows_.push_back((tap * inputs + i) * outputs);
    }
    plain_ = true;
    for (size_t i = 0; i < order_.size(); ++i) plain_ &= order_[i] == static_cast<int64_t>(i);
  }

  /// Whether `copy_share` takes a tensor of the owner and the place that the kernels have for it.
  bool shares(const Tensor& own, const Tensor& place) const {
    return (plain_ || !rows_.empty()) && bare(own) && bare(place) && own.scalar_type() == place.scalar_type() &&
           own.numel() == place.numel();
  }

  /// Copies a thread's part from one of them to the other, times a number; out of the place, onto `plus` if there is.
  template <bool out>
  void copy_share(const Tensor& own, const Tensor& place, double scale, const OptTensor& plus, int64_t part,
                  int64_t parts) const {
    typed(own, [&]<typename T>(Type<T>) {
      const T* of = (out ? place : own).template const_data_ptr<T>();
      T* to = (out ? own : place).template mutable_data_ptr<T>();
      const T* added = out && plus ? plus->const_data_ptr<T>() : nullptr;
      const auto columns = static_cast<int64_t>(rows_.size());
      const auto [begin, end] = share(plain_ ? own.numel() : split_[0], part, parts);
      const T factor = static_cast<T>(scale);
      if (plain_) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) to[i] = added == nullptr ? factor * of[i] : added[i] + factor * of[i];
      } else if constexpr (out) {
        MF_DISPATCH(move_out<T>)(rows_.data(), columns, begin, end, of, factor, added, to);
      } else {
        MF_DISPATCH(move_in<T>)(rows_.data(), columns, begin, end, of, factor, to);
      }
    });
  }

  /// The same of tensors that lie in any way.
  template <bool out>
  void copy(const Tensor& own, const Tensor& place) const {
    if constexpr (out) {
      own.view(split_).permute(order_).copy_(place);
    } else {
      place.copy_(own.reshape(split_).permute(order_));
    }
  }

 private:
  std::vector<int64_t> split_, order_;
  std::vector<int64_t> rows_;  // where the kernels have a weight's columns
  bool plain_ = false;
};

/// Moves tensors of a call to their places in a program's memory, and out of these.
class Moves : public torch::CustomClassHolder {
 public:
  Moves(std::vector<std::vector<int64_t>> splits, std::vector<std::vector<int64_t>> orders, std::vector<Tensor> places)
      : places_(std::move(places)) {
    TORCH_CHECK_VALUE(splits.size() == orders.size(), "orders: expected ", splits.size(), ", got ", orders.size());
    TORCH_CHECK_VALUE(splits.size() == places_.size(), "places: expected ", splits.size(), ", got ", places_.size());
    for (size_t i = 0; i < splits.size(); ++i) {
      TORCH_CHECK_VALUE(splits[i].size() == orders[i].size(), "orders: expected ", splits[i].size(), " axes, got ",
                        orders[i].size());
      arrangements_.emplace_back(std::move(splits[i]), std::move(orders[i]));
    }
  }

  /// Copies times a number to the places; zeros where there is nothing.
  void load(std::vector<OptTensor> given, double scale) {
    const at::AutoDispatchBelowADInplaceOrView below;
    check(given.size());
    std::vector<Tensor> own(places_.size());
    for (size_t i = 0; i < places_.size(); ++i) {
      if (given[i]) {
        own[i] = *given[i];
      } else {
        places_[i].zero_();
      }
    }
    move<false>(own, scale, {});
  }

  /// New tensors like the owners', with what the places have times a number; beyond these, zeros. To it is added what
  /// `plus` has: a tensor an owner, or nothing. `plus` may be empty.
  std::vector<Tensor> take(std::vector<Tensor> like, std::vector<OptTensor> plus, double scale) {
    const at::AutoDispatchBelowADInplaceOrView below;
    check(like.size());
    TORCH_CHECK_VALUE(plus.empty() || plus.size() == like.size(), "plus: expected none or ", like.size(), ", got ",
                      plus.size());
    plus.resize(like.size());
    const size_t count = places_.size();
    std::vector<Tensor> made;
    made.reserve(like.size());
    for (size_t i = 0; i < count; ++i) made.push_back(empty(like[i].sizes(), like[i].options()));
    move<true>(made, scale, plus);
    for (size_t i = count; i < like.size(); ++i) {
      made.push_back(zeros(like[i].sizes(), like[i].options()));
      if (plus[i]) made.back().copy_(*plus[i]);
    }
    return made;
  }

  /// Copies what the places have to tensors like the owners', where there are any.
  void give(std::vector<OptTensor> to) {
    const at::AutoDispatchBelowADInplaceOrView below;
    check(to.size());
    std::vector<Tensor> own(places_.size());
    for (size_t i = 0; i < places_.size(); ++i) {
      if (to[i]) own[i] = *to[i];
    }
    move<true>(own, 1, {});
  }

 private:
  /// Copies what there is, times a number, to its place, or (`out`) from there and onto `plus`. Each thread takes the
  /// share that it has in PyTorch's loops over the same tensors: what lies in the cache of another core comes from
  /// there at a fraction of the speed.
  template <bool out>
  void move(const std::vector<Tensor>& own, double scale, const std::vector<OptTensor>& plus) const {
    const auto term = [&](size_t i) { return plus.empty() ? OptTensor() : plus[i]; };
    std::vector<size_t> shared;
    int64_t elements = 0;
    for (size_t i = 0; i < places_.size(); ++i) {
      if (!own[i].defined()) continue;
      const OptTensor beside = term(i);
      const bool alike = !beside || (bare(*beside) && beside->scalar_type() == own[i].scalar_type() &&
                                     beside->sizes() == own[i].sizes());
      if (alike && arrangements_[i].shares(own[i], places_[i])) {
        shared.push_back(i);
        elements += own[i].numel();
      } else {
        arrangements_[i].copy<out>(own[i], places_[i]);
        if (scale != 1) (out ? own[i] : places_[i]).mul_(scale);
        if (beside) own[i].add_(*beside);
      }
    }
    const int64_t parts = elements < kGrain ? 1 : at::get_num_threads();
    each(parts, [&](int64_t part) {
      for (const size_t i : shared) {
        arrangements_[i].copy_share<out>(own[i], places_[i], scale, term(i), part, parts);
      }
    });
  }

  void check(size_t given) const {
    TORCH_CHECK_VALUE(given >= places_.size(), "tensors: expected ", places_.size(), " or more, got ", given);
  }

  std::vector<Arrangement> arrangements_;
  std::vector<Tensor> places_;
};

/// Running statistics of the batch norms of a network.
class Statistics : public torch::CustomClassHolder {
 public:
  /// Of each norm: what was added to its variance, the batch's share in the running statistics, and the factor that
  /// makes a variance of the batch one of the population.
  Statistics(std::vector<double> eps, std::vector<double> shares, std::vector<double> unbiased)
      : eps_(std::move(eps)), shares_(std::move(shares)), unbiased_(std::move(unbiased)) {
    TORCH_CHECK_VALUE(eps_.size() == shares_.size() && eps_.size() == unbiased_.size(),
                      "expected one number a norm of each kind");
  }

  /// mean <- (1 - share) mean + share (m + bias), var <- (1 - share) var + share unbiased (1 / rstd² - eps), all counts
  /// plus 1, and true; false, with nothing done, where these tensors are none to read and write as they lie. [C] each.
  bool follow(std::vector<Tensor> means, std::vector<Tensor> vars, std::vector<Tensor> batch, std::vector<Tensor> rstds,
              std::vector<OptTensor> biases, std::vector<Tensor> counts) {
    const size_t count = eps_.size();
    TORCH_CHECK_VALUE(means.size() == count && vars.size() == count && batch.size() == count && rstds.size() == count &&
                          biases.size() == count,
                      "expected ", count, " tensors of each kind");
    for (size_t i = 0; i < count; ++i) {
      for (const Tensor& t : {means[i], vars[i], batch[i], rstds[i], biases[i] ? *biases[i] : means[i]}) {
        if (!bare(t) || t.scalar_type() != means[i].scalar_type() || t.numel() != means[i].numel()) return false;
      }
    }
    for (const Tensor& t : counts) {
      if (!t.is_cpu() || !t.has_storage() || t.scalar_type() != at::kLong || t.numel() != 1 || t.is_inference() ||
          t.unsafeGetTensorImpl()->is_python_dispatch()) {
        return false;
      }
    }
    for (const Tensor& t : counts) {
      *t.mutable_data_ptr<int64_t>() += 1;
      t.unsafeGetTensorImpl()->bump_version();
    }
    for (size_t i = 0; i < count; ++i) {
      typed(means[i], [&]<typename T>(Type<T>) {
        T *mean = means[i].mutable_data_ptr<T>(), *var = vars[i].mutable_data_ptr<T>();
        const T *m = batch[i].const_data_ptr<T>(), *r = rstds[i].const_data_ptr<T>();
        const T* b = biases[i] ? biases[i]->const_data_ptr<T>() : nullptr;
        const T eps = static_cast<T>(eps_[i]), unbiased = static_cast<T>(unbiased_[i]);
        const T share = static_cast<T>(shares_[i]), rest = static_cast<T>(1 - shares_[i]);
        for (int64_t c = 0; c < means[i].numel(); ++c) {
          mean[c] = rest * mean[c] + share * (b == nullptr ? m[c] : m[c] + b[c]);
          var[c] = rest * var[c] + share * ((1 / (r[c] * r[c]) - eps) * unbiased);
        }
      });
    }
    return true;
  }

 private:
  std::vector<double> eps_, shares_, unbiased_;
};

/// Memory of one call and what runs on it.
class Lane : public torch::CustomClassHolder {
 public:
  /// `moves`: of parameters, of directions, out of gradients, out of second derivatives; `sections`: forward, backward,
  /// tangent, second; `places`: of the output, of its gradient, of how that moves, of how the output moves, then
  /// inputs.
  Lane(std::vector<c10::intrusive_ptr<Moves>> moves, std::vector<c10::intrusive_ptr<Calls>> sections,
       std::vector<Tensor> places)
      : moves_(std::move(moves)), sections_(std::move(sections)), places_(std::move(places)) {
    TORCH_CHECK_VALUE(moves_.size() == 4 && sections_.size() == 4, "expected four moves and four sections, got ",
                      moves_.size(), " and ", sections_.size());
    TORCH_CHECK_VALUE(places_.size() >= 5, "places: expected 5 or more, got ", places_.size());
  }

  struct Work {
    std::vector<Tensor> inputs;
    std::vector<OptTensor> parameters, directions, own;
    OptTensor gy, moves, out;
  };

  void run(const Work& work, const Tensor& halt) const {
    const at::AutoDispatchBelowADInplaceOrView below;
    if (!work.inputs.empty()) {
      for (size_t i = 0; i < work.inputs.size(); ++i) places_[4 + i].copy_(work.inputs[i]);
      moves_[0]->load(work.parameters, 1);
      sections_[0]->run(halt);
    }
    if (work.gy) {
      places_[1].copy_(*work.gy);
      sections_[1]->run(halt);
    }
    if (!work.directions.empty()) {
      moves_[1]->load(work.directions, 1);
      sections_[2]->run(halt);
    }
    if (work.moves) {
      places_[2].copy_(*work.moves);
      sections_[3]->run(halt);
    }
    if (work.out) work.out->copy_(places_[work.directions.empty() ? 0 : 3]);
    if (!work.own.empty()) moves_[work.moves ? 3 : 2]->give(work.own);
  }

  size_t inputs() const { return places_.size() - 4; }

 private:
  std::vector<c10::intrusive_ptr<Moves>> moves_;
  std::vector<c10::intrusive_ptr<Calls>> sections_;
  std::vector<Tensor> places_;
};

/// Calls that stand side by side, each on one of the threads that ATen's own loops have. Other threads would find these
/// still waiting, busily, for the next loop: between operations of the caller's that cost a third of the time.
class Team : public torch::CustomClassHolder {
 public:
  explicit Team(std::vector<c10::intrusive_ptr<Lane>> lanes) : lanes_(std::move(lanes)), works_(lanes_.size()) {}

  /// What a lane is to do when it runs next, in this order; what is empty or none is left out. The inputs are copied in
  /// with the parameters for a forward pass, `gy` for a backward pass, directions for its tangent, and `moves` for the
  /// derivative of the backward pass. `out` takes the output, or how it moves where there are directions; `own` the
  /// gradients, or their derivatives where there are `moves`.
  void add(int64_t lane, std::vector<Tensor> inputs, std::vector<OptTensor> parameters, OptTensor gy,
           std::vector<OptTensor> directions, OptTensor moves, OptTensor out, std::vector<OptTensor> own) {
    TORCH_CHECK_INDEX(lane >= 0 && lane < static_cast<int64_t>(lanes_.size()), "lane: expected one of ", lanes_.size(),
                      ", got ", lane);
    const size_t wanted = lanes_[lane]->inputs();
    TORCH_CHECK_VALUE(inputs.empty() || inputs.size() == wanted, "inputs: expected none or ", wanted, ", got ",
                      inputs.size());
    works_[lane] = {std::move(inputs), std::move(parameters), std::move(directions), std::move(own),
                    std::move(gy),     std::move(moves),      std::move(out)};
  }

  void run(const Tensor& halt) {
    std::vector<Lane::Work> works(lanes_.size());
    works.swap(works_);
    at::parallel_for(0, static_cast<int64_t>(lanes_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) lanes_[i]->run(works[i], halt);
    });
  }

 private:
  std::vector<c10::intrusive_ptr<Lane>> lanes_;
  std::vector<Lane::Work> works_;
};

}  // namespace

void define_moves(torch::Library& m) {
  m.class_<Moves>("Moves")
      .def(torch::init<std::vector<std::vector<int64_t>>, std::vector<std::vector<int64_t>>, std::vector<Tensor>>())
      .def("load", &Moves::load, "", {torch::arg("given"), torch::arg("scale") = 1.0})
      .def("take", &Moves::take, "",
           {torch::arg("like"), torch::arg("plus") = std::vector<OptTensor>(), torch::arg("scale") = 1.0})
      .def("give", &Moves::give);
  m.class_<Lane>("Lane").def(torch::init<std::vector<c10::intrusive_ptr<Moves>>, std::vector<c10::intrusive_ptr<Calls>>,
                                         std::vector<Tensor>>());
  m.class_<Team>("Team")
      .def(torch::init<std::vector<c10::intrusive_ptr<Lane>>>())
      .def("add", &Team::add, "",
           {torch::arg("lane"), torch::arg("inputs") = std::vector<Tensor>(),
            torch::arg("parameters") = std::vector<OptTensor>(), torch::arg("gy") = OptTensor(),
            torch::arg("directions") = std::vector<OptTensor>(), torch::arg("moves") = OptTensor(),
            torch::arg("out") = OptTensor(), torch::arg("own") = std::vector<OptTensor>()})
      .def("run", &Team::run);
  m.class_<Statistics>("Statistics")
      .def(torch::init<std::vector<double>, std::vector<double>, std::vector<double>>())
      .def("follow", &Statistics::follow);
}

}  // namespace mf
