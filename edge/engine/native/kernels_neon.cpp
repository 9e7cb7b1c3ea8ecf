/* 64-bit ARM with dot products of bytes: Cortex-A55, A75 and X1, Neoverse, Apple. */

#include "machine_arm.h"

#define EDGE_NEON
#define EDGE_DOTPROD
#define NAME_OF_ISA "neon"

namespace edge::neon {

#if defined(EDGE_ARM_DOTPROD)
EDGE_TARGET(EDGE_ARM_DOTPROD)
#include "kernels.h"
EDGE_TARGET_END

extern const Kernels *const kernels;
const Kernels *const kernels = &own;

bool usable() { return has_dotprod(); }
#else
extern const Kernels *const kernels;
const Kernels *const kernels = nullptr;

bool usable() { return false; }
#endif

}  // namespace edge::neon
