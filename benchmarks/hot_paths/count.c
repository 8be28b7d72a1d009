// Asks callgrind to count: see instructions.py. Outside of valgrind this does nothing.
#include "callgrind.h"

void start(void) {
  CALLGRIND_START_INSTRUMENTATION;
  CALLGRIND_ZERO_STATS;
}

void stop(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
