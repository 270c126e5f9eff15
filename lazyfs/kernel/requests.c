/* The requests that no daemon has answered yet: a table by unique, and a list in their order. */
#include "keeper.h"

#include <stdlib.h>
#include <string.h>

static size_t bucket_of(const struct requests *all, uint64_t unique)
{
    return (size_t)(unique >> 1) & (all->bucket_count - 1); /* the kernel counts in twos */
}

static void grow(struct requests *all)
{
    size_t count = all->bucket_count ? 2 * all->bucket_count : 256;
    struct request **buckets = calloc(count, sizeof *buckets);

    if (!buckets)
        return; /* longer chains do, unless there are none at all */
    free(all->buckets);
    all->buckets = buckets;
    all->bucket_count = count;
    for (struct request *request = all->first; request; request = request->after) {
        size_t bucket = bucket_of(all, request->unique);
        request->chained = buckets[bucket];
        buckets[bucket] = request;
    }
}

struct request *requests_add(struct requests *all, const struct fuse_in_header *header, int64_t now_ms)
{
    if (all->count >= all->bucket_count)
        grow(all);
    struct request *request = all->bucket_count ? malloc(sizeof *request + header->len) : NULL;
    if (!request)
        return NULL;
    size_t bucket = bucket_of(all, header->unique);
    *request = (struct request){
        .chained = all->buckets[bucket],
        .before = all->last,
        .unique = header->unique,
        .since_ms = now_ms,
        .length = header->len,
    };
    memcpy(request->bytes, header, header->len);
    all->buckets[bucket] = request;
    if (all->last)
        all->last->after = request;
    else
        all->first = request;
    all->last = request;
    all->count++;
    return request;
}

struct request *requests_find(const struct requests *all, uint64_t unique)
{
    if (!all->bucket_count)
        return NULL;
    struct request *request = all->buckets[bucket_of(all, unique)];
    while (request && request->unique != unique)
        request = request->chained;
    return request;
}

void requests_remove(struct requests *all, struct request *request)
{
    struct request **place = &all->buckets[bucket_of(all, request->unique)];

    while (*place != request)
        place = &(*place)->chained;
    *place = request->chained;
    if (request->before)
        request->before->after = request->after;
    else
        all->first = request->after;
    if (request->after)
        request->after->before = request->before;
    else
        all->last = request->before;
    all->count--;
}

void requests_note_early(struct requests *all, uint64_t unique)
{
    all->early[all->next_early++ % (sizeof all->early / sizeof *all->early)] = unique;
}

bool requests_was_early(struct requests *all, uint64_t unique)
{
    for (size_t i = 0; i < sizeof all->early / sizeof *all->early; i++)
        if (all->early[i] == unique) {
            all->early[i] = 0;
            return true;
        }
    return false;
}
