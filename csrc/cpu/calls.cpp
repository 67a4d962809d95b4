// Lists of operator calls, made one after the other without Python's interpreter, whose lock two threads would
// otherwise hand to and fro at every call. Made by mamlpp_fast/engine/fused/program.py.

#include "calls.h"

#include <ATen/Parallel.h>

namespace mf {
namespace {

/// Appends copies to the first of the second; known without a question to each tensor what it is, as `add` puts it.
void add_copies(const c10::intrusive_ptr<Calls>& calls, std::vector<at::Tensor> to, std::vector<at::Tensor> of) {
  TORCH_CHECK_VALUE(to.size() == of.size(), "of: expected ", to.size(), " tensors, got ", of.size());
  calls->add([to = std::move(to), of = std::move(of)] {
    for (size_t i = 0; i < to.size(); ++i) to[i].copy_(of[i]);
  });
}

/// Lists that run side by side, each on one of the threads that ATen's own loops have. Other threads would find these
/// still waiting, busily, for the next loop: between operations of the caller's that cost a third of the time.
class Team : public torch::CustomClassHolder {
 public:
  /// Appends lists that one thread runs in their order.
  void add(std::vector<c10::intrusive_ptr<Calls>> lists) { lists_.push_back(std::move(lists)); }

  void run(const at::Tensor& halt) {
    at::parallel_for(0, static_cast<int64_t>(lists_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (const auto& list : lists_[i]) list->run(halt);
      }
    });
  }

 private:
  std::vector<std::vector<c10::intrusive_ptr<Calls>>> lists_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(mamlpp_fast, m) {
  m.class_<Calls>("Calls")
      .def(torch::init<>())
      .def("add", &Calls::add_operator)
      .def("copy", &add_copies)
      .def("run", &Calls::run);
  m.class_<Team>("Team").def(torch::init<>()).def("add", &Team::add).def("run", &Team::run);
  define_moves(m);
}

}  // namespace mf
