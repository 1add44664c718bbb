/* bf16 matrices in twelve bits a number: proto/weight_format.py lays them out.
 *
 * A tile is 16 rows and 32 columns in eight groups of 64 numbers. Number i of group g belongs to row
 * i / 16 * 4 + i % 8 / 2 and to column g * 4 + i % 16 / 8 * 2 + i % 2.
 */
#ifndef FLASHMOE_PORTABLE_LOSSLESS_H
#define FLASHMOE_PORTABLE_LOSSLESS_H

#include "numbers.h"

enum {
  TILE = ROWS * COLUMNS,
  GROUP = 64,
  NUM_GROUPS = TILE / GROUP,
  PARTS = 5 /* arrays that make up a matrix, in the order of struct matrix */
};

struct matrix {
  const uint8_t *signs;     /* sign and mantissa, tile by tile of a block of 16 rows */
  const uint8_t *codes;     /* of two numbers a byte, the first in the low half */
  const uint8_t *bases;     /* a row */
  const int32_t *ends;      /* of each block's part of outliers */
  const uint32_t *outliers; /* place in the block | exponent << 24, ascending */
};

/* A block of 16 rows while it is unpacked from the left to the right. */
struct unpacking {
  const uint8_t *signs, *codes; /* of its first tile */
  const uint32_t *next, *end;   /* outliers still to come */
  uint8_t bases[GROUP];         /* the row's beside each number of a group */
};

INLINE struct matrix matrix_of(const void *const *parts) {
  return (struct matrix){parts[0], parts[1], parts[2], parts[3], parts[4]};
}

INLINE struct unpacking unpacking_of(const struct matrix *matrix, int64_t block, int64_t num_tiles) {
  struct unpacking unpacking = {
      .signs = matrix->signs + block * num_tiles * TILE,
      .codes = matrix->codes + block * num_tiles * TILE / 2,
      .next = matrix->outliers + (block ? matrix->ends[block - 1] : 0),
      .end = matrix->outliers + matrix->ends[block],
  };
  for (int i = 0; i < GROUP; i++)
    unpacking.bases[i] = matrix->bases[block * ROWS + i / 16 * 4 + i % 8 / 2];
  return unpacking;
}

INLINE void unpack_group(const uint8_t *signs, const uint8_t *codes, const uint8_t *bases,
                         uint16_t *numbers) {
  uint8_t exponents[GROUP];
  for (int i = 0; i < GROUP / 2; i++) {
    exponents[2 * i] = codes[i] & 15;
    exponents[2 * i + 1] = codes[i] >> 4;
  }
  for (int i = 0; i < GROUP; i++)
    exponents[i] = (uint8_t)(exponents[i] ? exponents[i] + bases[i] : 0);
  for (int i = 0; i < GROUP; i++)
    numbers[i] = (uint16_t)((signs[i] & 0x80) << 8 | exponents[i] << 7 | (signs[i] & 0x7f));
}

/* Outliers of a tile get their exponents. numbers: in the order of the record */
static void correct(struct unpacking *block, int64_t tile, uint16_t *numbers) {
  for (; block->next < block->end; block->next++) {
    int64_t place = (int64_t)(*block->next & 0xffffff) - tile * TILE;
    if (place >= TILE) break;
    numbers[place] = (uint16_t)((numbers[place] & 0x807f) | *block->next >> 24 << 7);
  }
}

/* A tile's 16 rows of 32 numbers, a row every `stride` numbers. Tiles come one after the other. */
INLINE void unpack_tile(struct unpacking *block, int64_t tile, uint16_t *rows, int64_t stride) {
  uint16_t numbers[TILE];
  const uint8_t *signs = block->signs + tile * TILE, *codes = block->codes + tile * TILE / 2;
  for (int group = 0; group < NUM_GROUPS; group++)
    unpack_group(signs + group * GROUP, codes + group * GROUP / 2, block->bases,
                 numbers + group * GROUP);
  correct(block, tile, numbers);
  for (int row = 0; row < ROWS; row++)
    for (int pair = 0; pair < COLUMNS / 2; pair++)
      memcpy(rows + row * stride + pair * 2,
             numbers + pair / 2 * GROUP + row / 4 * 16 + pair % 2 * 8 + row % 4 * 2, 4);
}

#endif
