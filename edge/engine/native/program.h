/* What the engine runs: a list of instructions over one arena of float32 values, compiled once from the recorded
   graph (edge/engine/native/compile.py) and checked once (check.cpp). Mirrored by the ctypes structures of
   library.py.

   Values are [rows][n][m] views of the arena. Rows are the tokens of a pass, up to `chunk` of them, or one: what is
   left once only the last token goes on. Weights, caches and scratch are memory that Python owns and hands over by
   address. */

#pragma once

#include <stddef.h>
#include <stdint.h>

/* Never out of line: the linker would keep one copy for all the files, and that may be one for a better machine. */
#define INLINE inline __attribute__((always_inline))

namespace edge {

constexpr int BLOCK = 32; /* columns that share a scale */
constexpr int PANEL = 16; /* rows that lie together */
/* Bytes of a panel's block: 16 fp16 scales, then 16 x 32 codes. */
constexpr int64_t PANEL_BYTES_4 = 32 + 256, PANEL_BYTES_8 = 32 + 512;
/* Floats of one quantized block of activations; see panels.h. */
constexpr int64_t QUANT_FLOATS = 34;
/* Raised by whatever changes what an instruction means: a module that was compiled before is refused. */
constexpr int CONTRACT = 1;
constexpr int VIEWS = 6, NUMBERS = 8, FLOATS = 4, WEIGHTS = 4;

enum Op : int32_t {
    /* view 0: out [rows, dim]; weight 0: table; number 0: 0 by token id, 1 by position. */
    EMBED,
    /* view 0: out [rows, layers, dim] from the rows that the caller gives with the pass. number 0: their Kind. */
    PLE_ROWS,
    /* view 0: x [rows, n, m] -> view 1: every m of it as ceil(m / 32) quantized blocks, QUANT_FLOATS floats each. */
    QUANTIZE,
    /* view 0: x (quantized where weights are INT8 or INT4) [rows, cols]; number 0: how many products, at most 4, of
       x with weights 0.. into views 1..: [rows, rows of the weight]. All the weights are of one Kind. */
    LINEAR,
    /* view 0: x [rows, heads, cols] (quantized likewise), weight 0: a stack of `heads` matrices, view 1: out. */
    HEAD_LINEAR,
    /* view 0: a [rows, n, k]; view 1: b [rows, k, m]; view 2: out [rows, n, m]. */
    MATMUL,
    /* view 0: x -> view 1, over m; weight 0: [m], or -1; float 0: eps. */
    NORM,
    /* The same minus the mean; weight 1: the bias. */
    LAYER_NORM,
    /* view 0: x [rows, n, m] -> view 1 [rows, n, 1]: sqrt(max(mean of squares, float 0)). */
    RMS,
    /* view 0: out [rows, 1, dim]: cos of dim / 2 angles, then sin, times float 0; weight 0: frequencies [dim / 2]. */
    ROTATION,
    /* view 0: x [rows, heads, m] -> view 1; view 2: a ROTATION of number 0 values; number 1: 1 where pairs are 2i,
       2i + 1. */
    ROPE,
    /* view 0: x -> view 1, times 1 + float 0 * ln(1 + floor((position + 1) / number 0)). */
    TEMPERATURE,
    /* view 0: k [rows, heads, dim]; view 1: v (for a latent cache: view 0 alone, [rows, 1, entry]); number 0: the
       cache. */
    APPEND,
    /* view 0: q [rows, heads, dim] -> view 1 [rows, heads, value dim]; number 0: the cache; 1: window, 2: chunk, 0 for
       none; float 0: scale; view 2: scratch of one row: see attend.h. */
    ATTENTION,
    /* view 0: logits [rows, experts] -> view 1: weights [rows, experts]; weight 0: bias or -1; numbers: active, 1 for
       sigmoid, 1 for normalized, groups, active groups; float 0: scale. */
    ROUTE,
    /* view 0: x [rows, dim]; view 1: weights [rows, experts]; view 2: out [rows, dim]; weights gate, up, down; view 3:
       scratch of as many rows, see experts.h; numbers: active, Activation, 1 where weights multiply the input. */
    EXPERTS,
    /* view 0: x -> view 1; number 0: Activation. */
    ACTIVATION,
    /* view 0: x -> view 1, over m; float 0: cut. */
    GAUSSIAN_TOPK,
    /* view 0: a, view 1: b (broadcast by strides of 0) -> view 2; number 0: Arithmetic; number 1: 1 where b is float
       0, 2 where b is weight 0 [m]; number 2: an Activation of a first. */
    BINARY,
    /* view 0 -> view 1, of the same n and m. A view of all rows to one of one row: the last row. */
    COPY,
    OPS,
};

enum Kind : int32_t { F32, BF16, INT8, INT4, F16 };
enum Arithmetic : int32_t { ADD, SUB, MUL, DIV };
enum Activation : int32_t { NONE, SILU, GELU_TANH, TANH };
enum Space : int32_t { ARENA, OUTPUT }; /* OUTPUT: the caller's logits */

/* float32 [rows][n][m], strides in floats. `one`: a single row, whatever the pass has. `unit` 0: m repeats one
   value. */
struct View {
    int64_t at, row, step;
    int32_t n, m, unit, one, space, unused;
};

struct Instruction {
    int32_t op, unused;
    View view[VIEWS];
    int32_t weight[WEIGHTS];
    int32_t number[NUMBERS];
    float real[FLOATS];
};

/* `count` matrices [rows, cols], `matrix` bytes apart. INT8 and INT4 lie in panels of 16 rows, `row` bytes apart,
   each ceil(cols / 32) blocks: scales fp16 [16], then codes. Of INT8 code (r, c) is byte 64 * (c / 4) + 4 * r + c %
   4; of INT4 byte 64 * (c % 16 / 4) + 4 * r + c % 4, its low nibble for c < 16 and its high one beyond, as code + 8.
   F32 and BF16 are rows, `row` bytes apart. A vector is a matrix of one row. */
struct Weight {
    const uint8_t *data;
    int64_t bytes; /* that may be read from data */
    int64_t count, rows, cols, row, matrix;
    int32_t kind, unused;
};

/* Keys [heads][capacity][k_dim] and values [heads][capacity][v_dim], F32, BF16 or INT8, by slot = position % capacity.
   Of a latent cache values are the first v_dim of the keys, and `v` is null. INT8 has one fp16 scale for each `group`
   values, [heads][capacity][dim / group], code = round(value / scale). */
struct Cache {
    uint8_t *k, *v;
    uint16_t *k_scale, *v_scale;
    int64_t k_bytes, v_bytes, k_scale_bytes, v_scale_bytes;
    int64_t heads, capacity, k_dim, v_dim, group;
    int32_t kind, latent;
};

struct Program {
    const Instruction *instructions;
    const Weight *weights;
    const Cache *caches;
    int64_t instruction_count, weight_count, cache_count;
    float *arena;
    int64_t arena_floats, chunk; /* chunk: most tokens of a pass */
    int64_t out_width;           /* floats of a row of OUTPUT */
    int64_t ple_row_bytes;       /* of a row that the caller gives; 0 without */
    int64_t vocab, context;      /* ids and positions end there */
    int32_t out_one, unused;     /* OUTPUT has one row, whatever the pass has */
};

/* One run of a program: `tokens` tokens that follow `start` others. */
struct Pass {
    int64_t tokens, start;
    const int64_t *ids;
    const uint8_t *ple;
    float *out;
    int64_t out_rows;
};

/* An instruction in a pass. */
struct Task {
    const Instruction &in;
    const Program &program;
    const Pass &pass;

    INLINE int64_t rows(const View &v) const { return v.one ? 1 : pass.tokens; }
    INLINE float *at(const View &v) const { return (v.space == OUTPUT ? pass.out : program.arena) + v.at; }
    INLINE float *at(const View &v, int64_t row) const { return at(v) + row * v.row; }
    /* The position of a row of v. */
    INLINE int64_t position(const View &v, int64_t row) const { return pass.start + (v.one ? pass.tokens - 1 : row); }
    INLINE const Weight &weight(int i) const { return program.weights[in.weight[i]]; }
};

/* An instruction is done in phases, each `items` pieces of work that threads share: work(task, first, stop, scratch)
   does pieces [first, stop). What a piece computes depends on nothing but the piece. `cost`: bytes that a piece
   moves, or as long a time. `scratch`: SCRATCH bytes of the thread's own, aligned to 64. */
constexpr int64_t SCRATCH = 512 << 10;

struct Phase {
    int64_t (*items)(const Task &);
    int64_t (*cost)(const Task &);
    void (*work)(const Task &, int64_t first, int64_t stop, uint8_t *scratch);
};

constexpr int PHASES = 6;

/* All instructions for one kind of machine; phases end with an empty one. */
struct Kernels {
    const char *name;
    Phase phases[OPS][PHASES];
};

}  // namespace edge
