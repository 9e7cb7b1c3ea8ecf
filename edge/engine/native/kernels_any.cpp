/* Portable C++, for any machine and for comparing the others with. */

#include "machine.h"

#define NAME_OF_ISA "any"

namespace edge::any {

#include "kernels.h"

extern const Kernels *const kernels;
const Kernels *const kernels = &own;

bool usable() { return true; }

}  // namespace edge::any
