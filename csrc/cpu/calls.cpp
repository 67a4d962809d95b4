// Lists of operator calls, made one after the other without Python's interpreter, whose lock two threads would
// otherwise hand to and fro at every call. Made by mamlpp_fast/engine/fused/program.py.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace mf {
namespace {

class Calls : public torch::CustomClassHolder {
 public:
  /// Appends a call: every argument of the schema, in its order; None for an empty list. What the operator returns is
  /// copied to `outs` where there are any, one a result or an element of a list, None for one that nobody wants.
  void add(std::string name, std::string overload, std::vector<c10::IValue> arguments,
           std::vector<std::optional<at::Tensor>> outs) {
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    const size_t wanted = op.schema().arguments().size();
    TORCH_CHECK_VALUE(arguments.size() == wanted, "arguments: expected ", wanted, " of ", name, ", got ",
                      arguments.size());
    for (size_t i = 0; i < wanted; ++i) {
      const auto list = op.schema().arguments()[i].type()->cast<c10::ListType>();
      if (!list) continue;
      const bool optional = list->getElementType()->kind() == c10::TypeKind::OptionalType;
      if (!arguments[i].isNone() && !optional) continue;
      c10::impl::GenericList given(list->getElementType());  // elements that may be none have another type
      if (!arguments[i].isNone()) {
        for (const c10::IValue& element : arguments[i].toListRef()) given.push_back(element);
      }
      arguments[i] = std::move(given);
    }
    calls_.push_back({op, std::move(arguments), std::move(outs)});
  }

  /// Makes the calls, without gradients, as long as `halt` [1] is 0.
  void run(const at::Tensor& halt) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const volatile uint8_t* halted = halt.const_data_ptr<uint8_t>();
    std::vector<c10::IValue> stack;
    for (const auto& [op, arguments, outs] : calls_) {
      if (*halted != 0) return;
      stack = arguments;
      op.callBoxed(&stack);
      const bool list = !outs.empty() && stack[0].isTensorList();  // as `unsafe_split` returns
      for (size_t i = 0; i < outs.size(); ++i) {
        if (outs[i]) outs[i]->copy_(list ? stack[0].toTensorList().get(i) : stack[i].toTensor());
      }
    }
  }

 private:
  struct Call {
    c10::OperatorHandle op;
    std::vector<c10::IValue> arguments;
    std::vector<std::optional<at::Tensor>> outs;
  };
  std::vector<Call> calls_;
};

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
  m.class_<Calls>("Calls").def(torch::init<>()).def("add", &Calls::add).def("run", &Calls::run);
  m.class_<Team>("Team").def(torch::init<>()).def("add", &Team::add).def("run", &Team::run);
}

}  // namespace mf
