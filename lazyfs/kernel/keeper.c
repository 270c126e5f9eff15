/* The threads that read /dev/fuse, and answer what is present. */
#define _GNU_SOURCE
#include "keeper.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* A read of what is present, for which no thread was left to wait for the disk. */
struct late_read {
    struct late_read *next;
    _Alignas(8) unsigned char bytes[sizeof(struct fuse_in_header) + sizeof(struct fuse_read_in)];
};

/* READ_BOUNDS_S of engine/totals.py. */
const uint64_t read_bounds_ns[TIME_BUCKETS - 1] = {
    25000,     50000,     100000,    250000,     500000,     1000000,    2500000,     5000000,     10000000,     25000000,     50000000,
    100000000, 250000000, 500000000, 1000000000, 2500000000, 5000000000, 10000000000, 30000000000, 60000000000, 120000000000,
};

int64_t keeper_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void count_read(struct counters *counters, uint64_t took_ns, size_t bytes)
{
    size_t bucket = 0;

    while (bucket < TIME_BUCKETS - 1 && took_ns > read_bounds_ns[bucket])
        bucket++;
    atomic_fetch_add_explicit(&counters->reads[bucket], 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&counters->time_ns, took_ns, memory_order_relaxed);
    atomic_fetch_add_explicit(&counters->bytes, bytes, memory_order_relaxed);
}

static void *work(void *argument);

/* With the pool's lock held. */
static int spawn(struct keeper *k)
{
    pthread_t thread;
    pthread_attr_t attributes;

    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 1 << 16);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    int error = pthread_create(&thread, &attributes, work, k);
    pthread_attr_destroy(&attributes);
    if (!error) {
        k->threads++;
        k->receiving++;
    }
    return error;
}

/* Return whether this thread may wait for the disk: another one receives requests meanwhile. */
static bool may_wait(struct keeper *k)
{
    pthread_mutex_lock(&k->pool_lock);
    /* The only thread, where there can be no other, must wait: nobody else would do it later. */
    bool may = k->receiving || (k->threads < MAX_THREADS && !spawn(k)) || k->threads == 1;
    pthread_mutex_unlock(&k->pool_lock);
    return may;
}

/* Leave a read to the next thread that has waited for the disk. */
static bool put_off(struct keeper *k, const struct fuse_in_header *header)
{
    struct late_read *late = malloc(sizeof *late);

    if (!late)
        return false;
    late->next = NULL;
    memcpy(late->bytes, header, sizeof late->bytes);
    ((struct fuse_in_header *)(void *)late->bytes)->len = sizeof late->bytes;
    pthread_mutex_lock(&k->pool_lock);
    *(k->late_last ? &k->late_last->next : &k->late_first) = late;
    k->late_last = late;
    pthread_mutex_unlock(&k->pool_lock);
    return true;
}

/* Answer a READ if all of it is present. Returns false if the daemon must. */
static bool read_present(struct keeper *k, const struct fuse_in_header *header, void *data, bool late)
{
    const struct fuse_read_in *in = (const void *)(header + 1);
    int64_t began = keeper_now_ns();
    struct shown *file = shown_answer(&k->files, in->fh);
    if (!file)
        return false;
    size_t length = shown_clip(file, in->offset, in->size);
    bool have = length && shown_read_now(file, data, length, in->offset), answering = true;
    if (length && !have) {
        shown_pause(&k->files, file);
        if (!late && !may_wait(k)) {
            shown_done(&k->files, file, false);
            return put_off(k, header);
        }
        have = shown_read(file, data, length, in->offset);
        answering = shown_resume(&k->files, file);
    }
    bool answered = have && answering;
    if (answered) {
        keeper_reply(k, header->unique, 0, data, length);
        count_read(k->counters, (uint64_t)(keeper_now_ns() - began), length);
    }
    shown_done(&k->files, file, answering);
    return answered;
}

static void seek(struct keeper *k, const struct fuse_in_header *header)
{
    const struct fuse_lseek_in *in = (const void *)(header + 1);
    struct shown *file = shown_answer(&k->files, in->fh);
    /* Not ENOSYS: the kernel would never ask again, for any file. Programs take this for a file
     * system that cannot tell. */
    int64_t found = -EINVAL;

    if (file) {
        shown_pause(&k->files, file);
        may_wait(k);
        found = shown_seek(file, in->offset, (int)in->whence);
        shown_done(&k->files, file, false);
    }
    struct fuse_lseek_out out = {.offset = found < 0 ? 0 : (uint64_t)found};
    if (found < 0)
        keeper_reply(k, header->unique, (int)found, NULL, 0);
    else
        keeper_reply(k, header->unique, 0, &out, sizeof out);
}

void keeper_take(struct keeper *k, struct fuse_in_header *header, size_t length, void *data)
{
    if (length < sizeof *header || header->len != length)
        return;
    size_t body = length - sizeof *header;
    if (header->opcode == FUSE_LSEEK && body >= sizeof(struct fuse_lseek_in))
        seek(k, header);
    else if (header->opcode != FUSE_READ || body < sizeof(struct fuse_read_in) || !read_present(k, header, data, false))
        keeper_forward(k, header);
}

static struct late_read *next_late(struct keeper *k)
{
    struct late_read *late = k->late_first;

    if (late) {
        k->late_first = late->next;
        if (!late->next)
            k->late_last = NULL;
    }
    return late;
}

/* Answer the reads that were put off, and return whether this thread is to receive again. */
static bool go_on(struct keeper *k, void *data)
{
    pthread_mutex_lock(&k->pool_lock);
    /* Not if nobody else receives: whoever comes here next does it, or this one later. */
    for (struct late_read *late; k->receiving && (late = next_late(k));) {
        pthread_mutex_unlock(&k->pool_lock);
        const struct fuse_in_header *header = (const void *)late->bytes;
        if (!read_present(k, header, data, true))
            keeper_forward(k, header);
        free(late);
        pthread_mutex_lock(&k->pool_lock);
    }
    bool receives = k->receiving < k->kept_threads;
    if (receives)
        k->receiving++;
    pthread_mutex_unlock(&k->pool_lock);
    return receives;
}

static void receive_no_more(struct keeper *k)
{
    pthread_mutex_lock(&k->pool_lock);
    k->receiving--;
    pthread_mutex_unlock(&k->pool_lock);
}

static void *work(void *argument)
{
    struct keeper *k = argument;
    void *request = malloc(MAX_REQUEST), *data = aligned_alloc(4096, MAX_READ);

    if (!request || !data)
        receive_no_more(k); /* another thread is there, or nothing is left to be done */
    else
        for (;;) {
            ssize_t got = read(k->fuse_fd, request, MAX_REQUEST);
            if (got < 0 && (errno == EINTR || errno == EAGAIN || errno == ENOENT))
                continue;
            int error = got < 0 ? errno : ENODEV; /* a test's socket ends with 0 */
            receive_no_more(k);
            if (got <= 0) {
                uint64_t one = 1;
                atomic_store(&k->ended, error);
                ssize_t ignored = write(k->ended_fd, &one, sizeof one);
                (void)ignored;
                break;
            }
            keeper_take(k, request, (size_t)got, data);
            if (!go_on(k, data))
                break;
        }
    free(request);
    free(data);
    pthread_mutex_lock(&k->pool_lock);
    if (!--k->threads)
        pthread_cond_broadcast(&k->pool_left);
    pthread_mutex_unlock(&k->pool_lock);
    return NULL;
}

int keeper_start(struct keeper *k, int fuse_fd, int ended_fd, int interrupts_fd, int wake_fd, int opened_fd,
                 struct counters *counters, unsigned threads)
{
    memset(k, 0, sizeof *k);
    int error = opened_map(&k->opened, opened_fd);
    if (error)
        return error;
    k->fuse_fd = fuse_fd;
    k->ended_fd = ended_fd;
    k->interrupts_fd = interrupts_fd;
    k->wake_fd = wake_fd;
    k->counters = counters;
    k->relay = -1;
    k->kept_threads = threads;
    shown_init(&k->files);
    pthread_mutex_init(&k->lock, NULL);
    pthread_mutex_init(&k->pool_lock, NULL);
    pthread_cond_init(&k->pool_left, NULL);
    /* Signals are for the thread that waits for them. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_mutex_lock(&k->pool_lock);
    for (unsigned i = 0; i < threads && !error; i++)
        error = spawn(k);
    bool none = !k->threads;
    pthread_mutex_unlock(&k->pool_lock);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return none ? error : 0;
}

void keeper_join(struct keeper *k)
{
    pthread_mutex_lock(&k->pool_lock);
    while (k->threads)
        pthread_cond_wait(&k->pool_left, &k->pool_lock);
    pthread_mutex_unlock(&k->pool_lock);
}
