/* What is done value by value: TEMPERATURE, ACTIVATION, BINARY, COPY, all as out = activation(a) arithmetic b.

   Operands are brought to one form first: a scalar and a vector of weights are operands that do not move from row to
   row, and what lies densely over n and m is one long m. A piece is STRETCH values of it, so that threads share even a
   single row of logits. Out may be the same view as a or as b: values are read before they are written. */

constexpr int64_t CHUNK = 1024;        /* values that are done at a time, through the nearest cache */
constexpr int32_t NO_ARITHMETIC = -1;

/* Element j of part i of a row: at[row * row + i * step + j * unit]. */
struct Operand {
    const float *at;
    int64_t row, step, unit;
};

struct Pointwise {
    Operand a, b;
    float *out;
    int64_t out_row, out_step;
    int64_t rows, n, m;
    int32_t activation, arithmetic;

    INLINE int64_t pieces() const { return up(m, STRETCH); }
};

static INLINE Operand operand_of(const Task &t, const View &v) {
    return {t.at(v), v.row, v.step, v.m == 1 ? 0 : v.unit};
}

/* Whether parts follow each other as values do, or all are one value. */
static INLINE bool seamless(const Operand &x, int64_t m) { return x.unit ? x.step == m : x.step == 0; }

/* Makes n and m one where that is possible. */
static INLINE void flatten(Pointwise &p) {
    if (p.n == 1 || p.out_step != p.m) return;
    if (p.m == 1 && p.a.step <= 1 && p.b.step <= 1)
        p.a.unit = p.a.step, p.b.unit = p.b.step;
    else if (!seamless(p.a, p.m) || !seamless(p.b, p.m))
        return;
    p.m *= p.n, p.n = 1;
}

static INLINE Pointwise pointwise(const Task &t, const View &out) {
    const View &a = t.in.view[0];
    Pointwise p = {operand_of(t, a), {nullptr, 0, 0, 0}, t.at(out), out.row, out.step, t.rows(out), out.n, out.m, NONE,
                   NO_ARITHMETIC};
    if (out.one && !a.one) p.a.at += (t.pass.tokens - 1) * a.row; /* the last row */
    if (t.in.op == ACTIVATION) p.activation = t.in.number[0];
    if (t.in.op == TEMPERATURE) p.arithmetic = MUL;
    if (t.in.op == BINARY) {
        p.arithmetic = t.in.number[0];
        p.activation = t.in.number[2];
        if (t.in.number[1] == 0) p.b = operand_of(t, t.in.view[1]);
        if (t.in.number[1] == 1) p.b = {t.in.real, 0, 0, 0};
        if (t.in.number[1] == 2) p.b = {vector_of(t, 0), 0, 0, out.m == 1 ? 0 : 1};
    }
    flatten(p);
    return p;
}

static INLINE v8 combined(v8 a, v8 b, const int kind) {
    return kind == ADD ? a + b : kind == SUB ? a - b : kind == MUL ? a * b : a / b;
}

/* kind and unit are constants wherever this is inlined. */
static INLINE void combine_as(const float *a, const float *b, float *y, int64_t m, const int kind, const int unit) {
    const v8 one = all(b[0]);
    int64_t j = 0;
    for (; j + 8 <= m; j += 8) store(y + j, combined(load(a + j), unit ? load(b + j) : one, kind));
    if (j == m) return;
    const int64_t n = m - j;
    store_some(y + j, combined(load_some(a + j, n), unit ? load_some(b + j, n) : one, kind), n);
}

static INLINE void combine_unit(const float *a, const float *b, float *y, int64_t m, int32_t kind, const int unit) {
    switch (kind) {
        case ADD: return combine_as(a, b, y, m, ADD, unit);
        case SUB: return combine_as(a, b, y, m, SUB, unit);
        case MUL: return combine_as(a, b, y, m, MUL, unit);
        default: return combine_as(a, b, y, m, DIV, unit);
    }
}

/* kind is a constant wherever this is inlined. */
static INLINE void activate_as(const float *x, float *y, int64_t m, const int32_t kind) {
    int64_t j = 0;
    for (; j + 8 <= m; j += 8) store(y + j, activated(load(x + j), kind));
    if (j < m) store_some(y + j, activated(load_some(x + j, m - j), kind), m - j);
}

static void activate(const float *x, float *y, int64_t m, int32_t kind) {
    switch (kind) {
        case SILU: return activate_as(x, y, m, SILU);
        case GELU_TANH: return activate_as(x, y, m, GELU_TANH);
        case TANH: return activate_as(x, y, m, TANH);
        default:
            if (x != y) memmove(y, x, (size_t)m * 4);
    }
}

/* m values of one part. What is between two steps lies in `room` of CHUNK floats. */
static void pointwise_part(const Pointwise &p, const float *a, const float *b, int64_t b_unit, float *y, int64_t m,
                           float *room) {
    for (int64_t j = 0; j < m; j += CHUNK) {
        const int64_t n = least(CHUNK, m - j);
        const float *x = a + j * p.a.unit;
        if (!p.a.unit) {
            for (int64_t i = 0; i < n; i++) room[i] = *a;
            x = room;
        }
        if (p.arithmetic == NO_ARITHMETIC) {
            activate(x, y + j, n, p.activation);
            continue;
        }
        if (p.activation != NONE) {
            activate(x, room, n, p.activation);
            x = room;
        }
        if (b_unit)
            combine_unit(x, b + j, y + j, n, p.arithmetic, 1);
        else
            combine_unit(x, b, y + j, n, p.arithmetic, 0);
    }
}

/* Queries grow with their position. */
static INLINE float temperature(const Task &t, int64_t row) {
    const int64_t position = t.position(t.in.view[1], row);
    return 1.0f + t.in.real[0] * log1pf((float)((position + 1) / t.in.number[0]));
}

static INLINE void pointwise_work(const Task &t, const View &out, int64_t first, int64_t stop, uint8_t *scratch) {
    const Pointwise p = pointwise(t, out);
    const int64_t pieces = p.pieces();
    int64_t piece = first % pieces, part = first / pieces % p.n, row = first / pieces / p.n;
    for (int64_t i = first; i < stop; i++) {
        const int64_t from = piece * STRETCH, m = least(STRETCH, p.m - from);
        const float factor = t.in.op == TEMPERATURE ? temperature(t, row) : 0.0f;
        const float *a = p.a.at + row * p.a.row + part * p.a.step + from * p.a.unit;
        const float *b = p.b.at ? p.b.at + row * p.b.row + part * p.b.step + from * p.b.unit : &factor;
        pointwise_part(p, a, b, p.b.unit, p.out + row * p.out_row + part * p.out_step + from, m, (float *)scratch);
        if (++piece < pieces) continue;
        piece = 0;
        if (++part == p.n) part = 0, row++;
    }
}

static INLINE int64_t pointwise_items(const Task &t, const View &out) {
    const Pointwise p = pointwise(t, out);
    return p.rows * p.n * p.pieces();
}

/* An exponential is as long as some more bytes. */
static INLINE int64_t pointwise_cost(const Task &t, const View &out) {
    const Pointwise p = pointwise(t, out);
    return least(p.m, STRETCH) * (p.activation == NONE ? 12 : 36);
}

static int64_t unary_items(const Task &t) { return pointwise_items(t, t.in.view[1]); }
static int64_t unary_cost(const Task &t) { return pointwise_cost(t, t.in.view[1]); }
static void unary_work(const Task &t, int64_t first, int64_t stop, uint8_t *scratch) {
    pointwise_work(t, t.in.view[1], first, stop, scratch);
}

static int64_t binary_items(const Task &t) { return pointwise_items(t, t.in.view[2]); }
static int64_t binary_cost(const Task &t) { return pointwise_cost(t, t.in.view[2]); }
static void binary_work(const Task &t, int64_t first, int64_t stop, uint8_t *scratch) {
    pointwise_work(t, t.in.view[2], first, stop, scratch);
}

static constexpr Phase temperature_phases[] = {{unary_items, unary_cost, unary_work}, {}};
static constexpr Phase activation_phases[] = {{unary_items, unary_cost, unary_work}, {}};
static constexpr Phase copy_phases[] = {{unary_items, unary_cost, unary_work}, {}};
static constexpr Phase binary_phases[] = {{binary_items, binary_cost, binary_work}, {}};
