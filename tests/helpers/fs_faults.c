/* Counts the file-system changes that a process makes below one folder, and ends it, or fails one
 * of them, where a test asks for it. Loaded with LD_PRELOAD, so that changes made by libraries in
 * Rust or C++ are seen like those of Python.
 *
 * The file named by FS_FAULTS holds `struct state`; the test maps it too. All processes of a
 * command count together. A kill is SIGKILL for the whole process group. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* Kinds of changes, bits of a mask. */
enum { CREATE = 1, OPEN = 2, WRITE = 4, SYNC = 8, RENAME = 16, REMOVE = 32, MKDIR = 64, SIZE = 128, LINK = 256, ATTR = 512 };
/* What happens at call `at`. */
enum { COUNT = 0, KILL = 1, FAIL = 2 };
/* What `gate` tells a caller to do. */
enum { GO = 0, NO = 1, HALF = 2 };

#define ENTRIES 20000
#define NAME 120

struct entry {
    int kind;
    char name[NAME]; /* path below the root; its end where it is longer */
};

struct state {
    long count;  /* changes so far */
    long at;     /* the change at which something happens, counted from 1 */
    long until;  /* the first change that works again; 0: none does */
    long failed; /* changes that were refused */
    int mode;
    int torn;  /* a write is half done before it ends or fails */
    int error; /* errno of a failure */
    int kinds; /* mask of the kinds that fail */
    char root[1024]; /* changes elsewhere do not count; empty: none counts */
    struct entry log[ENTRIES];
};

static struct state *state;

static void connect_state(void) {
    const char *path = getenv("FS_FAULTS");
    if (!path) return;
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return;
    void *memory = mmap(NULL, sizeof(struct state), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory != MAP_FAILED) state = memory;
}

__attribute__((constructor)) static void begin(void) { connect_state(); }

static int below_root(const char *path) {
    size_t length = strlen(state->root);
    return !strncmp(path, state->root, length) && (path[length] == '/' || !path[length]);
}

static void end_group(void) {
    kill(0, SIGKILL);
    for (;;) pause();
}

static int gate(int kind, const char *path) {
    if (!below_root(path)) return GO;
    long number = __sync_add_and_fetch(&state->count, 1);
    if (number <= ENTRIES) {
        struct entry *entry = &state->log[number - 1];
        const char *name = path + strlen(state->root);
        size_t length = strlen(name);
        entry->kind = kind;
        strncpy(entry->name, length >= NAME ? name + length - NAME + 1 : name, NAME - 1);
        entry->name[NAME - 1] = 0;
    }
    if (state->mode == KILL && number == state->at) {
        if (kind == WRITE && state->torn) return HALF;
        end_group();
    }
    if (state->mode == FAIL && number >= state->at && (!state->until || number < state->until) &&
        (kind & state->kinds)) {
        if (kind == WRITE && state->torn && number == state->at) return HALF;
        __sync_add_and_fetch(&state->failed, 1);
        errno = state->error;
        return NO;
    }
    return GO;
}

static int active(void) { return state && state->root[0] && state->count >= 0; }

static int gate_file(int kind, int file) {
    if (!active()) return GO;
    int before = errno;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 1) return GO;
    path[length] = 0;
    return gate(kind, path);
}

static int gate_path(int kind, int folder, const char *path) {
    if (!active() || !path) return GO;
    int before = errno;
    char whole[2 * PATH_MAX], base[PATH_MAX];
    if (path[0] == '/') {
        snprintf(whole, sizeof whole, "%s", path);
    } else {
        char link[64];
        if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length < 1) { errno = before; return GO; }
        base[length] = 0;
        snprintf(whole, sizeof whole, "%s/%s", base, path);
    }
    errno = before;
    return gate(kind, whole);
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name);

/* Opening for writing. */
static int gate_open(int folder, const char *path, int flags) {
    if (!active()) return GO;
    if ((flags & O_ACCMODE) == O_RDONLY && !(flags & (O_CREAT | O_TRUNC))) return GO;
    int before = errno;
    int fresh = (flags & O_CREAT) && faccessat(folder, path, F_OK, AT_SYMLINK_NOFOLLOW);
    errno = before;
    return gate_path(fresh ? CREATE : OPEN, folder, path);
}

#define MODE(last) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list more; va_start(more, last); mode = va_arg(more, mode_t); va_end(more); }

int open(const char *path, int flags, ...) {
    MODE(flags) REAL(open)
    return gate_open(AT_FDCWD, path, flags) ? -1 : real(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags) REAL(open64)
    return gate_open(AT_FDCWD, path, flags) ? -1 : real(path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
    MODE(flags) REAL(openat)
    return gate_open(folder, path, flags) ? -1 : real(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
    MODE(flags) REAL(openat64)
    return gate_open(folder, path, flags) ? -1 : real(folder, path, flags, mode);
}
int creat(const char *path, mode_t mode) {
    REAL(creat)
    return gate_open(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC) ? -1 : real(path, mode);
}
static int stream_flags(const char *mode) {
    if (mode[0] == 'w') return O_CREAT | O_WRONLY | O_TRUNC;
    if (mode[0] == 'a') return O_CREAT | O_WRONLY;
    return strchr(mode, '+') ? O_RDWR : O_RDONLY;
}
FILE *fopen(const char *path, const char *mode) {
    REAL(fopen)
    return gate_open(AT_FDCWD, path, stream_flags(mode)) ? NULL : real(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    REAL(fopen64)
    return gate_open(AT_FDCWD, path, stream_flags(mode)) ? NULL : real(path, mode);
}

/* Writing. */
#define WRITES(call, half) \
    switch (gate_file(WRITE, file)) { \
    case NO: return -1; \
    case HALF: { \
        ssize_t done = half; \
        if (state->mode == KILL) end_group(); \
        if (done < 1) { errno = state->error; return -1; } \
        return done; } \
    } \
    return call;

ssize_t write(int file, const void *data, size_t size) {
    REAL(write)
    WRITES(real(file, data, size), size > 1 ? real(file, data, size / 2) : 0)
}
ssize_t pwrite(int file, const void *data, size_t size, off_t place) {
    REAL(pwrite)
    WRITES(real(file, data, size, place), size > 1 ? real(file, data, size / 2, place) : 0)
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t place) {
    REAL(pwrite64)
    WRITES(real(file, data, size, place), size > 1 ? real(file, data, size / 2, place) : 0)
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(writev)
    WRITES(real(file, parts, count), real(file, parts, 1))
}
ssize_t pwritev(int file, const struct iovec *parts, int count, off_t place) {
    REAL(pwritev)
    WRITES(real(file, parts, count, place), real(file, parts, 1, place))
}
ssize_t sendfile(int file, int from, off_t *place, size_t size) {
    static ssize_t (*real)(int, int, off_t *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "sendfile");
    WRITES(real(file, from, place, size), size > 1 ? real(file, from, place, 1) : 0)
}
ssize_t sendfile64(int file, int from, off64_t *place, size_t size) {
    static ssize_t (*real)(int, int, off64_t *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "sendfile64");
    WRITES(real(file, from, place, size), size > 1 ? real(file, from, place, 1) : 0)
}
ssize_t copy_file_range(int from, off64_t *there, int file, off64_t *here, size_t size, unsigned flags) {
    REAL(copy_file_range)
    WRITES(real(from, there, file, here, size, flags), size > 1 ? real(from, there, file, here, 1, flags) : 0)
}
size_t fwrite(const void *data, size_t size, size_t count, FILE *stream) {
    REAL(fwrite)
    switch (gate_file(WRITE, fileno(stream))) {
    case NO: return 0;
    case HALF:
        if (count > 1) real(data, size, count / 2, stream);
        fflush(stream);
        if (state->mode == KILL) end_group();
        errno = state->error;
        return 0;
    }
    return real(data, size, count, stream);
}

/* One gate, then the call. */
#define FILE_CALL(kind, name, parameters, file, ...) \
    int name parameters { REAL(name) return gate_file(kind, file) ? -1 : real(__VA_ARGS__); }
#define PATH_CALL(kind, name, parameters, folder, path, ...) \
    int name parameters { REAL(name) return gate_path(kind, folder, path) ? -1 : real(__VA_ARGS__); }

/* Processes are killed here, never the machine: nothing waits for the disk. */
int fsync(int file) { return gate_file(SYNC, file) ? -1 : 0; }
int fdatasync(int file) { return gate_file(SYNC, file) ? -1 : 0; }
FILE_CALL(SIZE, ftruncate, (int file, off_t size), file, file, size)
FILE_CALL(SIZE, ftruncate64, (int file, off64_t size), file, file, size)
FILE_CALL(ATTR, fchmod, (int file, mode_t mode), file, file, mode)
FILE_CALL(ATTR, futimens, (int file, const struct timespec times[2]), file, file, times)
PATH_CALL(SIZE, truncate, (const char *path, off_t size), AT_FDCWD, path, path, size)
PATH_CALL(SIZE, truncate64, (const char *path, off64_t size), AT_FDCWD, path, path, size)
PATH_CALL(RENAME, rename, (const char *from, const char *to), AT_FDCWD, to, from, to)
PATH_CALL(RENAME, renameat, (int a, const char *from, int b, const char *to), b, to, a, from, b, to)
PATH_CALL(RENAME, renameat2, (int a, const char *from, int b, const char *to, unsigned flags), b, to, a, from, b, to, flags)
PATH_CALL(REMOVE, unlink, (const char *path), AT_FDCWD, path, path)
PATH_CALL(REMOVE, unlinkat, (int folder, const char *path, int flags), folder, path, folder, path, flags)
PATH_CALL(REMOVE, rmdir, (const char *path), AT_FDCWD, path, path)
PATH_CALL(REMOVE, remove, (const char *path), AT_FDCWD, path, path)
PATH_CALL(MKDIR, mkdir, (const char *path, mode_t mode), AT_FDCWD, path, path, mode)
PATH_CALL(MKDIR, mkdirat, (int folder, const char *path, mode_t mode), folder, path, folder, path, mode)
PATH_CALL(LINK, link, (const char *from, const char *to), AT_FDCWD, to, from, to)
PATH_CALL(LINK, linkat, (int a, const char *from, int b, const char *to, int flags), b, to, a, from, b, to, flags)
PATH_CALL(LINK, symlink, (const char *from, const char *to), AT_FDCWD, to, from, to)
PATH_CALL(LINK, symlinkat, (const char *from, int folder, const char *to), folder, to, from, folder, to)
PATH_CALL(ATTR, chmod, (const char *path, mode_t mode), AT_FDCWD, path, path, mode)
PATH_CALL(ATTR, fchmodat, (int folder, const char *path, mode_t mode, int flags), folder, path, folder, path, mode, flags)
PATH_CALL(ATTR, utimensat, (int folder, const char *path, const struct timespec times[2], int flags), folder, path, folder, path, times, flags)

/* These return the error instead of setting errno. */
int posix_fallocate(int file, off_t place, off_t size) {
    REAL(posix_fallocate)
    return gate_file(SIZE, file) ? state->error : real(file, place, size);
}
int posix_fallocate64(int file, off64_t place, off64_t size) {
    REAL(posix_fallocate64)
    return gate_file(SIZE, file) ? state->error : real(file, place, size);
}
