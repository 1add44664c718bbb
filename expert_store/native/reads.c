/* Linux's asynchronous reads by their system calls: the C library does not wrap them.
 *
 * Every function returns 0 or a count, or an error number below 0.
 */
#include <errno.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "version.h"

/* A queue of `depth` reads; the eventfd counts each that has ended. */
struct reads {
  aio_context_t context;
  int eventfd;
  struct iocb *requests;  /* [depth] */
  struct iocb **pointers; /* [depth], to the requests */
};

/* One read to submit; expert_store/native/binding.py has the same fields. */
struct read {
  uint64_t name; /* comes back with the event */
  uint64_t buffer, length_bytes;
  int64_t offset_bytes;
  int64_t descriptor;
};

struct event {
  uint64_t name;
  int64_t got_bytes; /* or an error number below 0 */
};

int64_t reads_version(void) { return READS_VERSION; }

static int64_t give_back(struct reads *reads, int64_t result) {
  free(reads->requests);
  free(reads->pointers);
  free(reads);
  return result;
}

/* queue: receives the new queue. */
int64_t reads_open(int64_t depth, int64_t eventfd, struct reads **queue) {
  struct reads *reads = calloc(1, sizeof *reads);
  if (!reads) return -ENOMEM;
  reads->eventfd = (int)eventfd;
  reads->requests = calloc((size_t)depth, sizeof *reads->requests);
  reads->pointers = calloc((size_t)depth, sizeof *reads->pointers);
  if (!reads->requests || !reads->pointers) return give_back(reads, -ENOMEM);
  for (int64_t i = 0; i < depth; i++) reads->pointers[i] = reads->requests + i;
  if (syscall(SYS_io_setup, (unsigned)depth, &reads->context) < 0) return give_back(reads, -errno);
  *queue = reads;
  return 0;
}

/* Waits for the reads in flight. */
int64_t reads_close(struct reads *reads) {
  return give_back(reads, syscall(SYS_io_destroy, reads->context) < 0 ? -errno : 0);
}

/* Submits up to `depth` reads in order until the kernel refuses one: how many it took. refusal: why it
 * took no more; 0 where it took all. */
int64_t reads_submit(struct reads *reads, const struct read *wanted, int64_t count,
                     int64_t *refusal) {
  *refusal = 0;
  for (int64_t i = 0; i < count; i++)
    reads->requests[i] = (struct iocb){
        .aio_data = wanted[i].name,
        .aio_lio_opcode = IOCB_CMD_PREAD,
        .aio_fildes = (uint32_t)wanted[i].descriptor,
        .aio_buf = wanted[i].buffer,
        .aio_nbytes = wanted[i].length_bytes,
        .aio_offset = wanted[i].offset_bytes,
        .aio_flags = IOCB_FLAG_RESFD,
        .aio_resfd = (uint32_t)reads->eventfd,
    };
  int64_t taken = 0;
  while (taken < count) {
    long got = syscall(SYS_io_submit, reads->context, (long)(count - taken), reads->pointers + taken);
    if (got <= 0) {
      *refusal = got < 0 ? errno : EAGAIN;
      break;
    }
    taken += got;
  }
  return taken;
}

/* The next read that has ended: 1, or 0 where none has. Never waits. */
int64_t reads_event(struct reads *reads, struct event *event) {
  struct io_event ended;
  struct timespec at_once = {0, 0};
  long got = syscall(SYS_io_getevents, reads->context, 0L, 1L, &ended, &at_once);
  if (got < 0) return -errno;
  if (got == 1) *event = (struct event){ended.data, ended.res};
  return got;
}
