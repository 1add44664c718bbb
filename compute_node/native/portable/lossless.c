/* One token times matrices of twelve bits a number, adding in the order of gemv.c; and such matrices
 * unpacked.
 */
#include "lossless.h"

enum {
  CHUNK_NUMBERS = 64 << 10, /* what a thread takes at a time */
  PANEL_COLUMNS = 512       /* unpacked at once: a multiple of SUMS */
};

struct lossless_job {
  const void *const *parts;      /* PARTS for each matrix */
  const uint16_t *const *biases; /* count times [rows], or null */
  const uint16_t *inputs;        /* a row every input_stride numbers */
  uint16_t *outputs;             /* products: [count, rows]; unpacking: [rows, columns] */
  int64_t count, input_stride, rows, columns;
  int64_t num_tiles, num_blocks; /* of a row of tiles; of a matrix */
  int64_t chunk_blocks, num_chunks;
  int64_t next; /* chunk of all matrices; threads take one after the other */
  int unpacking;
};

INLINE void multiply_packed(const struct lossless_job *job, int64_t number,
                            const struct matrix *matrix, int64_t block) {
  const uint16_t *input = job->inputs + number * job->input_stride;
  struct unpacking unpacking = unpacking_of(matrix, block, job->num_tiles);
  int64_t left = job->rows - block * ROWS, count = left < ROWS ? left : ROWS;
  struct dot dots[ROWS];
  uint16_t panel[ROWS * PANEL_COLUMNS];
  memset(dots, 0, sizeof dots);
  for (int64_t begin = 0; begin < job->columns; begin += PANEL_COLUMNS) {
    int64_t width = job->columns - begin < PANEL_COLUMNS ? job->columns - begin : PANEL_COLUMNS;
    for (int64_t column = 0; column < width; column += COLUMNS)
      unpack_tile(&unpacking, (begin + column) / COLUMNS, panel + column, PANEL_COLUMNS);
    for (int64_t row = 0; row < count; row++)
      add_columns(dots + row, panel + row * PANEL_COLUMNS, input + begin, width);
  }
  for (int64_t row = 0; row < count; row++) {
    int64_t at = block * ROWS + row;
    job->outputs[number * job->rows + at] =
        output_of(dots + row, job->columns, job->biases ? job->biases[number] + at : 0);
  }
}

INLINE void unpack_block(const struct lossless_job *job, const struct matrix *matrix,
                         int64_t block) {
  struct unpacking unpacking = unpacking_of(matrix, block, job->num_tiles);
  int64_t row = block * ROWS, count = job->rows - row < ROWS ? job->rows - row : ROWS;
  uint16_t *outputs = job->outputs + row * job->columns;
  for (int64_t tile = 0; tile < job->num_tiles; tile++) {
    int64_t column = tile * COLUMNS, left = job->columns - column;
    if (count == ROWS && left >= COLUMNS) {
      unpack_tile(&unpacking, tile, outputs + column, job->columns);
      continue;
    }
    uint16_t whole[TILE];
    unpack_tile(&unpacking, tile, whole, COLUMNS);
    for (int64_t r = 0; r < count; r++)
      memcpy(outputs + r * job->columns + column, whole + r * COLUMNS,
             (size_t)(left < COLUMNS ? left : COLUMNS) * 2);
  }
}

static void lossless_work(void *data) {
  struct lossless_job *job = data;
  int64_t chunk;
  while ((chunk = take(&job->next)) < job->count * job->num_chunks) {
    int64_t number = chunk / job->num_chunks;
    int64_t begin = chunk % job->num_chunks * job->chunk_blocks, end = begin + job->chunk_blocks;
    struct matrix matrix = matrix_of(job->parts + number * PARTS);
    for (int64_t block = begin; block < end && block < job->num_blocks; block++)
      if (job->unpacking)
        unpack_block(job, &matrix, block);
      else
        multiply_packed(job, number, &matrix, block);
  }
}

static void run(struct lossless_job *job, parallel_function *parallel, int64_t threads) {
  job->num_tiles = (job->columns + COLUMNS - 1) / COLUMNS;
  job->num_blocks = (job->rows + ROWS - 1) / ROWS;
  int64_t chunk_blocks = CHUNK_NUMBERS / (job->num_tiles * TILE);
  job->chunk_blocks = chunk_blocks > 1 ? chunk_blocks : 1;
  job->num_chunks = (job->num_blocks + job->chunk_blocks - 1) / job->chunk_blocks;
  share_out(lossless_work, job, job->count * job->rows * job->columns * 2, parallel, threads);
}

static void lossless_gemv(const void *const *parts, const uint16_t *const *biases, int64_t count,
                          const uint16_t *inputs, int64_t input_stride, uint16_t *outputs,
                          int64_t rows, int64_t columns, parallel_function *parallel,
                          int64_t threads) {
  struct lossless_job job = {.parts = parts, .biases = biases, .inputs = inputs,
                             .outputs = outputs, .count = count, .input_stride = input_stride,
                             .rows = rows, .columns = columns};
  run(&job, parallel, threads);
}

static void lossless_unpack(const void *const *parts, uint16_t *outputs, int64_t rows,
                            int64_t columns, parallel_function *parallel, int64_t threads) {
  struct lossless_job job = {.parts = parts, .outputs = outputs, .count = 1, .rows = rows,
                             .columns = columns, .unpacking = 1};
  run(&job, parallel, threads);
}
