#ifdef _OPENMP
#include <omp.h>
#endif

// For mamlpp_fast/_native.py: threads that the calling thread's parallel regions take from now on. Unlike
// at::set_num_threads it leaves alone what later threads begin with, and the threads of torch's own libraries.
extern "C" __attribute__((visibility("default"))) void mamlpp_fast_set_threads([[maybe_unused]] int count) {
#ifdef _OPENMP
  omp_set_num_threads(count);
#endif
}
