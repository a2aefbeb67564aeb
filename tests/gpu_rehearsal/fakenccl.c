/* NCCL for processes of one machine whose GPUs are host memory (fakecuda.c).

   The ranks meet in a file in /dev/shm that holds a barrier and a slot for each of them. A collective really computes,
   when it is called: while a stream is being captured it does nothing but become a node of the graph, and the simulated
   GPU calls it again at each replay. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define SLOT (64ul << 20) /* bytes; a longer buffer is sent in pieces */
#define HEADER 4096ul
#define PATIENCE_MS 60000

typedef int ncclResult_t;
enum { ncclSuccess = 0, ncclSystemError = 2 };
enum { ncclSum, ncclProd, ncclMax, ncclMin, ncclAvg };
enum { ncclInt8, ncclUint8, ncclInt32, ncclUint32, ncclInt64, ncclUint64, ncclFloat16, ncclFloat32, ncclFloat64,
       ncclBfloat16 };

typedef struct {
    char internal[128];
} ncclUniqueId;

typedef struct {
    pthread_barrier_t barrier;
    volatile int ready;
} Header;

typedef struct {
    int rank, n_ranks;
    Header *header;
    char *slots;
} Communicator;
typedef Communicator *ncclComm_t;

extern int fake_kernel(const char *name, void *stream);

/* ---- Meeting ---- */

EXPORT ncclResult_t ncclGetVersion(int *version) {
    *version = 22809;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/fake-nccl-%d-%ld", getpid(), (long)time.tv_nsec);
    return ncclSuccess;
}

/* Opens the file that rank 0 makes, once it has its full size; returns -1 if it never does. */
static int open_when_made(const char *name, off_t size) {
    for (int waited = 0; waited < PATIENCE_MS; waited++) {
        int file = shm_open(name, O_RDWR, 0600);
        if (file >= 0 && lseek(file, 0, SEEK_END) == size)
            return file;
        if (file >= 0)
            close(file);
        usleep(1000);
    }
    return -1;
}

static int make(const char *name, off_t size) {
    int file = shm_open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
    if (file >= 0 && ftruncate(file, size)) {
        close(file);
        return -1;
    }
    return file;
}

EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t *made, int n_ranks, ncclUniqueId id, int rank,
                                           void *configuration) {
    off_t size = HEADER + (off_t)n_ranks * SLOT;
    int file = rank == 0 ? make(id.internal, size) : open_when_made(id.internal, size);
    if (file < 0)
        return ncclSystemError;
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED)
        return ncclSystemError;
    Communicator *here = calloc(1, sizeof *here);
    here->rank = rank;
    here->n_ranks = n_ranks;
    here->header = (Header *)memory;
    here->slots = memory + HEADER;
    if (rank == 0) {
        pthread_barrierattr_t attributes;
        pthread_barrierattr_init(&attributes);
        pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
        pthread_barrier_init(&here->header->barrier, &attributes, n_ranks);
        __sync_synchronize();
        here->header->ready = 1;
    }
    while (!here->header->ready)
        usleep(1000);
    pthread_barrier_wait(&here->header->barrier);
    if (rank == 0)
        shm_unlink(id.internal); /* all have opened it, so it goes when the last of them ends */
    *made = here;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommInitRank(ncclComm_t *made, int n_ranks, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(made, n_ranks, id, rank, NULL);
}

EXPORT ncclResult_t ncclCommInitRankScalable(ncclComm_t *made, int n_ranks, int rank, int n_ids, ncclUniqueId *ids,
                                             void *configuration) {
    return ncclCommInitRankConfig(made, n_ranks, ids[0], rank, configuration);
}

/* ---- Numbers ---- */

static size_t size_of(int type) {
    static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
    return sizes[type];
}

static float from_half(uint16_t bits) {
    _Float16 number;
    memcpy(&number, &bits, sizeof number);
    return (float)number;
}

static uint16_t to_half(float value) {
    _Float16 number = (_Float16)value;
    uint16_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

static float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float number;
    memcpy(&number, &wide, sizeof number);
    return number;
}

static uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t half_way_to_even = 0x7fff + ((bits >> 16) & 1);
    return (bits + half_way_to_even) >> 16;
}

static double read_number(const char *array, size_t i, int type) {
    switch (type) {
    case ncclInt8:
        return ((const int8_t *)array)[i];
    case ncclUint8:
        return ((const uint8_t *)array)[i];
    case ncclInt32:
        return ((const int32_t *)array)[i];
    case ncclInt64:
        return ((const int64_t *)array)[i];
    case ncclFloat16:
        return from_half(((const uint16_t *)array)[i]);
    case ncclFloat32:
        return ((const float *)array)[i];
    case ncclFloat64:
        return ((const double *)array)[i];
    case ncclBfloat16:
        return from_bfloat16(((const uint16_t *)array)[i]);
    default:
        abort(); /* better than a wrong sum */
    }
}

static void write_number(char *array, size_t i, int type, double value) {
    switch (type) {
    case ncclInt8:
        ((int8_t *)array)[i] = value;
        break;
    case ncclUint8:
        ((uint8_t *)array)[i] = value;
        break;
    case ncclInt32:
        ((int32_t *)array)[i] = value;
        break;
    case ncclInt64:
        ((int64_t *)array)[i] = value;
        break;
    case ncclFloat16:
        ((uint16_t *)array)[i] = to_half(value);
        break;
    case ncclFloat32:
        ((float *)array)[i] = value;
        break;
    case ncclFloat64:
        ((double *)array)[i] = value;
        break;
    case ncclBfloat16:
        ((uint16_t *)array)[i] = to_bfloat16(value);
        break;
    default:
        abort();
    }
}

static double combine(double first, double second, int operation) {
    switch (operation) {
    case ncclProd:
        return first * second;
    case ncclMax:
        return first > second ? first : second;
    case ncclMin:
        return first < second ? first : second;
    default:
        return first + second;
    }
}

/* ---- Collectives ---- */

static int is_capturing(cudaStream_t stream) {
    enum cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaStreamIsCapturing(stream, &status);
    return status != cudaStreamCaptureStatusNone;
}

/* Every rank adds in the order of the ranks, so that all get the same bits. */
static void reduce_slots(Communicator *here, char *to, size_t count, int type, int operation) {
    for (size_t i = 0; i < count; i++) {
        double value = read_number(here->slots, i, type);
        for (int rank = 1; rank < here->n_ranks; rank++)
            value = combine(value, read_number(here->slots + rank * SLOT, i, type), operation);
        write_number(to, i, type, operation == ncclAvg ? value / here->n_ranks : value);
    }
}

EXPORT ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, ncclComm_t here,
                                  cudaStream_t stream) {
    fake_kernel("nccl all-reduce", stream);
    if (is_capturing(stream))
        return ncclSuccess;
    size_t size = size_of(type), most = SLOT / size;
    for (size_t done = 0; done < count; done += most) {
        size_t piece = count - done < most ? count - done : most;
        memcpy(here->slots + here->rank * SLOT, (const char *)from + done * size, piece * size);
        pthread_barrier_wait(&here->header->barrier);
        reduce_slots(here, (char *)to + done * size, piece, type, operation);
        pthread_barrier_wait(&here->header->barrier); /* nobody writes to a slot that others still read */
    }
    return ncclSuccess;
}

EXPORT ncclResult_t ncclBroadcast(const void *from, void *to, size_t count, int type, int root, ncclComm_t here,
                                  cudaStream_t stream) {
    fake_kernel("nccl broadcast", stream);
    if (is_capturing(stream))
        return ncclSuccess;
    size_t bytes = count * size_of(type);
    for (size_t done = 0; done < bytes; done += SLOT) {
        size_t piece = bytes - done < SLOT ? bytes - done : SLOT;
        if (here->rank == root)
            memcpy(here->slots, (const char *)from + done, piece);
        pthread_barrier_wait(&here->header->barrier);
        memmove((char *)to + done, here->slots, piece);
        pthread_barrier_wait(&here->header->barrier);
    }
    return ncclSuccess;
}

EXPORT ncclResult_t ncclBcast(void *buffer, size_t count, int type, int root, ncclComm_t here, cudaStream_t stream) {
    return ncclBroadcast(buffer, buffer, count, type, root, here, stream);
}

/* ---- The rest of what torch calls ---- */

EXPORT ncclResult_t ncclCommCount(ncclComm_t here, int *n_ranks) {
    *n_ranks = here->n_ranks;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommUserRank(ncclComm_t here, int *rank) {
    *rank = here->rank;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommCuDevice(ncclComm_t here, int *device) {
    return cudaGetDevice(device) ? ncclSystemError : ncclSuccess;
}

EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t here, int *error) {
    *error = ncclSuccess;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommFinalize(ncclComm_t here) {
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommDestroy(ncclComm_t here) {
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommAbort(ncclComm_t here) {
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommRegister(ncclComm_t here, void *buffer, size_t size, void **handle) {
    *handle = NULL;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommDeregister(ncclComm_t here, void *handle) {
    return ncclSuccess;
}

EXPORT ncclResult_t ncclGroupStart(void) {
    return ncclSuccess;
}

EXPORT ncclResult_t ncclGroupEnd(void) {
    return ncclSuccess;
}

EXPORT const char *ncclGetErrorString(ncclResult_t error) {
    return error ? "an error of the fake NCCL" : "no error";
}

EXPORT const char *ncclGetLastError(ncclComm_t here) {
    return "none";
}
