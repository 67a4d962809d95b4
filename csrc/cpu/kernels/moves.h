// A convolution's weight between the layout of its owner, [outputs, columns], and the kernels', in which each column's
// outputs are next to each other: column j begins at rows[j]. Of outputs begin to end.
#pragma once

#include <cstdint>

#include "isa.h"

MF_KERNEL(
    // kernels = scale * own
    template <typename T>
    void move_in(const int64_t* rows, int64_t columns, int64_t begin, int64_t end, const T* own, T scale, T* kernels);

    // own = plus + scale * kernels; without `plus` where that is null.
    template <typename T> void move_out(const int64_t* rows, int64_t columns, int64_t begin, int64_t end,
                                        const T* kernels, T scale, const T* plus, T* own);)
