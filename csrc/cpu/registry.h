// How the operations' files give their functions to torch's dispatcher without its headers, which take longer to read
// than most of our files to compile: registry.cpp alone reads them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace mf {

using Stack = std::vector<c10::IValue>;  ///< arguments of a call, and then its results

/// The arguments of a call that begin at `first`.
struct Given {
  Stack& stack;
  size_t first;
};

// An argument as a function takes it; raises where the schema has another type.
const at::Tensor& as_tensor(Given, size_t i);
std::optional<at::Tensor> as_optional_tensor(Given, size_t i);
int64_t as_int(Given, size_t i);
std::optional<int64_t> as_optional_int(Given, size_t i);
std::vector<int64_t> as_ints(Given, size_t i);
double as_double(Given, size_t i);
bool as_bool(Given, size_t i);
void drop(Given);  ///< takes all of them from the stack
void push(Stack&, at::Tensor);
void push(Stack&, double);
void push(Stack&, bool);

template <typename T>
struct Argument;
template <>
struct Argument<const at::Tensor&> {
  static const at::Tensor& of(Given given, size_t i) { return as_tensor(given, i); }
};
template <>
struct Argument<at::Tensor&> {  // one that the schema marks as written
  static at::Tensor& of(Given given, size_t i) { return const_cast<at::Tensor&>(as_tensor(given, i)); }
};
template <>
struct Argument<const std::optional<at::Tensor>&> {
  static std::optional<at::Tensor> of(Given given, size_t i) { return as_optional_tensor(given, i); }
};
template <>
struct Argument<std::optional<int64_t>> {
  static std::optional<int64_t> of(Given given, size_t i) { return as_optional_int(given, i); }
};
template <>
struct Argument<at::IntArrayRef> {
  static std::vector<int64_t> of(Given given, size_t i) { return as_ints(given, i); }
};
template <>
struct Argument<int64_t> {
  static int64_t of(Given given, size_t i) { return as_int(given, i); }
};
template <>
struct Argument<double> {
  static double of(Given given, size_t i) { return as_double(given, i); }
};
template <>
struct Argument<bool> {
  static bool of(Given given, size_t i) { return as_bool(given, i); }
};

template <typename T>
void push_all(Stack& stack, T result) {
  push(stack, std::move(result));
}
template <typename... T>
void push_all(Stack& stack, std::tuple<T...> results) {
  std::apply([&](auto&... each) { (push(stack, std::move(each)), ...); }, results);
}

/// A function whose type `call` knows, and the number of its arguments.
struct Kernel {
  void (*function)();
  void (*call)(void (*function)(), Given given);
  size_t arguments;
};

template <typename Result, typename... Arguments, size_t... i>
Kernel kernel(Result (*function)(Arguments...), std::index_sequence<i...>) {
  const auto call = [](void (*any)(), Given given) {
    const auto own = reinterpret_cast<Result (*)(Arguments...)>(any);
    if constexpr (std::is_void_v<Result>) {
      own(Argument<Arguments>::of(given, i)...);
      drop(given);
    } else {
      Result result = own(Argument<Arguments>::of(given, i)...);
      drop(given);
      push_all(given.stack, std::move(result));
    }
  };
  return {reinterpret_cast<void (*)()>(function), call, sizeof...(Arguments)};
}

/// For CPU tensors, behind an operation's name; nothing where the library has no level for this processor.
void add_kernel(const char* name, Kernel kernel);
/// An operation of this schema, for all tensors.
void add_operation(const char* schema, Kernel kernel);

/// Registers functions, each behind its operation's name; true.
template <typename Result, typename... Arguments, typename... Others>
bool implement(const char* name, Result (*function)(Arguments...), const Others&... others) {
  add_kernel(name, kernel(function, std::index_sequence_for<Arguments...>()));
  if constexpr (sizeof...(others) > 0) implement(others...);
  return true;
}

/// The same, behind an operation's schema.
template <typename Result, typename... Arguments>
bool implement_all(const char* schema, Result (*function)(Arguments...)) {
  add_operation(schema, kernel(function, std::index_sequence_for<Arguments...>()));
  return true;
}

// As at::empty and so on, whose headers read much more.
at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, const at::TensorOptions& options);
at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace mf
