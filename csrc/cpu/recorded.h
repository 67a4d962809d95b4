// What an operation with derivatives of its own asks before autograd records it; for files that see torch's headers.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/Tensor.h>

namespace mf {

inline bool has_tangent(const at::Tensor& t) { return t._fw_grad(0).defined(); }  // PyTorch has no level but this one

inline bool under_torch_func() {
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (transforms == nullptr) {
    return false;
  }
  try {
    transforms->checkSupportsCppAutogradFunction();
    return false;
  } catch (const c10::Error&) {
    return true;
  }
}

}  // namespace mf
