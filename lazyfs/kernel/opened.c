/* How many have each inode open. The kernel knows it, but does not say; the next daemon must.
 *
 * The table lies in memory that outlives this process (memfd), for the next keeper. So each change is
 * a single store: an inode that nobody has open any more keeps its slot, until the table is full. */
#define _GNU_SOURCE
#include "keeper.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SLOTS = 1 << 17 }; /* 2 MiB: for 98,000 inodes that are open, each once or many times */

int opened_map(struct opened_table *table, int fd)
{
    size_t length = SLOTS * sizeof *table->slots;
    void *map = ftruncate(fd, (off_t)length) ? MAP_FAILED : mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    if (map == MAP_FAILED)
        return errno;
    *table = (struct opened_table){.slots = map};
    for (size_t i = 0; i < SLOTS; i++)
        table->used += table->slots[i].inode != 0;
    return 0;
}

void opened_unmap(struct opened_table *table)
{
    munmap(table->slots, SLOTS * sizeof *table->slots);
}

/* Return the slot of the inode, or the empty slot where it would be. There is always an empty one.
 * They are scattered: numbers that were given one after the other would make long runs. */
static struct opened *slot_of(const struct opened_table *table, uint64_t inode)
{
    size_t i = (size_t)((inode * UINT64_C(0x9E3779B97F4A7C15)) >> 47);

    while (table->slots[i].inode && table->slots[i].inode != inode)
        i = (i + 1) % SLOTS;
    return &table->slots[i];
}

static int tidy_up(struct opened_table *table)
{
    struct opened *open = malloc(SLOTS * sizeof *open);

    if (!open)
        return ENOMEM;
    size_t count = opened_list(table, open, SLOTS);
    memset(table->slots, 0, SLOTS * sizeof *table->slots);
    for (size_t i = 0; i < count; i++)
        *slot_of(table, open[i].inode) = open[i];
    table->used = count;
    free(open);
    return count < SLOTS / 4 * 3 ? 0 : ENOMEM;
}

int opened_add(struct opened_table *table, uint64_t inode, int32_t backing_id)
{
    struct opened *slot = slot_of(table, inode);

    if (!slot->inode) {
        if (table->used >= SLOTS / 4 * 3) {
            if (tidy_up(table))
                return ENOMEM;
            slot = slot_of(table, inode);
        }
        slot->count = 0;
        slot->inode = inode;
        table->used++;
    }
    slot->backing_id = backing_id;
    slot->count++;
    return 0;
}

void opened_remove(struct opened_table *table, uint64_t inode)
{
    struct opened *slot = slot_of(table, inode);

    if (slot->inode && slot->count > 0)
        slot->count--;
}

size_t opened_list(const struct opened_table *table, struct opened *list, size_t room)
{
    size_t found = 0;

    for (size_t i = 0; i < SLOTS; i++)
        if (table->slots[i].inode && table->slots[i].count > 0) {
            if (found < room)
                list[found] = table->slots[i];
            found++;
        }
    return found;
}
