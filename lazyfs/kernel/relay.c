/* What the daemon gets and answers, and what it has not answered. */
#define _GNU_SOURCE
#include "keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define MADE_UP (UINT64_C(1) << 62) /* in the unique of a request that the kernel knows nothing of; bit 63 is
                                    * the kernel's (FUSE_UNIQUE_RESEND) */

/* linux/fuse.h since protocol 7.40; the headers of Debian 12 are older. */
struct open_out {
    uint64_t fh;
    uint32_t open_flags;
    int32_t backing_id;
};
enum { OPENED_PASSTHROUGH = 1 << 7 };

void keeper_reply(struct keeper *k, uint64_t unique, int error, const void *data, size_t length)
{
    struct fuse_out_header out = {.len = (uint32_t)(sizeof out + length), .error = error, .unique = unique};
    struct iovec parts[2] = {{&out, sizeof out}, {(void *)(uintptr_t)data, length}};

    /* It fails if the connection has ended, which is noticed elsewhere. */
    ssize_t ignored = writev(k->fuse_fd, parts, length ? 2 : 1);
    (void)ignored;
}

/* -- with the lock held, unless they say otherwise */

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
    struct request *request = requests_add(&k->requests, header, keeper_now_ns() / 1000000);

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

static void note_interrupt(struct keeper *k, struct request *request)
{
    uint64_t one = 1;

    request->interrupted = true;
    ssize_t ignored = write(k->interrupts_fd, &one, sizeof one);
    (void)ignored;
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
void keeper_forward(struct keeper *k, const struct fuse_in_header *header)
{
    struct request *request = NULL;
    bool no_memory = false;

    pthread_mutex_lock(&k->lock);
    take_done(k);
    if (header->opcode == FUSE_INTERRUPT) {
        const struct fuse_interrupt_in *in = (const void *)(header + 1);
        if (header->len < sizeof *header + sizeof *in)
            ;
        else if ((request = requests_find(&k->requests, in->unique)))
            note_interrupt(k, request);
        else
            requests_note_early(&k->requests, in->unique); /* its thread is later than this one */
    } else if (header->opcode != FUSE_FORGET && header->opcode != FUSE_BATCH_FORGET) {
        /* The daemon's inodes exist as long as they have a name or are open, so it forgets none. */
        request = push(k, header);
        no_memory = !request;
        if (request && requests_was_early(&k->requests, header->unique))
            note_interrupt(k, request);
    }
    pthread_mutex_unlock(&k->lock);
    if (no_memory)
        keeper_reply(k, header->unique, -ENOMEM, NULL, 0);
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
    sigset_t all, before; /* signals are for the thread that waits for them */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&k->relay_thread, NULL, hear, k); /* which sends what is unsent */
    pthread_sigmask(SIG_SETMASK, &before, NULL);
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

size_t keeper_unanswered(struct keeper *k, int64_t for_ms, struct unanswered *list, size_t room)
{
    int64_t now_ms = keeper_now_ns() / 1000000;
    size_t found = 0;

    pthread_mutex_lock(&k->lock);
    take_done(k);
    /* Reads last: there may be more of them than room, and somebody may wait for Ctrl-C. */
    for (int late = 0; late <= 1; late++)
        for (struct request *request = k->requests.first; request && found < room; request = request->after) {
            const struct fuse_in_header *header = header_of(request);
            const struct fuse_read_in *in = (const void *)(header + 1);
            bool reads = header->opcode == FUSE_READ && request->length >= sizeof *header + sizeof *in;
            if (request->abandoned || late != (reads && !request->interrupted))
                continue;
            if (request->interrupted || now_ms - request->since_ms >= for_ms)
                list[found++] = (struct unanswered){
                    .unique = request->unique,
                    .age_ms = now_ms - request->since_ms,
                    .opcode = header->opcode,
                    .pid = header->pid,
                    .direct = reads && in->flags & O_DIRECT,
                    .interrupted = request->interrupted,
                };
        }
    pthread_mutex_unlock(&k->lock);
    return found;
}

bool keeper_fail(struct keeper *k, uint64_t unique, int error)
{
    pthread_mutex_lock(&k->lock);
    take_done(k);
    struct request *request = requests_find(&k->requests, unique);
    bool ends = request && !request->abandoned;
    if (ends && changes_nothing(header_of(request)->opcode)) {
        drop(k, request);
        free(request);
    } else if (ends && header_of(request)->opcode == FUSE_OPEN)
        request->abandoned = true; /* the daemon may open it all the same */
    else
        ends = false;
    pthread_mutex_unlock(&k->lock);
    if (ends)
        keeper_reply(k, unique, -error, NULL, 0);
    return ends;
}

