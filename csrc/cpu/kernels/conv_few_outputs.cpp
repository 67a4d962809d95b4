// The second half of a convolution with few output channels: see conv_sum_taps in conv_kernels.h.

#include "conv_kernels.h"
#include "tiles.h"

namespace mf::MF_ISA {

template <typename T>
void conv_sum_taps(const mf::conv::Shape& s, const T* products, T* out) {
  using V = Vec<T>;
  const int64_t pixel = s.kh * s.kw * s.co;
  for (int64_t y = 0; y < s.out_height; ++y) {
    const int64_t top = s.pad_y > y ? s.pad_y - y : 0;
    const int64_t bottom = s.height + s.pad_y - y < s.kh ? s.height + s.pad_y - y : s.kh;
    for (int64_t x = 0; x < s.out_width; ++x, out += s.co) {
      const int64_t left = s.pad_x > x ? s.pad_x - x : 0;
      const int64_t right = s.width + s.pad_x - x < s.kw ? s.width + s.pad_x - x : s.kw;
      for (int64_t c = 0; c < s.co; c += V::size) {
        V total = V::zero();
        for (int64_t i = top; i < bottom; ++i) {
          for (int64_t j = left; j < right; ++j) {
            const int64_t from = (y + i - s.pad_y) * s.width + x + j - s.pad_x;
            total += V::load(products + from * pixel + (i * s.kw + j) * s.co + c);
          }
        }
        if (c + V::size <= s.co) {
          total.store(out + c);
        } else {
          total.store(out + c, static_cast<int>(s.co - c));
        }
      }
    }
  }
}

template void conv_sum_taps<float>(const mf::conv::Shape&, const float*, float*);
template void conv_sum_taps<double>(const mf::conv::Shape&, const double*, double*);

}  // namespace mf::MF_ISA
