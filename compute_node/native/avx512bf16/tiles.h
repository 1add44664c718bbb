/* What kernels over tiles of 16 rows and 32 columns share. */
#ifndef FLASHMOE_TILES_H
#define FLASHMOE_TILES_H

#include <immintrin.h>
#include <stdint.h>

#include "names.h"

#define TARGET "avx512f,avx512bw,avx512vl,avx512bf16"
#define INLINE __attribute__((target(TARGET), always_inline)) static inline

enum {
  ROWS = 16,                  /* of a tile: lanes of a register */
  COLUMNS = 32,               /* of a tile: bf16 numbers of a cache line */
  ACCUMULATOR_COLUMNS = 512,  /* oneDNN's */
  LINE_BYTES = 64,
  PARALLEL_BYTES = 1024 << 10  /* less is done before a second thread has woken */
};

/* In: register r holds dwords of row r. Out: register c holds dword c of all rows. */
INLINE void transpose(__m512i tile[ROWS]) {
  __m512i quad[ROWS];
  for (int i = 0; i < ROWS; i += 4) {
    __m512i low01 = _mm512_unpacklo_epi32(tile[i], tile[i + 1]);
    __m512i high01 = _mm512_unpackhi_epi32(tile[i], tile[i + 1]);
    __m512i low23 = _mm512_unpacklo_epi32(tile[i + 2], tile[i + 3]);
    __m512i high23 = _mm512_unpackhi_epi32(tile[i + 2], tile[i + 3]);
    quad[i] = _mm512_unpacklo_epi64(low01, low23);
    quad[i + 1] = _mm512_unpackhi_epi64(low01, low23);
    quad[i + 2] = _mm512_unpacklo_epi64(high01, high23);
    quad[i + 3] = _mm512_unpackhi_epi64(high01, high23);
  }
  for (int j = 0; j < 4; j++) {
    __m512i even0 = _mm512_shuffle_i32x4(quad[j], quad[4 + j], 0x88);
    __m512i odd0 = _mm512_shuffle_i32x4(quad[j], quad[4 + j], 0xdd);
    __m512i even1 = _mm512_shuffle_i32x4(quad[8 + j], quad[12 + j], 0x88);
    __m512i odd1 = _mm512_shuffle_i32x4(quad[8 + j], quad[12 + j], 0xdd);
    tile[j] = _mm512_shuffle_i32x4(even0, even1, 0x88);
    tile[4 + j] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
    tile[8 + j] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
    tile[12 + j] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
}

/* The next chunk of a job, for the thread that asks. */
INLINE int64_t take(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

/* Adds an accumulator to those before it, the way oneDNN does. A first one is not added to zero: that
 * would lose the sign of -0. */
INLINE __m512 add_accumulator(__m512 total, __m512 sum, int first) {
  return first ? sum : _mm512_add_ps(total, sum);
}

/* Bias, rounding, and up to 16 outputs. */
INLINE void finish_rows(__m512 total, int64_t count, const uint16_t *bias, uint16_t *output) {
  __mmask16 mask = (__mmask16)((1u << count) - 1);
  if (bias) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bias));
    total = _mm512_add_ps(total, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
  }
  _mm256_mask_storeu_epi16(output, mask, (__m256i)_mm512_cvtneps_pbh(total));
}

#endif
