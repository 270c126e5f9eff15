/* How many have each inode open. The kernel knows it, but does not say; the next daemon must. */
#include "keeper.h"

#include <errno.h>
#include <stdlib.h>

static size_t home_of(const struct opened_table *table, uint64_t inode)
{
    return (size_t)((inode * UINT64_C(0x9E3779B97F4A7C15)) >> 32) & (table->slot_count - 1);
}

/* Return the slot of the inode, or the empty slot where it would be. There is always an empty one. */
static struct opened *slot_of(const struct opened_table *table, uint64_t inode)
{
    size_t i = home_of(table, inode);

    while (table->slots[i].inode && table->slots[i].inode != inode)
        i = (i + 1) & (table->slot_count - 1);
    return &table->slots[i];
}

static int grow(struct opened_table *table)
{
    struct opened_table larger = {.slot_count = table->slot_count ? 2 * table->slot_count : 64, .count = table->count};

    larger.slots = calloc(larger.slot_count, sizeof *larger.slots);
    if (!larger.slots)
        return ENOMEM;
    for (size_t i = 0; i < table->slot_count; i++)
        if (table->slots[i].inode)
            *slot_of(&larger, table->slots[i].inode) = table->slots[i];
    free(table->slots);
    *table = larger;
    return 0;
}

int opened_add(struct opened_table *table, uint64_t inode, int32_t backing_id)
{
    if (2 * (table->count + 1) > table->slot_count && grow(table))
        return ENOMEM;
    struct opened *slot = slot_of(table, inode);
    if (!slot->inode) {
        slot->inode = inode;
        slot->count = 0;
        table->count++;
    }
    slot->count++;
    slot->backing_id = backing_id;
    return 0;
}

void opened_remove(struct opened_table *table, uint64_t inode)
{
    if (!table->slot_count)
        return;
    struct opened *slot = slot_of(table, inode);
    if (!slot->inode || --slot->count)
        return;
    table->count--;
    /* Move up those behind it that an empty slot here would hide. */
    size_t mask = table->slot_count - 1, hole = (size_t)(slot - table->slots);
    for (size_t i = (hole + 1) & mask; table->slots[i].inode; i = (i + 1) & mask) {
        size_t home = home_of(table, table->slots[i].inode);
        if (((i - home) & mask) >= ((i - hole) & mask)) {
            table->slots[hole] = table->slots[i];
            hole = i;
        }
    }
    table->slots[hole].inode = 0;
}

size_t opened_list(const struct opened_table *table, struct opened *list, size_t room)
{
    size_t found = 0;

    for (size_t i = 0; i < table->slot_count && found < room; i++)
        if (table->slots[i].inode)
            list[found++] = table->slots[i];
    return table->count;
}
