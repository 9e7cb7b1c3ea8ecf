/* x86 with AVX-VNNI: Alder Lake, Sierra Forest, Zen 5. */

#include "machine.h"

#define EDGE_X86
#define EDGE_FMA
#define EDGE_F16C
#define EDGE_VNNI
#define NAME_OF_ISA "avxvnni"

namespace edge::avxvnni {

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
EDGE_TARGET("avx2,fma,f16c,avxvnni")
#include "kernels.h"
EDGE_TARGET_END

extern const Kernels *const kernels;
const Kernels *const kernels = &own;

bool usable() { return has_avx2() && has_avx_vnni(); }
#else
extern const Kernels *const kernels;
const Kernels *const kernels = nullptr;

bool usable() { return false; }
#endif

}  // namespace edge::avxvnni
