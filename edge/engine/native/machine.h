/* What every file of kernels begins with. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "program.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

namespace edge {

static inline bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

static inline bool has_avx_vnni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
}

static inline bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

}  // namespace edge
#endif

/* Compiles what follows for a machine that the rest of the module is not compiled for. */
#if defined(__clang__)
#define EDGE_STRING(x) #x
#define EDGE_TARGET(features) \
    _Pragma(EDGE_STRING(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define EDGE_TARGET_END _Pragma("clang attribute pop")
#else
#define EDGE_STRING(x) #x
#define EDGE_TARGET(features) _Pragma("GCC push_options") _Pragma(EDGE_STRING(GCC target(features)))
#define EDGE_TARGET_END _Pragma("GCC pop_options")
#endif
