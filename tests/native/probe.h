/* The integer products of one kind of machine, behind pointers: included inside its namespace, for its target. */

#include "simd.h"
#include "product.h"
#if defined(EDGE_X86)
#include "dots_x86.h"
#elif defined(EDGE_NEON)
#include "dots_neon.h"
#else
#include "dots_any.h"
#endif
#include "panels.h"

static void copy_dots(const Dots *dots, int rows, int32_t *out) { memcpy(out, dots, (size_t)rows * sizeof(Dots)); }

static void few(bool four, const uint8_t *codes, const int16_t *q, const int8_t *split, int32_t sum, int32_t *out) {
    const Dots dots = four ? dots4(codes, split, sum) : dots8(codes, q, split, sum);
    copy_dots(&dots, 1, out);
}

template <int R>
static void many_rows(bool four, const uint8_t *codes, const int16_t *const *q, int32_t *out) {
    int16_t widened[512];
    Dots dots[R];
    four ? widen4(codes, widened) : widen8(codes, widened);
    dots16<R>(widened, q, dots);
    copy_dots(dots, R, out);
}

static void many(int rows, bool four, const uint8_t *codes, const int16_t *const *q, int32_t *out) {
    if (rows == 1) many_rows<1>(four, codes, q, out);
    if (rows == 2) many_rows<2>(four, codes, q, out);
    if (rows == 3) many_rows<3>(four, codes, q, out);
    if (rows == 4) many_rows<4>(four, codes, q, out);
}

static void product(const Weight *w, const float *x, int64_t x_row, int64_t rows, float *y, int64_t y_row,
                    uint8_t *scratch) {
    multiply_panels({w, 0, x, x_row, rows, y, y_row}, 0, units(*w), scratch);
}

/* out: fused products and sums of a, b, c [8]; the values of 8 halves; a as halves. */
static void conversions(const float *a, const float *b, const float *c, const uint16_t *halves, float *out,
                        uint16_t *as_halves) {
    store(out, fma8(load(a), load(b), load(c)));
    store(out + 8, load_half(halves));
    for (int i = 0; i < 8; i++) as_halves[i] = to_half(a[i]);
}

static const Probe probe = {few, many, quantize_row, product, conversions};
