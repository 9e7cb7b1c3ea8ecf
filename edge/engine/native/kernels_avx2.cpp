/* x86 with AVX2, FMA and F16C. */

#include "machine.h"

#define EDGE_X86
#define EDGE_FMA
#define EDGE_F16C
#define NAME_OF_ISA "avx2"

namespace edge::avx2 {

#if defined(__x86_64__)
EDGE_TARGET("avx2,fma,f16c")
#include "kernels.h"
EDGE_TARGET_END

extern const Kernels *const kernels;
const Kernels *const kernels = &own;

bool usable() { return has_avx2(); }
#else
extern const Kernels *const kernels;
const Kernels *const kernels = nullptr;

bool usable() { return false; }
#endif

}  // namespace edge::avx2
