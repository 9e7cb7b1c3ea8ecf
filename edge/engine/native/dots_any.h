/* Products of a block in portable C++: the meaning of the others. */

/* 16 rows of nibbles times 32 values, minus 8 times their sum: codes are kept as code + 8. */
static INLINE Dots dots4(const uint8_t *codes, const int8_t *split, int32_t sum) {
    int32_t out[16];
    for (int r = 0; r < 16; r++) {
        int32_t s = -8 * sum;
        for (int k = 0; k < 4; k++)
            for (int j = 0; j < 4; j++) {
                const int c = 4 * k + j, code = codes[64 * k + 4 * r + j];
                s += (code & 15) * (128 * split[c] + split[32 + c]);
                s += (code >> 4) * (128 * split[16 + c] + split[48 + c]);
            }
        out[r] = s;
    }
    Dots dots;
    memcpy(&dots, out, sizeof dots);
    return dots;
}

static INLINE Dots dots8(const uint8_t *codes, const int16_t *q, const int8_t *, int32_t) {
    int32_t out[16];
    for (int r = 0; r < 16; r++) {
        int32_t s = 0;
        for (int c = 0; c < 32; c++) s += (int8_t)codes[64 * (c / 4) + 4 * r + c % 4] * q[c];
        out[r] = s;
    }
    Dots dots;
    memcpy(&dots, out, sizeof dots);
    return dots;
}

/* A block as int16 [16 pairs of columns][16 rows][2]. */
static INLINE void widen4(const uint8_t *codes, int16_t *out) {
    for (int c = 0; c < 16; c++)
        for (int r = 0; r < 16; r++) {
            const uint8_t code = codes[64 * (c / 4) + 4 * r + c % 4];
            out[32 * (c / 2) + 2 * r + c % 2] = (int16_t)((code & 15) - 8);
            out[32 * (8 + c / 2) + 2 * r + c % 2] = (int16_t)((code >> 4) - 8);
        }
}

static INLINE void widen8(const uint8_t *codes, int16_t *out) {
    for (int c = 0; c < 32; c++)
        for (int r = 0; r < 16; r++)
            out[32 * (c / 2) + 2 * r + c % 2] = (int8_t)codes[64 * (c / 4) + 4 * r + c % 4];
}

template <int R>
static INLINE void dots16(const int16_t *codes, const int16_t *const *q, Dots *dots) {
    for (int r = 0; r < R; r++) {
        int32_t out[16] = {0};
        for (int c = 0; c < 16; c++)
            for (int i = 0; i < 16; i++)
                out[i] += codes[32 * c + 2 * i] * q[r][2 * c] + codes[32 * c + 2 * i + 1] * q[r][2 * c + 1];
        memcpy(&dots[r], out, sizeof out);
    }
}
