/* Compares each kind of kernels that this machine can run with the portable ones, on random data: integer products, and
   what panels give, to the bit. Prints "NAME ok" for each and ends with 0, or says what differs and ends with 1.

   Stands alone. With EDGE_WHOLE defined and the engine's own files beside it, it also runs a small program on each. */

#include <stdio.h>
#include <stdlib.h>

#include "machine_arm.h"

namespace edge {

struct Probe {
    void (*few)(bool four, const uint8_t *codes, const int16_t *q, const int8_t *split, int32_t sum, int32_t *out);
    void (*many)(int rows, bool four, const uint8_t *codes, const int16_t *const *q, int32_t *out);
    void (*quantize)(const float *x, int64_t cols, float *out);
    void (*product)(const Weight *w, const float *x, int64_t x_row, int64_t rows, float *y, int64_t y_row,
                    uint8_t *scratch);
    void (*conversions)(const float *a, const float *b, const float *c, const uint16_t *halves, float *out,
                        uint16_t *as_halves);
};

namespace any {
#include "probe.h"
}

#if defined(__x86_64__)
#define EDGE_X86
#define EDGE_FMA
#define EDGE_F16C
namespace avx2 {
EDGE_TARGET("avx2,fma,f16c")
#include "probe.h"
EDGE_TARGET_END
}  // namespace avx2
#define EDGE_VNNI
#if defined(__clang__) || __GNUC__ >= 11
#define HAS_AVXVNNI
namespace avxvnni {
EDGE_TARGET("avx2,fma,f16c,avxvnni")
#include "probe.h"
EDGE_TARGET_END
}  // namespace avxvnni
#endif
#define EDGE_AVX512
namespace avx512 {
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" /* gcc 12's own header */
#endif
EDGE_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#include "probe.h"
EDGE_TARGET_END
}  // namespace avx512

static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
#endif

#if defined(EDGE_ARM)
#define EDGE_NEON
namespace asimd {
#include "probe.h"
}
#if defined(EDGE_ARM_DOTPROD)
#define EDGE_DOTPROD
namespace neon {
EDGE_TARGET(EDGE_ARM_DOTPROD)
#include "probe.h"
EDGE_TARGET_END
}  // namespace neon
#endif
#if defined(EDGE_ARM_I8MM)
#define EDGE_I8MM
namespace i8mm {
EDGE_TARGET(EDGE_ARM_I8MM)
#include "probe.h"
EDGE_TARGET_END
}  // namespace i8mm
#endif
#endif

namespace {

/* ---- Random data ---- */

uint64_t state = 88172645463325252ull;

uint32_t any_bits() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 16);
}

int64_t between(int64_t low, int64_t high) { return low + any_bits() % (uint64_t)(high - low + 1); }
float any_float() { return (float)between(-1000000, 1000000) * 1e-6f; }

/* Memory that ends where it is said to: a sanitizer sees what is read or written beyond. */
template <class T> T *make(int64_t count) {
    void *found = nullptr;
    if (posix_memalign(&found, 64, (size_t)count * sizeof(T))) exit(2);
    memset(found, 0, (size_t)count * sizeof(T));
    return (T *)found;
}

void differ(const char *machine, const char *what, long long a, long long b) {
    printf("%s differs: %s (%lld, %lld)\n", machine, what, a, b);
    exit(1);
}

void same_bits(const char *machine, const char *what, const void *found, const void *wanted, int64_t bytes, int64_t a,
               int64_t b) {
    if (memcmp(found, wanted, (size_t)bytes)) differ(machine, what, a, b);
}

/* ---- Products of a block ---- */

struct Block {
    uint8_t codes[512];
    int16_t q[4][32];
    int8_t split[4][64];
    int32_t sum[4];
};

/* `extreme`: codes and values at the ends of what they can be. */
void fill(Block &b, bool extreme) {
    const uint8_t ends[] = {0x80, 0x7f, 0xff, 0x80};
    for (uint8_t &code : b.codes) code = extreme ? ends[any_bits() % 4] : (uint8_t)any_bits();
    for (int r = 0; r < 4; r++) {
        b.sum[r] = 0;
        for (int c = 0; c < 32; c++) {
            const int q = extreme ? (any_bits() & 1 ? 16256 : -16256) : (int)between(-16256, 16256);
            const int high = (q + 64) >> 7;
            b.q[r][c] = (int16_t)q;
            b.split[r][c] = (int8_t)high;
            b.split[r][32 + c] = (int8_t)(q - 128 * high);
            b.sum[r] += q;
        }
    }
}

/* The definition, with nothing in common with any kernel. */
void defined(const Block &b, bool four, int row, int32_t *out) {
    for (int r = 0; r < 16; r++) {
        int64_t s = 0;
        for (int c = 0; c < 32; c++) {
            const int byte = four ? 64 * (c % 16 / 4) + 4 * r + c % 4 : 64 * (c / 4) + 4 * r + c % 4;
            const int code = !four ? (int8_t)b.codes[byte] : (c < 16 ? b.codes[byte] & 15 : b.codes[byte] >> 4) - 8;
            s += (int64_t)code * b.q[row][c];
        }
        out[r] = (int32_t)s;
    }
}

void check_blocks(const char *machine, const Probe &probe) {
    Block *b = make<Block>(1);
    int32_t *wanted = make<int32_t>(64), *found = make<int32_t>(64);
    for (int round = 0; round < 400; round++) {
        const bool four = round % 2;
        fill(*b, round % 8 >= 6);
        const int16_t *q[4];
        for (int r = 0; r < 4; r++) {
            q[r] = b->q[r];
            defined(*b, four, r, wanted + 16 * r);
            probe.few(four, b->codes, b->q[r], b->split[r], b->sum[r], found + 16 * r);
        }
        same_bits(machine, four ? "dots4" : "dots8", found, wanted, 256, round, 1);
        for (int rows = 1; rows <= 4; rows++) {
            probe.many(rows, four, b->codes, q, found);
            same_bits(machine, four ? "widen4 and dots16" : "widen8 and dots16", found, wanted, 64 * rows, round, rows);
        }
    }
    free(b), free(wanted), free(found);
}

/* ---- Products of matrices ---- */

/* A matrix as files have it; nothing may be read beyond its last byte. */
Weight make_weight(int32_t kind, int64_t rows, int64_t cols) {
    const int64_t blocks = (cols + BLOCK - 1) / BLOCK, panels = (rows + PANEL - 1) / PANEL;
    const int64_t each = kind == INT4 ? PANEL_BYTES_4 : PANEL_BYTES_8, bytes = panels * blocks * each;
    uint8_t *data = make<uint8_t>(bytes);
    for (int64_t i = 0; i < bytes; i++) data[i] = (uint8_t)any_bits();
    for (int64_t i = 0; i < panels * blocks; i++)
        for (int r = 0; r < PANEL; r++) {
            const uint16_t scale = (uint16_t)(any_bits() % 0x3c00 | (any_bits() & 0x8000)); /* subnormal ones too */
            memcpy(data + i * each + 2 * r, &scale, 2);
        }
    return {data, bytes, 1, rows, cols, blocks * each, panels * blocks * each, kind, 0};
}

void fill_row(float *x, int64_t cols, int64_t like) {
    for (int64_t i = 0; i < cols; i++) x[i] = like % 7 == 6 ? 0.0f : any_float() * (like % 7 == 5 ? 1e-33f : 1.0f);
    if (like % 11 == 10) x[between(0, cols - 1)] = like % 2 ? 1e38f * 10.0f : -1e38f;
}

void check_product(const char *machine, const Probe &probe, int32_t kind, int64_t rows, int64_t cols, int64_t tokens,
                   uint8_t *scratch) {
    const Weight w = make_weight(kind, rows, cols);
    const int64_t x_row = (cols + BLOCK - 1) / BLOCK * QUANT_FLOATS, y_row = rows + 3;
    const int64_t size = (tokens - 1) * y_row + rows;
    float *x = make<float>(cols), *a = make<float>(tokens * x_row), *b = make<float>(tokens * x_row);
    float *wanted = make<float>(size), *found = make<float>(size);
    for (int64_t t = 0; t < tokens; t++) {
        fill_row(x, cols, t + rows);
        any::probe.quantize(x, cols, a + t * x_row);
        probe.quantize(x, cols, b + t * x_row);
    }
    same_bits(machine, "quantized rows", b, a, tokens * x_row * 4, cols, tokens);
    any::probe.product(&w, a, x_row, tokens, wanted, y_row, scratch);
    probe.product(&w, a, x_row, tokens, found, y_row, scratch);
    /* Not a number is that in both; its bits are the machine's. */
    for (int64_t i = 0; i < size; i++)
        if (wanted[i] != wanted[i] && found[i] != found[i]) wanted[i] = found[i] = 0.0f;
    same_bits(machine, kind == INT4 ? "an int4 product" : "an int8 product", found, wanted, size * 4, rows, tokens);
    free(x), free(a), free(b), free(wanted), free(found), free((void *)w.data);
}

void check_products(const char *machine, const Probe &probe) {
    uint8_t *scratch = make<uint8_t>(SCRATCH);
    const int64_t shapes[][3] = {{16, 32, 1},  {1, 1, 1},    {7, 31, 2},   {8, 33, 3},    {9, 64, 4},   {48, 96, 5},
                                 {17, 640, 6}, {31, 100, 7}, {40, 544, 9}, {16, 1057, 1}, {5, 32, 1030}};
    for (const auto &s : shapes)
        for (int32_t kind = INT8; kind <= INT4; kind++) check_product(machine, probe, kind, s[0], s[1], s[2], scratch);
    for (int i = 0; i < 40; i++)
        check_product(machine, probe, i % 2 ? INT4 : INT8, between(1, 50), between(1, 200), between(1, 9), scratch);
    free(scratch);
}

/* ---- Conversions ---- */

/* All halves but not-a-numbers, and floats of any size that halves may have; a * b + c within a rounding. */
void check_conversions(const char *machine, const Probe &probe) {
    float in[24], found[16], wanted[16];
    uint16_t halves[8], found_halves[8], wanted_halves[8];
    for (int h = 0; h < 0x10000; h += 8) {
        for (int i = 0; i < 8; i++) halves[i] = (uint16_t)((h + i) % 0x8000 > 0x7c00 ? 0 : h + i);
        for (float &x : in) x = any_float();
        for (int i = 0; i < 8; i++) {
            const uint32_t bits = any_bits() % 0x20000000 + 0x30000000; /* from 5e-10 to 2e9 */
            memcpy(in + i, &bits, 4);
        }
        any::probe.conversions(in, in + 8, in + 16, halves, wanted, wanted_halves);
        probe.conversions(in, in + 8, in + 16, halves, found, found_halves);
        same_bits(machine, "load_half", found + 8, wanted + 8, 32, h, 0);
        same_bits(machine, "to_half", found_halves, wanted_halves, 16, h, 0);
        for (int i = 0; i < 8; i++) {
            const double exact = (double)in[i] * in[8 + i] + in[16 + i], size = fabs((double)in[i] * in[8 + i]) + 1.0;
            if (!(fabs(found[i] - exact) <= 1.5e-7 * size)) differ(machine, "fma8", h, i);
        }
    }
}

void check_machine(const char *machine, const Probe &probe) {
    check_blocks(machine, probe);
    check_products(machine, probe);
    check_conversions(machine, probe);
    printf("%s ok\n", machine);
}

}  // namespace
}  // namespace edge

#if defined(EDGE_WHOLE)
#include "whole.h"
#endif

int main() {
    using namespace edge;
    check_machine("any", any::probe);
#if defined(__x86_64__)
    if (has_avx2()) check_machine("avx2", avx2::probe);
#if defined(HAS_AVXVNNI)
    if (has_avx2() && has_avx_vnni()) check_machine("avxvnni", avxvnni::probe);
#endif
    if (has_avx512()) check_machine("avx512", avx512::probe);
#endif
#if defined(EDGE_ARM)
    check_machine("asimd", asimd::probe);
#if defined(EDGE_ARM_DOTPROD)
    if (has_dotprod()) check_machine("neon", neon::probe);
#endif
#if defined(EDGE_ARM_I8MM)
    if (has_i8mm()) check_machine("i8mm", i8mm::probe);
#endif
#endif
#if defined(EDGE_WHOLE)
    check_programs();
#endif
    return 0;
}
