/* Compiled versions of the measured hot spots: the system calls on file handles, stat(2), and the encoding of attributes.
 *
 * Each has a counterpart in pure Python that does the same: in handle.py, inlinenodes.py, syscalls.py, credentials.py and
 * protocol/. Nothing here keeps state. Numbers that are too large for a field of a struct wrap. Kernel structs are those of
 * name_to_handle_at(2) and include/uapi/linux/fuse.h.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/fuse.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#define BILLION 1000000000LL
#define MAX_HANDLE 128 /* include/linux/exportfs.h, MAX_HANDLE_SZ */

static PyObject *name_fd, *name_ino_mask; /* of attributes */

struct handle_buffer {
    struct file_handle head;
    unsigned char data[MAX_HANDLE];
};

/* -- Stat ------------------------------------------------------------------------------------------------------------ */

typedef struct {
    PyObject_HEAD
    unsigned long long dev, ino, rdev, nlink, blocks;
    long long size;
    struct timespec atime, mtime, ctime;
    unsigned int mode, uid, gid;
    long blksize;
} Stat;

static PyMemberDef stat_members[] = {
    {"st_dev", T_ULONGLONG, offsetof(Stat, dev), READONLY, NULL},
    {"st_ino", T_ULONGLONG, offsetof(Stat, ino), READONLY, NULL},
    {"st_rdev", T_ULONGLONG, offsetof(Stat, rdev), READONLY, NULL},
    {"st_nlink", T_ULONGLONG, offsetof(Stat, nlink), READONLY, NULL},
    {"st_blocks", T_ULONGLONG, offsetof(Stat, blocks), READONLY, NULL},
    {"st_size", T_LONGLONG, offsetof(Stat, size), READONLY, NULL},
    {"st_mode", T_UINT, offsetof(Stat, mode), READONLY, NULL},
    {"st_uid", T_UINT, offsetof(Stat, uid), READONLY, NULL},
    {"st_gid", T_UINT, offsetof(Stat, gid), READONLY, NULL},
    {"st_blksize", T_LONG, offsetof(Stat, blksize), READONLY, NULL},
    {NULL},
};

/* The time at the offset `closure` in nanoseconds: from the year 2262 on they do not fit 64 bits. */
static PyObject *stat_time_ns(PyObject *self, void *closure)
{
    const struct timespec *time = (const struct timespec *)((const char *)self + (size_t)closure);
    long long sum;
    PyObject *seconds, *unit, *product, *rest, *result = NULL;
    if (!__builtin_mul_overflow((long long)time->tv_sec, BILLION, &sum) &&
        !__builtin_add_overflow(sum, (long long)time->tv_nsec, &sum))
        return PyLong_FromLongLong(sum);
    seconds = PyLong_FromLongLong(time->tv_sec);
    unit = PyLong_FromLongLong(BILLION);
    product = seconds && unit ? PyNumber_Multiply(seconds, unit) : NULL;
    rest = PyLong_FromLong(time->tv_nsec);
    if (product && rest)
        result = PyNumber_Add(product, rest);
    Py_XDECREF(seconds);
    Py_XDECREF(unit);
    Py_XDECREF(product);
    Py_XDECREF(rest);
    return result;
}

static PyGetSetDef stat_times[] = {
    {"st_atime_ns", stat_time_ns, NULL, NULL, (void *)offsetof(Stat, atime)},
    {"st_mtime_ns", stat_time_ns, NULL, NULL, (void *)offsetof(Stat, mtime)},
    {"st_ctime_ns", stat_time_ns, NULL, NULL, (void *)offsetof(Stat, ctime)},
    {NULL},
};

static int same_time(struct timespec a, struct timespec b) { return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec; }

static PyTypeObject StatType;

static PyObject *stat_compare(PyObject *left, PyObject *right, int operator)
{
    const Stat *a = (const Stat *)left, *b = (const Stat *)right;
    int same;
    if (!Py_IS_TYPE(right, &StatType) || (operator != Py_EQ && operator != Py_NE))
        Py_RETURN_NOTIMPLEMENTED;
    same = a->dev == b->dev && a->ino == b->ino && a->rdev == b->rdev && a->nlink == b->nlink &&
           a->blocks == b->blocks && a->size == b->size && same_time(a->atime, b->atime) &&
           same_time(a->mtime, b->mtime) && same_time(a->ctime, b->ctime) && a->mode == b->mode && a->uid == b->uid &&
           a->gid == b->gid && a->blksize == b->blksize;
    return PyBool_FromLong(same == (operator == Py_EQ));
}

static PyTypeObject StatType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "handlefs._native.Stat",
    .tp_doc = "The attributes of an inode, named as those of os.stat_result; times are nanoseconds since the epoch.",
    .tp_basicsize = sizeof(Stat),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_members = stat_members,
    .tp_getset = stat_times,
    .tp_richcompare = stat_compare,
};

static void set_stat(Stat *self, const struct stat *from)
{
    self->dev = from->st_dev;
    self->ino = from->st_ino;
    self->rdev = from->st_rdev;
    self->nlink = from->st_nlink;
    self->blocks = from->st_blocks;
    self->size = from->st_size;
    self->atime = from->st_atim;
    self->mtime = from->st_mtim;
    self->ctime = from->st_ctim;
    self->mode = from->st_mode;
    self->uid = from->st_uid;
    self->gid = from->st_gid;
    self->blksize = from->st_blksize;
}

static PyObject *new_stat(const struct stat *from)
{
    Stat *self = PyObject_New(Stat, &StatType);
    if (self != NULL)
        set_stat(self, from);
    return (PyObject *)self;
}

/* Runs the system call without the GIL; yields its result, with errno as it left it. */
#define SYSTEM_CALL(result, call)                                                                                      \
    do {                                                                                                               \
        Py_BEGIN_ALLOW_THREADS result = (call);                                                                        \
        Py_END_ALLOW_THREADS                                                                                           \
    } while (0)

static PyObject *native_fstat(PyObject *module, PyObject *argument)
{
    struct stat found;
    int fd, result;
    if (!PyArg_Parse(argument, "i", &fd))
        return NULL;
    SYSTEM_CALL(result, fstat(fd, &found));
    return result < 0 ? PyErr_SetFromErrno(PyExc_OSError) : new_stat(&found);
}

/* OSError for errno, with the file name as bytes. */
static PyObject *error_about(const char *name)
{
    int number = errno; /* PyBytes_FromString may change it */
    PyObject *filename = PyBytes_FromString(name);
    errno = number;
    if (filename != NULL) {
        PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, filename);
        Py_DECREF(filename);
    }
    return NULL;
}

/* -- file handles ---------------------------------------------------------------------------------------------------- */

static PyObject *native_name_to_handle_at(PyObject *module, PyObject *args)
{
    int directory, flags, mount_id, result;
    const char *name;
    struct handle_buffer handle = {.head.handle_bytes = MAX_HANDLE};
    if (!PyArg_ParseTuple(args, "iyi", &directory, &name, &flags))
        return NULL;
    SYSTEM_CALL(result, name_to_handle_at(directory, name, &handle.head, &mount_id, flags));
    if (result < 0)
        return error_about(name);
    return Py_BuildValue("iy#i", handle.head.handle_type, handle.data, (Py_ssize_t)handle.head.handle_bytes, mount_id);
}

static PyObject *native_open_by_handle_at(PyObject *module, PyObject *args)
{
    int mount_fd, type, flags, fd;
    Py_buffer data;
    struct handle_buffer handle;
    if (!PyArg_ParseTuple(args, "iiy*i", &mount_fd, &type, &data, &flags))
        return NULL;
    if (data.len > MAX_HANDLE) {
        PyBuffer_Release(&data);
        errno = EINVAL;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    handle.head.handle_bytes = data.len;
    handle.head.handle_type = type;
    memcpy(handle.data, data.buf, data.len);
    PyBuffer_Release(&data);
    SYSTEM_CALL(fd, open_by_handle_at(mount_fd, &handle.head, flags | O_CLOEXEC));
    return fd < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(fd);
}

static PyObject *native_look(PyObject *module, PyObject *args)
{
    int directory, mount_id, result;
    const char *name;
    struct handle_buffer handle = {.head.handle_bytes = MAX_HANDLE};
    struct stat found;
    if (!PyArg_ParseTuple(args, "iy", &directory, &name))
        return NULL;
    SYSTEM_CALL(result, name_to_handle_at(directory, name, &handle.head, &mount_id, 0) ||
                            fstatat(directory, name, &found, AT_SYMLINK_NOFOLLOW));
    if (result && errno == ENOENT)
        Py_RETURN_NONE;
    if (result)
        return error_about(name);
    return Py_BuildValue("iy#iN", handle.head.handle_type, handle.data, (Py_ssize_t)handle.head.handle_bytes, mount_id,
                         new_stat(&found));
}

/* The node ID in an inline handle of `size` bytes: u32 or u64 inode, u32 generation. 0 if it is none (nodeid.py), and on
 * big-endian machines for the smaller one, whose nodes are then found the other way. */
static uint64_t inline_nodeid(const unsigned char *data, unsigned int size)
{
    uint64_t ino = 0;
    uint32_t generation;
    memcpy(&ino, data, size - sizeof generation);
    memcpy(&generation, data + size - sizeof generation, sizeof generation);
    return ino < 1ULL << 31 ? ino << 32 | generation : 0;
}

/* What an object must be like to have an inline node ID; the rule and its reasons are in inlinenodes.py. */
struct inline_rule {
    int mount_id, type;
    unsigned int size;
    unsigned long long device, root_ino;
    long just_now;          /* nanoseconds */
    struct timespec before; /* what has changed since then has changed just now */
};

enum finding { ELSEWHERE, ABSENT, FOUND };

/* Whether the handle and the attributes are of one object that `rule` holds for; its node ID then. */
static int is_inline(const struct handle_buffer *handle, int mount_id, const struct stat *found,
                     const struct inline_rule *rule, uint64_t *nodeid)
{
    if (mount_id != rule->mount_id || handle->head.handle_type != rule->type || handle->head.handle_bytes != rule->size)
        return 0;
    *nodeid = inline_nodeid(handle->data, rule->size);
    return *nodeid >> 32 == found->st_ino && found->st_ino != rule->root_ino && found->st_dev == rule->device;
}

/* Looks at `name` while a descriptor pins what it stands for. */
static enum finding look_pinned(int directory, const char *name, const struct inline_rule *rule, uint64_t *nodeid,
                                struct stat *found)
{
    struct handle_buffer handle = {.head.handle_bytes = MAX_HANDLE};
    int mount_id, result, fd = openat(directory, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT ? ABSENT : ELSEWHERE;
    result = name_to_handle_at(fd, "", &handle.head, &mount_id, AT_EMPTY_PATH) || fstat(fd, found);
    close(fd);
    return !result && is_inline(&handle, mount_id, found, rule, nodeid) ? FOUND : ELSEWHERE;
}

/* Whether the time proves that the inode has not been another one since `rule->before`. */
static int is_older(struct timespec changed, const struct inline_rule *rule)
{
    return changed.tv_nsec != 0 &&
           (changed.tv_sec < rule->before.tv_sec ||
            (changed.tv_sec == rule->before.tv_sec && changed.tv_nsec < rule->before.tv_nsec));
}

static enum finding look_by_name(int directory, const char *name, const struct inline_rule *rule, uint64_t *nodeid,
                                 struct stat *found)
{
    struct handle_buffer handle = {.head.handle_bytes = MAX_HANDLE};
    int mount_id;
    if (name_to_handle_at(directory, name, &handle.head, &mount_id, 0))
        return errno == ENOENT ? ABSENT : ELSEWHERE;
    if (mount_id != rule->mount_id)
        return ELSEWHERE;
    if (fstatat(directory, name, found, AT_SYMLINK_NOFOLLOW))
        return errno == ENOENT ? ABSENT : ELSEWHERE;
    if (is_inline(&handle, mount_id, found, rule, nodeid) && is_older(found->st_ctim, rule))
        return FOUND;
    return look_pinned(directory, name, rule, nodeid, found);
}

static enum finding look_inline(int directory, const char *name, const struct inline_rule *rule, uint64_t *nodeid,
                                struct stat *found)
{
    enum finding finding;
    SYSTEM_CALL(finding, look_by_name(directory, name, rule, nodeid, found));
    return finding;
}

static PyObject *find_inline(int directory, PyObject *name, const struct inline_rule *rule)
{
    char *text;
    uint64_t nodeid;
    struct stat found;
    if (PyBytes_AsStringAndSize(name, &text, NULL) < 0)
        return NULL;
    switch (look_inline(directory, text, rule, &nodeid, &found)) {
    case FOUND:
        return Py_BuildValue("KN", (unsigned long long)nodeid, new_stat(&found));
    case ABSENT:
        Py_RETURN_FALSE;
    default:
        Py_RETURN_NONE;
    }
}

static void begin_looking(struct inline_rule *rule)
{
    clock_gettime(CLOCK_REALTIME, &rule->before);
    rule->before.tv_nsec -= rule->just_now;
    if (rule->before.tv_nsec < 0) {
        rule->before.tv_nsec += BILLION;
        rule->before.tv_sec--;
    }
}

/* Takes an InlineRule of inlinenodes.py apart. */
static int parse_rule(PyObject *fields, struct inline_rule *rule)
{
    if (!PyArg_ParseTuple(fields, "iiIKKl", &rule->mount_id, &rule->type, &rule->size, &rule->device, &rule->root_ino,
                          &rule->just_now))
        return 0;
    if (rule->size == 8 || rule->size == 12)
        return 1;
    PyErr_SetString(PyExc_ValueError, "not the size of an inline handle");
    return 0;
}

static PyObject *native_find_inline(PyObject *module, PyObject *args)
{
    int directory;
    struct inline_rule rule;
    PyObject *names, *fields, *result;
    if (!PyArg_ParseTuple(args, "iO!O!", &directory, &PyList_Type, &names, &PyTuple_Type, &fields) ||
        !parse_rule(fields, &rule))
        return NULL;
    begin_looking(&rule);
    result = PyList_New(0);
    for (Py_ssize_t index = 0; result != NULL && index < PyList_GET_SIZE(names); index++) {
        PyObject *name = Py_NewRef(PyList_GET_ITEM(names, index)); /* another thread may change the list meanwhile */
        PyObject *item = find_inline(directory, name, &rule);
        Py_DECREF(name);
        if (item == NULL || PyList_Append(result, item) < 0)
            Py_CLEAR(result);
        Py_XDECREF(item);
    }
    return result;
}

static PyObject *native_inline_of(PyObject *module, PyObject *args)
{
    struct handle_buffer handle = {.head.handle_bytes = MAX_HANDLE};
    struct inline_rule rule;
    struct stat found;
    uint64_t nodeid;
    int fd, mount_id, result;
    PyObject *fields;
    if (!PyArg_ParseTuple(args, "iO!", &fd, &PyTuple_Type, &fields) || !parse_rule(fields, &rule))
        return NULL;
    SYSTEM_CALL(result, name_to_handle_at(fd, "", &handle.head, &mount_id, AT_EMPTY_PATH) || fstat(fd, &found));
    if (result)
        return PyErr_SetFromErrno(PyExc_OSError);
    if (!is_inline(&handle, mount_id, &found, &rule, &nodeid))
        Py_RETURN_NONE;
    return Py_BuildValue("KN", (unsigned long long)nodeid, new_stat(&found));
}

/* -- the wire format ------------------------------------------------------------------------------------------------- */

static void fill_attr(struct fuse_attr *attr, uint64_t ino, const Stat *stat)
{
    memset(attr, 0, sizeof *attr);
    attr->ino = ino;
    attr->size = stat->size;
    attr->blocks = stat->blocks;
    attr->atime = stat->atime.tv_sec;
    attr->mtime = stat->mtime.tv_sec;
    attr->ctime = stat->ctime.tv_sec;
    attr->atimensec = stat->atime.tv_nsec;
    attr->mtimensec = stat->mtime.tv_nsec;
    attr->ctimensec = stat->ctime.tv_nsec;
    attr->mode = stat->mode;
    attr->nlink = stat->nlink;
    attr->uid = stat->uid;
    attr->gid = stat->gid;
    /* new_encode_dev in include/linux/kdev_t.h */
    attr->rdev = (minor(stat->rdev) & 0xff) | major(stat->rdev) << 8 | (minor(stat->rdev) & ~0xffu) << 12;
    attr->blksize = stat->blksize;
}

struct timeout {
    unsigned long long seconds;
    unsigned int nanoseconds;
};

static void fill_entry(struct fuse_entry_out *out, uint64_t nodeid, uint64_t generation, struct timeout entry,
                       struct timeout attr, uint64_t ino, const Stat *stat)
{
    memset(out, 0, sizeof *out);
    out->nodeid = nodeid;
    out->generation = generation;
    out->entry_valid = entry.seconds;
    out->entry_valid_nsec = entry.nanoseconds;
    out->attr_valid = attr.seconds;
    out->attr_valid_nsec = attr.nanoseconds;
    fill_attr(&out->attr, ino, stat);
}

static PyObject *native_attr_out(PyObject *module, PyObject *args)
{
    struct fuse_attr_out out = {0};
    struct timeout timeout;
    unsigned long long ino;
    Stat *stat;
    if (!PyArg_ParseTuple(args, "(KI)KO!", &timeout.seconds, &timeout.nanoseconds, &ino, &StatType, &stat))
        return NULL;
    out.attr_valid = timeout.seconds;
    out.attr_valid_nsec = timeout.nanoseconds;
    fill_attr(&out.attr, ino, stat);
    return PyBytes_FromStringAndSize((const char *)&out, sizeof out);
}

static PyObject *native_entry_out(PyObject *module, PyObject *args)
{
    struct fuse_entry_out out;
    struct timeout entry, attr;
    unsigned long long nodeid, generation, ino;
    Stat *stat;
    if (!PyArg_ParseTuple(args, "KK(KI)(KI)KO!", &nodeid, &generation, &entry.seconds, &entry.nanoseconds,
                          &attr.seconds, &attr.nanoseconds, &ino, &StatType, &stat))
        return NULL;
    fill_entry(&out, nodeid, generation, entry, attr, ino, stat);
    return PyBytes_FromStringAndSize((const char *)&out, sizeof out);
}

/* -- directories ----------------------------------------------------------------------------------------------------- */

/* struct linux_dirent64 of getdents64(2). */
struct kernel_dirent {
    uint64_t ino;
    int64_t offset;
    unsigned short length;
    unsigned char type;
    char name[];
};

/* A new instance of the tuple class `type` with the items (name, ino, type, offset). */
static PyObject *new_entry(PyTypeObject *type, const struct kernel_dirent *from)
{
    PyObject *items = Py_BuildValue("((yKiL))", from->name, (unsigned long long)from->ino, (int)from->type,
                                    (long long)from->offset);
    PyObject *entry = items == NULL ? NULL : PyTuple_Type.tp_new(type, items, NULL);
    Py_XDECREF(items);
    return entry;
}

static PyObject *native_getdents(PyObject *module, PyObject *args)
{
    int fd;
    Py_ssize_t size, count, position = 0;
    PyTypeObject *type;
    PyObject *entries;
    char *buffer;
    if (!PyArg_ParseTuple(args, "inO!", &fd, &size, &PyType_Type, &type))
        return NULL;
    if (!PyType_IsSubtype(type, &PyTuple_Type)) {
        PyErr_SetString(PyExc_TypeError, "not a class of tuples");
        return NULL;
    }
    buffer = PyMem_Malloc(size);
    if (buffer == NULL)
        return PyErr_NoMemory();
    SYSTEM_CALL(count, syscall(SYS_getdents64, fd, buffer, size));
    entries = count < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyList_New(0);
    while (entries != NULL && position < count) {
        const struct kernel_dirent *from = (const struct kernel_dirent *)(buffer + position);
        PyObject *entry = new_entry(type, from);
        if (entry == NULL || PyList_Append(entries, entry) < 0)
            Py_CLEAR(entries);
        Py_XDECREF(entry);
        position += from->length;
    }
    PyMem_Free(buffer);
    return entries;
}

/* A reply that is being made. */
struct reply {
    char *end;       /* of what it holds already */
    Py_ssize_t room; /* bytes left */
    struct timeout entry, attr;
};

enum outcome { FAILED = -1, FULL, WRITTEN };

/* Writes struct fuse_dirent: `head` without its name. */
static enum outcome write_dirent(struct reply *reply, const struct fuse_dirent *head, const char *name)
{
    Py_ssize_t size = FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + head->namelen);
    if (size > reply->room)
        return FULL;
    memset(reply->end + size - 8, 0, 8); /* the padding */
    memcpy(reply->end, head, FUSE_NAME_OFFSET);
    memcpy(reply->end + FUSE_NAME_OFFSET, name, head->namelen);
    reply->end += size;
    reply->room -= size;
    return WRITTEN;
}

/* Writes struct fuse_direntplus: `entry`, then as above. */
static enum outcome write_direntplus(struct reply *reply, const struct fuse_entry_out *entry,
                                     const struct fuse_dirent *head, const char *name)
{
    struct reply rest = {.end = reply->end + sizeof *entry, .room = reply->room - (Py_ssize_t)sizeof *entry};
    enum outcome outcome = write_dirent(&rest, head, name);
    if (outcome == WRITTEN) {
        memcpy(reply->end, entry, sizeof *entry);
        reply->end = rest.end;
        reply->room = rest.room;
    }
    return outcome;
}

/* Takes the tuple (name, ino, type, offset) apart. */
static int parse_dirent(PyObject *entry, struct fuse_dirent *head, const char **name)
{
    unsigned long long ino, offset;
    int type;
    Py_ssize_t length;
    if (!PyArg_ParseTuple(entry, "y#KiK", name, &length, &ino, &type, &offset))
        return 0;
    head->ino = ino;
    head->off = offset;
    head->namelen = length;
    head->type = type;
    return 1;
}

/* Writes struct fuse_dirent for the tuple (name, ino, type, offset). */
static enum outcome put_dirent(struct reply *reply, PyObject *entry)
{
    struct fuse_dirent head;
    const char *name;
    return parse_dirent(entry, &head, &name) ? write_dirent(reply, &head, name) : FAILED;
}

/* Writes struct fuse_direntplus for the tuple (entry, node): `entry` as above, node None or (nodeid, generation, (ino, Stat)). */
static enum outcome put_direntplus(struct reply *reply, PyObject *item)
{
    struct fuse_entry_out out = {0};
    struct fuse_dirent head;
    PyObject *entry, *node, *attributes;
    const char *name;
    unsigned long long nodeid, generation, ino;
    Stat *stat;
    if (!PyArg_ParseTuple(item, "OO", &entry, &node) || !parse_dirent(entry, &head, &name))
        return FAILED;
    if (node != Py_None) {
        if (!PyArg_ParseTuple(node, "KKO!", &nodeid, &generation, &PyTuple_Type, &attributes) ||
            !PyArg_ParseTuple(attributes, "KO!", &ino, &StatType, &stat))
            return FAILED;
        fill_entry(&out, nodeid, generation, reply->entry, reply->attr, ino, stat);
    }
    return write_direntplus(reply, &out, &head, name);
}

/* A reply with as many of the `entries`, a sequence, as fit, each written by `put`. */
static PyObject *fill(struct reply *reply, PyObject *entries, enum outcome (*put)(struct reply *, PyObject *))
{
    enum outcome outcome = WRITTEN;
    PyObject *items = PySequence_Fast(entries, "not a sequence"), *bytes;
    if (items == NULL)
        return NULL;
    bytes = PyBytes_FromStringAndSize(NULL, reply->room);
    if (bytes != NULL) {
        reply->end = PyBytes_AS_STRING(bytes);
        for (Py_ssize_t index = 0; outcome == WRITTEN && index < PySequence_Fast_GET_SIZE(items); index++)
            outcome = put(reply, PySequence_Fast_GET_ITEM(items, index));
        if (outcome == FAILED)
            Py_CLEAR(bytes);
        else
            _PyBytes_Resize(&bytes, reply->end - PyBytes_AS_STRING(bytes));
    }
    Py_DECREF(items);
    return bytes;
}

static PyObject *native_dirents(PyObject *module, PyObject *args)
{
    struct reply reply = {0};
    PyObject *entries;
    if (!PyArg_ParseTuple(args, "On", &entries, &reply.room))
        return NULL;
    return fill(&reply, entries, put_dirent);
}

static PyObject *native_direntplus(PyObject *module, PyObject *args)
{
    struct reply reply = {0};
    PyObject *entries;
    if (!PyArg_ParseTuple(args, "On(KI)(KI)", &entries, &reply.room, &reply.entry.seconds, &reply.entry.nanoseconds,
                          &reply.attr.seconds, &reply.attr.nanoseconds))
        return NULL;
    return fill(&reply, entries, put_direntplus);
}

/* Fills in the reply for the object `found` with an inline node ID; 0 with an exception set if that fails. */
static int fill_inline(struct fuse_entry_out *out, uint64_t nodeid, const struct stat *found, PyObject *generation_of,
                       struct timeout entry, struct timeout attr)
{
    PyObject *number = PyLong_FromUnsignedLongLong(nodeid);
    PyObject *signature = number == NULL ? NULL : PyObject_CallOneArg(generation_of, number);
    unsigned long long generation = signature == NULL ? 0 : PyLong_AsUnsignedLongLong(signature);
    Stat stat;
    Py_XDECREF(number);
    Py_XDECREF(signature);
    if (PyErr_Occurred())
        return 0;
    set_stat(&stat, found);
    fill_entry(out, nodeid, generation, entry, attr, stat.ino, &stat);
    return 1;
}

static int is_dot(const char *name) { return name[0] == '.' && (!name[1] || (name[1] == '.' && !name[2])); }

/* Looks one entry up and writes it; nothing if its node is not `known`, and has to be found otherwise. */
static enum outcome put_inline(struct reply *reply, int directory, const struct kernel_dirent *from,
                               const struct inline_rule *rule, PyObject *generation_of, int *known)
{
    struct fuse_entry_out out = {0};
    struct fuse_dirent head = {from->ino, from->offset, strlen(from->name), from->type};
    struct stat found;
    uint64_t nodeid;
    enum finding finding = is_dot(from->name) ? ABSENT : look_inline(directory, from->name, rule, &nodeid, &found);
    *known = finding != ELSEWHERE;
    if (finding == ELSEWHERE)
        return FULL;
    if (finding == FOUND && !fill_inline(&out, nodeid, &found, generation_of, reply->entry, reply->attr))
        return FAILED;
    return write_direntplus(reply, &out, &head, from->name);
}

static PyObject *native_inline_direntplus(PyObject *module, PyObject *args)
{
    int directory, known = 1;
    long long offset;
    Py_ssize_t wanted, count, position = 0;
    unsigned long long parent_ino;
    struct inline_rule rule;
    struct reply reply = {0};
    PyObject *fields, *generation_of, *bytes;
    char *buffer;
    enum outcome outcome = WRITTEN;
    if (!PyArg_ParseTuple(args, "iLnnKO!O(KI)(KI)", &directory, &offset, &wanted, &reply.room, &parent_ino,
                          &PyTuple_Type, &fields, &generation_of, &reply.entry.seconds, &reply.entry.nanoseconds,
                          &reply.attr.seconds, &reply.attr.nanoseconds) ||
        !parse_rule(fields, &rule))
        return NULL;
    begin_looking(&rule);
    buffer = PyMem_Malloc(wanted);
    bytes = buffer == NULL ? PyErr_NoMemory() : PyBytes_FromStringAndSize(NULL, reply.room);
    if (bytes == NULL) {
        PyMem_Free(buffer);
        return NULL;
    }
    reply.end = PyBytes_AS_STRING(bytes);
    SYSTEM_CALL(count, lseek(directory, offset, SEEK_SET) < 0 ? -1 : syscall(SYS_getdents64, directory, buffer, wanted));
    if (count < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        outcome = FAILED;
    }
    while (outcome == WRITTEN && position < count) {
        struct kernel_dirent *from = (struct kernel_dirent *)(buffer + position);
        if (parent_ino && strcmp(from->name, "..") == 0)
            from->ino = parent_ino;
        outcome = put_inline(&reply, directory, from, &rule, generation_of, &known);
        position += from->length;
    }
    PyMem_Free(buffer);
    if (outcome == FAILED)
        Py_CLEAR(bytes);
    else if ((!known && reply.end == PyBytes_AS_STRING(bytes)) || (offset == 0 && count == 0))
        Py_SETREF(bytes, Py_NewRef(Py_None));
    else
        _PyBytes_Resize(&bytes, reply.end - PyBytes_AS_STRING(bytes));
    return bytes;
}

/* -- from a request to its reply -------------------------------------------------------------------------------------- */

/* What it takes to reply to a request in one step. */
struct replier {
    PyObject *inode_of;      /* callable: the Inode of a node ID (inodecache.py) */
    PyObject *generation_of; /* callable: the generation of a node ID */
    struct timeout entry, attr;
    int is_inline; /* node IDs are; by this rule: */
    struct inline_rule rule;
};

static const char replier_name[] = "handlefs._native.replier";

static void free_replier(PyObject *capsule)
{
    struct replier *self = PyCapsule_GetPointer(capsule, replier_name);
    Py_XDECREF(self->inode_of);
    Py_XDECREF(self->generation_of);
    PyMem_Free(self);
}

static PyObject *native_replier(PyObject *module, PyObject *args)
{
    struct replier parsed = {0}, *self;
    PyObject *fields, *capsule;
    if (!PyArg_ParseTuple(args, "OOO(KI)(KI)", &parsed.inode_of, &fields, &parsed.generation_of, &parsed.entry.seconds,
                          &parsed.entry.nanoseconds, &parsed.attr.seconds, &parsed.attr.nanoseconds))
        return NULL;
    parsed.is_inline = fields != Py_None;
    if (parsed.is_inline && !parse_rule(fields, &parsed.rule))
        return NULL;
    self = PyMem_Malloc(sizeof *self);
    if (self == NULL)
        return PyErr_NoMemory();
    *self = parsed;
    capsule = PyCapsule_New(self, replier_name, free_replier);
    if (capsule == NULL) {
        PyMem_Free(self);
        return NULL;
    }
    Py_INCREF(self->inode_of);
    Py_INCREF(self->generation_of);
    return capsule;
}

/* The Inode of `nodeid`, with its descriptor and mask; NULL with an exception set. */
static PyObject *open_inode(const struct replier *self, uint64_t nodeid, int *fd, unsigned long long *ino_mask)
{
    PyObject *number = PyLong_FromUnsignedLongLong(nodeid);
    PyObject *inode = number == NULL ? NULL : PyObject_CallOneArg(self->inode_of, number);
    PyObject *descriptor = inode == NULL ? NULL : PyObject_GetAttr(inode, name_fd);
    PyObject *mask = descriptor == NULL ? NULL : PyObject_GetAttr(inode, name_ino_mask);
    if (mask != NULL) {
        *fd = PyLong_AsLong(descriptor);
        *ino_mask = PyLong_AsUnsignedLongLong(mask);
    }
    Py_XDECREF(number);
    Py_XDECREF(descriptor);
    Py_XDECREF(mask);
    if (PyErr_Occurred())
        Py_CLEAR(inode);
    return inode;
}

/* A request as it was read: its header, and the body after that, which has no extensions. */
struct request {
    struct fuse_in_header header;
    const char *body;
    size_t size; /* of the body */
};

static int parse_request(const Py_buffer *message, struct request *request)
{
    uint16_t extensions; /* total_extlen, which older headers do not name */
    if ((size_t)message->len < sizeof request->header)
        return 0;
    memcpy(&request->header, message->buf, sizeof request->header);
    memcpy(&extensions, (const char *)message->buf + sizeof request->header - 4, sizeof extensions);
    request->body = (const char *)message->buf + sizeof request->header;
    request->size = message->len - sizeof request->header;
    return request->header.len == message->len && extensions == 0;
}

/* The reply to `request`: the header with `error`, and the `payload`. */
static PyObject *new_reply(const struct request *request, int error, const void *payload, size_t size)
{
    struct fuse_out_header header = {sizeof header + size, -error, request->header.unique};
    PyObject *reply = PyBytes_FromStringAndSize(NULL, sizeof header + size);
    if (reply != NULL) {
        memcpy(PyBytes_AS_STRING(reply), &header, sizeof header);
        memcpy(PyBytes_AS_STRING(reply) + sizeof header, payload, size);
    }
    return reply;
}

static PyObject *reply_to_getattr(const struct replier *self, const struct request *request)
{
    struct fuse_attr_out out = {.attr_valid = self->attr.seconds, .attr_valid_nsec = self->attr.nanoseconds};
    struct stat found;
    Stat stat;
    unsigned long long ino_mask;
    int fd, result;
    PyObject *inode = open_inode(self, request->header.nodeid, &fd, &ino_mask);
    if (inode == NULL)
        return NULL;
    SYSTEM_CALL(result, fstat(fd, &found));
    if (result < 0)
        PyErr_SetFromErrno(PyExc_OSError);
    Py_DECREF(inode); /* which may close it, and change errno */
    if (result < 0)
        return NULL;
    set_stat(&stat, &found);
    fill_attr(&out.attr, stat.ino ^ ino_mask, &stat);
    return new_reply(request, 0, &out, sizeof out);
}

/* Whether the body is the name of one directory entry with its NUL, and nothing else. */
static int is_name(const struct request *request)
{
    const char *name = request->body;
    return request->size > 1 && name[request->size - 1] == '\0' && strlen(name) == request->size - 1 &&
           strchr(name, '/') == NULL && !is_dot(name);
}

static PyObject *reply_to_lookup(const struct replier *self, const struct request *request)
{
    struct inline_rule rule = self->rule;
    struct fuse_entry_out out;
    struct stat found;
    unsigned long long ino_mask;
    uint64_t nodeid;
    int directory;
    enum finding finding;
    PyObject *inode;
    if (!self->is_inline || !is_name(request))
        Py_RETURN_NONE;
    inode = open_inode(self, request->header.nodeid, &directory, &ino_mask);
    if (inode == NULL)
        return NULL;
    begin_looking(&rule);
    finding = look_inline(directory, request->body, &rule, &nodeid, &found);
    Py_DECREF(inode);
    if (finding == ABSENT)
        return new_reply(request, ENOENT, "", 0);
    if (finding == ELSEWHERE || S_ISDIR(found.st_mode))
        Py_RETURN_NONE;
    if (!fill_inline(&out, nodeid, &found, self->generation_of, self->entry, self->attr))
        return NULL;
    return new_reply(request, 0, &out, sizeof out);
}

static PyObject *reply_at_once(const struct replier *self, const Py_buffer *message)
{
    struct request request;
    if (!parse_request(message, &request))
        Py_RETURN_NONE;
    switch (request.header.opcode) {
    case FUSE_GETATTR:
        return reply_to_getattr(self, &request);
    case FUSE_LOOKUP:
        return reply_to_lookup(self, &request);
    default:
        Py_RETURN_NONE;
    }
}

static PyObject *native_reply(PyObject *module, PyObject *args)
{
    PyObject *capsule, *reply = NULL;
    Py_buffer message;
    struct replier *self;
    if (!PyArg_ParseTuple(args, "Oy*", &capsule, &message))
        return NULL;
    self = PyCapsule_GetPointer(capsule, replier_name);
    if (self != NULL)
        reply = reply_at_once(self, &message);
    PyBuffer_Release(&message);
    return reply;
}

/* -- credentials ------------------------------------------------------------------------------------------------------ */

/* ioctl(2) without `capability`; the thread has it again afterwards. */
static int ioctl_without(unsigned int capability, int fd, unsigned long request, void *argument)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];
    uint32_t *effective = &data[capability / 32].effective, before;
    int result, number;
    if (syscall(SYS_capget, &header, data) < 0)
        return -1;
    before = *effective;
    *effective &= ~(1u << capability % 32);
    if (syscall(SYS_capset, &header, data) < 0)
        return -1;
    result = ioctl(fd, request, argument);
    number = errno;
    *effective = before;
    if (syscall(SYS_capset, &header, data) < 0)
        return -1;
    errno = number;
    return result;
}

static PyObject *native_ioctl_without(PyObject *module, PyObject *args)
{
    unsigned int capability;
    unsigned long request;
    int fd, result;
    Py_buffer argument;
    if (!PyArg_ParseTuple(args, "Iikw*", &capability, &fd, &request, &argument))
        return NULL;
    if (capability >= 32 * _LINUX_CAPABILITY_U32S_3) {
        PyBuffer_Release(&argument);
        PyErr_SetString(PyExc_ValueError, "no such capability");
        return NULL;
    }
    if ((size_t)argument.len < _IOC_SIZE(request)) {
        PyBuffer_Release(&argument);
        PyErr_SetString(PyExc_ValueError, "the argument is smaller than the request says");
        return NULL;
    }
    SYSTEM_CALL(result, ioctl_without(capability, fd, request, argument.buf));
    PyBuffer_Release(&argument);
    return result < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(result);
}

/* -- the module ------------------------------------------------------------------------------------------------------ */

static PyMethodDef methods[] = {
    {"fstat", native_fstat, METH_O, "fstat(fd) -> Stat"},
    {"name_to_handle_at", native_name_to_handle_at, METH_VARARGS,
     "name_to_handle_at(dir_fd, name, flags) -> (handle type, handle bytes, mount ID)"},
    {"open_by_handle_at", native_open_by_handle_at, METH_VARARGS,
     "open_by_handle_at(mount_fd, handle type, handle bytes, flags) -> descriptor, close-on-exec"},
    {"look", native_look, METH_VARARGS,
     "look(dir_fd, name) -> (handle type, handle bytes, mount ID, Stat), the Stat taken last; None for no entry"},
    {"find_inline", native_find_inline, METH_VARARGS,
     "find_inline(dir_fd, names, rule) -> list of (nodeid, Stat), None where it has to be found otherwise, False for no entry"},
    {"inline_of", native_inline_of, METH_VARARGS,
     "inline_of(fd, rule) -> (nodeid, Stat) of what is open as fd, None if that has no inline node ID"},
    {"attr_out", native_attr_out, METH_VARARGS, "attr_out(timeout, ino, Stat) -> struct fuse_attr_out"},
    {"entry_out", native_entry_out, METH_VARARGS,
     "entry_out(nodeid, generation, entry timeout, attr timeout, ino, Stat) -> struct fuse_entry_out"},
    {"getdents", native_getdents, METH_VARARGS,
     "getdents(fd, size, type) -> list of instances of the tuple class, each of (name, ino, type, offset)"},
    {"dirents", native_dirents, METH_VARARGS, "dirents(entries, size) -> as many struct fuse_dirent as fit"},
    {"direntplus", native_direntplus, METH_VARARGS,
     "direntplus([(entry, node or None)], size, entry timeout, attr timeout) -> as many struct fuse_direntplus as fit"},
    {"replier", native_replier, METH_VARARGS,
     "replier(Inode of a node ID, rule or None, generation of a node ID, entry timeout, attr timeout) -> for reply()"},
    {"reply", native_reply, METH_VARARGS,
     "reply(replier, request) -> the reply to a GETATTR, or by the rule to a LOOKUP of what is no directory; else None"},
    {"inline_direntplus", native_inline_direntplus, METH_VARARGS,
     "inline_direntplus(directory fd, offset, bytes to list, bytes of reply, inode number of .. or 0, rule, "
     "generation of a node ID, entry timeout, attr timeout) -> struct fuse_direntplus for each up to one to be found otherwise, "
     "None if that is the first"},
    {"ioctl_without", native_ioctl_without, METH_VARARGS,
     "ioctl_without(capability, fd, request, argument) -> what ioctl(2) returns without that capability"},
    {NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_doc = "Compiled versions of measured hot spots.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__native(void)
{
    name_fd = PyUnicode_InternFromString("fd");
    name_ino_mask = PyUnicode_InternFromString("ino_mask");
    if (name_fd == NULL || name_ino_mask == NULL || PyType_Ready(&StatType) < 0)
        return NULL;
    return PyModule_Create(&definition);
}
