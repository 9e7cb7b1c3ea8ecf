#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>

#include "program.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ __volatile__("yield")
#else
#define PAUSE()
#endif

namespace edge {
namespace {

constexpr int MOST_THREADS = 256;
constexpr int64_t SPIN_NS = 200000; /* what waking a thread costs, a few times */
constexpr int PATIENCE = 2000;      /* pauses before a waiting thread lets others have its core */

struct Job {
    void (*work)(void *, int64_t, int64_t, uint8_t *);
    void *context;
    int64_t items, grain;
    int sharers;
};

/* Each thread's own stretch of the pieces, one after another as they lie in memory; who is done helps the others. */
struct alignas(64) Stretch {
    int64_t next, stop;
};

/* A job's number, whether it takes no more threads, and how many of them are inside. */
constexpr uint64_t CLOSED = 1ull << 31, INSIDE = CLOSED - 1;
uint64_t state = CLOSED;
Job job;
Stretch stretches[MOST_THREADS];
int wanted = 1, workers, sleeping, ending;
pthread_t threads[MOST_THREADS];
uint8_t *scratch[MOST_THREADS];
pthread_mutex_t callers = PTHREAD_MUTEX_INITIALIZER, lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t more = PTHREAD_COND_INITIALIZER;

int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

template <typename T> T get(const T &x) { return __atomic_load_n(&x, __ATOMIC_ACQUIRE); }

bool news(uint64_t s, uint64_t seen) { return !(s & CLOSED) && s >> 32 != seen; }

void take(int self) {
    for (int i = 0; i < job.sharers; i++) {
        Stretch &s = stretches[(self + i) % job.sharers];
        int64_t first;
        while ((first = __atomic_fetch_add(&s.next, job.grain, __ATOMIC_RELAXED)) < s.stop)
            job.work(job.context, first, first + job.grain < s.stop ? first + job.grain : s.stop, scratch[self]);
    }
}

/* Waits for a job that this thread has not seen: awake for a moment, then asleep. */
void await_job(uint64_t seen) {
    const int64_t until = now() + SPIN_NS;
    do {
        for (int i = 0; i < 100; i++) {
            if (news(get(state), seen) || get(ending)) return;
            PAUSE();
        }
    } while (now() < until);
    pthread_mutex_lock(&lock);
    __atomic_fetch_add(&sleeping, 1, __ATOMIC_SEQ_CST);
    while (!news(get(state), seen) && !get(ending)) pthread_cond_wait(&more, &lock);
    __atomic_fetch_sub(&sleeping, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&lock);
}

void *worker(void *argument) {
    const int self = (int)(intptr_t)argument;
    uint64_t seen = 0;
    while (!get(ending)) {
        await_job(seen);
        uint64_t s = get(state);
        if (!news(s, seen)) continue;
        if (!__atomic_compare_exchange_n(&state, &s, s + 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) continue;
        seen = s >> 32;
        take(self);
        __atomic_fetch_sub(&state, 1, __ATOMIC_RELEASE);
    }
    return nullptr;
}

void end_workers() {
    pthread_mutex_lock(&lock);
    __atomic_store_n(&ending, 1, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&more);
    pthread_mutex_unlock(&lock);
    for (int i = 0; i < workers; i++) pthread_join(threads[i], nullptr);
    for (int i = 0; i <= workers; i++) {
        free(scratch[i]);
        scratch[i] = nullptr;
    }
    workers = ending = 0;
}

/* A child of fork has no threads but the one that called it, and whatever the others held it will never get back. */
void after_fork() {
    workers = sleeping = ending = 0;
    state = CLOSED;
    callers = lock = PTHREAD_MUTEX_INITIALIZER;
    more = PTHREAD_COND_INITIALIZER;
}

uint8_t *own_scratch(int i) {
    void *found = scratch[i];
    if (!found && posix_memalign(&found, 64, SCRATCH)) found = nullptr;
    return scratch[i] = (uint8_t *)found;
}

bool ready() {
    static bool watched = false;
    if (!watched) watched = pthread_atfork(nullptr, nullptr, after_fork) == 0;
    if (!own_scratch(0)) return false;
    while (workers < wanted - 1) {
        if (!own_scratch(workers + 1)) return false;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, 1 << 18);
        const int failed = pthread_create(&threads[workers], &attributes, worker, (void *)(intptr_t)(workers + 1));
        pthread_attr_destroy(&attributes);
        if (failed)
            wanted = workers + 1; /* fewer then, and no more attempts */
        else
            workers++;
    }
    return true;
}

void wake() {
    if (!__atomic_load_n(&sleeping, __ATOMIC_SEQ_CST)) return;
    pthread_mutex_lock(&lock);
    pthread_cond_broadcast(&more);
    pthread_mutex_unlock(&lock);
}

void share() {
    const uint64_t number = (get(state) >> 32) + 1;
    job.sharers = workers + 1;
    for (int64_t i = 0; i <= workers; i++)
        stretches[i] = {job.items * i / (workers + 1), job.items * (i + 1) / (workers + 1)};
    __atomic_store_n(&state, number << 32, __ATOMIC_SEQ_CST);
    wake();
    take(0);
    __atomic_fetch_or(&state, CLOSED, __ATOMIC_ACQ_REL);
    for (int i = 0; get(state) & INSIDE; i++) {
        PAUSE();
        if (i % PATIENCE == PATIENCE - 1) sched_yield();
    }
}

}  // namespace

void pool_threads(int count) {
    pthread_mutex_lock(&callers);
    if (workers) end_workers();
    wanted = count < 1 ? 1 : count > MOST_THREADS ? MOST_THREADS : count;
    pthread_mutex_unlock(&callers);
}

bool pool_run(int64_t items, int64_t grain, void (*work)(void *, int64_t, int64_t, uint8_t *), void *context) {
    pthread_mutex_lock(&callers);
    const bool is_ready = ready();
    if (is_ready && items > 0) {
        job = {work, context, items, grain < 1 ? 1 : grain, 1};
        if (workers && items > job.grain)
            share();
        else
            work(context, 0, items, scratch[0]);
    }
    pthread_mutex_unlock(&callers);
    return is_ready;
}

}  // namespace edge
