/* Joins network namespaces by links with a delay and a rate of their own: a switch in user space,
 * because kernels of small virtual machines often lack netem.
 *
 * switch NAMESPACE ADDRESS ...: in each namespace (a file below /run/netns) makes a TUN device "box0"
 * and passes IPv4 packets between them by destination. Prints "ready". Then reads lines
 * "NUMBER DELAY_NS BYTES_PER_S IS_UP" from standard input, one a change of a box's link, answers each
 * with "done", and ends with standard input.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { MOST_BOXES = 32, MOST_PACKETS = 8192, PACKET_BYTES = 2048, MOST_QUEUED_NS = 200000000 };

typedef struct {
    int device, is_up;
    uint32_t address;
    int64_t delay_ns, bytes_per_s, up_free_ns, down_free_ns;
} Link;

typedef struct {
    int64_t due_ns;
    uint64_t number; /* packets that are due at once leave in the order they came */
    int to, size;
    unsigned char bytes[PACKET_BYTES];
} Packet;

static Link links[MOST_BOXES];
static int num_links;
static Packet packets[MOST_PACKETS], lost, *heap[MOST_PACKETS], *unused[MOST_PACKETS];
static int num_waiting, num_unused;
static uint64_t num_seen;

static void stop(const char *what) {
    perror(what);
    exit(1);
}

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static int64_t later(int64_t a, int64_t b) { return a > b ? a : b; }

static int is_before(const Packet *a, const Packet *b) {
    return a->due_ns != b->due_ns ? a->due_ns < b->due_ns : a->number < b->number;
}

static void push(Packet *packet) {
    int place = num_waiting++;
    for (; place && is_before(packet, heap[(place - 1) / 2]); place = (place - 1) / 2)
        heap[place] = heap[(place - 1) / 2];
    heap[place] = packet;
}

static Packet *pop(void) {
    Packet *first = heap[0], *last = heap[--num_waiting];
    int place = 0;
    for (;;) {
        int child = 2 * place + 1;
        if (child >= num_waiting) break;
        if (child + 1 < num_waiting && is_before(heap[child + 1], heap[child])) child++;
        if (!is_before(heap[child], last)) break;
        heap[place] = heap[child];
        place = child;
    }
    heap[place] = last;
    return first;
}

static int device_in(const char *name) {
    char path[256];
    int own = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    snprintf(path, sizeof path, "/run/netns/%s", name);
    int other = open(path, O_RDONLY | O_CLOEXEC);
    if (own < 0 || other < 0 || setns(other, CLONE_NEWNET)) stop(path);
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    strcpy(request.ifr_name, "box0");
    int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (device < 0 || ioctl(device, TUNSETIFF, &request)) stop("/dev/net/tun");
    if (setns(own, CLONE_NEWNET)) stop("own namespace");
    close(own);
    close(other);
    return device;
}

/* Whether a sender's or a receiver's buffer is full. */
static int is_full(int64_t free_ns, int64_t from_ns) { return free_ns - from_ns > MOST_QUEUED_NS; }

static int64_t sent_ns(const Link *link, int size) {
    return link->bytes_per_s ? size * 1000000000LL / link->bytes_per_s : 0;
}

static void forward(Link *from, Packet *packet) {
    uint32_t address;
    memcpy(&address, packet->bytes + 16, sizeof address);
    Link *to = links;
    while (to < links + num_links && to->address != address) to++;
    int64_t now = now_ns(), arrived_ns = later(now, from->up_free_ns) + from->delay_ns;
    if (to == links + num_links || !from->is_up || !to->is_up || is_full(from->up_free_ns, now)
        || is_full(to->down_free_ns, arrived_ns)) {
        unused[num_unused++] = packet;
        return;
    }
    from->up_free_ns = later(now, from->up_free_ns) + sent_ns(from, packet->size);
    arrived_ns = from->up_free_ns + from->delay_ns;
    to->down_free_ns = later(arrived_ns, to->down_free_ns) + sent_ns(to, packet->size);
    packet->due_ns = to->down_free_ns + to->delay_ns;
    packet->to = to - links;
    packet->number = num_seen++;
    push(packet);
}

static void receive(Link *from) {
    for (;;) {
        Packet *packet = num_unused ? unused[num_unused - 1] : &lost;
        packet->size = read(from->device, packet->bytes, PACKET_BYTES);
        if (packet->size < 0) return;
        if (!num_unused) continue;
        num_unused--;
        if (packet->size >= 20 && packet->bytes[0] >> 4 == 4)
            forward(from, packet);
        else
            unused[num_unused++] = packet;
    }
}

static void deliver(void) {
    while (num_waiting && heap[0]->due_ns <= now_ns()) {
        Packet *packet = pop();
        /* A link that went down meanwhile, or a full device, loses it. */
        if (links[packet->to].is_up && write(links[packet->to].device, packet->bytes, packet->size) < 0
            && errno != EAGAIN && errno != EIO)
            stop("deliver");
        unused[num_unused++] = packet;
    }
}

static void change(const char *line) {
    int number, is_up;
    long long delay_ns, bytes_per_s;
    if (sscanf(line, "%d %lld %lld %d", &number, &delay_ns, &bytes_per_s, &is_up) != 4 || number < 0
        || number >= num_links) {
        fprintf(stderr, "no such change: %s\n", line);
        exit(1);
    }
    links[number].delay_ns = delay_ns;
    links[number].bytes_per_s = bytes_per_s;
    links[number].is_up = is_up;
    puts("done");
    fflush(stdout);
}

int main(int count, char **words) {
    if (count < 3 || count % 2 == 0 || count / 2 > MOST_BOXES) return 2;
    prctl(PR_SET_PDEATHSIG, 9);
    prctl(PR_SET_TIMERSLACK, 1UL);
    struct sched_param first = {.sched_priority = 1}; /* a link does not wait for processors */
    if (sched_setscheduler(0, SCHED_FIFO, &first)) perror("links wait for processors");
    for (int n = 0; n < MOST_PACKETS; n++) unused[num_unused++] = &packets[n];
    struct pollfd polled[MOST_BOXES + 1];
    for (; num_links < count / 2; num_links++) {
        Link *link = &links[num_links];
        link->device = device_in(words[1 + 2 * num_links]);
        link->is_up = 1;
        if (inet_pton(AF_INET, words[2 + 2 * num_links], &link->address) != 1) return 2;
        polled[num_links] = (struct pollfd){.fd = link->device, .events = POLLIN};
    }
    polled[num_links] = (struct pollfd){.fd = STDIN_FILENO, .events = POLLIN};
    setvbuf(stdin, NULL, _IONBF, 0);
    puts("ready");
    fflush(stdout);
    for (;;) {
        int64_t wait_ns = num_waiting ? later(0, heap[0]->due_ns - now_ns()) : 0;
        struct timespec wait = {wait_ns / 1000000000LL, wait_ns % 1000000000LL};
        if (ppoll(polled, num_links + 1, num_waiting ? &wait : NULL, NULL) < 0 && errno != EINTR)
            stop("ppoll");
        deliver();
        for (int n = 0; n < num_links; n++)
            if (polled[n].revents & POLLIN) receive(&links[n]);
        if (polled[num_links].revents) {
            char line[128];
            if (!fgets(line, sizeof line, stdin)) return 0;
            change(line);
        }
    }
}
