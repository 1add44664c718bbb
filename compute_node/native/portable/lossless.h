/* bf16 matrices in twelve bits a number: proto/weight_format.py lays them out.
 *
 * A tile is 16 rows and 32 columns in eight groups of 64 numbers. Number i of group g belongs to row
 * i / 16 * 4 + i % 8 / 2 and to column g * 4 + i % 16 / 8 * 2 + i % 2.
 */
#ifndef FLASHMOE_PORTABLE_LOSSLESS_H
#define FLASHMOE_PORTABLE_LOSSLESS_H

#include "vectors.h"

enum {
  TILE = ROWS * COLUMNS,
  GROUP = 64,
  NUM_GROUPS = TILE / GROUP,
  EACH = GROUP / (4 * LANES), /* registers of a group's numbers of even columns, and of odd ones */
  AHEAD_LINES = 32,           /* prefetched in each array */
  PARTS = 5 /* arrays that make up a matrix, in the order of struct matrix */
};

struct matrix {
  const uint8_t *signs;     /* sign and mantissa, tile by tile of a block of 16 rows */
  const uint8_t *codes;     /* of two numbers a byte, the first in the low half */
  const uint8_t *bases;     /* a row */
  const int32_t *ends;      /* of each block's part of outliers */
  const uint32_t *outliers; /* place in the block | exponent << 24, ascending */
};

typedef uint8_t vector_bytes __attribute__((vector_size(LANES * 4)));
typedef uint8_t half_vector_bytes __attribute__((vector_size(LANES * 2)));
typedef uint16_t vector_words __attribute__((vector_size(LANES * 4)));

/* A block of 16 rows while it is unpacked from the left to the right. */
struct unpacking {
  const uint8_t *signs, *codes; /* of its first tile */
  const uint32_t *next, *end;   /* outliers still to come */
  vector_bytes bases[EACH];     /* the row's beside each number of a group */
};

/* A group's numbers: dwords of either kind hold pairs of neighbouring rows' numbers; eight words are four
 * rows of one column, and four of the next of its kind. */
struct unpacked {
  vector_words even[EACH], odd[EACH]; /* columns */
};

INLINE struct matrix matrix_of(const void *const *parts) {
  return (struct matrix){parts[0], parts[1], parts[2], parts[3], parts[4]};
}

/* The row's base beside each number of a group. */
INLINE void bases_of(const uint8_t *rows, vector_bytes bases[EACH]) {
#if LANES == 16
  __m128i all = _mm_loadu_si128((const __m128i *)rows);
  __m512i fours = _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_set_m128i(_mm_srli_si128(all, 4), all)),
      _mm256_set_m128i(_mm_srli_si128(all, 12), _mm_srli_si128(all, 8)), 1);
  bases[0] = (vector_bytes)_mm512_shuffle_epi8(
      fours, _mm512_set4_epi32(0x03030202, 0x01010000, 0x03030202, 0x01010000));
#else
  uint8_t numbers[GROUP];
  for (int i = 0; i < GROUP; i++) numbers[i] = rows[i / 16 * 4 + i % 8 / 2];
  memcpy(bases, numbers, sizeof numbers);
#endif
}

INLINE struct unpacking unpacking_of(const struct matrix *matrix, int64_t block, int64_t num_tiles) {
  struct unpacking unpacking = {
      .signs = matrix->signs + block * num_tiles * TILE,
      .codes = matrix->codes + block * num_tiles * TILE / 2,
      .next = matrix->outliers + (block ? matrix->ends[block - 1] : 0),
      .end = matrix->outliers + matrix->ends[block],
  };
  bases_of(matrix->bases + block * ROWS, unpacking.bases);
  return unpacking;
}

/* Bits of `a` where those of mask are set, else of `b`. */
INLINE vector_words choose(uint16_t mask, vector_words a, vector_words b) {
  vector_words masks = (vector_words){0} + mask;
#if LANES == 16
  return (vector_words)_mm512_ternarylogic_epi32((__m512i)masks, (__m512i)a, (__m512i)b, 0xca);
#else
  return (a & masks) | (b & ~masks);
#endif
}

/* The base added to each code but 0. */
INLINE vector_bytes exponents_of(vector_bytes codes, vector_bytes bases) {
#if LANES == 16
  __mmask64 coded = _mm512_test_epi8_mask((__m512i)codes, (__m512i)codes);
  return (vector_bytes)_mm512_maskz_add_epi8(coded, (__m512i)codes, (__m512i)bases);
#else
  return (codes + bases) & (vector_bytes)(codes != 0);
#endif
}

INLINE void unpack(const uint8_t *signs, const uint8_t *codes, const vector_bytes *bases,
                   struct unpacked *group) {
  const uint16_t sign = 0x8000, exponent = 0x7f80;
  for (int i = 0; i < EACH; i++) {
    vector_words s, x;
    half_vector_bytes two;
    memcpy(&s, signs + i * 4 * LANES, sizeof s);
    memcpy(&two, codes + i * 2 * LANES, sizeof two);
    x = __builtin_convertvector(two, vector_words);
    x = (vector_words)exponents_of((vector_bytes)(x | x << 4) & 15, bases[i]);
    group->even[i] = choose(exponent, x << 7, choose(sign, s << 8, s));
    group->odd[i] = choose(exponent, x >> 1, choose(sign, s, s >> 8));
  }
}

/* Outliers of a tile get their exponents. */
static __attribute__((noinline)) void correct(struct unpacking *block, int64_t tile,
                                              struct unpacked *groups) {
  for (; block->next < block->end; block->next++) {
    int64_t place = (int64_t)(*block->next & 0xffffff) - tile * TILE;
    if (place >= TILE) break;
    struct unpacked *group = groups + place / GROUP;
    uint16_t *numbers = place % 2 ? (uint16_t *)group->odd : (uint16_t *)group->even, number;
    memcpy(&number, numbers + place % GROUP / 2, sizeof number);
    number = (uint16_t)((number & 0x807f) | *block->next >> 24 << 7);
    memcpy(numbers + place % GROUP / 2, &number, sizeof number);
  }
}

/* Tiles come one after the other. */
INLINE void unpack_tile(struct unpacking *block, int64_t tile, struct unpacked groups[NUM_GROUPS]) {
  const uint8_t *signs = block->signs + tile * TILE, *codes = block->codes + tile * TILE / 2;
  for (int i = 0; i < NUM_GROUPS; i++) {
    __builtin_prefetch(signs + (i + AHEAD_LINES) * GROUP);
    if (i % 2 == 0) __builtin_prefetch(codes + (i / 2 + AHEAD_LINES) * GROUP);
    unpack(signs + i * GROUP, codes + i * GROUP / 2, block->bases, groups + i);
  }
  if (__builtin_expect(
          block->next < block->end && (int64_t)(*block->next & 0xffffff) < (tile + 1) * TILE, 0)) {
    struct unpacked stored[NUM_GROUPS];
    memcpy(stored, groups, sizeof stored);
    correct(block, tile, stored);
    memcpy(groups, stored, sizeof stored);
  }
}

/* A tile's 16 rows of 32 numbers, a row every `stride` numbers. */
INLINE void unpack_rows(struct unpacking *block, int64_t tile, uint16_t *rows, int64_t stride) {
  struct unpacked groups[NUM_GROUPS];
  unpack_tile(block, tile, groups);
  for (int i = 0; i < NUM_GROUPS; i++) {
    uint16_t even[GROUP / 2], odd[GROUP / 2];
    memcpy(even, groups[i].even, sizeof even);
    memcpy(odd, groups[i].odd, sizeof odd);
    for (int j = 0; j < GROUP / 2; j++) {
      uint16_t *place = rows + (j / 8 * 4 + j % 4) * stride + i * 4 + j % 8 / 4 * 2;
      place[0] = even[j];
      place[1] = odd[j];
    }
  }
}

#endif
