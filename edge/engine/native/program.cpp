/* Runs programs, and what library.py calls. */

#include <stdio.h>
#include <string.h>

#include "check.h"
#include "pool.h"
#include "program.h"

#define API extern "C" __attribute__((visibility("default")))

namespace edge {

#define MACHINES(X) X(avx512) X(avxvnni) X(avx2) X(i8mm) X(neon) X(asimd) X(any)
#define DECLARE(isa) \
    namespace isa { \
    extern const Kernels *const kernels; /* null where the file was compiled for another kind of machine */ \
    bool usable(); \
    }
MACHINES(DECLARE)

namespace {

/* Bytes of work that a thread takes at once, and below which a second thread costs more than it brings. */
constexpr int64_t GRAIN = 96 << 10, SMALL = 24 << 10;

const Kernels *chosen = nullptr;

const Kernels *machine(int i) {
    const Kernels *found[8];
    int n = 0;
#define COLLECT(isa) \
    if (isa::kernels && isa::usable()) found[n++] = isa::kernels;
    MACHINES(COLLECT)
    return i < n ? found[i] : nullptr;
}

struct Shared {
    const Task &task;
    const Phase &phase;
};

void shared_work(void *context, int64_t first, int64_t stop, uint8_t *scratch) {
    const Shared &s = *(const Shared *)context;
    s.phase.work(s.task, first, stop, scratch);
}

bool run_phase(const Task &task, const Phase &phase) {
    const int64_t items = phase.items(task), cost = phase.cost(task) + 1;
    if (items <= 0) return true;
    int64_t grain = cost >= GRAIN ? 1 : GRAIN / cost;
    if (items <= SMALL / cost) grain = items;
    /* Enough runs that threads end together. */
    else if (items < 8 * grain) grain = (items + 7) / 8;
    Shared shared = {task, phase};
    return pool_run(items, grain, shared_work, &shared);
}

}  // namespace
}  // namespace edge

using namespace edge;

/* The name of the i-th of the kinds of kernels that this machine can run, best first; null beyond. */
API const char *edge_machine(int i) {
    const Kernels *found = machine(i);
    return found ? found->name : nullptr;
}

/* 1 where kernels of that name run from now on. */
API int edge_use(const char *name) {
    for (int i = 0; const Kernels *found = machine(i); i++)
        if (!strcmp(found->name, name)) {
            chosen = found;
            return 1;
        }
    return 0;
}

API void edge_threads(int count) { pool_threads(count); }

/* 0, or 1 + the place of what reaches outside its memory or does not fit, described in `message`. */
API int64_t edge_check(const Program *program, char *message, int64_t size) {
    return check(*program, message, size);
}

/* Runs a program that was checked. 0; 1: the pass does not fit the program; 2: no memory; 3: no kernels. */
API int edge_run(const Program *program, const Pass *pass) {
    if (!chosen && !(chosen = machine(0))) return 3;
    if (!pass_fits(*program, *pass)) return 1;
    for (int64_t i = 0; i < program->instruction_count; i++) {
        const Task task = {program->instructions[i], *program, *pass};
        for (const Phase *phase = chosen->phases[task.in.op]; phase->work; phase++)
            if (!run_phase(task, *phase)) return 2;
    }
    return 0;
}

/* Sizes of structures and what else library.py must have the same. */
API int64_t edge_size(int which) {
    const int64_t sizes[] = {sizeof(View),    sizeof(Instruction), sizeof(Weight), sizeof(Cache),
                             sizeof(Program), sizeof(Pass),        OPS,            CONTRACT};
    return which >= 0 && which < 8 ? sizes[which] : 0;
}
