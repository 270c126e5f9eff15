/*
 * The keeper's path of bytes: it owns /dev/fuse, answers reads of what is present, and gives every
 * other request to a daemon and, if that ends, to the next one.
 *
 *   shown.c       the files whose present bytes may be read here, and how
 *   opened.c      how many have each inode open, for the next daemon
 *   requests.c    requests that a daemon has got, or will get, and has not answered
 *   relay.c       what the daemon gets and answers
 *   keeper.c      the threads that read /dev/fuse
 *   _keeper.c     the same for Python
 *
 * All structures on the wire are those of <linux/fuse.h>. Nothing here knows of Python.
 */
#ifndef LAZYFS_KEEPER_H
#define LAZYFS_KEEPER_H

#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum {
    MAX_READ = 1 << 20,     /* what INIT allows: 256 pages */
    MAX_REQUEST = 1 << 17,  /* the longest request; nothing is ever written, so none comes near */
    MAX_THREADS = 64,       /* each may wait for the disk; 64 keep the fastest disks busy */
    READ_AROUND = 1 << 18,  /* as READ_AROUND of cache/store/cache_file.py, measured there */
    TIME_BUCKETS = 22,      /* the times of reads, by the bounds in `read_bounds_ns` */
    DONE_RING = 1 << 15,    /* answers that the daemon gave the kernel by itself: twice as many as
                               the kernel has reads under way */
};

/* -- shown.c */

/* What a daemon says of a file. Its bytes from `data_offset` on, `data_size` of them, lie in `fd` at
 * the same offsets; `map` has a byte for each block of them (core/block_map.py). */
struct showing {
    uint64_t inode;
    uint64_t size; /* of the whole file */
    uint64_t data_offset, data_size;
    uint32_t block_shift;
    int fd;     /* -1: nothing can be read here, and all is data */
    int map_fd; /* -1: everything is present */
};

struct shown;

struct shown_files {
    pthread_mutex_t lock;
    pthread_cond_t quiet; /* nobody is answering from a file that was withdrawn */
    struct shown **buckets;
    size_t bucket_count, count;
};

void shown_init(struct shown_files *files);
void shown_destroy(struct shown_files *files);
/* Take over both descriptors. A file that was shown under the same inode is withdrawn. Returns 0, or
 * an errno, and then the descriptors are the caller's. */
int shown_show(struct shown_files *files, const struct showing *showing);
/* When this returns, no read is answered from the file any more. Returns false if it is not shown. */
bool shown_withdraw(struct shown_files *files, uint64_t inode);

/* Find a file to answer from: it is not withdrawn before `shown_done`, or `shown_pause`. */
struct shown *shown_answer(struct shown_files *files, uint64_t inode);
/* Let it be withdrawn, while the disk is waited for; the file stays open. */
void shown_pause(struct shown_files *files, struct shown *file);
/* Go on to answer. Returns false if it was withdrawn: then only `shown_done` is left to be called. */
bool shown_resume(struct shown_files *files, struct shown *file);
void shown_done(struct shown_files *files, struct shown *file, bool answering);

/* Return how many bytes a read gets, or 0 if it is not for us: not present, or outside the data. */
size_t shown_clip(const struct shown *file, uint64_t offset, uint32_t size);
/* Read without waiting for a disk. Returns false if that does not give all `length` bytes. */
bool shown_read_now(const struct shown *file, void *data, size_t length, uint64_t offset);
bool shown_read(const struct shown *file, void *data, size_t length, uint64_t offset);
/* lseek(2) with SEEK_DATA or SEEK_HOLE. Returns the offset, or a negative errno. */
int64_t shown_seek(const struct shown *file, uint64_t offset, int whence);

/* -- opened.c; the caller holds a lock */

struct opened {
    uint64_t inode;
    int32_t count;
    int32_t backing_id; /* 0: none */
};

struct opened_table {
    struct opened *slots; /* open addressing; an inode of 0 is an empty slot */
    size_t used;
};

/* Lie in the memory of `fd`, which stays the caller's; what it has is taken over. */
int opened_map(struct opened_table *table, int fd);
void opened_unmap(struct opened_table *table);
int opened_add(struct opened_table *table, uint64_t inode, int32_t backing_id);
void opened_remove(struct opened_table *table, uint64_t inode);
/* Return how many there are; fill in at most `room` of them. */
size_t opened_list(const struct opened_table *table, struct opened *list, size_t room);

/* -- requests.c; the caller holds a lock */

struct request {
    struct request *chained;        /* in its bucket */
    struct request *before, *after; /* in the order in which they came */
    uint64_t unique;
    int64_t since_ms; /* CLOCK_MONOTONIC */
    bool sent;        /* the present daemon has got it */
    bool interrupted; /* its thread has a signal: keeper_unanswered lists it at once */
    bool abandoned;   /* an OPEN that was interrupted: if it succeeds, it is closed again */
    uint32_t length;
    _Alignas(8) unsigned char bytes[]; /* the request, from its header on */
};

struct requests {
    struct request **buckets;
    size_t bucket_count, count;
    struct request *first, *last;
    uint64_t early[64]; /* interrupted before they were put here; a ring */
    unsigned next_early;
};

static inline const struct fuse_in_header *header_of(const struct request *request)
{
    return (const struct fuse_in_header *)request->bytes;
}

/* Keep a copy of a request. Returns NULL without memory. */
struct request *requests_add(struct requests *all, const struct fuse_in_header *request, int64_t now_ms);
struct request *requests_find(const struct requests *all, uint64_t unique);
void requests_remove(struct requests *all, struct request *request); /* the caller frees it */
/* Note that an INTERRUPT came before its request. */
void requests_note_early(struct requests *all, uint64_t unique);
/* Return whether that happened to this one, and forget it. */
bool requests_was_early(struct requests *all, uint64_t unique);

/* -- keeper.c and relay.c */

/* Shared with the daemon, which only reads it. */
struct counters {
    _Atomic uint64_t reads[TIME_BUCKETS];
    _Atomic uint64_t time_ns, bytes;
};

extern const uint64_t read_bounds_ns[TIME_BUCKETS - 1];

/* Shared with one daemon: the uniques that it has answered at /dev/fuse by itself. */
struct done_ring {
    _Atomic uint64_t head; /* the keeper's */
    _Atomic uint64_t tail; /* the daemon's */
    uint64_t uniques[DONE_RING];
};

struct unanswered {
    uint64_t unique;
    int64_t age_ms;
    uint32_t opcode;
    uint32_t pid; /* of the thread, as the one who mounted sees it; 0: not to be seen */
    uint8_t direct; /* a READ of a file that was opened with O_DIRECT */
    uint8_t interrupted;
    uint8_t unused[6];
};

struct keeper {
    int fuse_fd;
    int ended_fd; /* an eventfd, written to when the kernel's connection has ended */
    _Atomic int ended; /* the errno with which it ended */
    struct shown_files files;
    struct counters *counters;

    pthread_mutex_t lock; /* what follows */
    struct requests requests;
    struct opened_table opened;
    int relay; /* the daemon's socket, or -1 */
    int interrupts_fd; /* an eventfd, written to when something was interrupted */
    int wake_fd; /* an eventfd: the relay's thread looks at `unsent` */
    struct request *unsent; /* the first that the daemon has not got, because its socket was full */
    struct done_ring *done;
    pthread_t relay_thread;
    bool relay_running;
    uint64_t made_up; /* how many requests were made up here */

    pthread_mutex_t pool_lock; /* what follows */
    pthread_cond_t pool_left;
    unsigned threads, receiving, kept_threads;
    struct late_read *late_first, *late_last; /* reads that wait for a thread */
};

/* Start to read `fuse_fd` with `threads` threads. The descriptors stay the caller's: `ended_fd`,
 * `interrupts_fd` and `wake_fd` are eventfds, and `counters` is mapped by it. `opened_fd` may have the
 * table of a keeper that has ended. Returns 0 or an errno. */
int keeper_start(struct keeper *keeper, int fuse_fd, int ended_fd, int interrupts_fd, int wake_fd, int opened_fd,
                 struct counters *counters, unsigned threads);
/* Give a daemon what is unanswered, after `init`, the made-up FUSE_INIT. Takes over `relay`. */
int keeper_attach(struct keeper *keeper, int relay, struct done_ring *done, const void *init, size_t length);
/* Take in what the daemon has answered, and wait for the next. `done` is not used any more. */
void keeper_detach(struct keeper *keeper);
/* Tell the daemon that no request will come any more; what it still answers is heard. */
void keeper_hang_up(struct keeper *keeper);
/* List what is unanswered for so long, or was interrupted, at most `room`; return how many. The
 * caller finds out what the signal is: programs do not expect that one that is harmless, such as a
 * timer's, ends an open(2). */
size_t keeper_unanswered(struct keeper *keeper, int64_t for_ms, struct unanswered *list, size_t room);
/* End the wait for a request with an error. Returns false if it may change something, so that its
 * answer must be waited for, or if there is no such request. */
bool keeper_fail(struct keeper *keeper, uint64_t unique, int error);
/* Wait for the threads to end, after the connection has. */
void keeper_join(struct keeper *keeper);

/* CLOCK_MONOTONIC. */
int64_t keeper_now_ns(void);
void keeper_reply(struct keeper *keeper, uint64_t unique, int error, const void *data, size_t length);
/* Give a request to the daemon, or to the next one. */
void keeper_forward(struct keeper *keeper, const struct fuse_in_header *request);
/* Do with one request what a thread does. For `data` there is room for MAX_READ bytes. */
void keeper_take(struct keeper *keeper, struct fuse_in_header *request, size_t length, void *data);

#endif
