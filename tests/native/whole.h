/* A small program on the whole of each kind of kernels: integer products alike to the bit, the rest nearly. */

extern "C" {
int64_t edge_check(const edge::Program *, char *, int64_t);
int edge_run(const edge::Program *, const edge::Pass *);
int edge_use(const char *);
const char *edge_machine(int);
void edge_threads(int);
}

namespace edge {

#define EVERY(X) X(any) X(avx2) X(avxvnni) X(avx512) X(asimd) X(neon) X(i8mm)
#define DECLARE_ONE(isa)                  \
    namespace isa {                       \
    extern const Kernels *const kernels; \
    bool usable();                        \
    }
EVERY(DECLARE_ONE)

namespace {

constexpr int COLS = 100, HEADS = 2, DIM = 24, OUT = HEADS * DIM, CHUNK = 7, CONTEXT = 16, QUANT = 4 * QUANT_FLOATS;
/* Values of the arena, CHUNK rows each but the scratch. */
constexpr int X = 0, NORMED = X + CHUNK * COLS, CODES = NORMED + CHUNK * COLS, Q = CODES + CHUNK * QUANT,
              K = Q + CHUNK * OUT, V = K + CHUNK * OUT, PLAIN = V + CHUNK * OUT, HALF = PLAIN + CHUNK * OUT,
              ATTENDED = HALF + CHUNK * OUT, WAIT = ATTENDED + CHUNK * OUT, WAIT_FLOATS = HEADS * 2 * (DIM + 8),
              FLOATS_ALL = WAIT + WAIT_FLOATS;

View view(int64_t at, int32_t n, int32_t m) { return {at, (int64_t)n * m, m, n, m, 1, 0, ARENA, 0}; }

Weight plain_weight(int32_t kind, int64_t rows, int64_t cols) {
    const int64_t size = kind == F32 ? 4 : 2;
    uint8_t *data = make<uint8_t>(rows * cols * size);
    for (int64_t i = 0; i < rows * cols; i++) {
        const float x = any_float();
        memcpy(data + i * size, (const uint8_t *)&x + (4 - size), (size_t)size);
    }
    return {data, rows * cols * size, 1, rows, cols, cols * size, rows * cols * size, kind, 0};
}

Weight panel_weight(int32_t kind, int64_t rows, int64_t cols) {
    const Weight w = make_weight(kind, rows, cols);
    const int64_t each = kind == INT4 ? PANEL_BYTES_4 : PANEL_BYTES_8;
    for (int64_t i = 0; i < w.bytes / each; i++)
        for (int r = 0; r < PANEL; r++) {
            const uint16_t scale = kind == INT4 ? 0x2400 : 0x1400; /* 2^-6, 2^-10 */
            memcpy((uint8_t *)w.data + i * each + 2 * r, &scale, 2);
        }
    return w;
}

struct Model {
    Weight weights[5];
    Cache cache;
    Instruction steps[8];
    float *arena;
    Program program;

    explicit Model(int32_t kind) {
        memset((void *)this, 0, sizeof *this);
        weights[0] = panel_weight(INT4, OUT, COLS), weights[1] = panel_weight(INT8, OUT, COLS);
        weights[2] = plain_weight(F32, OUT, COLS), weights[3] = plain_weight(BF16, OUT, COLS);
        weights[4] = plain_weight(F32, 1, COLS);
        const int64_t size = kind == INT8 ? 1 : kind == BF16 ? 2 : 4, entries = HEADS * CONTEXT;
        const int64_t bytes = entries * DIM * size;
        const int64_t scales = entries * DIM / 8;
        cache = {make<uint8_t>(bytes), make<uint8_t>(bytes), make<uint16_t>(scales), make<uint16_t>(scales), bytes,
                 bytes, scales * 2, scales * 2, HEADS, CONTEXT, DIM, DIM, 8, kind, 0};
        arena = make<float>(FLOATS_ALL);
        step(0, QUANTIZE, {view(X, 1, COLS), view(CODES, 1, QUANT)});
        step(1, LINEAR, {view(CODES, 1, QUANT), view(Q, 1, OUT)}, 0, 1);
        step(2, LINEAR, {view(CODES, 1, QUANT), view(K, 1, OUT), view(V, 1, OUT)}, 1, 2);
        step(3, NORM, {view(X, 1, COLS), view(NORMED, 1, COLS)}, 4);
        steps[3].real[0] = 1e-6f;
        step(4, LINEAR, {view(NORMED, 1, COLS), view(PLAIN, 1, OUT)}, 2, 1);
        step(5, LINEAR, {view(NORMED, 1, COLS), view(HALF, 1, OUT)}, 3, 1);
        step(6, APPEND, {view(K, HEADS, DIM), view(PLAIN, HEADS, DIM)});
        View wait = view(WAIT, 1, WAIT_FLOATS);
        wait.one = 1;
        step(7, ATTENTION, {view(Q, HEADS, DIM), view(ATTENDED, HEADS, DIM), wait});
        steps[7].real[0] = 0.2f;
        program = {steps, weights, &cache, 8, 5, 1, arena, FLOATS_ALL, CHUNK, 0, 0, 100, CONTEXT, 0, 0};
    }

    ~Model() {
        for (const Weight &w : weights) free((void *)w.data);
        free(cache.k), free(cache.v), free(cache.k_scale), free(cache.v_scale), free(arena);
    }

    struct Views {
        View v[3];
    };

    void step(int i, int32_t op, Views views, int32_t weight = -1, int32_t number = 0) {
        steps[i].op = op;
        memcpy(steps[i].view, views.v, sizeof views.v);
        for (int32_t &w : steps[i].weight) w = weight;
        steps[i].number[0] = number;
    }
};

void run(const Model &m, const Kernels &kernels, const Pass &pass, uint8_t *scratch) {
    for (const Instruction &in : m.steps) {
        const Task task = {in, m.program, pass};
        for (const Phase *phase = kernels.phases[in.op]; phase->work; phase++)
            phase->work(task, 0, phase->items(task), scratch);
    }
}

void near_enough(const char *machine, const float *found, const float *wanted, int64_t n) {
    float most = 0.0f;
    for (int64_t i = 0; i < n; i++) most = fabsf(wanted[i]) > most ? fabsf(wanted[i]) : most;
    for (int64_t i = 0; i < n; i++)
        if (!(fabsf(found[i] - wanted[i]) <= 2e-3f * most)) differ(machine, "a program's values", i, n);
}

/* `kernels` null: the engine itself, two threads, and the best of its kernels. */
void check_program(const char *machine, const Kernels *kernels, int32_t kind, uint8_t *scratch) {
    const uint64_t seed = state;
    Model wanted(kind);
    state = seed;
    Model found(kind);
    char message[200];
    if (edge_check(&found.program, message, sizeof message)) differ(machine, message, 0, 0);
    const int64_t ids[CHUNK] = {0};
    const int64_t passes[] = {CHUNK, 1, 3, 1};
    int64_t start = 0;
    for (const int64_t tokens : passes) {
        for (int64_t i = 0; i < tokens * COLS; i++) wanted.arena[X + i] = found.arena[X + i] = any_float();
        const Pass pass = {tokens, start, ids, nullptr, nullptr, 0};
        run(wanted, *any::kernels, pass, scratch);
        if (kernels)
            run(found, *kernels, pass, scratch);
        else if (edge_run(&found.program, &pass))
            differ(machine, "edge_run", tokens, start);
        same_bits(machine, "int4 LINEAR", found.arena + Q, wanted.arena + Q, tokens * OUT * 4, tokens, 0);
        same_bits(machine, "int8 LINEAR", found.arena + K, wanted.arena + K, tokens * OUT * 4, tokens, 0);
        same_bits(machine, "the second LINEAR", found.arena + V, wanted.arena + V, tokens * OUT * 4, tokens, 0);
        near_enough(machine, found.arena + PLAIN, wanted.arena + PLAIN, tokens * OUT);
        near_enough(machine, found.arena + HALF, wanted.arena + HALF, tokens * OUT);
        near_enough(machine, found.arena + ATTENDED, wanted.arena + ATTENDED, tokens * OUT);
        start += tokens;
    }
}

}  // namespace

static void check_programs() {
    uint8_t *scratch = make<uint8_t>(SCRATCH);
    const int32_t kinds[] = {F32, BF16, INT8};
    for (const int32_t kind : kinds) {
#define CHECK_ONE(isa) \
    if (isa::kernels && isa::usable()) check_program(#isa, isa::kernels, kind, scratch);
        EVERY(CHECK_ONE)
        edge_threads(2);
        for (int i = 0; edge_machine(i); i++) {
            if (!edge_use(edge_machine(i))) differ(edge_machine(i), "edge_use", i, 0);
            check_program(edge_machine(i), nullptr, kind, scratch);
        }
        edge_threads(1);
    }
#define NAME_ONE(isa) \
    if (isa::kernels && isa::usable()) printf("%s whole\n", #isa);
    EVERY(NAME_ONE)
    printf("engine:");
    for (int i = 0; edge_machine(i); i++) printf(" %s", edge_machine(i));
    printf("\n");
    free(scratch);
}

}  // namespace edge
