/* Any 64-bit ARM: Cortex-A53 and A72. */

#include "machine_arm.h"

#define EDGE_NEON
#define NAME_OF_ISA "asimd"

namespace edge::asimd {

#if defined(EDGE_ARM)
#include "kernels.h"

extern const Kernels *const kernels;
const Kernels *const kernels = &own;

bool usable() { return true; }
#else
extern const Kernels *const kernels;
const Kernels *const kernels = nullptr;

bool usable() { return false; }
#endif

}  // namespace edge::asimd
