#include "conv_kernels.h"
#include "conv_micro.h"
namespace mf::MF_ISA {
mf::conv::WinogradKernels winograd_kernels() { return {}; }
}
