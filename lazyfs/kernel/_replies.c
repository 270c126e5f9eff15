/*
 * What pyfuse3 and libfuse 3.14 cannot do for the daemon: it gets requests from the keeper and not
 * from /dev/fuse, gives some answers to one and some to the other, and answers an OPEN with a
 * backing id.
 *
 * It defines fuse_session_mount and fuse_reply_open. kernel/passthrough.py loads it with RTLD_GLOBAL
 * before pyfuse3, so the dynamic linker finds these first when it binds pyfuse3's calls. All other
 * functions are those of libfuse.
 *
 * pyfuse3 replies in the thread, and in the step of the event loop, in which the handler returns.
 * So a single slot is enough for the backing id. It is filled just before the return, and the reply
 * that has its file handle empties it.
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#define FUSE_USE_VERSION 35
#include <Python.h>
#include <fuse3/fuse_lowlevel.h>

#include "keeper.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>

enum {
    /* Answers of this length are given to the kernel without the keeper, which would have to copy
     * them. Those that it must know of, to an OPEN or a RELEASE, are shorter. */
    LONG = 4096,
    /* linux/fuse.h: the flags of an OPEN. Without NOFLUSH the first close of a mount waits for us,
     * only to learn that we have no FLUSH. */
    DIRECT_IO = 1 << 0,
    KEEP_CACHE = 1 << 1,
    NONSEEKABLE = 1 << 2,
    CACHE_DIR = 1 << 3,
    NOFLUSH = 1 << 5,
    PASSTHROUGH = 1 << 7,
};

/* linux/fuse.h: struct fuse_open_out since protocol 7.40. */
struct open_out {
    uint64_t fh;
    uint32_t open_flags;
    int32_t backing_id;
};

static uint64_t slot_fh;
static int32_t slot_backing_id; /* 0 if the slot is empty. Ids begin at 1. */

static int fuse_fd = -1;
static struct done_ring *done;

/* -- requests and replies */

static ssize_t receive(int fd, void *buffer, size_t room, void *unused)
{
    (void)unused;
    ssize_t got = recv(fd, buffer, room, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN)
        errno = EINTR; /* to pyfuse3 that is no error */
    if (!got || (got < 0 && errno != EINTR)) {
        errno = ENODEV; /* as /dev/fuse has it after an unmount */
        return -1;
    }
    return got;
}

static ssize_t send_to_keeper(int fd, struct iovec *parts, size_t count, size_t length)
{
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};

    while (sendmsg(fd, &message, MSG_NOSIGNAL) < 0) {
        struct pollfd full = {.fd = fd, .events = POLLOUT};
        if (errno == EAGAIN)
            poll(&full, 1, -1);
        else if (errno != EINTR) {
            errno = ENOENT; /* the keeper is gone: libfuse is silent about that */
            return -1;
        }
    }
    return (ssize_t)length;
}

static void note_done(int fd, uint64_t unique)
{
    uint64_t tail = atomic_load_explicit(&done->tail, memory_order_relaxed);

    if (tail - atomic_load_explicit(&done->head, memory_order_acquire) < DONE_RING) {
        done->uniques[tail % DONE_RING] = unique;
        atomic_store_explicit(&done->tail, tail + 1, memory_order_release);
        return;
    }
    /* Full. The kernel, which has its answer, ignores this one. */
    struct fuse_out_header out = {.len = sizeof out, .error = -EIO, .unique = unique};
    struct iovec part = {&out, sizeof out};
    send_to_keeper(fd, &part, 1, sizeof out);
}

static ssize_t reply(int fd, struct iovec *parts, int count, void *unused)
{
    const struct fuse_out_header *out = parts[0].iov_base;

    (void)unused;
    /* A notification, which may block, is not the keeper's either. */
    if (out->unique && out->len < LONG)
        return send_to_keeper(fd, parts, (size_t)count, out->len);
    ssize_t written = writev(fuse_fd, parts, count);
    int error = errno;
    if (out->unique)
        note_done(fd, out->unique);
    errno = error;
    return written;
}

__attribute__((visibility("default"))) int fuse_session_mount(struct fuse_session *session, const char *path)
{
    static const struct fuse_custom_io io = {.read = receive, .writev = reply};
    int fd = -1;

    return sscanf(path, "/dev/fd/%d", &fd) == 1 ? fuse_session_custom_io(session, &io, fd) : -1;
}

__attribute__((visibility("default"))) int fuse_reply_open(fuse_req_t request, const struct fuse_file_info *fi)
{
    struct open_out out = {.fh = fi->fh};

    if (slot_backing_id && slot_fh == fi->fh) {
        out.open_flags = PASSTHROUGH | NOFLUSH;
        out.backing_id = slot_backing_id;
        slot_backing_id = 0;
    } else {
        out.open_flags = (fi->direct_io ? DIRECT_IO : 0u) | (fi->keep_cache ? KEEP_CACHE : 0u)
                         | (fi->nonseekable ? NONSEEKABLE : 0u) | (fi->cache_readdir ? CACHE_DIR : 0u)
                         | (fi->noflush ? NOFLUSH : 0u);
    }
    return fuse_reply_buf(request, (const char *)&out, sizeof out);
}

/* -- for Python */

static PyObject *reply_with(PyObject *module, PyObject *args)
{
    unsigned long long fh;
    int backing_id;

    (void)module;
    if (!PyArg_ParseTuple(args, "Ki", &fh, &backing_id))
        return NULL;
    slot_fh = fh;
    slot_backing_id = backing_id;
    Py_RETURN_NONE;
}

static PyObject *connect_to(PyObject *module, PyObject *args)
{
    int done_fd, fd;

    (void)module;
    if (!PyArg_ParseTuple(args, "ii", &fd, &done_fd))
        return NULL;
    void *map = mmap(NULL, sizeof *done, PROT_READ | PROT_WRITE, MAP_SHARED, done_fd, 0);
    if (map == MAP_FAILED)
        return PyErr_SetFromErrno(PyExc_OSError);
    done = map;
    fuse_fd = fd;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"reply_with", reply_with, METH_VARARGS,
     "reply_with(fh, backing_id): let the next OPEN reply with this file handle be passthrough."},
    {"connect", connect_to, METH_VARARGS, "connect(fuse_fd, done_fd): before pyfuse3.init. Both stay open."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "lazyfs.kernel._replies",
    .m_doc = "How the daemon's requests and replies go.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__replies(void)
{
    return PyModule_Create(&definition);
}
