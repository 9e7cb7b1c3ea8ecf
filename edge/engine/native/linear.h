/* QUANTIZE, LINEAR and HEAD_LINEAR: products with weights of any kind. */

static INLINE void multiply(const Product &p, int64_t first, int64_t stop, uint8_t *scratch) {
    if (quantized(*p.w))
        multiply_panels(p, first, stop, scratch);
    else
        multiply_plain(p, first, stop, scratch);
}

static int64_t quantize_items(const Task &t) { return t.rows(t.in.view[0]) * t.in.view[0].n; }
static int64_t quantize_cost(const Task &t) { return 8 * t.in.view[0].m; }

static void quantize_work(const Task &t, int64_t first, int64_t stop, uint8_t *) {
    const View &x = t.in.view[0], &out = t.in.view[1];
    for (int64_t i = first; i < stop; i++) {
        const int64_t row = i / x.n, part = i % x.n;
        quantize_row(t.at(x, row) + part * x.step, x.m, t.at(out, row) + part * out.step);
    }
}

/* Units of all the products of a LINEAR, one after another. */
static int64_t linear_items(const Task &t) {
    int64_t total = 0;
    for (int i = 0; i < t.in.number[0]; i++) total += units(t.weight(i));
    return total;
}

static int64_t linear_cost(const Task &t) { return unit_cost(t.weight(0), t.rows(t.in.view[0])); }

static void linear_work(const Task &t, int64_t first, int64_t stop, uint8_t *scratch) {
    const View &x = t.in.view[0];
    int64_t before = 0;
    for (int i = 0; i < t.in.number[0] && before < stop; i++) {
        const Weight &w = t.weight(i);
        const View &y = t.in.view[1 + i];
        const int64_t count = units(w), from = most(first - before, 0), to = least(stop - before, count);
        if (from < to) multiply({&w, 0, t.at(x), x.row, t.rows(x), t.at(y), y.row}, from, to, scratch);
        before += count;
    }
}

static int64_t head_linear_items(const Task &t) { return t.weight(0).count * units(t.weight(0)); }

static void head_linear_work(const Task &t, int64_t first, int64_t stop, uint8_t *scratch) {
    const View &x = t.in.view[0], &y = t.in.view[1];
    const Weight &w = t.weight(0);
    const int64_t each = units(w);
    while (first < stop) {
        const int64_t head = first / each, from = first % each, to = least(each, from + stop - first);
        multiply({&w, head, t.at(x) + head * x.step, x.row, t.rows(x), t.at(y) + head * y.step, y.row}, from, to,
                 scratch);
        first += to - from;
    }
}

static constexpr Phase quantize_phases[] = {{quantize_items, quantize_cost, quantize_work}, {}};
static constexpr Phase linear_phases[] = {{linear_items, linear_cost, linear_work}, {}};
static constexpr Phase head_linear_phases[] = {{head_linear_items, linear_cost, head_linear_work}, {}};
