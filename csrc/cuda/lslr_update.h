// The LSLR update and its derivatives over a flat buffer [tasks, size], on a CUDA device: the CUDA C++ twin of
// kernels/lslr_update.py. Formulas: docs/derivations/lslr_update.md.
//
// Contract of every launcher:
// - All pointers are device memory of the current device, aligned to the type: float, or double where the name ends in
//   _f64. Buffers (theta, grad, gout, a and the results named after them) are [tasks, size] without gaps.
// - rates is [segments, steps], and offsets int64 [segments + 1] rises from 0 to size: the elements offsets[s] to
//   offsets[s + 1] have rate rates[s, step]. With offsets null, rates is [steps, size] and every element has its own.
// - Outputs are written whole, but of a gradient of rates only the entries of `step`. A result may be the buffer that
//   stands first among the inputs.
// - mf_lslr_update_workspace() bytes of workspace, aligned to 16, are the caller's, free again when the stream has
//   passed.
// - Work is enqueued on `stream`; nothing is allocated and the host does not wait, so a launch may be captured in a
//   graph. The result says whether the launch was accepted, not whether it ran.
// - Sums are taken in a fixed order, without atomics: the same input gives the same bits.
// - cudaErrorInvalidValue: a negative size, 2^31 elements a task or more, 65536 tasks or more, or a step out of range.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

extern "C" {

struct mf_lslr_shape {
  int64_t tasks, size, segments, steps, step;
};

/// Bytes of workspace for the two launches that sum over segments.
size_t mf_lslr_update_workspace(const mf_lslr_shape* shape);

/// out = theta - rate * grad
cudaError_t mf_lslr_update_f32(const mf_lslr_shape* shape, const int64_t* offsets, const float* theta,
                               const float* grad, const float* rates, float* out, cudaStream_t stream);
cudaError_t mf_lslr_update_f64(const mf_lslr_shape* shape, const int64_t* offsets, const double* theta,
                               const double* grad, const double* rates, double* out, cudaStream_t stream);

/// ggrad = -rate * gout; grates = -(sum of gout * grad over tasks and a rate's elements)
cudaError_t mf_lslr_update_backward_f32(const mf_lslr_shape* shape, const int64_t* offsets, const float* gout,
                                        const float* grad, const float* rates, float* ggrad, float* grates,
                                        void* workspace, cudaStream_t stream);
cudaError_t mf_lslr_update_backward_f64(const mf_lslr_shape* shape, const int64_t* offsets, const double* gout,
                                        const double* grad, const double* rates, double* ggrad, double* grates,
                                        void* workspace, cudaStream_t stream);

/// For cotangents a of ggrad and b (like rates) of grates: cgout = -rate * a - b * grad, cgrad = -b * gout,
/// crates = -(sum of a * gout).
cudaError_t mf_lslr_update_double_backward_f32(const mf_lslr_shape* shape, const int64_t* offsets, const float* a,
                                               const float* b, const float* gout, const float* grad, const float* rates,
                                               float* cgout, float* cgrad, float* crates, void* workspace,
                                               cudaStream_t stream);
cudaError_t mf_lslr_update_double_backward_f64(const mf_lslr_shape* shape, const int64_t* offsets, const double* a,
                                               const double* b, const double* gout, const double* grad,
                                               const double* rates, double* cgout, double* cgrad, double* crates,
                                               void* workspace, cudaStream_t stream);
}
