/* The threads that read /dev/fuse, and the one that hears the daemon. */
#define _GNU_SOURCE
#include "keeper.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MADE_UP (UINT64_C(1) << 63) /* in the unique of a request that the kernel knows nothing of */

/* linux/fuse.h since protocol 7.40; the headers of Debian 12 are older. */
struct open_out {
    uint64_t fh;
    uint32_t open_flags;
    int32_t backing_id;
};
enum { OPENED_PASSTHROUGH = 1 << 7 };

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

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* -- answers */

static void reply(struct keeper *k, uint64_t unique, int error, const void *data, size_t length)
{
    struct fuse_out_header out = {.len = (uint32_t)(sizeof out + length), .error = error, .unique = unique};
    struct iovec parts[2] = {{&out, sizeof out}, {(void *)(uintptr_t)data, length}};

    /* It fails if the connection has ended, which is noticed elsewhere. */
    ssize_t ignored = writev(k->fuse_fd, parts, length ? 2 : 1);
    (void)ignored;
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

/* -- requests for the daemon; all with the lock held, unless they say otherwise */

static void drop(struct keeper *k, struct request *request)
{
    if (k->unsent == request)
        k->unsent = request->after;
    requests_remove(&k->requests, request);
}

/* Forget what the daemon has answered at /dev/fuse by itself. */
static void take_done(struct keeper *k)
{
    if (!k->done)
        return;
    uint64_t head = atomic_load_explicit(&k->done->head, memory_order_relaxed);
    uint64_t tail = atomic_load_explicit(&k->done->tail, memory_order_acquire);
    if (tail - head > DONE_RING)
        return; /* the daemon has written nonsense; what it has answered is then answered twice */
    for (; head != tail; head++) {
        struct request *request = requests_find(&k->requests, k->done->uniques[head % DONE_RING]);
        if (request) {
            drop(k, request);
            free(request);
        }
    }
    atomic_store_explicit(&k->done->head, head, memory_order_release);
}

/* Send what the daemon has not got, as far as its socket takes it. */
static void send_unsent(struct keeper *k)
{
    while (k->relay >= 0 && k->unsent) {
        struct request *request = k->unsent;
        if (send(k->relay, request->bytes, request->length, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
            if (errno == EINTR)
                continue;
            return; /* full; or the daemon has ended, and the next one gets it */
        }
        request->sent = true;
        k->unsent = request->after;
    }
}

/* Queue a request and send what can be sent. Returns NULL without memory. */
static struct request *push(struct keeper *k, const struct fuse_in_header *header)
{
    struct request *request = requests_add(&k->requests, header, now_ns() / 1000000);

    if (!request)
        return NULL;
    if (k->unsent)
        return request; /* behind others, and the relay's thread sends them all */
    k->unsent = request;
    send_unsent(k);
    if (k->unsent && k->relay >= 0) {
        uint64_t one = 1;
        ssize_t ignored = write(k->wake_fd, &one, sizeof one);
        (void)ignored;
    }
    return request;
}

static bool changes_nothing(uint32_t opcode)
{
    switch (opcode) {
    case FUSE_READ:
    case FUSE_LOOKUP:
    case FUSE_GETATTR:
    case FUSE_GETXATTR:
    case FUSE_LISTXATTR:
    case FUSE_STATFS:
    case FUSE_OPENDIR:
    case FUSE_READDIR:
    case FUSE_READDIRPLUS:
        return true;
    default:
        return false;
    }
}

/* Whoever waits for a request wants to go. Returns whether it is to be told so. */
static bool interrupt(struct keeper *k, uint64_t unique)
{
    struct request *request = requests_find(&k->requests, unique);

    if (!request) {
        requests_note_early(&k->requests, unique); /* two threads, and the other one is later */
        return false;
    }
    if (changes_nothing(header_of(request)->opcode)) {
        drop(k, request);
        free(request);
        return true;
    }
    if (header_of(request)->opcode != FUSE_OPEN || request->abandoned)
        return false;
    request->abandoned = true; /* the daemon may open it all the same */
    return true;
}

/* The daemon has opened what nobody has open: let it close that. */
static void release_again(struct keeper *k, uint64_t inode, uint64_t fh)
{
    struct {
        struct fuse_in_header header;
        struct fuse_release_in in;
    } made_up = {
        .header = {.len = sizeof made_up, .opcode = FUSE_RELEASE, .unique = MADE_UP | 2 * ++k->made_up, .nodeid = inode},
        .in = {.fh = fh},
    };

    push(k, &made_up.header);
}

/* Without the lock: give a request to the daemon. */
static void forward(struct keeper *k, const struct fuse_in_header *header)
{
    uint64_t told = 0;
    int error = 0;

    pthread_mutex_lock(&k->lock);
    take_done(k);
    if (header->opcode == FUSE_INTERRUPT) {
        const struct fuse_interrupt_in *in = (const void *)(header + 1);
        if (header->len >= sizeof *header + sizeof *in && interrupt(k, in->unique))
            told = in->unique, error = -EINTR;
    } else if (header->opcode != FUSE_FORGET && header->opcode != FUSE_BATCH_FORGET) {
        /* The daemon's inodes exist as long as they have a name or are open, so it forgets none. */
        if (requests_was_early(&k->requests, header->unique) && changes_nothing(header->opcode))
            told = header->unique, error = -EINTR;
        else if (!push(k, header))
            told = header->unique, error = -ENOMEM;
    }
    pthread_mutex_unlock(&k->lock);
    if (error)
        reply(k, told, error, NULL, 0);
}

/* Without the lock: pass on what the daemon has answered. */
static void answer(struct keeper *k, const struct fuse_out_header *out, size_t length)
{
    if (length < sizeof *out || out->len != length)
        return;
    pthread_mutex_lock(&k->lock);
    struct request *request = requests_find(&k->requests, out->unique);
    if (request)
        drop(k, request);
    pthread_mutex_unlock(&k->lock);
    if (!request)
        return; /* INIT, which the kernel knows nothing of; or it was interrupted, or is late */
    const struct fuse_in_header *header = header_of(request);
    bool wanted = !request->abandoned && !(request->unique & MADE_UP);
    bool taken = wanted && write(k->fuse_fd, out, length) >= 0;
    if (header->opcode == FUSE_OPEN && !out->error && length >= sizeof *out + sizeof(struct open_out)) {
        struct open_out opened;
        memcpy(&opened, out + 1, sizeof opened);
        pthread_mutex_lock(&k->lock);
        opened_add(&k->opened, header->nodeid, opened.open_flags & OPENED_PASSTHROUGH ? opened.backing_id : 0);
        if (!taken)
            release_again(k, header->nodeid, opened.fh);
        pthread_mutex_unlock(&k->lock);
    } else if (header->opcode == FUSE_RELEASE) {
        pthread_mutex_lock(&k->lock);
        opened_remove(&k->opened, header->nodeid);
        pthread_mutex_unlock(&k->lock);
    }
    free(request);
}

static void *hear(void *argument)
{
    struct keeper *k = argument;
    size_t room = sizeof(struct fuse_out_header) + MAX_READ;
    void *buffer = malloc(room);

    while (buffer) {
        pthread_mutex_lock(&k->lock);
        send_unsent(k);
        short events = k->unsent ? POLLIN | POLLOUT : POLLIN;
        pthread_mutex_unlock(&k->lock);
        struct pollfd polled[2] = {{.fd = k->relay, .events = events}, {.fd = k->wake_fd, .events = POLLIN}};
        if (poll(polled, 2, -1) < 0)
            continue;
        if (polled[1].revents) {
            uint64_t woken;
            ssize_t ignored = read(k->wake_fd, &woken, sizeof woken);
            (void)ignored;
        }
        ssize_t got;
        while ((got = recv(k->relay, buffer, room, MSG_DONTWAIT)) > 0)
            answer(k, buffer, (size_t)got);
        if (got == 0 || (errno != EAGAIN && errno != EINTR))
            break;
    }
    free(buffer);
    return NULL;
}

int keeper_attach(struct keeper *k, int relay, struct done_ring *done, const void *init, size_t length)
{
    if (send(relay, init, length, MSG_NOSIGNAL) < 0)
        return errno;
    pthread_mutex_lock(&k->lock);
    for (struct request *request = k->requests.first, *after; request; request = after) {
        after = request->after;
        request->sent = false;
        if (request->abandoned) { /* nobody waits for it, and no daemon has it open */
            requests_remove(&k->requests, request);
            free(request);
        }
    }
    k->relay = relay;
    k->done = done;
    k->unsent = k->requests.first;
    int error = pthread_create(&k->relay_thread, NULL, hear, k); /* which sends what is unsent */
    k->relay_running = !error;
    if (error)
        k->relay = -1, k->done = NULL;
    pthread_mutex_unlock(&k->lock);
    return error;
}

void keeper_detach(struct keeper *k)
{
    if (!k->relay_running)
        return;
    shutdown(k->relay, SHUT_RDWR); /* what has arrived is still received */
    pthread_join(k->relay_thread, NULL);
    pthread_mutex_lock(&k->lock);
    take_done(k);
    close(k->relay);
    k->relay = -1;
    k->done = NULL;
    k->unsent = NULL;
    k->relay_running = false;
    pthread_mutex_unlock(&k->lock);
}

void keeper_hang_up(struct keeper *k)
{
    pthread_mutex_lock(&k->lock);
    if (k->relay >= 0)
        shutdown(k->relay, SHUT_WR);
    pthread_mutex_unlock(&k->lock);
}

unsigned keeper_expire(struct keeper *k, int64_t timeout_ms)
{
    int64_t since_ms = now_ns() / 1000000 - timeout_ms;
    unsigned expired = 0;

    pthread_mutex_lock(&k->lock);
    take_done(k);
    for (struct request *request = k->requests.first, *after; request && request->since_ms <= since_ms; request = after) {
        after = request->after;
        if (header_of(request)->opcode != FUSE_READ)
            continue;
        drop(k, request);
        reply(k, request->unique, -EIO, NULL, 0);
        free(request);
        expired++;
    }
    pthread_mutex_unlock(&k->lock);
    return expired;
}

int64_t keeper_oldest(struct keeper *k, size_t *count)
{
    pthread_mutex_lock(&k->lock);
    take_done(k);
    *count = k->requests.count;
    int64_t oldest_ms = k->requests.first ? now_ns() / 1000000 - k->requests.first->since_ms : 0;
    pthread_mutex_unlock(&k->lock);
    return oldest_ms;
}

/* -- the threads that read /dev/fuse */

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
    bool may = k->receiving || (k->threads < MAX_THREADS && !spawn(k));
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
    int64_t began = now_ns();
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
        reply(k, header->unique, 0, data, length);
        count_read(k->counters, (uint64_t)(now_ns() - began), length);
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
        reply(k, header->unique, (int)found, NULL, 0);
    else
        reply(k, header->unique, 0, &out, sizeof out);
}

void keeper_take(struct keeper *k, struct fuse_in_header *header, size_t length, void *data)
{
    if (length < sizeof *header || header->len != length)
        return;
    size_t body = length - sizeof *header;
    if (header->opcode == FUSE_LSEEK && body >= sizeof(struct fuse_lseek_in))
        seek(k, header);
    else if (header->opcode != FUSE_READ || body < sizeof(struct fuse_read_in) || !read_present(k, header, data, false))
        forward(k, header);
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
    for (struct late_read *late; (late = next_late(k));) {
        pthread_mutex_unlock(&k->pool_lock);
        const struct fuse_in_header *header = (const void *)late->bytes;
        if (!read_present(k, header, data, true))
            forward(k, header);
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

int keeper_start(struct keeper *k, int fuse_fd, int ended_fd, int wake_fd, struct counters *counters, unsigned threads)
{
    memset(k, 0, sizeof *k);
    k->fuse_fd = fuse_fd;
    k->ended_fd = ended_fd;
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
    int error = 0;
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
