/* What the stand-in CANN says and does; every other function of CANN's returns 0, "success", and does nothing.
   Signatures are those of CANN's acl and hccl interfaces, as far as they matter here. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static int object; /* whatever a handle points to: nobody looks inside */
static _Thread_local int device;

static long handle(void **out) {
    *out = &object;
    return 0;
}

static long host_memory(void **out, size_t size) {
    return posix_memalign(out, 512, size ? size : 1);
}

/* devices */
long aclrtGetDeviceCount(uint32_t *count) {
    *count = DEVICES;
    return 0;
}
long aclrtSetDevice(int32_t id) {
    if (id < 0 || id >= DEVICES) return 107001; /* invalid device id */
    device = id;
    return 0;
}
long aclrtGetDevice(int32_t *id) {
    *id = device;
    return 0;
}
const char *aclrtGetSocName(void) {
    const char *other = getenv("ASCENT_STAND_IN_SOC");
    return other && *other ? other : SOC;
}
long aclrtGetRunMode(int32_t *mode) {
    *mode = 1; /* host */
    return 0;
}
long aclrtGetMemInfo(int32_t kind, size_t *available, size_t *total) {
    *available = *total = (size_t)64 << 30;
    return 0;
}
long aclGetCompileoptSize(int32_t option) {
    return 8;
}
long aclGetCompileopt(int32_t option, char *value, size_t length) {
    strncpy(value, "disable", length);
    return 0;
}

/* handles */
long aclrtCreateStream(void **stream) {
    return handle(stream);
}
long aclrtCreateStreamV2(void **stream) {
    return handle(stream);
}
long aclrtCreateStreamWithConfig(void **stream) {
    return handle(stream);
}
long aclrtCreateContext(void **context) {
    return handle(context);
}
long aclrtGetCurrentContext(void **context) {
    return handle(context);
}
long aclrtCreateEvent(void **event) {
    return handle(event);
}
long aclrtCreateEventWithFlag(void **event) {
    return handle(event);
}
long aclrtCreateEventExWithFlag(void **event) {
    return handle(event);
}
long aclrtQueryEventStatus(void *event, int32_t *status) {
    *status = 1; /* complete */
    return 0;
}
long aclrtQueryEventWaitStatus(void *event, int32_t *status) {
    *status = 1;
    return 0;
}

/* memory: the host's */
long aclrtMalloc(void **out, size_t size) {
    return host_memory(out, size);
}
long aclrtMallocAlign32(void **out, size_t size) {
    return host_memory(out, size);
}
long aclrtMallocHost(void **out, size_t size) {
    return host_memory(out, size);
}
long aclrtFree(void *memory) {
    free(memory);
    return 0;
}
long aclrtFreeHost(void *memory) {
    free(memory);
    return 0;
}
long aclrtMemcpy(void *to, size_t room, const void *from, size_t size) {
    memmove(to, from, size);
    return 0;
}
long aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size) {
    memmove(to, from, size);
    return 0;
}
long aclrtMemset(void *to, size_t room, int32_t value, size_t size) {
    memset(to, value, size);
    return 0;
}
/* expandable segments */
long aclrtReserveMemAddress(void **out, size_t size) {
    *out = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return *out == MAP_FAILED;
}
long aclrtMallocPhysical(void **out) {
    return handle(out);
}

/* HCCL: a communicator is made, and what is sent through it stays where it was. Each call is a line of the file that
   ASCENT_STAND_IN_LOG names: function, communicator, its ranks, this one, elements, dtype, operation or peer. */
struct communicator {
    uint32_t number, ranks, rank;
};

static void tell(const char *name, struct communicator *c, uint64_t count, int32_t dtype, int64_t more) {
    const char *path = getenv("ASCENT_STAND_IN_LOG");
    FILE *file = path && *path ? fopen(path, "a") : 0;
    if (!file) return;
    fprintf(file, "%s %u %u %u %llu %d %lld\n", name, c->number, c->ranks, c->rank, (unsigned long long)count, dtype,
            (long long)more);
    fclose(file);
}

static long initialise(uint32_t ranks, uint32_t rank, void **out) {
    static uint32_t made;
    struct communicator *c = malloc(sizeof *c);
    if (!c || rank >= ranks) return 1;
    c->number = __sync_fetch_and_add(&made, 1);
    c->ranks = ranks;
    c->rank = rank;
    *out = c;
    tell("HcclCommInit", c, 0, -1, 0);
    return 0;
}
long HcclGetRootInfo(char *info) {
    strcpy(info, "stand-in");
    return 0;
}
long HcclCommInitRootInfo(uint32_t ranks, const void *info, uint32_t rank, void **out) {
    return initialise(ranks, rank, out);
}
long HcclCommInitRootInfoConfig(uint32_t ranks, const void *info, uint32_t rank, void *config, void **out) {
    return initialise(ranks, rank, out);
}
long HcclGetCommName(struct communicator *c, char *name) {
    sprintf(name, "stand-in-%u", c->number);
    return 0;
}
long HcclAllReduce(void *from, void *to, uint64_t count, int32_t dtype, int32_t op, struct communicator *c) {
    tell("HcclAllReduce", c, count, dtype, op);
    return 0;
}
long HcclReduceScatter(void *from, void *to, uint64_t count, int32_t dtype, int32_t op, struct communicator *c) {
    tell("HcclReduceScatter", c, count, dtype, op);
    return 0;
}
long HcclAllGather(void *from, void *to, uint64_t count, int32_t dtype, struct communicator *c) {
    tell("HcclAllGather", c, count, dtype, 0);
    return 0;
}
long HcclBroadcast(void *what, uint64_t count, int32_t dtype, uint32_t root, struct communicator *c) {
    tell("HcclBroadcast", c, count, dtype, root);
    return 0;
}
long HcclAlltoAll(void *from, uint64_t count, int32_t dtype, void *to, uint64_t c2, int32_t d2, struct communicator *c) {
    tell("HcclAlltoAll", c, count * c->ranks, dtype, 0);
    return 0;
}
long HcclAlltoAllV(void *from, uint64_t *counts, void *at, int32_t dtype, void *to, void *c2, void *at2, int32_t d2,
                   struct communicator *c) {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < c->ranks; i++) sum += counts[i];
    tell("HcclAlltoAllV", c, sum, dtype, 0);
    return 0;
}
long HcclSend(void *what, uint64_t count, int32_t dtype, uint32_t peer, struct communicator *c) {
    tell("HcclSend", c, count, dtype, peer);
    return 0;
}
long HcclRecv(void *what, uint64_t count, int32_t dtype, uint32_t peer, struct communicator *c) {
    tell("HcclRecv", c, count, dtype, peer);
    return 0;
}
struct message {
    int32_t type; /* 0 send, 1 receive */
    void *what;
    uint64_t count;
    int32_t dtype;
    uint32_t peer;
};
long HcclBatchSendRecv(struct message *all, uint32_t length, struct communicator *c) {
    for (uint32_t i = 0; i < length; i++)
        tell(all[i].type ? "HcclRecv" : "HcclSend", c, all[i].count, all[i].dtype, all[i].peer);
    return 0;
}
