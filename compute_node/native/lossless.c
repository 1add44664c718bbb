/* bf16 matrices in twelve bits a number, with no bit lost: proto/weight_format.py lays them out.
 *
 * A number is a byte of sign and mantissa, and four bits that name its exponent: 0 is exponent 0, any
 * other code is added to the row's base. The few numbers whose exponent is farther off stand in a list.
 * They lie in tiles of 16 rows and 32 columns, in the order in which they come out of the registers, so
 * that one pass unpacks and multiplies, and adds in oneDNN's order as gemv.c does.
 */
#include <string.h>

#if defined(__x86_64__)
#include "tiles.h"

enum {
  TILE = ROWS * COLUMNS,
  GROUP = 64,          /* numbers that are unpacked at once: two columns pairs of 16 rows */
  NUM_GROUPS = TILE / GROUP,
  PARTS = 5,           /* arrays that make up a matrix */
  AHEAD_LINES = 96,    /* prefetched so far ahead, in each array */
  CHUNK_NUMBERS = 64 << 10
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

struct job {
  const void *const *parts;       /* PARTS for each matrix */
  const uint16_t *const *biases;  /* count times [rows], or null */
  const uint16_t *inputs;         /* a row every input_stride numbers */
  uint16_t *outputs;              /* products: [count, rows]; unpacking: [rows, columns] */
  int64_t count, input_stride, rows, columns;
  int64_t num_tiles, num_blocks;  /* of a row of tiles; of a matrix */
  int64_t chunk_blocks, num_chunks;
  int64_t next;                   /* chunk of all matrices; threads take one after the other */
  int unpacking;
};

INLINE void multiply_block(const struct job *job, int64_t number, const struct matrix *matrix,
                           int64_t block) {
  const uint16_t *input = job->inputs + number * job->input_stride;
  __m512i bases = bases_of(matrix, block);
  struct cursor cursor = cursor_of(matrix, block);
  __m512 total = _mm512_setzero_ps(), sum = total;
  const int64_t tiles_each = ACCUMULATOR_COLUMNS / COLUMNS;
  for (int64_t tile = 0; tile < job->num_tiles; tile++) {
    __m512i numbers[ROWS];
    int32_t pairs[ROWS];
    if (tile % tiles_each == 0) sum = _mm512_setzero_ps();
    memcpy(pairs, input + tile * COLUMNS, sizeof pairs);
    unpack_tile(matrix, (block * job->num_tiles + tile) * TILE, tile, bases, &cursor, numbers);
    for (int c = 0; c < ROWS; c++)
      sum = _mm512_dpbf16_ps(sum, (__m512bh)numbers[c], (__m512bh)_mm512_set1_epi32(pairs[c]));
    if (tile % tiles_each == tiles_each - 1 || tile == job->num_tiles - 1)
      total = add_accumulator(total, sum, tile < tiles_each);
  }
  int64_t row = block * ROWS, left = job->rows - row;
  finish_rows(total, left < ROWS ? left : ROWS, job->biases ? job->biases[number] + row : 0,
              job->outputs + number * job->rows + row);
}

INLINE void unpack_block(const struct job *job, const struct matrix *matrix, int64_t block) {
  __m512i bases = bases_of(matrix, block);
  struct cursor cursor = cursor_of(matrix, block);
  int64_t row = block * ROWS, count = job->rows - row < ROWS ? job->rows - row : ROWS;
  for (int64_t tile = 0; tile < job->num_tiles; tile++) {
    __m512i numbers[ROWS];
    int64_t column = tile * COLUMNS, left = job->columns - column;
    __mmask32 mask = left < COLUMNS ? (1u << left) - 1 : 0xffffffff;
    unpack_tile(matrix, (block * job->num_tiles + tile) * TILE, tile, bases, &cursor, numbers);
    transpose(numbers);
    for (int64_t r = 0; r < count; r++)
      _mm512_mask_storeu_epi16(job->outputs + (row + r) * job->columns + column, mask, numbers[r]);
  }
}

__attribute__((target(TARGET))) static void work(void *data) {
  struct job *job = data;
  int64_t chunk;
  while ((chunk = take(&job->next)) < job->count * job->num_chunks) {
    int64_t number = chunk / job->num_chunks;
    int64_t begin = chunk % job->num_chunks * job->chunk_blocks, end = begin + job->chunk_blocks;
    struct matrix matrix = matrix_of(job->parts + number * PARTS);
    for (int64_t block = begin; block < end && block < job->num_blocks; block++)
      if (job->unpacking)
        unpack_block(job, &matrix, block);
      else
        multiply_block(job, number, &matrix, block);
  }
}

static void run(struct job *job, parallel_function *parallel, int64_t threads) {
  job->num_tiles = (job->columns + COLUMNS - 1) / COLUMNS;
  job->num_blocks = (job->rows + ROWS - 1) / ROWS;
  int64_t chunk_blocks = CHUNK_NUMBERS / (job->num_tiles * TILE);
  job->chunk_blocks = chunk_blocks > 1 ? chunk_blocks : 1;
  job->num_chunks = (job->num_blocks + job->chunk_blocks - 1) / job->chunk_blocks;
  if (parallel && threads > 1 && job->count * job->rows * job->columns * 2 >= PARALLEL_BYTES)
    parallel(work, job, (unsigned)threads, 0);
  else
    work(job);
}

/* outputs[i] = matrix i times inputs[i], or times the same input where input_stride is 0.
 * parts: five arrays a matrix, as in struct matrix. columns: a multiple of 32. parallel: null for one
 * thread. */
void lossless_gemv(const void *const *parts, const uint16_t *const *biases, int64_t count,
                   const uint16_t *inputs, int64_t input_stride, uint16_t *outputs, int64_t rows,
                   int64_t columns, parallel_function *parallel, int64_t threads) {
  struct job job = {.parts = parts, .biases = biases, .inputs = inputs, .outputs = outputs,
                    .count = count, .input_stride = input_stride, .rows = rows,
                    .columns = columns};
  run(&job, parallel, threads);
}

/* outputs: the matrix as bf16 [rows, columns]. */
void lossless_unpack(const void *const *parts, uint16_t *outputs, int64_t rows, int64_t columns,
                     parallel_function *parallel, int64_t threads) {
  struct job job = {.parts = parts, .outputs = outputs, .count = 1, .rows = rows,
                    .columns = columns, .unpacking = 1};
  run(&job, parallel, threads);
}

#endif
