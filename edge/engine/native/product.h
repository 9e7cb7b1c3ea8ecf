/* One product that any kind of weight can be asked for: y[r, i] = sum of x[r, j] w[i, j], for a matrix of `w`. Rows
   of w are done in units of PANEL; a unit's results depend on nothing but its rows and x. */

struct Product {
    const Weight *w;
    int64_t matrix;    /* which of w's */
    const float *x;    /* rows of floats where w is F32 or BF16, else of quantized blocks */
    int64_t x_row;     /* floats between them */
    int64_t rows;      /* of x */
    float *y;          /* [rows][w->rows], y_row floats apart */
    int64_t y_row;
};

static INLINE bool quantized(const Weight &w) { return w.kind == INT8 || w.kind == INT4; }
static INLINE int64_t units(const Weight &w) { return up(w.rows, PANEL); }
/* Floats that a row of x takes, as the weight wants it. */
static INLINE int64_t x_floats(const Weight &w) { return quantized(w) ? up(w.cols, BLOCK) * QUANT_FLOATS : w.cols; }

/* What a unit costs for so many rows of x, in bytes read or as long a time. No more than makes threads take a few units
   at a time, that share the work on x. */
static INLINE int64_t unit_cost(const Weight &w, int64_t rows) {
    const int64_t bits = w.kind == INT4 ? 5 : w.kind == INT8 ? 9 : w.kind == BF16 ? 16 : 32;
    return least(PANEL * w.cols * bits / 8 * (1 + rows / 4), rows > 6 ? 24 << 10 : INT64_MAX);
}

/* The whole numbers of a block's products with the 16 rows of a panel. */
struct Dots {
    v8i low, high;
};
