/* The keeper for Python: one object, which its supervisor (lazyfs/keeper.py) owns. */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#include "keeper.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct {
    PyObject_HEAD
    struct keeper keeper;
    int ended_fd, interrupts_fd, wake_fd;
    bool started;
} Keeper;

static PyObject *failed(int error)
{
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static void *map_shared(int fd, size_t length)
{
    void *map = ftruncate(fd, (off_t)length) ? MAP_FAILED : mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    return map == MAP_FAILED ? NULL : map;
}

static int keeper_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    Keeper *self = (Keeper *)object;
    static char *names[] = {"fuse_fd", "counters_fd", "opened_fd", "threads", NULL};
    int fuse_fd, counters_fd, opened_fd;
    unsigned threads;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iiiI", names, &fuse_fd, &counters_fd, &opened_fd, &threads))
        return -1;
    /* What is mapped and opened here lives as long as the process. */
    struct counters *counters = map_shared(counters_fd, sizeof *counters);
    self->ended_fd = eventfd(0, EFD_CLOEXEC);
    self->interrupts_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    self->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int error = !counters || self->ended_fd < 0 || self->interrupts_fd < 0 || self->wake_fd < 0
                    ? errno
                    : keeper_start(&self->keeper, fuse_fd, self->ended_fd, self->interrupts_fd, self->wake_fd,
                                   opened_fd, counters, threads);
    if (error) {
        failed(error);
        return -1;
    }
    self->started = true;
    Py_INCREF(self); /* its threads use it, to the end of the process */
    return 0;
}

static PyObject *attach(PyObject *object, PyObject *args)
{
    struct keeper *k = &((Keeper *)object)->keeper;
    int relay, done_fd, error;
    Py_buffer init;

    if (!PyArg_ParseTuple(args, "iiy*", &relay, &done_fd, &init))
        return NULL;
    struct done_ring *done = map_shared(done_fd, sizeof *done);
    error = done ? keeper_attach(k, relay, done, init.buf, (size_t)init.len) : errno;
    if (error && done)
        munmap(done, sizeof *done);
    PyBuffer_Release(&init);
    if (error)
        return failed(error);
    Py_RETURN_NONE;
}

static PyObject *detach(PyObject *object, PyObject *unused)
{
    struct keeper *k = &((Keeper *)object)->keeper;
    struct done_ring *done = k->done;

    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    keeper_detach(k);
    Py_END_ALLOW_THREADS
    if (done)
        munmap(done, sizeof *done);
    Py_RETURN_NONE;
}

static PyObject *hang_up(PyObject *object, PyObject *unused)
{
    (void)unused;
    keeper_hang_up(&((Keeper *)object)->keeper);
    Py_RETURN_NONE;
}

static PyObject *show(PyObject *object, PyObject *args)
{
    struct showing s;
    unsigned long long inode, size, data_offset, data_size;
    unsigned block_shift;

    if (!PyArg_ParseTuple(args, "KKKKIii", &inode, &size, &data_offset, &data_size, &block_shift, &s.fd, &s.map_fd))
        return NULL;
    s.inode = inode;
    s.size = size;
    s.data_offset = data_offset;
    s.data_size = data_size;
    s.block_shift = block_shift;
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = shown_show(&((Keeper *)object)->keeper.files, &s);
    Py_END_ALLOW_THREADS
    if (error)
        return failed(error);
    Py_RETURN_NONE;
}

static PyObject *withdraw(PyObject *object, PyObject *args)
{
    unsigned long long inode;
    bool found;

    if (!PyArg_ParseTuple(args, "K", &inode))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    found = shown_withdraw(&((Keeper *)object)->keeper.files, inode);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(found);
}

static PyObject *opened(PyObject *object, PyObject *unused)
{
    struct keeper *k = &((Keeper *)object)->keeper;

    (void)unused;
    pthread_mutex_lock(&k->lock);
    size_t count = opened_list(&k->opened, NULL, 0);
    PyObject *list = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(count * sizeof(struct opened)));
    if (list)
        opened_list(&k->opened, (struct opened *)(void *)PyBytes_AS_STRING(list), count);
    pthread_mutex_unlock(&k->lock);
    return list;
}

static PyObject *unanswered(PyObject *object, PyObject *args)
{
    static struct unanswered list[4096]; /* with the interpreter's lock held */
    long long for_ms;

    if (!PyArg_ParseTuple(args, "L", &for_ms))
        return NULL;
    size_t count = keeper_unanswered(&((Keeper *)object)->keeper, for_ms, list, sizeof list / sizeof *list);
    return PyBytes_FromStringAndSize((const char *)list, (Py_ssize_t)(count * sizeof *list));
}

static PyObject *fail(PyObject *object, PyObject *args)
{
    unsigned long long unique;
    int error;

    if (!PyArg_ParseTuple(args, "Ki", &unique, &error))
        return NULL;
    return PyBool_FromLong(keeper_fail(&((Keeper *)object)->keeper, unique, error));
}

static PyObject *ended(PyObject *object, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLong(atomic_load(&((Keeper *)object)->keeper.ended));
}

static PyObject *fileno_of(PyObject *object, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLong(((Keeper *)object)->ended_fd);
}

static PyObject *interrupts_fd(PyObject *object, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLong(((Keeper *)object)->interrupts_fd);
}

static PyMethodDef methods[] = {
    {"attach", attach, METH_VARARGS, "attach(relay, done_fd, init): give a daemon what is unanswered. Takes relay."},
    {"detach", detach, METH_NOARGS, "detach(): the daemon has ended; wait for what it has answered."},
    {"hang_up", hang_up, METH_NOARGS, "hang_up(): tell the daemon that no request will come any more."},
    {"show", show, METH_VARARGS,
     "show(inode, size, data_offset, data_size, block_shift, fd, map_fd): answer reads. Takes both descriptors."},
    {"withdraw", withdraw, METH_VARARGS, "withdraw(inode) -> bool: answer no read from the file any more."},
    {"opened", opened, METH_NOARGS, "opened() -> bytes: (inode, count, backing id) of each, as struct '=Qii'."},
    {"unanswered", unanswered, METH_VARARGS,
     "unanswered(for_ms) -> bytes: an array of struct unanswered, of those that wait for so long or were interrupted."},
    {"fail", fail, METH_VARARGS, "fail(unique, errno) -> bool: end the wait for a request, if that may be."},
    {"ended", ended, METH_NOARGS, "ended() -> int: the errno with which the connection has ended, or 0."},
    {"interrupts_fd", interrupts_fd, METH_NOARGS, "interrupts_fd() -> int: an eventfd; somebody who waits has a signal."},
    {"fileno", fileno_of, METH_NOARGS, "fileno() -> int: readable once the connection has ended."},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject keeper_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "lazyfs.kernel._keeper.Keeper",
    .tp_basicsize = sizeof(Keeper),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "Keeper(fuse_fd, counters_fd, opened_fd, threads): answers what it can, and relays the rest.",
    .tp_new = PyType_GenericNew,
    .tp_init = keeper_init,
    .tp_methods = methods,
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "lazyfs.kernel._keeper",
    .m_doc = "The keeper's threads.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__keeper(void)
{
    PyObject *module = PyModule_Create(&definition);

    if (!module || PyModule_AddType(module, &keeper_type))
        return NULL;
    return module;
}
