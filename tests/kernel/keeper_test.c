/*
 * Tests of the keeper's C code by itself, for the sanitizers. A socket of messages stands for
 * /dev/fuse, and another one for the daemon's; what is read and written is what the kernel would see.
 *
 * usage: keeper_test NAME [SEED SECONDS]
 */
#define _GNU_SOURCE
#include "keeper.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: not %s\n", __FILE__, __LINE__, #condition);     \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

enum { BLOCK = 65536, BLOCKS = 16, HEAD = 40, RELEASE_SIZE = 24, OPENED_BY_TEST = 1 << 7 };

struct open_answer {
    uint64_t fh;
    uint32_t open_flags;
    int32_t backing_id;
};

/* -- the rig */

static struct keeper keeper;
static struct counters *counters;
static struct done_ring *done;
static int kernel_end, daemon_end;

static void attach(void)
{
    int ends[2];

    CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends));
    daemon_end = ends[0];
    done = mmap(NULL, sizeof *done, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(done != MAP_FAILED);
    CHECK(!keeper_attach(&keeper, ends[1], done, "init", 4));
    char init[8];
    CHECK(recv(daemon_end, init, sizeof init, 0) == 4);
}

static void end_daemon(void)
{
    close(daemon_end);
    keeper_detach(&keeper);
    munmap(done, sizeof *done);
}

static void start(unsigned threads)
{
    int ends[2];

    CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends));
    kernel_end = ends[0];
    counters = calloc(1, sizeof *counters);
    CHECK(!keeper_start(&keeper, ends[1], eventfd(0, 0), eventfd(0, EFD_NONBLOCK), eventfd(0, EFD_NONBLOCK),
                        memfd_create("opened", 0), counters, threads));
    attach();
}

static void stop(void)
{
    shutdown(kernel_end, SHUT_WR);
    struct pollfd ended = {.fd = keeper.ended_fd, .events = POLLIN};
    CHECK(poll(&ended, 1, 10000) == 1);
    CHECK(atomic_load(&keeper.ended) == ENODEV);
    keeper_join(&keeper);
    end_daemon();
    for (struct request *request = keeper.requests.first, *after; request; request = after) {
        after = request->after;
        free(request);
    }
    free(keeper.requests.buckets);
    opened_unmap(&keeper.opened);
    shown_destroy(&keeper.files);
    free(counters);
    close(kernel_end);
}

static void ask(uint32_t opcode, uint64_t unique, uint64_t inode, const void *body, size_t length)
{
    struct {
        struct fuse_in_header header;
        char body[4096];
    } request = {.header = {.len = (uint32_t)(HEAD + length), .opcode = opcode, .unique = unique, .nodeid = inode}};

    if (length)
        memcpy(request.body, body, length);
    CHECK(send(kernel_end, &request, HEAD + length, 0) == (ssize_t)(HEAD + length));
}

static void ask_read(uint64_t unique, uint64_t inode, uint64_t offset, uint32_t size)
{
    struct fuse_read_in in = {.fh = inode, .offset = offset, .size = size};
    ask(FUSE_READ, unique, inode, &in, sizeof in);
}

/* What a signal does, and the supervisor, which finds that it is to end the wait. */
static void interrupt(uint64_t unique)
{
    struct fuse_interrupt_in in = {.unique = unique};
    ask(FUSE_INTERRUPT, unique | 1, 0, &in, sizeof in);
}

static void end_interrupted(uint64_t unique)
{
    struct pollfd polled = {.fd = keeper.interrupts_fd, .events = POLLIN};
    struct unanswered list[4];
    uint64_t times;
    CHECK(poll(&polled, 1, 10000) == 1 && read(keeper.interrupts_fd, &times, sizeof times) == sizeof times);
    CHECK(keeper_unanswered(&keeper, 100000, list, 4) == 1);
    CHECK(list[0].unique == unique && list[0].interrupted);
    keeper_fail(&keeper, unique, EINTR);
}

/* What the kernel is told next, with its body in `body`. */
static struct fuse_out_header told(void *body, size_t room)
{
    static char buffer[sizeof(struct fuse_out_header) + MAX_READ];
    struct pollfd polled = {.fd = kernel_end, .events = POLLIN};
    struct fuse_out_header out;

    CHECK(poll(&polled, 1, 10000) == 1);
    ssize_t got = recv(kernel_end, buffer, sizeof buffer, 0);
    CHECK(got >= (ssize_t)sizeof out);
    memcpy(&out, buffer, sizeof out);
    CHECK(out.len == got);
    size_t length = (size_t)got - sizeof out;
    if (room)
        memcpy(body, buffer + sizeof out, length < room ? length : room);
    return out;
}

static int told_error(uint64_t unique)
{
    struct fuse_out_header out = told(NULL, 0);
    CHECK(out.unique == unique);
    return out.error;
}

static void nobody_is_told(int fd)
{
    struct pollfd polled = {.fd = fd, .events = POLLIN};
    CHECK(poll(&polled, 1, 50) == 0);
}

/* What the daemon gets next. */
static struct fuse_in_header got(void)
{
    char buffer[8192];
    struct pollfd polled = {.fd = daemon_end, .events = POLLIN};
    struct fuse_in_header header;

    CHECK(poll(&polled, 1, 10000) == 1);
    CHECK(recv(daemon_end, buffer, sizeof buffer, 0) >= HEAD);
    memcpy(&header, buffer, sizeof header);
    return header;
}

static void answer(uint64_t unique, int error, const void *body, size_t length)
{
    char buffer[8192];
    struct fuse_out_header out = {.len = (uint32_t)(sizeof out + length), .error = error, .unique = unique};

    memcpy(buffer, &out, sizeof out);
    if (length)
        memcpy(buffer + sizeof out, body, length);
    CHECK(send(daemon_end, buffer, out.len, 0) == (ssize_t)out.len);
}

/* A file of BLOCKS blocks, each filled with its number plus `base`, and its map. */
static unsigned char *map_of(int *map_fd, int *fd, unsigned char base)
{
    static unsigned char block[BLOCK];

    *fd = memfd_create("data", 0);
    for (int i = 0; i < BLOCKS; i++) {
        memset(block, base + i, BLOCK);
        CHECK(write(*fd, block, BLOCK) == BLOCK);
    }
    *map_fd = memfd_create("map", 0);
    CHECK(!ftruncate(*map_fd, BLOCKS));
    unsigned char *map = mmap(NULL, BLOCKS, PROT_READ | PROT_WRITE, MAP_SHARED, *map_fd, 0);
    CHECK(map != MAP_FAILED);
    return map;
}

static unsigned char *show(uint64_t inode, unsigned char base)
{
    struct showing s = {.inode = inode, .size = BLOCKS * BLOCK, .data_size = BLOCKS * BLOCK, .block_shift = 16};
    unsigned char *map = map_of(&s.map_fd, &s.fd, base);
    CHECK(!shown_show(&keeper.files, &s));
    return map;
}

/* -- the tests */

static void reads_what_is_present(void)
{
    static unsigned char data[MAX_READ];
    start(2);
    unsigned char *map = show(7, 10);
    map[1] = 1, map[2] = 2, map[3] = 3;
    ask_read(2, 7, BLOCK + 100, BLOCK);
    struct fuse_out_header out = told(data, sizeof data);
    CHECK(out.unique == 2 && !out.error && out.len == sizeof out + BLOCK);
    CHECK(data[0] == 11 && data[BLOCK - 101] == 11 && data[BLOCK - 100] == 12);
    uint64_t missing[][2] = {{0, 1}, {2 * BLOCK, BLOCK + 1}, {3 * BLOCK, 1}, {BLOCKS * BLOCK, 4096}, {UINT64_MAX, 4096}};
    for (uint64_t i = 0; i < sizeof missing / sizeof *missing; i++) {
        ask_read(4 + 2 * i, 7, missing[i][0], (uint32_t)missing[i][1]);
        CHECK(got().unique == 4 + 2 * i);
    }
    ask_read(20, 8, BLOCK, 10);
    CHECK(got().unique == 20);
    CHECK(atomic_load(&counters->bytes) == BLOCK);
    map[BLOCKS - 1] = 1;
    ask_read(22, 7, BLOCKS * BLOCK - 10, 4096); /* cut at the end of the file */
    CHECK(told(data, sizeof data).len == sizeof out + 10);
    CHECK(shown_withdraw(&keeper.files, 7) && !shown_withdraw(&keeper.files, 7));
    ask_read(24, 7, BLOCK, 10);
    CHECK(got().unique == 24);
    munmap(map, BLOCKS);
    stop();
}

static void gives_the_rest_to_the_daemon(void)
{
    start(1);
    for (uint64_t unique = 2; unique <= 8; unique += 2)
        ask(FUSE_LOOKUP, unique, 1, "name", 5);
    for (uint64_t unique = 2; unique <= 8; unique += 2)
        CHECK(got().unique == unique);
    answer(6, 0, "entry", 5);
    CHECK(told_error(6) == 0);
    answer(6, 0, "again", 5);    /* late */
    answer(1, 0, "init", 4);     /* to the made-up INIT */
    answer(4, -ENOENT, NULL, 0);
    CHECK(told_error(4) == -ENOENT);
    ask(FUSE_FORGET, 10, 1, "12345678", 8);
    ask(FUSE_STATFS, 12, 1, NULL, 0);
    CHECK(got().unique == 12);
    struct unanswered list[4];
    CHECK(keeper_unanswered(&keeper, 0, list, 4) == 3);
    done->uniques[0] = 2, done->uniques[1] = 8;
    atomic_store(&done->tail, 2); /* the daemon has answered these at /dev/fuse */
    CHECK(keeper_unanswered(&keeper, 0, list, 4) == 1);
    stop();
}

static void a_second_daemon_goes_on(void)
{
    struct open_answer opened = {.fh = 5, .open_flags = OPENED_BY_TEST, .backing_id = 3};
    start(1);
    ask(FUSE_OPEN, 2, 5, "12345678", 8);
    ask_read(4, 5, 0, 100);
    ask(FUSE_OPEN, 6, 5, "12345678", 8);
    CHECK(got().unique == 2 && got().unique == 4 && got().unique == 6);
    answer(2, 0, &opened, sizeof opened);
    CHECK(told_error(2) == 0);
    end_daemon();
    ask(FUSE_STATFS, 8, 1, NULL, 0); /* while there is none */
    usleep(50000);
    struct opened table[4];
    CHECK(opened_list(&keeper.opened, table, 4) == 1);
    CHECK(table[0].inode == 5 && table[0].count == 1 && table[0].backing_id == 3);
    attach();
    CHECK(got().unique == 4 && got().unique == 6 && got().unique == 8);
    answer(6, 0, &opened, sizeof opened);
    CHECK(told_error(6) == 0);
    char release[RELEASE_SIZE] = {0};
    ask(FUSE_RELEASE, 10, 5, release, sizeof release);
    CHECK(got().unique == 10);
    end_daemon(); /* the RELEASE is not answered, so it counts as open */
    CHECK(opened_list(&keeper.opened, table, 4) == 1 && table[0].count == 2);
    attach();
    CHECK(got().unique == 4 && got().unique == 8 && got().unique == 10);
    answer(10, 0, NULL, 0);
    CHECK(told_error(10) == 0);
    end_daemon();
    CHECK(opened_list(&keeper.opened, table, 4) == 1 && table[0].count == 1);
    attach();
    stop();
}

static void interrupts_end_a_wait(void)
{
    struct open_answer opened = {.fh = 5};
    start(1);
    ask_read(2, 5, 0, 100);
    CHECK(got().unique == 2);
    interrupt(2);
    nobody_is_told(kernel_end); /* not every signal is to end it */
    end_interrupted(2);
    CHECK(told_error(2) == -EINTR);
    answer(2, 0, "late", 4);
    ask(FUSE_OPEN, 4, 5, "12345678", 8);
    CHECK(got().unique == 4);
    interrupt(4);
    end_interrupted(4);
    CHECK(told_error(4) == -EINTR);
    answer(4, 0, &opened, sizeof opened); /* it is open in the daemon now, and nobody wants it */
    struct fuse_in_header made_up = got();
    CHECK(made_up.opcode == FUSE_RELEASE && made_up.nodeid == 5);
    answer(made_up.unique, 0, NULL, 0);
    ask(FUSE_UNLINK, 6, 1, "name", 5); /* it may have been done, so it is waited for */
    CHECK(got().unique == 6);
    interrupt(6);
    end_interrupted(6);
    nobody_is_told(kernel_end);
    answer(6, -EROFS, NULL, 0);
    CHECK(told_error(6) == -EROFS);
    interrupt(8); /* before its request */
    ask_read(8, 5, 0, 100);
    CHECK(got().unique == 8);
    end_interrupted(8);
    CHECK(told_error(8) == -EINTR);
    CHECK(opened_list(&keeper.opened, NULL, 0) == 0);
    ask(FUSE_OPEN, 10, 5, "12345678", 8);
    CHECK(got().unique == 10);
    interrupt(10);
    end_interrupted(10);
    CHECK(told_error(10) == -EINTR);
    ask(FUSE_LOOKUP, 12, 1, "name", 5);
    CHECK(got().unique == 12);
    end_daemon();
    attach();
    CHECK(got().unique == 12); /* and not the OPEN, which nobody wants */
    nobody_is_told(daemon_end);
    CHECK(keeper_fail(&keeper, 12, EINTR) && !keeper_fail(&keeper, 12, EINTR));
    CHECK(told_error(12) == -EINTR);
    stop();
}

static void reads_that_wait_for_long_fail(void)
{
    start(1);
    ask_read(2, 5, 0, 100);
    ask(FUSE_LOOKUP, 4, 1, "name", 5);
    CHECK(got().unique == 2 && got().unique == 4);
    struct unanswered list[4];
    CHECK(keeper_unanswered(&keeper, 10000, list, 4) == 0);
    usleep(30000);
    CHECK(keeper_unanswered(&keeper, 10, list, 4) == 2);
    CHECK(list[0].unique == 4 && list[1].unique == 2 && list[1].opcode == FUSE_READ && list[1].age_ms >= 30);
    CHECK(keeper_unanswered(&keeper, 0, list, 1) == 1);
    CHECK(keeper_fail(&keeper, 2, EIO));
    CHECK(told_error(2) == -EIO);
    stop();
}

static void a_daemon_that_does_not_read_holds_nobody_up(void)
{
    enum { MANY = 20000 };
    start(2);
    unsigned char *map = show(7, 0);
    memset(map, 1, BLOCKS);
    for (uint64_t i = 1; i <= MANY; i++)
        ask_read(2 * i, 9, 0, 100); /* more than its socket takes */
    ask_read(2 * MANY + 2, 7, 0, 10);
    char data[10];
    CHECK(told(data, sizeof data).unique == 2 * MANY + 2);
    static unsigned char seen[MANY + 1];
    for (uint64_t i = 0; i < MANY; i++) {
        uint64_t unique = got().unique / 2;
        CHECK(unique >= 1 && unique <= MANY && !seen[unique]++);
        answer(2 * unique, 0, NULL, 0);
        CHECK(told_error(2 * unique) == 0);
    }
    munmap(map, BLOCKS);
    stop();
}

static void holes_are_found(void)
{
    start(1);
    struct showing s = {.inode = 7, .size = 100 + BLOCKS * BLOCK + 50, .data_offset = 100, .data_size = BLOCKS * BLOCK,
                        .block_shift = 16};
    unsigned char *map = map_of(&s.map_fd, &s.fd, 0);
    map[0] = 2, map[1] = 1, map[2] = 0, map[3] = 3, map[4] = 2;
    for (int i = 5; i < BLOCKS; i++)
        map[i] = 2;
    CHECK(!shown_show(&keeper.files, &s));
    int64_t end = 100 + BLOCKS * BLOCK, size = end + 50;
    struct {
        int64_t offset;
        int whence;
        int64_t found;
    } cases[] = {
        {0, SEEK_DATA, 0}, {0, SEEK_HOLE, 100}, {100, SEEK_DATA, 100 + BLOCK}, {200, SEEK_HOLE, 200},
        {100 + BLOCK, SEEK_DATA, 100 + BLOCK}, {100 + BLOCK, SEEK_HOLE, 100 + 4 * BLOCK},
        {100 + 2 * BLOCK + 9, SEEK_DATA, 100 + 2 * BLOCK + 9}, {100 + 4 * BLOCK, SEEK_DATA, end},
        {end, SEEK_DATA, end}, {end, SEEK_HOLE, size}, {size - 1, SEEK_DATA, size - 1}, {size, SEEK_DATA, -ENXIO},
        {size + 1, SEEK_HOLE, -ENXIO}, {0, SEEK_SET, -EINVAL},
    };
    for (uint64_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct fuse_lseek_in in = {.fh = 7, .offset = (uint64_t)cases[i].offset, .whence = (uint32_t)cases[i].whence};
        struct fuse_lseek_out found = {0};
        ask(FUSE_LSEEK, 2 + 2 * i, 7, &in, sizeof in);
        struct fuse_out_header out = told(&found, sizeof found);
        int64_t result = out.error ? out.error : (int64_t)found.offset;
        if (result != cases[i].found)
            fprintf(stderr, "case %ju: %jd\n", (uintmax_t)i, (intmax_t)result);
        CHECK(result == cases[i].found);
    }
    struct fuse_lseek_in in = {.fh = 8, .whence = SEEK_DATA};
    ask(FUSE_LSEEK, 100, 8, &in, sizeof in); /* a file that is not shown: never ENOSYS */
    CHECK(told_error(100) == -EINVAL);
    struct showing nothing = {.inode = 9, .size = 1000, .fd = -1, .map_fd = -1};
    CHECK(!shown_show(&keeper.files, &nothing));
    in = (struct fuse_lseek_in){.fh = 9, .offset = 10, .whence = SEEK_HOLE};
    struct fuse_lseek_out found;
    ask(FUSE_LSEEK, 102, 9, &in, sizeof in);
    CHECK(!told(&found, sizeof found).error && found.offset == 1000);
    munmap(map, BLOCKS);
    stop();
}

/* Readers never get a byte of a file after it was withdrawn, whatever else is shown meanwhile. */
static _Atomic bool ending;

static void *change_files(void *unused)
{
    (void)unused;
    while (!atomic_load(&ending))
        for (uint64_t inode = 1; inode <= 3; inode++) {
            unsigned char *map = show(inode, (unsigned char)(inode * 16));
            memset(map, 1, BLOCKS);
            munmap(map, BLOCKS);
            if (inode == 2)
                shown_withdraw(&keeper.files, inode);
        }
    return NULL;
}

static void files_change_under_readers(void)
{
    static unsigned char data[4 * BLOCK];
    pthread_t thread;
    start(4);
    CHECK(!pthread_create(&thread, NULL, change_files, NULL));
    int answered = 0;
    for (uint64_t i = 1; i <= 3000; i++) {
        uint64_t inode = 1 + i % 3;
        ask_read(2 * i, inode, (i % 12) * BLOCK, 4096);
        struct pollfd polled[2] = {{.fd = kernel_end, .events = POLLIN}, {.fd = daemon_end, .events = POLLIN}};
        CHECK(poll(polled, 2, 10000) > 0);
        if (polled[1].revents) {
            CHECK(got().unique == 2 * i);
            done->uniques[atomic_load(&done->tail) % DONE_RING] = 2 * i;
            atomic_fetch_add(&done->tail, 1);
            continue;
        }
        CHECK(told(data, sizeof data).unique == 2 * i && data[0] == inode * 16 + i % 12);
        answered++;
    }
    CHECK(answered > 100);
    atomic_store(&ending, true);
    pthread_join(thread, NULL);
    stop();
}

static void tables_grow(void)
{
    enum { MANY = 20000 };
    struct opened_table table, next;
    int fd = memfd_create("opened", 0);
    CHECK(!opened_map(&table, fd));
    for (uint64_t inode = 1; inode <= MANY; inode++)
        for (int i = 0; i < 2; i++)
            CHECK(!opened_add(&table, inode | (inode % 2) << 61, 0));
    for (uint64_t inode = MANY; inode; inode--) {
        opened_remove(&table, inode | (inode % 2) << 61);
        if (inode % 3)
            opened_remove(&table, inode | (inode % 2) << 61);
    }
    for (uint64_t inode = 1 << 20; inode < (1 << 20) + (1 << 19); inode++) { /* more than there are slots */
        CHECK(!opened_add(&table, inode, 0));
        opened_remove(&table, inode);
    }
    CHECK(!opened_map(&next, fd)); /* as another process does */
    struct opened *list = calloc(MANY, sizeof *list);
    CHECK(opened_list(&next, list, MANY) == MANY / 3);
    for (size_t i = 0; i < MANY / 3; i++)
        CHECK((list[i].inode & 0xffffff) % 3 == 0 && list[i].count == 1);
    free(list);
    opened_unmap(&table);
    opened_unmap(&next);
    close(fd);

    start(1);
    for (uint64_t inode = 1; inode <= MANY; inode++) {
        struct showing s = {.inode = inode, .size = inode, .fd = -1, .map_fd = -1};
        CHECK(!shown_show(&keeper.files, &s));
    }
    CHECK(keeper.files.count == MANY);
    for (uint64_t inode = 2; inode <= MANY; inode += 2)
        CHECK(shown_withdraw(&keeper.files, inode));
    CHECK(keeper.files.count == MANY / 2);
    stop();
}

/* -- any bytes, at both entrances */

static uint64_t dice_state;

static uint64_t dice(void)
{
    dice_state ^= dice_state << 13, dice_state ^= dice_state >> 7, dice_state ^= dice_state << 17;
    return dice_state;
}

static uint64_t odd_number(void)
{
    static const uint64_t odd[] = {0, 1, 7, 40, 4096, BLOCK, BLOCKS * BLOCK, 1u << 20, UINT32_MAX, INT64_MAX, UINT64_MAX};
    uint64_t number = odd[dice() % (sizeof odd / sizeof *odd)];
    return dice() % 3 ? number : dice() % 2 ? number - dice() % 9 : dice();
}

static void any_bytes(double seconds)
{
    static char data[MAX_READ], sink[sizeof(struct fuse_out_header) + MAX_READ];
    struct timespec now;
    start(1);
    clock_gettime(CLOCK_MONOTONIC, &now);
    double until = (double)now.tv_sec + seconds;
    uint64_t cases = 0;
    do {
        for (int i = 0; i < 1000; i++, cases++) {
            struct showing s = {.inode = dice() % 8, .size = odd_number(), .data_offset = odd_number(), .data_size = odd_number(),
                                .block_shift = (uint32_t)(dice() % 4 ? 16 : odd_number()), .fd = -1, .map_fd = -1};
            if (dice() % 4) {
                unsigned char *map = map_of(&s.map_fd, &s.fd, 0);
                for (int j = 0; j < BLOCKS; j++)
                    map[j] = (unsigned char)(dice() % 5);
                munmap(map, BLOCKS);
            }
            if (shown_show(&keeper.files, &s)) {
                close(s.fd);
                close(s.map_fd);
            }
            if (!(dice() % 4))
                shown_withdraw(&keeper.files, dice() % 8);
            for (int j = 0; j < 20; j++) {
                _Alignas(8) unsigned char bytes[256];
                for (size_t b = 0; b < sizeof bytes; b += 8) {
                    uint64_t number = odd_number();
                    memcpy(bytes + b, &number, 8);
                }
                size_t length = dice() % (sizeof bytes + 1);
                struct fuse_in_header *header = (void *)bytes;
                if (dice() % 8)
                    header->len = (uint32_t)length;
                static const uint32_t opcodes[] = {FUSE_READ, FUSE_READ, FUSE_LSEEK, FUSE_INTERRUPT, FUSE_OPEN, FUSE_RELEASE, FUSE_FORGET};
                if (dice() % 8)
                    header->opcode = opcodes[dice() % 7];
                header->unique = dice() % 64;
                struct fuse_read_in *in = (void *)(header + 1);
                if (dice() % 8)
                    in->fh = dice() % 8;
                keeper_take(&keeper, header, length, data);
            }
            for (int j = 0; j < 3; j++) { /* and what a daemon might say */
                char bytes[64];
                size_t length = dice() % sizeof bytes;
                for (size_t b = 0; b < length; b++)
                    bytes[b] = (char)dice();
                struct fuse_out_header *out = (void *)bytes;
                if (length >= sizeof *out)
                    *out = (struct fuse_out_header){.len = (uint32_t)length, .error = dice() % 2 ? 0 : -5, .unique = dice() % 64};
                send(daemon_end, bytes, length + !length, MSG_DONTWAIT);
            }
            atomic_store(&done->tail, dice() % 3 ? atomic_load(&done->tail) : odd_number());
            while (recv(kernel_end, sink, sizeof sink, MSG_DONTWAIT) > 0)
                ;
            while (recv(daemon_end, sink, sizeof sink, MSG_DONTWAIT) > 0)
                ;
        }
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((double)now.tv_sec < until);
    printf("%ju cases\n", (uintmax_t)cases);
    stop();
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {
        {"reads_what_is_present", reads_what_is_present},
        {"gives_the_rest_to_the_daemon", gives_the_rest_to_the_daemon},
        {"a_second_daemon_goes_on", a_second_daemon_goes_on},
        {"interrupts_end_a_wait", interrupts_end_a_wait},
        {"reads_that_wait_for_long_fail", reads_that_wait_for_long_fail},
        {"a_daemon_that_does_not_read_holds_nobody_up", a_daemon_that_does_not_read_holds_nobody_up},
        {"holes_are_found", holes_are_found},
        {"files_change_under_readers", files_change_under_readers},
        {"tables_grow", tables_grow},
    };
    if (argc == 4 && !strcmp(argv[1], "any_bytes")) {
        dice_state = strtoull(argv[2], NULL, 10) | 1;
        any_bytes(atof(argv[3]));
        return 0;
    }
    for (size_t i = 0; argc == 2 && i < sizeof tests / sizeof *tests; i++)
        if (!strcmp(argv[1], tests[i].name)) {
            tests[i].run();
            return 0;
        }
    fprintf(stderr, "there is no such test\n");
    return 2;
}
