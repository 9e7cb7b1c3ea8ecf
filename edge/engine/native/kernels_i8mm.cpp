/* 64-bit ARM with products of matrices of bytes: Cortex-A510, A710 and X2, Neoverse V1 and N2, Apple from M2 on. */

#include "machine_arm.h"

#define EDGE_NEON
#define EDGE_DOTPROD
#define EDGE_I8MM
#define NAME_OF_ISA "i8mm"

namespace edge::i8mm {

#if defined(EDGE_ARM_I8MM)
EDGE_TARGET(EDGE_ARM_I8MM)
#include "kernels.h"
EDGE_TARGET_END

extern const Kernels *const kernels;
const Kernels *const kernels = &own;

bool usable() { return has_i8mm(); }
#else
extern const Kernels *const kernels;
const Kernels *const kernels = nullptr;

bool usable() { return false; }
#endif

}  // namespace edge::i8mm
