// Lists of operator calls, made one after the other without Python's interpreter, whose lock two threads would
// otherwise hand to and fro at every call. Made by mamlpp_fast/engine/fused/program.py.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <string>
#include <utility>
#include <vector>

namespace mf {
namespace {

class Calls : public torch::CustomClassHolder {
 public:
  /// Appends a call: every argument of the schema, in its order.
  void add(std::string name, std::string overload, std::vector<c10::IValue> arguments) {
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    const size_t wanted = op.schema().arguments().size();
    TORCH_CHECK_VALUE(arguments.size() == wanted, "arguments: expected ", wanted, " of ", name, ", got ",
                      arguments.size());
    calls_.push_back({op, std::move(arguments)});
  }

  /// Makes the calls, without gradients, as long as `halt` [1] is 0.
  void run(const at::Tensor& halt) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const volatile uint8_t* halted = halt.const_data_ptr<uint8_t>();
    std::vector<c10::IValue> stack;
    for (const auto& [op, arguments] : calls_) {
      if (*halted != 0) return;
      stack = arguments;
      op.callBoxed(&stack);
    }
  }

 private:
  std::vector<std::pair<c10::OperatorHandle, std::vector<c10::IValue>>> calls_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(mamlpp_fast, m) {
  m.class_<Calls>("Calls").def(torch::init<>()).def("add", &Calls::add).def("run", &Calls::run);
}

}  // namespace mf
