// Batch norm with training statistics and a fused leaky ReLU, three orders, on a CUDA device: the CUDA C++ twin of
// kernels/per_step_batch_norm.py. Formulas and names (p, q, r, t, w): docs/derivations/per_step_batch_norm.md.
//
// Contract of every launcher:
// - All pointers are device memory of the current device. Images (x, y, gy, gx, u, c_gy, c_x) hold `type`, in
//   [tasks, images, channels, pixels] order or, channels_last, [tasks, images, pixels, channels], without gaps. Rows
//   (mean, rstd, var, gamma, beta and their gradients) hold float, or double where `type` is double. mean, rstd, var
//   and gradients of rows are [tasks, channels]; gamma, beta, a and b are too, with row_stride = channels, or one row
//   for all tasks with row_stride = 0.
// - Outputs are written whole, and need no initial value. They may not overlap inputs.
// - The caller supplies the workspace: mf_batch_norm_workspace() bytes, aligned to 16, free again when the stream has
//   passed. It needs no initial value.
// - Work is enqueued on `stream`; nothing is allocated and the host does not wait, so a launch may be captured in a
//   graph. The result says whether the launch was accepted, not whether it ran.
// - Sums are taken in a fixed order, without atomics: the same input gives the same bits.
// - cudaErrorInvalidValue: a size below 1, fewer than two rows (images x pixels), 2^31 elements a task or more, 65536
//   tasks or more, or an unknown type.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

extern "C" {

enum mf_type { MF_DOUBLE = 0, MF_FLOAT = 1, MF_BFLOAT16 = 2, MF_HALF = 3 };

struct mf_batch_norm_shape {
  int64_t tasks, images, channels, pixels;
  int channels_last;
};

/// Bytes of workspace for any of the three launches; 0 where the shape or the type is refused.
size_t mf_batch_norm_workspace(const mf_batch_norm_shape* shape, mf_type type);

/// y = leaky(gamma (x - mean) rstd + beta), rstd = 1/sqrt(var + eps), var biased; slope 1 leaves the leaky ReLU out.
cudaError_t mf_batch_norm(const mf_batch_norm_shape* shape, mf_type type, const void* x, const void* gamma,
                          const void* beta, int64_t row_stride, double eps, double slope, void* y, void* mean,
                          void* rstd, void* var, void* workspace, cudaStream_t stream);

/// Gradients gx, ggamma, gbeta for the gradient gy of y.
cudaError_t mf_batch_norm_backward(const mf_batch_norm_shape* shape, mf_type type, const void* gy, const void* x,
                                   const void* gamma, const void* beta, int64_t row_stride, const void* mean,
                                   const void* rstd, double slope, void* gx, void* ggamma, void* gbeta, void* workspace,
                                   cudaStream_t stream);

/// Gradients c_gy, c_x, c_gamma of the backward pass for cotangents u of gx, a of ggamma and b of gbeta; a and b may
/// be null (zero). That of beta is zero.
cudaError_t mf_batch_norm_double_backward(const mf_batch_norm_shape* shape, mf_type type, const void* u, const void* a,
                                          const void* b, const void* gy, const void* x, const void* gamma,
                                          const void* beta, int64_t row_stride, const void* mean, const void* rstd,
                                          double slope, void* c_gy, void* c_x, void* c_gamma, void* workspace,
                                          cudaStream_t stream);
}
