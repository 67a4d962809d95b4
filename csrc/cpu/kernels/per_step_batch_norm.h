// Plain-data interface between csrc/cpu/per_step_batch_norm.cpp and its kernels.
#pragma once

#include <cstdint>

#include "bf16.h"
#include "isa.h"

namespace mf::bn {

constexpr int kMaxSums = 5;
constexpr int kMaxConstants = 8;

// One call of any of the three orders, less its images; an order leaves the members it does not need null.
template <typename T>
struct Problem {
  int64_t tasks, images, channels, pixels;
  // Rows of task t start at t * row_stride, which is 0 or channels. a and b may be null: zero.
  const T* gamma;
  const T* beta;
  const T* a;
  const T* b;
  int64_t row_stride;
  double eps;
  T slope;  // 1: no leaky ReLU
  // [tasks, channels]: written by forward, read by the others.
  T* mean;
  T* rstd;
  T* var;
  T* affine[2];  // [tasks, channels]; backward: gγ, gβ; double backward: c_γ
  // Channels-last only: rows of a task (images * pixels) are cut into pieces, always at the same places.
  int64_t pieces, piece_rows;
  double* sums;  // [tasks, pieces, kMaxSums, channels]
  T* constants;  // [tasks, kMaxConstants, channels]
};

// With its images, stored as S.
template <typename S>
struct Call : Problem<Compute<S>> {
  const S* x;
  const S* gy;
  const S* u;
  S* out[2];  // forward: y; backward: gx; double backward: c_gy, c_x
};

template <typename S>
using Pass = void (*)(const Call<S>& p, int64_t begin, int64_t end);

// The three phases of channels-last; contiguous tensors do all of an order in one call.
template <typename S>
struct Kernels {
  Pass<S> planes;  // [begin, end) of tasks * channels
  Pass<S> sums;    // [begin, end) of tasks * pieces
  void (*combine)(const Call<S>& p);
  Pass<S> apply;  // of tasks * pieces
};

enum class Order { forward, backward, double_backward };

}  // namespace mf::bn

MF_KERNEL(template <typename S> bn::Kernels<S> batch_norm_kernels(bn::Order order, bool leaky);)
