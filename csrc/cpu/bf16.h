// bfloat16 in memory: the kernels read and write it, and compute in float32. Conversions: kernels' vec.h.
#pragma once

#include <cstdint>
#include <type_traits>

namespace mf {

/// The upper half of a float32.
enum class Bf16 : uint16_t {};

/// The type in which values stored as S are computed.
template <typename S>
using Compute = std::conditional_t<std::is_same_v<S, Bf16>, float, S>;

}  // namespace mf
