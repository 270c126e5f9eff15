/*
 * This module does the one thing that pyfuse3 and libfuse 3.14 cannot do: it answers an OPEN with
 * FOPEN_PASSTHROUGH and a backing id.
 *
 * It defines fuse_reply_open. lazyfs/kernel/passthrough.py loads it with RTLD_GLOBAL before
 * pyfuse3, so the dynamic linker finds this function first when it binds pyfuse3's call. All other
 * functions are those of libfuse.
 *
 * pyfuse3 replies in the thread, and in the step of the event loop, in which the handler returns.
 * So a single slot is enough. It is filled just before the return, and the reply that has its file
 * handle empties it.
 */
#define PY_SSIZE_T_CLEAN
#define FUSE_USE_VERSION 35
#include <Python.h>
#include <fuse3/fuse_lowlevel.h>
#include <stdint.h>

/* linux/fuse.h: struct fuse_open_out since protocol 7.40, and its flags */
struct open_out {
    uint64_t fh;
    uint32_t open_flags;
    int32_t backing_id;
};

enum {
    FOPEN_DIRECT_IO = 1 << 0,
    FOPEN_KEEP_CACHE = 1 << 1,
    FOPEN_NONSEEKABLE = 1 << 2,
    FOPEN_CACHE_DIR = 1 << 3,
    /* Without this the first close of a mount waits for us, only to learn that we have no FLUSH. */
    FOPEN_NOFLUSH = 1 << 5,
    FOPEN_PASSTHROUGH = 1 << 7,
};

static uint64_t slot_fh;
static int32_t slot_backing_id; /* 0 if the slot is empty. Ids begin at 1. */

__attribute__((visibility("default")))
int fuse_reply_open(fuse_req_t req, const struct fuse_file_info *fi)
{
    struct open_out out = {.fh = fi->fh};

    if (slot_backing_id && slot_fh == fi->fh) {
        out.open_flags = FOPEN_PASSTHROUGH | FOPEN_NOFLUSH;
        out.backing_id = slot_backing_id;
        slot_backing_id = 0;
    } else {
        out.open_flags = (fi->direct_io ? FOPEN_DIRECT_IO : 0) | (fi->keep_cache ? FOPEN_KEEP_CACHE : 0)
                         | (fi->nonseekable ? FOPEN_NONSEEKABLE : 0) | (fi->cache_readdir ? FOPEN_CACHE_DIR : 0)
                         | (fi->noflush ? FOPEN_NOFLUSH : 0);
    }
    return fuse_reply_buf(req, (const char *)&out, sizeof out);
}

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

static PyMethodDef methods[] = {
    {"reply_with", reply_with, METH_VARARGS,
     "reply_with(fh, backing_id): let the next OPEN reply with this file handle be passthrough."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "lazyfs.kernel._passthrough",
    .m_doc = "An OPEN reply with a backing id.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__passthrough(void)
{
    return PyModule_Create(&definition);
}
