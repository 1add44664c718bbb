/* bf16 matrices in twelve bits a number, with no bit lost: proto/weight_format.py lays them out.
 *
 * A number is a byte of sign and mantissa, and four bits that name its exponent: 0 is exponent 0, any
 * other code is added to the row's base. The few numbers whose exponent is farther off stand in a list.
 * They lie in tiles of 16 rows and 32 columns, in the order in which they come out of the registers, so
 * that one pass unpacks and multiplies.
 */
#ifndef FLASHMOE_LOSSLESS_H
#define FLASHMOE_LOSSLESS_H

#include <string.h>

#include "tiles.h"

enum {
  TILE = ROWS * COLUMNS,
  GROUP = 64,          /* numbers that are unpacked at once: two columns pairs of 16 rows */
  NUM_GROUPS = TILE / GROUP,
  PARTS = 5,           /* arrays that make up a matrix, in the order of struct matrix */
  AHEAD_LINES = 96     /* prefetched so far ahead, in each array */
};

struct matrix {
  const uint8_t *signs;     /* sign and mantissa, tile by tile of a block of 16 rows */
  const uint8_t *codes;     /* of two numbers a byte, the first in the low half */
  const uint8_t *bases;     /* a row */
  const int32_t *ends;      /* of each block's part of outliers */
  const uint32_t *outliers; /* place in the block | exponent << 24, ascending */
};

/* What of a block's outliers is still to come. */
struct cursor {
  const uint32_t *next, *end;
};

INLINE struct matrix matrix_of(const void *const *parts) {
  return (struct matrix){parts[0], parts[1], parts[2], parts[3], parts[4]};
}

INLINE struct cursor cursor_of(const struct matrix *matrix, int64_t block) {
  int32_t begin = block ? matrix->ends[block - 1] : 0;
  return (struct cursor){matrix->outliers + begin, matrix->outliers + matrix->ends[block]};
}

/* The row's base beside each number of a group. */
INLINE __m512i bases_of(const struct matrix *matrix, int64_t block) {
  uint8_t bases[GROUP];
  for (int i = 0; i < GROUP; i++) bases[i] = matrix->bases[block * ROWS + i / 16 * 4 + i % 8 / 2];
  return _mm512_loadu_si512(bases);
}

/* Dword r of pairs[0] and pairs[1]: two columns of row r, and the next two. */
INLINE void unpack(const uint8_t *signs, const uint8_t *codes, __m512i bases, __m512i pairs[2]) {
  const __m512i low_bits = _mm512_set1_epi8(0x7f), nibble = _mm512_set1_epi8(0x0f);
  __m512i sign = _mm512_loadu_si512(signs);
  __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
  __m512i code = _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), nibble);
  __mmask64 coded = _mm512_test_epi8_mask(code, code);
  __m512i exponent = _mm512_maskz_add_epi8(coded, code, bases);
  /* 0xca: bits of the second where the first is set, else of the third */
  __m512i high = _mm512_ternarylogic_epi32(low_bits, _mm512_srli_epi16(exponent, 1), sign, 0xca);
  __m512i low = _mm512_ternarylogic_epi32(low_bits, sign, _mm512_slli_epi16(exponent, 7), 0xca);
  pairs[0] = _mm512_unpacklo_epi8(low, high);
  pairs[1] = _mm512_unpackhi_epi8(low, high);
}

/* Outliers of one tile get their exponents. numbers: the tile as `unpack` gave it. */
__attribute__((target(TARGET), noinline)) static void correct(uint16_t *numbers, int64_t tile,
                                                               struct cursor *cursor) {
  for (; cursor->next < cursor->end; cursor->next++) {
    int64_t place = (int64_t)(*cursor->next & 0xffffff) - tile * TILE;
    if (place >= TILE) break;
    int64_t group = place / GROUP, byte = place % GROUP;
    uint16_t *number = numbers + (group * 2 + byte % 16 / 8) * COLUMNS + byte / 16 * 8 + byte % 8;
    *number = (uint16_t)((*number & 0x807f) | *cursor->next >> 24 << 7);
  }
}

/* A tile whose register c holds columns 2c and 2c + 1 of all rows. */
INLINE void unpack_tile(const struct matrix *matrix, int64_t at, int64_t tile, __m512i bases,
                        struct cursor *cursor, __m512i numbers[ROWS]) {
  const uint8_t *signs = matrix->signs + at, *codes = matrix->codes + at / 2;
  for (int i = 0; i < NUM_GROUPS; i++) {
    _mm_prefetch(signs + (i + AHEAD_LINES) * LINE_BYTES, _MM_HINT_T0);
    if (i % 2 == 0) _mm_prefetch(codes + (i / 2 + AHEAD_LINES) * LINE_BYTES, _MM_HINT_T0);
    unpack(signs + i * GROUP, codes + i * GROUP / 2, bases, numbers + 2 * i);
  }
  if (__builtin_expect(cursor->next < cursor->end &&
                       (int64_t)(*cursor->next & 0xffffff) < (tile + 1) * TILE, 0)) {
    uint16_t stored[TILE];
    memcpy(stored, numbers, sizeof stored);
    correct(stored, tile, cursor);
    memcpy(numbers, stored, sizeof stored);
  }
}

#endif
