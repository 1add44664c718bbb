/* Several tokens times a bf16 matrix, in the order of oneDNN's product on CPUs without bf16
 * instructions: an accumulator gets the second product of a pair of columns, then the first; a new one
 * starts where compute_node/kernels finds out, for each shape and number of tokens.
 *
 * 16 rows are widened to float32 once, a panel of columns at a time, and multiplied with all tokens.
 */
#include "lossless.h"

enum {
  MULTIPLIED_COLUMNS = 256, /* of a panel: 16 KiB */
  GROUP_TOKENS = 256,       /* that go through a panel before the next is made */
  VECTORS = ROWS / LANES
};

struct gemm_job {
  const void *const *weight;     /* one array [rows, columns], or PARTS of them */
  int64_t lossless;              /* the latter */
  const uint16_t *bias, *inputs; /* [rows], or null; [tokens, columns] */
  uint16_t *outputs;             /* [tokens, rows] */
  int64_t tokens, rows, columns, accumulator_columns;
  int64_t next; /* block of 16 rows; threads take one after the other */
};

/* What the tokens have of 16 rows so far: of the present accumulator, and of those before it. */
struct gemm_sums {
  float present[GROUP_TOKENS][ROWS], total[GROUP_TOKENS][ROWS];
};

/* Where a block of 16 rows comes from. */
struct source {
  const uint16_t *rows; /* `count` of them; the last stands for those missing */
  int64_t count, columns;
  struct unpacking unpacking; /* of a lossless one */
};

static struct source source_of(const struct gemm_job *job, int64_t block) {
  int64_t left = job->rows - block * ROWS;
  struct source source = {.count = left < ROWS ? left : ROWS, .columns = job->columns};
  if (job->lossless) {
    struct matrix matrix = matrix_of(job->weight);
    source.unpacking = unpacking_of(&matrix, block, job->columns / COLUMNS);
  } else
    source.rows = (const uint16_t *)job->weight[0] + block * ROWS * job->columns;
  return source;
}

/* Columns from `begin` of 16 rows; called for one range after the other. panel: [width, ROWS] */
INLINE void widen_panel(struct source *source, int64_t lossless, int64_t begin, int64_t width,
                        float (*panel)[ROWS]) {
  for (int64_t column = 0; column < width; column += COLUMNS) {
    uint16_t tile[ROWS][COLUMNS];
    if (lossless)
      unpack_rows(&source->unpacking, (begin + column) / COLUMNS, tile[0], COLUMNS);
    else
      for (int64_t row = 0; row < ROWS; row++)
        memcpy(tile[row],
               source->rows + (row < source->count ? row : source->count - 1) * source->columns +
                   begin + column,
               sizeof tile[row]);
    for (int c = 0; c < COLUMNS; c++)
      for (int row = 0; row < ROWS; row++) panel[column + c][row] = widen(tile[row][c]);
  }
}

INLINE void multiply_tokens(float (*panel)[ROWS], int64_t width,
                            float (*inputs)[MULTIPLIED_COLUMNS], const int tokens,
                            float (*present)[ROWS]) {
  vector sums[TOKENS][VECTORS];
  memcpy(sums, present, (size_t)tokens * sizeof sums[0]);
  for (int64_t pair = 0; pair < width; pair += 2)
    for (int64_t column = pair + 1; column >= pair; column--) {
      vector numbers[VECTORS];
      memcpy(numbers, panel[column], sizeof numbers);
      for (int t = 0; t < tokens; t++)
        for (int v = 0; v < VECTORS; v++) 
          sums[t][v] = add_product(sums[t][v], numbers[v], splat(inputs[t][column]));
    }
  memcpy(present, sums, (size_t)tokens * sizeof sums[0]);
}

INLINE void multiply_some(const struct gemm_job *job, float (*panel)[ROWS], int64_t begin,
                          int64_t width, int64_t token, const int tokens, struct gemm_sums *sums) {
  float inputs[TOKENS][MULTIPLIED_COLUMNS];
  for (int t = 0; t < tokens; t++) {
    const uint16_t *input = job->inputs + (token + t) * job->columns + begin;
    for (int64_t column = 0; column < width; column++) inputs[t][column] = widen(input[column]);
  }
  multiply_tokens(panel, width, inputs, tokens, sums->present + token);
}

/* Constant numbers of tokens, so that accumulators are registers. */
INLINE void multiply_panel(const struct gemm_job *job, float (*panel)[ROWS], int64_t begin,
                           int64_t width, struct gemm_sums *sums) {
  int64_t token = 0;
  for (; token + TOKENS <= job->tokens; token += TOKENS)
    multiply_some(job, panel, begin, width, token, TOKENS, sums);
  for (; token + TOKENS / 3 <= job->tokens; token += TOKENS / 3)
    multiply_some(job, panel, begin, width, token, TOKENS / 3, sums);
  for (; token < job->tokens; token++) multiply_some(job, panel, begin, width, token, 1, sums);
}

INLINE void end_accumulator(int64_t tokens, int first, struct gemm_sums *sums) {
  for (int64_t t = 0; t < tokens; t++)
    for (int row = 0; row < ROWS; row++)
      sums->total[t][row] = first ? sums->present[t][row] : sums->total[t][row] + sums->present[t][row];
}

static void multiply_block(const struct gemm_job *job, int64_t block, float (*panel)[ROWS],
                           struct gemm_sums *sums) {
  int64_t row = block * ROWS;
  struct source source = source_of(job, block);
  for (int64_t begin = 0; begin < job->columns; begin += job->accumulator_columns) {
    int64_t end = begin + job->accumulator_columns;
    if (end > job->columns) end = job->columns;
    memset(sums->present, 0, (size_t)job->tokens * sizeof sums->present[0]);
    for (int64_t column = begin; column < end; column += MULTIPLIED_COLUMNS) {
      int64_t width = end - column < MULTIPLIED_COLUMNS ? end - column : MULTIPLIED_COLUMNS;
      widen_panel(&source, job->lossless, column, width, panel);
      multiply_panel(job, panel, column, width, sums);
    }
    end_accumulator(job->tokens, begin == 0, sums);
  }
  for (int64_t t = 0; t < job->tokens; t++)
    for (int64_t r = 0; r < source.count; r++)
      job->outputs[t * job->rows + row + r] =
          narrow(job->bias ? sums->total[t][r] + widen(job->bias[row + r]) : sums->total[t][r]);
}

static void gemm_work(void *data) {
  struct gemm_job *job = data;
  struct gemm_sums sums;
  float panel[MULTIPLIED_COLUMNS][ROWS] __attribute__((aligned(64)));
  int64_t block, num_blocks = (job->rows + ROWS - 1) / ROWS;
  while ((block = take(&job->next)) < num_blocks) multiply_block(job, block, panel, &sums);
}

static void gemm(const void *const *weight, int64_t lossless, const uint16_t *bias,
                 const uint16_t *inputs, uint16_t *outputs, int64_t tokens, int64_t rows,
                 int64_t columns, int64_t accumulator_columns, parallel_function *parallel,
                 int64_t threads) {
  for (; tokens > 0; tokens -= GROUP_TOKENS) {
    int64_t group = tokens < GROUP_TOKENS ? tokens : GROUP_TOKENS;
    struct gemm_job job = {weight, lossless, bias, inputs, outputs, group,
                           rows,   columns,  accumulator_columns,   0};
    share_out(gemm_work, &job, group * rows * columns * 2, parallel, threads);
    inputs += group * columns;
    outputs += group * rows;
  }
}
