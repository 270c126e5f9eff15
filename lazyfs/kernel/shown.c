/* The files whose present bytes the keeper may read: a table by inode, and the reads. */
#define _GNU_SOURCE
#include "keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MISSING, DATA, ZERO }; /* core/block_map.py; what is neither DATA nor ZERO is not here */

struct shown {
    struct shown *chained;
    struct showing is;
    const _Atomic unsigned char *map; /* NULL: everything is present */
    size_t map_length;
    unsigned users;     /* threads that hold it */
    unsigned answering; /* those of them that may still answer */
    bool withdrawn;
};

static size_t bucket_of(const struct shown_files *files, uint64_t inode)
{
    return (size_t)((inode * UINT64_C(0x9E3779B97F4A7C15)) >> 32) & (files->bucket_count - 1);
}

void shown_init(struct shown_files *files)
{
    *files = (struct shown_files){.bucket_count = 0};
    pthread_mutex_init(&files->lock, NULL);
    pthread_cond_init(&files->quiet, NULL);
}

static void destroy(struct shown *file)
{
    if (file->map)
        munmap((void *)(uintptr_t)file->map, file->map_length);
    if (file->is.map_fd >= 0)
        close(file->is.map_fd);
    if (file->is.fd >= 0)
        close(file->is.fd);
    free(file);
}

void shown_destroy(struct shown_files *files)
{
    for (size_t i = 0; i < files->bucket_count; i++)
        for (struct shown *file = files->buckets[i], *next; file; file = next) {
            next = file->chained;
            destroy(file);
        }
    free(files->buckets);
    pthread_mutex_destroy(&files->lock);
    pthread_cond_destroy(&files->quiet);
}

static int grow(struct shown_files *files)
{
    size_t count = files->bucket_count ? 2 * files->bucket_count : 64;
    struct shown **buckets = calloc(count, sizeof *buckets), **old = files->buckets;
    size_t old_count = files->bucket_count;

    if (!buckets)
        return ENOMEM;
    files->buckets = buckets;
    files->bucket_count = count;
    for (size_t i = 0; i < old_count; i++)
        for (struct shown *file = old[i], *next; file; file = next) {
            next = file->chained;
            size_t bucket = bucket_of(files, file->is.inode);
            file->chained = buckets[bucket];
            buckets[bucket] = file;
        }
    free(old);
    return 0;
}

/* Return the place that points to the file, or to the end of its chain; NULL without any buckets. */
static struct shown **place_of(struct shown_files *files, uint64_t inode)
{
    if (!files->bucket_count)
        return NULL;
    struct shown **place = &files->buckets[bucket_of(files, inode)];
    while (*place && (*place)->is.inode != inode)
        place = &(*place)->chained;
    return place;
}

/* With the lock held: take a file out of the table, and wait until nobody answers from it. */
static void withdraw(struct shown_files *files, struct shown **place)
{
    struct shown *file = *place;

    *place = file->chained;
    files->count--;
    file->withdrawn = true;
    file->users++; /* so that it stays while this waits */
    while (file->answering)
        pthread_cond_wait(&files->quiet, &files->lock);
    if (!--file->users)
        destroy(file);
}

int shown_show(struct shown_files *files, const struct showing *showing)
{
    struct shown *file = calloc(1, sizeof *file);
    int error = 0;

    if (!file)
        return ENOMEM;
    file->is = *showing;
    if (showing->block_shift > 40 || showing->data_size > INT64_MAX || showing->size > INT64_MAX
        || showing->data_offset > showing->size || showing->data_size > showing->size - showing->data_offset)
        error = EINVAL;
    if (!error && showing->map_fd >= 0) {
        uint64_t block = UINT64_C(1) << showing->block_shift;
        uint64_t blocks = showing->data_size / block + (showing->data_size % block ? 1 : 0);
        file->map_length = blocks ? (size_t)blocks : 1;
        off_t there = lseek(showing->map_fd, 0, SEEK_END);
        /* A page that a map does not have would end the keeper with SIGBUS. */
        void *map = there < 0 || (uint64_t)there < file->map_length
                        ? MAP_FAILED
                        : mmap(NULL, file->map_length, PROT_READ, MAP_SHARED, showing->map_fd, 0);
        if (map == MAP_FAILED)
            error = there < 0 ? errno : there < (off_t)file->map_length ? EINVAL : ENOMEM;
        else
            file->map = map;
    }
    if (error) {
        free(file);
        return error;
    }
    pthread_mutex_lock(&files->lock);
    if (files->count >= files->bucket_count && (error = grow(files)) && !files->bucket_count) {
        pthread_mutex_unlock(&files->lock);
        file->is.fd = file->is.map_fd = -1;
        destroy(file);
        return error;
    }
    struct shown **place = place_of(files, showing->inode);
    if (*place) {
        withdraw(files, place);
        place = place_of(files, showing->inode); /* others may have changed the chain meanwhile */
    }
    file->chained = *place;
    *place = file;
    files->count++;
    pthread_mutex_unlock(&files->lock);
    return 0;
}

bool shown_withdraw(struct shown_files *files, uint64_t inode)
{
    pthread_mutex_lock(&files->lock);
    struct shown **place = place_of(files, inode);
    bool found = place && *place;
    if (found)
        withdraw(files, place);
    pthread_mutex_unlock(&files->lock);
    return found;
}

struct shown *shown_answer(struct shown_files *files, uint64_t inode)
{
    pthread_mutex_lock(&files->lock);
    struct shown **place = place_of(files, inode), *file = place ? *place : NULL;
    if (file) {
        file->users++;
        file->answering++;
    }
    pthread_mutex_unlock(&files->lock);
    return file;
}

/* With the lock held. */
static void stop_answering(struct shown_files *files, struct shown *file)
{
    if (!--file->answering && file->withdrawn)
        pthread_cond_broadcast(&files->quiet);
}

void shown_pause(struct shown_files *files, struct shown *file)
{
    pthread_mutex_lock(&files->lock);
    stop_answering(files, file);
    pthread_mutex_unlock(&files->lock);
}

bool shown_resume(struct shown_files *files, struct shown *file)
{
    pthread_mutex_lock(&files->lock);
    bool shown = !file->withdrawn;
    if (shown)
        file->answering++;
    pthread_mutex_unlock(&files->lock);
    return shown;
}

void shown_done(struct shown_files *files, struct shown *file, bool answering)
{
    pthread_mutex_lock(&files->lock);
    if (answering)
        stop_answering(files, file);
    bool last = !--file->users && file->withdrawn;
    pthread_mutex_unlock(&files->lock);
    if (last)
        destroy(file);
}

size_t shown_clip(const struct shown *file, uint64_t offset, uint32_t size)
{
    const struct showing *is = &file->is;

    if (is->fd < 0 || offset >= is->size || offset < is->data_offset || size > MAX_READ)
        return 0;
    uint64_t length = size < is->size - offset ? size : is->size - offset;
    uint64_t start = offset - is->data_offset;
    if (start > is->data_size || length > is->data_size - start || !length)
        return 0;
    if (file->map)
        for (uint64_t block = start >> is->block_shift, last = (start + length - 1) >> is->block_shift; block <= last;
             block++) {
            /* With acquire: the bytes were written before the map said so. */
            unsigned char state = atomic_load_explicit(&file->map[block], memory_order_acquire);
            if (state != DATA && state != ZERO)
                return 0;
        }
    return (size_t)length;
}

bool shown_read_now(const struct shown *file, void *data, size_t length, uint64_t offset)
{
    struct iovec into = {data, length};

    return preadv2(file->is.fd, &into, 1, (off_t)offset, RWF_NOWAIT) == (ssize_t)length;
}

bool shown_read(const struct shown *file, void *data, size_t length, uint64_t offset)
{
    size_t done = 0;

    if (length < READ_AROUND)
        posix_fadvise(file->is.fd, (off_t)(offset & ~(uint64_t)(READ_AROUND - 1)), READ_AROUND, POSIX_FADV_WILLNEED);
    while (done < length) {
        ssize_t got = pread(file->is.fd, (char *)data + done, length - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return false; /* the daemon reads it again, and says what is wrong */
        done += (size_t)got;
    }
    return true;
}

int64_t shown_seek(const struct shown *file, uint64_t offset, int whence)
{
    const struct showing *is = &file->is;
    bool for_hole = whence == SEEK_HOLE;

    if (whence != SEEK_DATA && whence != SEEK_HOLE)
        return -EINVAL;
    if (offset >= is->size)
        return -ENXIO;
    if (!file->map && is->fd >= 0) {
        off_t found = lseek(is->fd, (off_t)offset, whence);
        return found < 0 ? -errno : found;
    }
    /* What lies before and behind the blocks is data: the metadata of a qcow2, and its padding. */
    uint64_t data_end = is->data_offset + (file->map ? is->data_size : 0), at = offset;
    if (at < is->data_offset) {
        if (!for_hole)
            return (int64_t)at;
        at = is->data_offset;
    }
    while (at < data_end) {
        uint64_t block = (at - is->data_offset) >> is->block_shift;
        bool hole = atomic_load_explicit(&file->map[block], memory_order_relaxed) == ZERO;
        if (hole == for_hole)
            return (int64_t)at;
        at = is->data_offset + ((block + 1) << is->block_shift);
        if (at > data_end)
            at = data_end;
    }
    if (for_hole)
        return (int64_t)is->size;
    return at < is->size ? (int64_t)at : -ENXIO;
}
