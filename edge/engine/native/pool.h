/* Threads that share pieces of work. They spin a moment for more, then sleep: between tokens there is little to wait
   for, and an idle engine must not burn a core. */

#pragma once

#include <stdint.h>

namespace edge {

/* Threads from now on, the caller's among them; those that exist are ended. */
void pool_threads(int count);

/* work(context, first, stop, scratch) over [0, items) in runs of about `grain`, on all threads; returns when all is
   done. Calls from several threads wait for each other. False, and nothing done, where there is no memory for
   scratch. */
bool pool_run(int64_t items, int64_t grain, void (*work)(void *, int64_t, int64_t, uint8_t *), void *context);

}  // namespace edge
