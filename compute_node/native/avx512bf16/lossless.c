/* One token times matrices of twelve bits a number, adding in oneDNN's order as gemv.c does; and such
 * matrices unpacked.
 */
#if defined(__x86_64__)
#include "lossless.h"

enum { CHUNK_NUMBERS = 64 << 10 /* what a thread takes at a time */ };

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
