// Loaded before the C library: whatever waits for the disk waits for EXO_TEST_SYNC_MS longer.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

static int slowly(const char *name, int file) {
    int (*sync)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    const char *ms = getenv("EXO_TEST_SYNC_MS");
    usleep((ms ? atoi(ms) : 0) * 1000);
    return sync(file);
}

int fsync(int file) { return slowly("fsync", file); }
int fdatasync(int file) { return slowly("fdatasync", file); }
