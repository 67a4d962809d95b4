#include "registry.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <memory>

#include "isa.h"

namespace mf {
namespace {

/// A kernel as the dispatcher calls it.
class Boxed : public c10::OperatorKernel {
 public:
  explicit Boxed(Kernel kernel) : kernel_(kernel) {}
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) const {
    const size_t wanted = kernel_.arguments, given = op.schema().arguments().size();
    TORCH_CHECK(given == wanted, op.operator_name(), ": the schema has ", given, " arguments, the function ", wanted);
    kernel_.call(kernel_.function, {*stack, stack->size() - wanted});
  }

 private:
  Kernel kernel_;
};

torch::CppFunction boxed(Kernel kernel) {
  return torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Boxed>(kernel));
}

// Made at the first use, for the files' own variables are initialised in any order.
torch::Library& on_cpu() {
  static torch::Library library(torch::Library::IMPL, "mamlpp_fast", c10::DispatchKey::CPU, __FILE__, __LINE__);
  return library;
}
torch::Library& everywhere() {
  static torch::Library library(torch::Library::FRAGMENT, "mamlpp_fast", std::nullopt, __FILE__, __LINE__);
  return library;
}

const c10::IValue& at_place(Given given, size_t i) { return given.stack[given.first + i]; }

}  // namespace

const at::Tensor& as_tensor(Given given, size_t i) { return at_place(given, i).toTensor(); }
std::optional<at::Tensor> as_optional_tensor(Given given, size_t i) {
  return at_place(given, i).toOptional<at::Tensor>();
}
int64_t as_int(Given given, size_t i) { return at_place(given, i).toInt(); }
std::optional<int64_t> as_optional_int(Given given, size_t i) { return at_place(given, i).toOptional<int64_t>(); }
std::vector<int64_t> as_ints(Given given, size_t i) { return at_place(given, i).toIntVector(); }
double as_double(Given given, size_t i) { return at_place(given, i).toDouble(); }
bool as_bool(Given given, size_t i) { return at_place(given, i).toBool(); }

void drop(Given given) {
  given.stack.erase(given.stack.begin() + static_cast<int64_t>(given.first), given.stack.end());
}
void push(Stack& stack, at::Tensor result) { stack.emplace_back(std::move(result)); }
void push(Stack& stack, double result) { stack.emplace_back(result); }
void push(Stack& stack, bool result) { stack.emplace_back(result); }

void add_kernel(const char* name, Kernel kernel) {
  if (isa() == Isa::none) return;  // _native.py says so, and PyTorch's closed forms serve
  on_cpu().impl(name, boxed(kernel));
}
void add_operation(const char* schema, Kernel kernel) { everywhere().def(schema, boxed(kernel)); }

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::empty(sizes, options); }
at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, const at::TensorOptions& options) {
  return at::empty_strided(sizes, strides, options);
}
at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::zeros(sizes, options); }

}  // namespace mf
