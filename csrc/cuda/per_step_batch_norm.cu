// Each order is a reduction, which cuts the rows (image, pixel) of a task into pieces and leaves one partial sum of
// each in the workspace [quantity, piece, task, channel], and an elementwise pass, which adds them up.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "per_step_batch_norm.h"

namespace {

constexpr int kThreads = 256;
constexpr int kMaxPieces = 32;
constexpr int kTargetBlocks = 512;
constexpr int kMaxQuantities = 5;

template <class A, class T>
__device__ A wide(T value) {
  return static_cast<A>(value);
}
template <>
__device__ float wide<float, __nv_bfloat16>(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
template <>
__device__ float wide<float, __half>(__half value) {
  return __half2float(value);
}

template <class T, class A>
__device__ void put(T* to, A value) {
  *to = static_cast<T>(value);
}
__device__ void put(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }
__device__ void put(__half* to, float value) { *to = __float2half_rn(value); }

/// Sizes of one launch. A piece is `piece` rows; every block takes one piece of the channels it covers. Reciprocals
/// of row counts come from the host: a division in double is a call, whose saved registers would be spills.
struct Sizes {
  int tasks, channels, pixels, rows, pieces, piece, row_stride;
  double per_row, per_piece_row, per_last_row;
};

/// A block is kChannels neighbouring channels by kRows rows at a time.
template <bool kLast>
struct Block {
  static constexpr int kChannels = kLast ? 32 : 1;
  static constexpr int kRows = kThreads / kChannels;

  int channel, row, task, piece;

  __device__ Block()
      : channel(blockIdx.x * kChannels + threadIdx.x % kChannels),
        row(threadIdx.x / kChannels),
        task(blockIdx.y),
        piece(blockIdx.z) {}

  /// Index of the first row of this thread, and one past the piece's last.
  __device__ int first(const Sizes& s) const { return piece * s.piece + row; }
  __device__ int stop(const Sizes& s) const { return min(s.rows, (piece + 1) * s.piece); }

  __device__ int offset(const Sizes& s, int m) const {
    if (kLast) return m * s.channels + channel;
    return (m / s.pixels * s.channels + channel) * s.pixels + m % s.pixels;
  }
  __device__ int64_t task_offset(const Sizes& s) const { return static_cast<int64_t>(task) * s.rows * s.channels; }
  __device__ int row_index(const Sizes& s) const { return task * s.channels + channel; }
  __device__ int64_t part_index(const Sizes& s, int quantity, int piece_index) const {
    return (static_cast<int64_t>(quantity * s.pieces + piece_index) * s.tasks + task) * s.channels + channel;
  }
  __device__ bool writes_rows() const { return row == 0 && piece == 0; }
};

/// Sums over the rows of a block, in a fixed tree; every thread gets those of its channel.
template <class A, bool kLast, int kCount>
__device__ void sum_rows(A (&values)[kCount]) {
  __shared__ A shared[kCount][kThreads];
#pragma unroll
  for (int k = 0; k < kCount; ++k) shared[k][threadIdx.x] = values[k];
  for (int half = kThreads / 2; half >= Block<kLast>::kChannels; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) shared[k][threadIdx.x] += shared[k][threadIdx.x + half];
    }
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) values[k] = shared[k][threadIdx.x % Block<kLast>::kChannels];
}

/// Partial sums of the pieces, added in order.
template <class A, bool kLast, int kCount>
__device__ void total(const A* parts, const Block<kLast>& block, const Sizes& s, A (&sums)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    sums[k] = 0;
    for (int i = 0; i < s.pieces; ++i) sums[k] += parts[block.part_index(s, k, i)];
  }
}

template <class T, class A, bool kLast>
__global__ void __launch_bounds__(kThreads) forward_sums(Sizes s, const T* __restrict__ x, A* __restrict__ parts) {
  const Block<kLast> block;
  const bool real = block.channel < s.channels;
  x += block.task_offset(s);
  const int stop = real ? block.stop(s) : 0;
  const A inverse = static_cast<A>(block.piece + 1 < s.pieces ? s.per_piece_row : s.per_last_row);
  A sum[1] = {};
  for (int m = block.first(s); m < stop; m += block.kRows) sum[0] += wide<A>(x[block.offset(s, m)]);
  sum_rows<A, kLast>(sum);
  const A centre = sum[0] * inverse;
  A deviations[2] = {};
  for (int m = block.first(s); m < stop; m += block.kRows) {
    const A d = wide<A>(x[block.offset(s, m)]) - centre;
    deviations[0] += d;
    deviations[1] += d * d;
  }
  sum_rows<A, kLast>(deviations);
  if (block.row == 0 && real) {
    // What rounding left in the mean is taken out of it and of the squares.
    parts[block.part_index(s, 0, block.piece)] = centre + deviations[0] * inverse;
    parts[block.part_index(s, 1, block.piece)] = deviations[1] - deviations[0] * deviations[0] * inverse;
  }
}

template <class T, class A, bool kLast>
__global__ void __launch_bounds__(kThreads)
    forward_apply(Sizes s, const T* __restrict__ x, const A* __restrict__ gamma, const A* __restrict__ beta, A eps,
                  A slope, const A* __restrict__ parts, T* __restrict__ y, A* __restrict__ mean, A* __restrict__ rstd,
                  A* __restrict__ var) {
  const Block<kLast> block;
  if (block.channel >= s.channels) return;
  const A first = parts[block.part_index(s, 0, 0)];
  A shift = 0;
  for (int i = 1; i < s.pieces; ++i) {
    shift += (parts[block.part_index(s, 0, i)] - first) * static_cast<A>(min(s.piece, s.rows - i * s.piece));
  }
  const A centre = first + shift * static_cast<A>(s.per_row);
  A squares = 0;
  for (int i = 0; i < s.pieces; ++i) {
    const A d = parts[block.part_index(s, 0, i)] - centre;
    squares += parts[block.part_index(s, 1, i)] + d * d * static_cast<A>(min(s.piece, s.rows - i * s.piece));
  }
  const A variance = squares * static_cast<A>(s.per_row);
  const A inverse = rsqrt(variance + eps);
  if (block.writes_rows()) {
    mean[block.row_index(s)] = centre;
    rstd[block.row_index(s)] = inverse;
    var[block.row_index(s)] = variance;
  }
  const A weight = gamma[block.task * s.row_stride + block.channel];
  const A bias = beta[block.task * s.row_stride + block.channel];
  x += block.task_offset(s);
  y += block.task_offset(s);
  for (int m = block.first(s); m < block.stop(s); m += block.kRows) {
    const int i = block.offset(s, m);
    const A z = (wide<A>(x[i]) - centre) * inverse * weight + bias;
    put(y + i, z > 0 ? z : z * slope);
  }
}

/// What the backward passes read of one channel.
template <class A>
struct Rows {
  A mean, rstd, gamma, beta, slope;

  template <bool kLast>
  __device__ Rows(const Block<kLast>& block, const Sizes& s, const A* means, const A* rstds, const A* gammas,
                  const A* betas, A slope)
      : slope(slope) {
    const bool real = block.channel < s.channels;
    mean = real ? means[block.row_index(s)] : 0;
    rstd = real ? rstds[block.row_index(s)] : 0;
    gamma = real ? gammas[block.task * s.row_stride + block.channel] : 0;
    beta = real ? betas[block.task * s.row_stride + block.channel] : 0;
  }
  __device__ A normal(A x) const { return (x - mean) * rstd; }
  __device__ A gate(A normal) const { return normal * gamma + beta > 0 ? A(1) : slope; }
};

template <class T, class A, bool kLast>
__global__ void __launch_bounds__(kThreads)
    backward_sums(Sizes s, const T* __restrict__ gy, const T* __restrict__ x, const A* __restrict__ mean,
                  const A* __restrict__ rstd, const A* __restrict__ gamma, const A* __restrict__ beta, A slope,
                  A* __restrict__ parts) {
  const Block<kLast> block;
  const Rows<A> rows(block, s, mean, rstd, gamma, beta, slope);
  const bool real = block.channel < s.channels;
  gy += block.task_offset(s);
  x += block.task_offset(s);
  A sums[2] = {};
  if (real) {
    for (int m = block.first(s); m < block.stop(s); m += block.kRows) {
      const int i = block.offset(s, m);
      const A normal = rows.normal(wide<A>(x[i]));
      const A g = wide<A>(gy[i]) * rows.gate(normal);
      sums[0] += g;
      sums[1] += g * normal;
    }
  }
  sum_rows<A, kLast>(sums);
  if (block.row == 0 && real) {
    for (int k = 0; k < 2; ++k) parts[block.part_index(s, k, block.piece)] = sums[k];
  }
}

template <class T, class A, bool kLast>
__global__ void __launch_bounds__(kThreads)
    backward_apply(Sizes s, const T* __restrict__ gy, const T* __restrict__ x, const A* __restrict__ mean,
                   const A* __restrict__ rstd, const A* __restrict__ gamma, const A* __restrict__ beta, A slope,
                   const A* __restrict__ parts, T* __restrict__ gx, A* __restrict__ ggamma, A* __restrict__ gbeta) {
  const Block<kLast> block;
  if (block.channel >= s.channels) return;
  const Rows<A> rows(block, s, mean, rstd, gamma, beta, slope);
  A sums[2];
  total(parts, block, s, sums);
  if (block.writes_rows()) {
    gbeta[block.row_index(s)] = sums[0];
    ggamma[block.row_index(s)] = sums[1];
  }
  const A p = sums[0] * static_cast<A>(s.per_row);
  const A q = sums[1] * static_cast<A>(s.per_row);
  gy += block.task_offset(s);
  x += block.task_offset(s);
  gx += block.task_offset(s);
  for (int m = block.first(s); m < block.stop(s); m += block.kRows) {
    const int i = block.offset(s, m);
    const A normal = rows.normal(wide<A>(x[i]));
    const A g = wide<A>(gy[i]) * rows.gate(normal);
    put(gx + i, rows.gamma * rows.rstd * (g - p - normal * q));
  }
}

template <class T, class A, bool kLast>
__global__ void __launch_bounds__(kThreads)
    double_sums(Sizes s, const T* __restrict__ u, const T* __restrict__ gy, const T* __restrict__ x,
                const A* __restrict__ mean, const A* __restrict__ rstd, const A* __restrict__ gamma,
                const A* __restrict__ beta, A slope, A* __restrict__ parts) {
  const Block<kLast> block;
  const Rows<A> rows(block, s, mean, rstd, gamma, beta, slope);
  const bool real = block.channel < s.channels;
  u += block.task_offset(s);
  gy += block.task_offset(s);
  x += block.task_offset(s);
  A sums[5] = {};
  if (real) {
    for (int m = block.first(s); m < block.stop(s); m += block.kRows) {
      const int i = block.offset(s, m);
      const A normal = rows.normal(wide<A>(x[i]));
      const A g = wide<A>(gy[i]) * rows.gate(normal);
      const A v = wide<A>(u[i]);
      sums[0] += g;
      sums[1] += g * normal;
      sums[2] += v;
      sums[3] += v * normal;
      sums[4] += v * g;
    }
  }
  sum_rows<A, kLast>(sums);
  if (block.row == 0 && real) {
    for (int k = 0; k < 5; ++k) parts[block.part_index(s, k, block.piece)] = sums[k];
  }
}

template <class T, class A, bool kLast>
__global__ void __launch_bounds__(kThreads)
    double_apply(Sizes s, const T* __restrict__ u, const A* __restrict__ a, const A* __restrict__ b,
                 const T* __restrict__ gy, const T* __restrict__ x, const A* __restrict__ mean,
                 const A* __restrict__ rstd, const A* __restrict__ gamma, const A* __restrict__ beta, A slope,
                 const A* __restrict__ parts, T* __restrict__ c_gy, T* __restrict__ c_x, A* __restrict__ c_gamma) {
  const Block<kLast> block;
  if (block.channel >= s.channels) return;
  const Rows<A> rows(block, s, mean, rstd, gamma, beta, slope);
  A sums[5];
  total(parts, block, s, sums);
  const A share = static_cast<A>(s.per_row);
  const A p = sums[0] * share, q = sums[1] * share, r = sums[2] * share, t = sums[3] * share, w = sums[4] * share;
  if (block.writes_rows()) c_gamma[block.row_index(s)] = static_cast<A>(s.rows) * rows.rstd * (w - r * p - t * q);
  const int row = block.task * s.row_stride + block.channel;
  const A to_gamma = a == nullptr ? A(0) : a[row];
  const A to_beta = b == nullptr ? A(0) : b[row];
  const A scale = rows.gamma * rows.rstd;
  const A along = w - r * p - 3 * t * q;
  const int64_t task = block.task_offset(s);
  for (int m = block.first(s); m < block.stop(s); m += block.kRows) {
    const int64_t i = task + block.offset(s, m);
    const A normal = rows.normal(wide<A>(x[i]));
    const A gate = rows.gate(normal);
    const A g = wide<A>(gy[i]) * gate - p;
    const A v = wide<A>(u[i]) - r;
    put(c_gy + i, (scale * (v - normal * t) + to_gamma * normal + to_beta) * gate);
    put(c_x + i, to_gamma * rows.rstd * (g - normal * q) - scale * rows.rstd * (along * normal + t * g + q * v));
  }
}

template <class T, class A, bool kLast>
struct Launcher {
  using Type = T;
  using Wide = A;
  static constexpr bool kChannelsLast = kLast;

  Sizes sizes;
  dim3 grid;
  cudaStream_t stream;

  template <class... Formal, class... Given>
  void operator()(void (*kernel)(Sizes, Formal...), Given... given) const {
    kernel<<<grid, kThreads, 0, stream>>>(sizes, static_cast<Formal>(given)...);
  }
};

bool valid(const mf_batch_norm_shape& s, mf_type type) {
  if (s.tasks < 1 || s.images < 1 || s.channels < 1 || s.pixels < 1 || s.tasks > 65535) return false;
  if (type < MF_DOUBLE || type > MF_HALF) return false;
  const int64_t limit = int64_t{1} << 31;
  return s.images < limit && s.pixels < limit / s.images && s.images * s.pixels >= 2 &&
         s.channels < limit / (s.images * s.pixels);
}

/// Pieces so that about kTargetBlocks blocks are busy, none of them without rows.
Sizes sizes_of(const mf_batch_norm_shape& s, int64_t row_stride, bool last) {
  const int channels = last ? 32 : 1;
  const int rows = static_cast<int>(s.images * s.pixels);
  const int block_rows = kThreads / channels * 4;
  const int64_t blocks = (s.channels + channels - 1) / channels * s.tasks;
  const int64_t wanted =
      std::min<int64_t>({kMaxPieces, kTargetBlocks / blocks, (int64_t{rows} + block_rows - 1) / block_rows});
  const int pieces = static_cast<int>(std::max<int64_t>(1, wanted));
  const int piece = (rows + pieces - 1) / pieces;
  const int used = (rows + piece - 1) / piece;
  return {static_cast<int>(s.tasks),
          static_cast<int>(s.channels),
          static_cast<int>(s.pixels),
          rows,
          used,
          piece,
          static_cast<int>(row_stride),
          1.0 / rows,
          1.0 / piece,
          1.0 / (rows - (used - 1) * piece)};
}

template <class T, class A, bool kLast, class Body>
cudaError_t with_launcher(const mf_batch_norm_shape& s, int64_t row_stride, cudaStream_t stream, Body body) {
  const Sizes sizes = sizes_of(s, row_stride, kLast);
  const int channels = Block<kLast>::kChannels;
  const dim3 grid((sizes.channels + channels - 1) / channels, sizes.tasks, sizes.pieces);
  body(Launcher<T, A, kLast>{sizes, grid, stream});
  return cudaGetLastError();
}

template <class T, class A, class Body>
cudaError_t with_layout(const mf_batch_norm_shape& s, int64_t row_stride, cudaStream_t stream, Body body) {
  return s.channels_last || s.pixels == 1 ? with_launcher<T, A, true>(s, row_stride, stream, body)
                                          : with_launcher<T, A, false>(s, row_stride, stream, body);
}

template <class Body>
cudaError_t dispatch(const mf_batch_norm_shape* shape, mf_type type, int64_t row_stride, cudaStream_t stream,
                     Body body) {
  if (shape == nullptr || !valid(*shape, type) || (row_stride != 0 && row_stride != shape->channels)) {
    return cudaErrorInvalidValue;
  }
  switch (type) {
    case MF_DOUBLE:
      return with_layout<double, double>(*shape, row_stride, stream, body);
    case MF_FLOAT:
      return with_layout<float, float>(*shape, row_stride, stream, body);
    case MF_BFLOAT16:
      return with_layout<__nv_bfloat16, float>(*shape, row_stride, stream, body);
    default:
      return with_layout<__half, float>(*shape, row_stride, stream, body);
  }
}

}  // namespace

extern "C" {

size_t mf_batch_norm_workspace(const mf_batch_norm_shape* shape, mf_type type) {
  if (shape == nullptr || !valid(*shape, type)) return 0;
  const Sizes s = sizes_of(*shape, 0, shape->channels_last || shape->pixels == 1);
  const size_t element = type == MF_DOUBLE ? sizeof(double) : sizeof(float);
  return element * kMaxQuantities * s.pieces * s.tasks * s.channels;
}

cudaError_t mf_batch_norm(const mf_batch_norm_shape* shape, mf_type type, const void* x, const void* gamma,
                          const void* beta, int64_t row_stride, double eps, double slope, void* y, void* mean,
                          void* rstd, void* var, void* workspace, cudaStream_t stream) {
  return dispatch(shape, type, row_stride, stream, [=](auto launch) {
    using L = decltype(launch);
    using T = typename L::Type;
    using A = typename L::Wide;
    launch(&forward_sums<T, A, L::kChannelsLast>, x, workspace);
    launch(&forward_apply<T, A, L::kChannelsLast>, x, gamma, beta, eps, slope, workspace, y, mean, rstd, var);
  });
}

cudaError_t mf_batch_norm_backward(const mf_batch_norm_shape* shape, mf_type type, const void* gy, const void* x,
                                   const void* gamma, const void* beta, int64_t row_stride, const void* mean,
                                   const void* rstd, double slope, void* gx, void* ggamma, void* gbeta, void* workspace,
                                   cudaStream_t stream) {
  return dispatch(shape, type, row_stride, stream, [=](auto launch) {
    using L = decltype(launch);
    using T = typename L::Type;
    using A = typename L::Wide;
    launch(&backward_sums<T, A, L::kChannelsLast>, gy, x, mean, rstd, gamma, beta, slope, workspace);
    launch(&backward_apply<T, A, L::kChannelsLast>, gy, x, mean, rstd, gamma, beta, slope, workspace, gx, ggamma,
           gbeta);
  });
}

cudaError_t mf_batch_norm_double_backward(const mf_batch_norm_shape* shape, mf_type type, const void* u, const void* a,
                                          const void* b, const void* gy, const void* x, const void* gamma,
                                          const void* beta, int64_t row_stride, const void* mean, const void* rstd,
                                          double slope, void* c_gy, void* c_x, void* c_gamma, void* workspace,
                                          cudaStream_t stream) {
  return dispatch(shape, type, row_stride, stream, [=](auto launch) {
    using L = decltype(launch);
    using T = typename L::Type;
    using A = typename L::Wide;
    launch(&double_sums<T, A, L::kChannelsLast>, u, gy, x, mean, rstd, gamma, beta, slope, workspace);
    launch(&double_apply<T, A, L::kChannelsLast>, u, a, b, gy, x, mean, rstd, gamma, beta, slope, workspace, c_gy, c_x,
           c_gamma);
  });
}
}
