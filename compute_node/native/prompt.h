/* The tokens of a prompt through the experts that they chose, from hidden states to weighted outputs: the
 * same in every folder, compiled into each with its own products and sums.
 *
 * Between the two products every number is rounded where torch's own operations round it;
 * compute_node/kernels/prompt_experts.py takes this way where each step is known to give torch's bits.
 *
 * Before it is included: gemm, gate_of, weigh, add_rows, take, PARALLEL_BYTES; THREAD and
 * ENTRY_OF_FOLDER, how functions are declared that threads enter, and the entries.
 */
#include <string.h>

enum { SUMMED_TOKENS = 16 /* whose outputs a thread adds up at a time */ };

/* What one expert has to do. */
struct expert {
  const void *const *gate_up, *down; /* one array of bf16, or the arrays of a lossless matrix */
  const int64_t *places;             /* [count], k * tokens + token of each choice of it */
  int64_t count;
  int64_t up_step, down_step;        /* columns of an accumulator in either product */
};

struct prompt {
  const uint16_t *states; /* [tokens, hidden] */
  const float *weights;   /* [tokens, top_k] */
  const uint16_t *table;  /* the activation of every bf16 number */
  uint16_t *outputs;      /* [tokens, top_k, hidden] */
  uint16_t *scratch;      /* a thread: most tokens of an expert times (2 * hidden + 3 * inner) */
  int64_t scratch_numbers; /* of a thread */
  int64_t tokens, top_k, hidden, inner, lossless;
};

struct prompt_job {
  const struct prompt *prompt;
  const struct expert *experts;
  int64_t num_experts;
  int64_t next, next_scratch; /* threads take one after the other */
};

static void compute(const struct prompt *prompt, const struct expert *expert, uint16_t *scratch,
                    parallel_function *parallel, int64_t threads) {
  int64_t hidden = prompt->hidden, inner = prompt->inner, count = expert->count;
  uint16_t *chosen = scratch, *made = chosen + count * hidden;
  uint16_t *projected = made + count * hidden, *activated = projected + count * 2 * inner;
  for (int64_t i = 0; i < count; i++)
    memcpy(chosen + i * hidden, prompt->states + expert->places[i] % prompt->tokens * hidden,
           (size_t)hidden * 2);
  gemm(expert->gate_up, prompt->lossless, 0, chosen, projected, count, 2 * inner, hidden,
       expert->up_step, parallel, threads);
  gate_of(projected, prompt->table, count, inner, activated);
  gemm(expert->down, prompt->lossless, 0, activated, made, count, hidden, inner, expert->down_step,
       parallel, threads);
  for (int64_t i = 0; i < count; i++) {
    int64_t token = expert->places[i] % prompt->tokens, k = expert->places[i] / prompt->tokens;
    int64_t at = token * prompt->top_k + k;
    weigh(made + i * hidden, prompt->weights[at], hidden, prompt->outputs + at * hidden);
  }
}

THREAD void prompt_work(void *data) {
  struct prompt_job *job = data;
  uint16_t *scratch = job->prompt->scratch + take(&job->next_scratch) * job->prompt->scratch_numbers;
  int64_t number;
  while ((number = take(&job->next)) < job->num_experts)
    compute(job->prompt, job->experts + number, scratch, 0, 1);
}

/* Several experts: each by one thread where there are enough of them, else each by all threads.
 * Entering a parallel region wakes a thread, which takes as long as a small product. */
ENTRY_OF_FOLDER void prompt_experts(const struct prompt *prompt, const struct expert *experts, int64_t num_experts,
                                    parallel_function *parallel, int64_t threads) {
  struct prompt_job job = {prompt, experts, num_experts, 0, 0};
  if (parallel && threads > 1 && num_experts >= 2 * threads)
    parallel(prompt_work, &job, (unsigned)threads, 0);
  else
    for (int64_t number = 0; number < num_experts; number++)
      compute(prompt, experts + number, prompt->scratch, parallel, threads);
}

struct sum_job {
  const uint16_t *rows; /* [tokens, count, columns] */
  const int64_t *order; /* [tokens, count] */
  int64_t tokens, count, columns;
  uint16_t *totals; /* [tokens, columns] */
  int64_t next;     /* group of tokens; threads take one after the other */
};

THREAD void sum_work(void *data) {
  struct sum_job *sum = data;
  int64_t token;
  while ((token = take(&sum->next) * SUMMED_TOKENS) < sum->tokens)
    for (int64_t end = token + SUMMED_TOKENS; token < end && token < sum->tokens; token++)
      add_rows(sum->rows + token * sum->count * sum->columns, sum->order + token * sum->count,
               sum->count, sum->columns, sum->totals + token * sum->columns);
}

/* What each token's experts made, added up in the given order, rounded each time. */
ENTRY_OF_FOLDER void add_rows_of_each(const uint16_t *rows, const int64_t *order, int64_t tokens, int64_t count,
                      int64_t columns, uint16_t *totals, parallel_function *parallel,
                      int64_t threads) {
  struct sum_job sum = {rows, order, tokens, count, columns, totals, 0};
  if (parallel && threads > 1 && tokens * count * columns * 2 >= PARALLEL_BYTES)
    parallel(sum_work, &sum, (unsigned)threads, 0);
  else
    sum_work(&sum);
}
