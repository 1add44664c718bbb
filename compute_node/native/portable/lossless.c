/* One token times matrices of twelve bits a number, adding in the order of gemv.c; and such matrices
 * unpacked.
 */
#include "lossless.h"

enum {
  CHUNK_NUMBERS = 64 << 10,                  /* what a thread takes at a time */
  SUM_GROUPS = SUMS * ROWS / GROUP,          /* whose columns have sums of their own */
  REST_GROUPS = REST_SUMS * ROWS / GROUP,    /* the same beyond a multiple of SUMS columns */
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

/* Sums of 16 rows and four columns. Those of even columns: of even rows, then of odd ones. */
struct group_sums {
  vector even[EACH][2], odd[EACH][2];
};

/* input: of the group's columns */
INLINE void add_group(struct group_sums *sums, const struct unpacked *group, const uint16_t *input) {
  vector_bits x = load_two_pairs_twice(input);
  for (int i = 0; i < EACH; i++) {
    vector_bits even = (vector_bits)group->even[i], odd = (vector_bits)group->odd[i];
    sums->even[i][0] = add_product(sums->even[i][0], firsts(even), firsts(x));
    sums->even[i][1] = add_product(sums->even[i][1], seconds(even), firsts(x));
    sums->odd[i][0] = add_product(sums->odd[i][0], firsts(odd), seconds(x));
    sums->odd[i][1] = add_product(sums->odd[i][1], seconds(odd), seconds(x));
  }
}

/* Adds each of the second half's sums to one of the first half's, until those of four columns are left. */
INLINE void halve_groups(struct group_sums *groups, int count) {
  for (int half = count / 2; half > 0; half /= 2)
    for (int group = 0; group < half; group++)
      for (int i = 0; i < EACH; i++)
        for (int rows = 0; rows < 2; rows++) {
          groups[group].even[i][rows] += groups[half + group].even[i][rows];
          groups[group].odd[i][rows] += groups[half + group].odd[i][rows];
        }
}

/* 16 rows' sums of four columns added up in halves. */
INLINE void add_up_group(const struct group_sums *sums, float totals[ROWS]) {
  for (int i = 0; i < EACH; i++) {
    vector even_rows = fold(2, sums->even[i][0], sums->odd[i][0]);
    vector odd_rows = fold(2, sums->even[i][1], sums->odd[i][1]);
    vector made = fold(LANES / 2, even_rows, odd_rows);
    for (int lane = 0; lane < LANES / 2; lane++) {
      totals[i * LANES + 2 * lane] = made[lane];
      totals[i * LANES + 2 * lane + 1] = made[LANES / 2 + lane];
    }
  }
}

INLINE void multiply_packed(const struct lossless_job *job, int64_t number,
                            const struct matrix *matrix, int64_t block) {
  const uint16_t *input = job->inputs + number * job->input_stride;
  struct unpacking unpacking = unpacking_of(matrix, block, job->num_tiles);
  struct group_sums sums[SUM_GROUPS] = {0}, rest[REST_GROUPS] = {0};
  const int64_t tiles_each = SUMS / COLUMNS, whole = job->num_tiles / tiles_each * tiles_each;
  for (int64_t tile = 0; tile < job->num_tiles; tile++) {
    struct unpacked groups[NUM_GROUPS];
    unpack_tile(&unpacking, tile, groups);
    for (int i = 0; i < NUM_GROUPS; i++) {
      struct group_sums *own = tile < whole ? sums + tile % tiles_each * NUM_GROUPS + i
                                            : rest + i % REST_GROUPS;
      add_group(own, groups + i, input + tile * COLUMNS + i * 4);
    }
  }
  float totals[ROWS], of_rest[ROWS];
  halve_groups(sums, SUM_GROUPS);
  add_up_group(sums, totals);
  if (whole < job->num_tiles) {
    halve_groups(rest, REST_GROUPS);
    add_up_group(rest, of_rest);
    for (int row = 0; row < ROWS; row++) totals[row] += of_rest[row];
  }
  int64_t row = block * ROWS, left = job->rows - row;
  finish(totals, job->biases ? job->biases[number] + row : 0,
         job->outputs + number * job->rows + row, left < ROWS ? left : ROWS);
}

INLINE void unpack_block(const struct lossless_job *job, const struct matrix *matrix,
                         int64_t block) {
  struct unpacking unpacking = unpacking_of(matrix, block, job->num_tiles);
  int64_t row = block * ROWS, count = job->rows - row < ROWS ? job->rows - row : ROWS;
  uint16_t *outputs = job->outputs + row * job->columns;
  for (int64_t tile = 0; tile < job->num_tiles; tile++) {
    int64_t column = tile * COLUMNS, left = job->columns - column;
    if (count == ROWS && left >= COLUMNS) {
      unpack_rows(&unpacking, tile, outputs + column, job->columns);
      continue;
    }
    uint16_t whole[TILE];
    unpack_rows(&unpacking, tile, whole, COLUMNS);
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
