/* What ARM's files of kernels begin with. */

#include "machine.h"

#if defined(__aarch64__) && !defined(__AARCH64EB__)
#define EDGE_ARM
#include <arm_neon.h>

#if defined(__linux__) || defined(__ANDROID__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace edge {

/* Bits of Linux's HWCAP and HWCAP2, which headers may not name yet. */
constexpr unsigned long ARM_DOTPROD = 1ul << 20, ARM_I8MM = 1ul << 13;

#if defined(__linux__) || defined(__ANDROID__)
static inline bool has_dotprod() { return getauxval(AT_HWCAP) & ARM_DOTPROD; }
static inline bool has_i8mm() { return has_dotprod() && getauxval(AT_HWCAP2) & ARM_I8MM; }
#elif defined(__APPLE__)
static inline bool has_feature(const char *name) {
    int found = 0;
    size_t size = sizeof found;
    return !sysctlbyname(name, &found, &size, nullptr, 0) && found;
}
static inline bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
static inline bool has_i8mm() { return has_dotprod() && has_feature("hw.optional.arm.FEAT_I8MM"); }
#else
static inline bool has_dotprod() { return false; }
static inline bool has_i8mm() { return false; }
#endif

}  // namespace edge

/* gcc wants an architecture that the intrinsics' own is part of; clang before 16 has only those of its command line. */
#if !defined(__clang__)
#define EDGE_ARM_DOTPROD "arch=armv8.2-a+dotprod"
#define EDGE_ARM_I8MM "arch=armv8.2-a+dotprod+i8mm"
#else
#if __clang_major__ >= 16 || defined(__ARM_FEATURE_DOTPROD)
#define EDGE_ARM_DOTPROD "dotprod"
#endif
#if __clang_major__ >= 16 || defined(__ARM_FEATURE_MATMUL_INT8)
#define EDGE_ARM_I8MM "dotprod,i8mm"
#endif
#endif
#endif
