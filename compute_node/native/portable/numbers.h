/* What the portable entries share: bf16 numbers, and how threads divide work. */
#ifndef FLASHMOE_PORTABLE_NUMBERS_H
#define FLASHMOE_PORTABLE_NUMBERS_H

#include <stdint.h>
#include <string.h>

#include "../entries.h"

#define INLINE __attribute__((always_inline)) static inline

enum {
  ROWS = 16,                  /* of a tile of a lossless matrix, and of a block of any */
  COLUMNS = 32,               /* of a tile */
  PARALLEL_BYTES = 1024 << 10 /* less is done before a second thread has woken */
};

INLINE float widen(uint16_t number) {
  uint32_t bits = (uint32_t)number << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

/* To the nearest, ties to even. */
INLINE uint16_t narrow(float number) {
  uint32_t bits;
  memcpy(&bits, &number, sizeof bits);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (uint16_t)(number != number ? 0xffff : rounded);
}

/* What one thread takes of a job's parts. */
INLINE int64_t take(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

INLINE void share_out(void (*work)(void *), void *job, int64_t bytes, parallel_function *parallel,
                      int64_t threads) {
  if (parallel && threads > 1 && bytes >= PARALLEL_BYTES)
    parallel(work, job, (unsigned)threads, 0);
  else
    work(job);
}

#endif
