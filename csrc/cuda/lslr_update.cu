// A block serves one piece of at most kPiece elements of one segment for one task and finds it in the offsets itself;
// blocks beyond the last piece do nothing. A sum over a segment is left piece by piece in the workspace [task, piece]
// and added up in order by a second kernel. Per-element rates need no sum over elements: a thread takes all tasks.

#include <algorithm>

#include "lslr_update.h"

namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 2048;

struct Sizes {
  int size, segments, steps, step, pieces, tasks;
};

struct Piece {
  int segment, begin, end;
};

/// Number of pieces of a segment.
__device__ int pieces_of(const int64_t* offsets, int segment) {
  return static_cast<int>((offsets[segment + 1] - offsets[segment] + kPiece - 1) / kPiece);
}

/// Segment and elements of a piece; empty beyond the last.
__device__ Piece find(const int64_t* offsets, const Sizes& s, int wanted) {
  int before = 0;
  for (int segment = 0; segment < s.segments; ++segment) {
    const int count = pieces_of(offsets, segment);
    if (wanted < before + count) {
      const int begin = static_cast<int>(offsets[segment]) + (wanted - before) * kPiece;
      return {segment, begin, min(begin + kPiece, static_cast<int>(offsets[segment + 1]))};
    }
    before += count;
  }
  return {0, 0, 0};
}

/// The piece of this block, found by one thread.
__device__ Piece own_piece(const int64_t* offsets, const Sizes& s) {
  __shared__ Piece shared;
  if (offsets == nullptr) {
    const int begin = blockIdx.x * kPiece;
    return {0, begin, min(begin + kPiece, s.size)};
  }
  if (threadIdx.x == 0) shared = find(offsets, s, blockIdx.x);
  __syncthreads();
  return shared;
}

/// Sum over the block, in thread 0, in a fixed order.
template <class T>
__device__ T block_sum(T value) {
  __shared__ T warps[kThreads / 32];
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  T total = 0;
  if (threadIdx.x == 0)
    for (const T warp : warps) total += warp;
  return total;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    update(Sizes s, const int64_t* offsets, const T* theta, const T* grad, const T* rates, T* out) {
  const Piece p = own_piece(offsets, s);
  const int64_t task = static_cast<int64_t>(blockIdx.y) * s.size;
  const bool each = offsets == nullptr;
  const T* row = each ? rates + static_cast<int64_t>(s.step) * s.size : rates + p.segment * s.steps + s.step;
  for (int i = p.begin + threadIdx.x; i < p.end; i += kThreads)
    out[task + i] = theta[task + i] - row[each ? i : 0] * grad[task + i];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    backward(Sizes s, const int64_t* offsets, const T* gout, const T* grad, const T* rates, T* ggrad, T* parts) {
  const Piece p = own_piece(offsets, s);
  const int64_t task = static_cast<int64_t>(blockIdx.y) * s.size;
  const T rate = rates[p.segment * s.steps + s.step];
  T sum = 0;
  for (int i = p.begin + threadIdx.x; i < p.end; i += kThreads) {
    const T g = gout[task + i];
    sum -= g * grad[task + i];
    ggrad[task + i] = -rate * g;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) parts[static_cast<int64_t>(blockIdx.y) * s.pieces + blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    backward_each(Sizes s, const T* gout, const T* grad, const T* rates, T* ggrad, T* grates) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= s.size) return;
  const int64_t row = static_cast<int64_t>(s.step) * s.size + i;
  const T rate = rates[row];
  T sum = 0;
  for (int task = 0; task < s.tasks; ++task) {
    const int64_t at = static_cast<int64_t>(task) * s.size + i;
    const T g = gout[at];
    sum -= g * grad[at];
    ggrad[at] = -rate * g;
  }
  grates[row] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    double_backward(Sizes s, const int64_t* offsets, const T* a, const T* b, const T* gout, const T* grad,
                    const T* rates, T* cgout, T* cgrad, T* parts) {
  const Piece p = own_piece(offsets, s);
  const int64_t task = static_cast<int64_t>(blockIdx.y) * s.size;
  const int at_rate = p.segment * s.steps + s.step;
  const T rate = rates[at_rate], along = b[at_rate];
  T sum = 0;
  for (int i = p.begin + threadIdx.x; i < p.end; i += kThreads) {
    const T u = a[task + i], g = gout[task + i];
    sum -= u * g;
    cgout[task + i] = -rate * u - along * grad[task + i];
    cgrad[task + i] = -along * g;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) parts[static_cast<int64_t>(blockIdx.y) * s.pieces + blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    double_backward_each(Sizes s, const T* a, const T* b, const T* gout, const T* grad, const T* rates, T* cgout,
                         T* cgrad, T* crates) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= s.size) return;
  const int64_t row = static_cast<int64_t>(s.step) * s.size + i;
  const T rate = rates[row], along = b[row];
  T sum = 0;
  for (int task = 0; task < s.tasks; ++task) {
    const int64_t at = static_cast<int64_t>(task) * s.size + i;
    const T u = a[at], g = gout[at];
    sum -= u * g;
    cgout[at] = -rate * u - along * grad[at];
    cgrad[at] = -along * g;
  }
  crates[row] = sum;
}

/// One block adds up the pieces of its segment over all tasks.
template <class T>
__global__ void __launch_bounds__(kThreads) collect(Sizes s, const int64_t* offsets, const T* parts, T* grates) {
  __shared__ int first;
  if (threadIdx.x == 0) {
    first = 0;
    for (int segment = 0; segment < static_cast<int>(blockIdx.x); ++segment) first += pieces_of(offsets, segment);
  }
  __syncthreads();
  const int count = pieces_of(offsets, blockIdx.x);
  T sum = 0;
  for (int task = 0; task < s.tasks; ++task)
    for (int i = threadIdx.x; i < count; i += kThreads) sum += parts[static_cast<int64_t>(task) * s.pieces + first + i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) grates[blockIdx.x * s.steps + s.step] = sum;
}

/// Pieces there can be at most; the host does not read the offsets.
int64_t most_pieces(const mf_lslr_shape& shape) { return shape.size / kPiece + std::max<int64_t>(1, shape.segments); }

bool refused(const mf_lslr_shape& shape) {
  const int64_t limit = int64_t{1} << 31;
  return shape.tasks < 0 || shape.tasks > 65535 || shape.size < 0 || shape.size >= limit || shape.segments < 0 ||
         shape.segments >= limit || shape.steps < 1 || shape.steps * shape.segments >= limit || shape.step < 0 ||
         shape.step >= shape.steps;
}

Sizes sizes_of(const mf_lslr_shape& shape) {
  return {static_cast<int>(shape.size), static_cast<int>(shape.segments),     static_cast<int>(shape.steps),
          static_cast<int>(shape.step), static_cast<int>(most_pieces(shape)), static_cast<int>(shape.tasks)};
}

bool empty(const mf_lslr_shape& shape) { return shape.tasks == 0 || shape.size == 0; }

unsigned blocks_of(int64_t elements, int each) { return static_cast<unsigned>((elements + each - 1) / each); }

template <class T>
cudaError_t run_update(const mf_lslr_shape& shape, const int64_t* offsets, const T* theta, const T* grad,
                       const T* rates, T* out, cudaStream_t stream) {
  if (refused(shape)) return cudaErrorInvalidValue;
  if (empty(shape)) return cudaSuccess;
  const Sizes s = sizes_of(shape);
  const dim3 grid(static_cast<unsigned>(s.pieces), static_cast<unsigned>(s.tasks));
  update<T><<<grid, kThreads, 0, stream>>>(s, offsets, theta, grad, rates, out);
  return cudaGetLastError();
}

/// Launches `pieces` and adds its sums up, or `each`; grates gets zeros if there is nothing to sum.
template <class T, class Pieces, class Each>
cudaError_t run_sums(const mf_lslr_shape& shape, const int64_t* offsets, T* grates, void* workspace,
                     cudaStream_t stream, const Pieces& pieces, const Each& each) {
  if (refused(shape)) return cudaErrorInvalidValue;
  const Sizes s = sizes_of(shape);
  if (offsets == nullptr) {
    if (s.size == 0) return cudaSuccess;
    each(s, blocks_of(s.size, kThreads));
    return cudaGetLastError();
  }
  if (s.segments == 0) return cudaSuccess;
  T* parts = static_cast<T*>(workspace);
  if (s.tasks > 0) pieces(s, dim3(static_cast<unsigned>(s.pieces), static_cast<unsigned>(s.tasks)), parts);
  collect<T><<<static_cast<unsigned>(s.segments), kThreads, 0, stream>>>(s, offsets, parts, grates);
  return cudaGetLastError();
}

template <class T>
cudaError_t run_backward(const mf_lslr_shape& shape, const int64_t* offsets, const T* gout, const T* grad,
                         const T* rates, T* ggrad, T* grates, void* workspace, cudaStream_t stream) {
  return run_sums<T>(
      shape, offsets, grates, workspace, stream,
      [&](const Sizes& s, dim3 grid, T* parts) {
        backward<T><<<grid, kThreads, 0, stream>>>(s, offsets, gout, grad, rates, ggrad, parts);
      },
      [&](const Sizes& s, unsigned grid) {
        backward_each<T><<<grid, kThreads, 0, stream>>>(s, gout, grad, rates, ggrad, grates);
      });
}

template <class T>
cudaError_t run_double_backward(const mf_lslr_shape& shape, const int64_t* offsets, const T* a, const T* b,
                                const T* gout, const T* grad, const T* rates, T* cgout, T* cgrad, T* crates,
                                void* workspace, cudaStream_t stream) {
  return run_sums<T>(
      shape, offsets, crates, workspace, stream,
      [&](const Sizes& s, dim3 grid, T* parts) {
        double_backward<T><<<grid, kThreads, 0, stream>>>(s, offsets, a, b, gout, grad, rates, cgout, cgrad, parts);
      },
      [&](const Sizes& s, unsigned grid) {
        double_backward_each<T><<<grid, kThreads, 0, stream>>>(s, a, b, gout, grad, rates, cgout, cgrad, crates);
      });
}

}  // namespace

extern "C" {

size_t mf_lslr_update_workspace(const mf_lslr_shape* shape) {
  if (refused(*shape)) return 0;
  return static_cast<size_t>(shape->tasks * most_pieces(*shape)) * sizeof(double);
}

#define MF_LAUNCHERS(suffix, T)                                                                                       \
  cudaError_t mf_lslr_update_##suffix(const mf_lslr_shape* shape, const int64_t* offsets, const T* theta,             \
                                      const T* grad, const T* rates, T* out, cudaStream_t stream) {                   \
    return run_update<T>(*shape, offsets, theta, grad, rates, out, stream);                                           \
  }                                                                                                                   \
  cudaError_t mf_lslr_update_backward_##suffix(const mf_lslr_shape* shape, const int64_t* offsets, const T* gout,     \
                                               const T* grad, const T* rates, T* ggrad, T* grates, void* workspace,   \
                                               cudaStream_t stream) {                                                 \
    return run_backward<T>(*shape, offsets, gout, grad, rates, ggrad, grates, workspace, stream);                     \
  }                                                                                                                   \
  cudaError_t mf_lslr_update_double_backward_##suffix(                                                                \
      const mf_lslr_shape* shape, const int64_t* offsets, const T* a, const T* b, const T* gout, const T* grad,       \
      const T* rates, T* cgout, T* cgrad, T* crates, void* workspace, cudaStream_t stream) {                          \
    return run_double_backward<T>(*shape, offsets, a, b, gout, grad, rates, cgout, cgrad, crates, workspace, stream); \
  }
MF_LAUNCHERS(f32, float)
MF_LAUNCHERS(f64, double)
#undef MF_LAUNCHERS
}
