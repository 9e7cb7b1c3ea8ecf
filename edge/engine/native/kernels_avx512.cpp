/* x86 with AVX512-VNNI: Ice Lake, Sapphire Rapids, Zen 4. */

#include "machine.h"

#define EDGE_X86
#define EDGE_FMA
#define EDGE_F16C
#define EDGE_VNNI
#define EDGE_AVX512
#define NAME_OF_ISA "avx512"

namespace edge::avx512 {

#if defined(__x86_64__)
EDGE_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#include "kernels.h"
EDGE_TARGET_END

extern const Kernels *const kernels;
const Kernels *const kernels = &own;

bool usable() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
#else
extern const Kernels *const kernels;
const Kernels *const kernels = nullptr;

bool usable() { return false; }
#endif

}  // namespace edge::avx512
