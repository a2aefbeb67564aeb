/* A CUDA runtime and driver for a machine without a GPU.

   Device memory is the host's memory and kernels compute nothing: their launches are logged by name. What a program asks
   of streams, events and graphs is checked as CUDA checks it, above all while a stream is being captured: there a
   synchronisation, an allocation or an event from outside is refused and makes the capture invalid.

   Preloaded (LD_PRELOAD), this library takes the place of libcudart. Found as libcuda.so.1, it is the driver that Triton,
   torch and NVRTC's loader open. Functions called fake_* read the log. */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Everything else is compiled hidden, so that only these functions stand in for CUDA's. */
#define EXPORT __attribute__((visibility("default")))

#define MEMORY_OF_A_DEVICE (80ul << 30)
#define PAGE 4096ul
#define CUDA_VERSION_HERE 13000

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

/* Returns `array` with room for one more than `count` elements; it grows in steps. */
static void *with_room(void *array, size_t count, size_t *capacity, size_t element_size) {
    if (count < *capacity)
        return array;
    *capacity = *capacity ? 2 * *capacity : 4096;
    return realloc(array, *capacity * element_size);
}

/* ---- The log ---- */

/* The order is that of KINDS in calls.py. */
typedef enum {
    KERNEL,
    MEMSET,
    COPY_FROM_PINNED,
    COPY_FROM_PAGEABLE,
    COPY_TO_HOST,
    COPY_ON_DEVICE,
    SYNCHRONISATION,
    GRAPH_LAUNCH,
    ALLOCATION,
    PINNED_ALLOCATION,
    VIOLATION,
} Kind;

typedef struct {
    Kind kind;
    const char *name;
    uint64_t capture; /* number of the capture that it was recorded by; 0: it was executed */
    size_t bytes;
} Entry;

static Entry *entries;
static size_t n_entries, entry_capacity;

static void note(Kind kind, const char *name, uint64_t capture, size_t bytes) {
    pthread_mutex_lock(&lock);
    entries = with_room(entries, n_entries, &entry_capacity, sizeof *entries);
    entries[n_entries++] = (Entry){kind, name, capture, bytes};
    pthread_mutex_unlock(&lock);
}

EXPORT size_t fake_count(void) {
    return n_entries;
}

EXPORT int fake_kind(size_t number) {
    return entries[number].kind;
}

EXPORT const char *fake_name(size_t number) {
    return entries[number].name;
}

EXPORT uint64_t fake_capture(size_t number) {
    return entries[number].capture;
}

EXPORT size_t fake_bytes(size_t number) {
    return entries[number].bytes;
}

/* ---- Errors ---- */

static __thread cudaError_t last_error = cudaSuccess;

static cudaError_t fail(cudaError_t error) {
    last_error = error;
    return error;
}

EXPORT cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

EXPORT cudaError_t cudaPeekAtLastError(void) {
    return last_error;
}

EXPORT const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
    case cudaSuccess:
        return "cudaSuccess";
    case cudaErrorMemoryAllocation:
        return "cudaErrorMemoryAllocation";
    case cudaErrorStreamCaptureUnsupported:
        return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated:
        return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureMerge:
        return "cudaErrorStreamCaptureMerge";
    case cudaErrorStreamCaptureIsolation:
        return "cudaErrorStreamCaptureIsolation";
    case cudaErrorStreamCaptureUnjoined:
        return "cudaErrorStreamCaptureUnjoined";
    case cudaErrorStreamCaptureImplicit:
        return "cudaErrorStreamCaptureImplicit";
    default:
        return "an error of the fake CUDA runtime";
    }
}

/* CUDA's own words, which torch passes on. */
EXPORT const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess:
        return "no error";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorStreamCaptureUnsupported:
        return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
        return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureMerge:
        return "operation would result in a merge of separate capture sequences";
    case cudaErrorStreamCaptureIsolation:
        return "dependency created on uncaptured work in another stream";
    case cudaErrorStreamCaptureUnjoined:
        return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureImplicit:
        return "operation would make the legacy stream depend on a capturing blocking stream";
    default:
        return "an error of the fake CUDA runtime";
    }
}

/* ---- Devices ---- */

static __thread int current_device = 0;

static int n_devices(void) {
    const char *wanted = getenv("FAKE_CUDA_DEVICES");
    return wanted ? atoi(wanted) : 1;
}

/* What the runtime and the driver say about an H100. */
static int attribute(int which) {
    switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
        return 1024;
    case cudaDevAttrMaxBlockDimZ:
        return 64;
    case cudaDevAttrMaxGridDimX:
        return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
        return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock:
        return 48 << 10;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        return 227 << 10;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        return 228 << 10;
    case cudaDevAttrReservedSharedMemoryPerBlock:
        return 1024;
    case cudaDevAttrWarpSize:
        return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
        return 65536;
    case cudaDevAttrClockRate:
        return 1980000;
    case cudaDevAttrMemoryClockRate:
        return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth:
        return 5120;
    case cudaDevAttrMultiProcessorCount:
        return 132;
    case cudaDevAttrL2CacheSize:
        return 50 << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
        return 2048;
    case cudaDevAttrComputeCapabilityMajor:
        return 9;
    case cudaDevAttrComputeCapabilityMinor:
        return 0;
    default:
        return 0;
    }
}

EXPORT cudaError_t cudaGetDeviceCount(int *count) {
    *count = n_devices();
    return cudaSuccess;
}

EXPORT cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}

EXPORT cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= n_devices())
        return fail(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    memset(found, 0, sizeof *found);
    snprintf(found->name, sizeof found->name, "Fake NVIDIA H100");
    found->totalGlobalMem = MEMORY_OF_A_DEVICE;
    found->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    found->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    found->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    found->reservedSharedMemPerBlock = attribute(cudaDevAttrReservedSharedMemoryPerBlock);
    found->regsPerBlock = attribute(cudaDevAttrMaxRegistersPerBlock);
    found->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
    found->warpSize = attribute(cudaDevAttrWarpSize);
    found->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
    found->maxThreadsDim[0] = attribute(cudaDevAttrMaxBlockDimX);
    found->maxThreadsDim[1] = attribute(cudaDevAttrMaxBlockDimY);
    found->maxThreadsDim[2] = attribute(cudaDevAttrMaxBlockDimZ);
    found->maxGridSize[0] = attribute(cudaDevAttrMaxGridDimX);
    found->maxGridSize[1] = attribute(cudaDevAttrMaxGridDimY);
    found->maxGridSize[2] = attribute(cudaDevAttrMaxGridDimZ);
    found->totalConstMem = 65536;
    found->major = attribute(cudaDevAttrComputeCapabilityMajor);
    found->minor = attribute(cudaDevAttrComputeCapabilityMinor);
    found->textureAlignment = 512;
    found->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    found->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    found->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    found->maxBlocksPerMultiProcessor = 32;
    found->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
    found->unifiedAddressing = 1;
    found->concurrentKernels = 1;
    found->asyncEngineCount = 3;
    found->canMapHostMemory = 1;
    found->cooperativeLaunch = 1;
    found->managedMemory = 1;
    found->pciBusID = device;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
    *value = attribute(which);
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetPCIBusId(char *name, int length, int device) {
    snprintf(name, length, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least)
        *least = 0;
    if (greatest)
        *greatest = -5;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDA_VERSION_HERE;
    return cudaSuccess;
}

EXPORT cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDA_VERSION_HERE;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = device != peer;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    *pool = (cudaMemPool_t)8; /* a handle that is not NULL; nobody looks behind it */
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr which, void *value) {
    *(uint64_t *)value = 0;
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr which, void *value) {
    return cudaSuccess;
}

EXPORT cudaError_t cudaProfilerStart(void) {
    return cudaSuccess;
}

EXPORT cudaError_t cudaProfilerStop(void) {
    return cudaSuccess;
}

/* ---- Streams, and what may happen while one is captured ---- */

typedef struct Capture Capture;

typedef struct {
    uint64_t id;
    unsigned flags;
    int priority;
    Capture *capture; /* NULL: it executes what it is given */
    int joined;       /* within a capture: whether its origin has waited for this stream */
} Stream;

struct Capture {
    uint64_t id;
    enum cudaStreamCaptureMode mode;
    long thread;
    int valid;
    size_t nodes;
    Stream *origin;
};

typedef struct {
    Stream *stream; /* where it was recorded last; NULL: nowhere yet */
    Capture *capture;
    uint64_t capture_id; /* a later capture may lie at the same address */
    double when;
} Event;

typedef struct {
    size_t nodes;
} Graph;

static Stream default_stream;
static Stream **streams;
static size_t n_streams, stream_capacity;
static Capture *active[64];
static int n_active;
static uint64_t n_captures;
static __thread enum cudaStreamCaptureMode mode_of_this_thread = cudaStreamCaptureModeGlobal;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

static Stream *stream_of(cudaStream_t handle) {
    if (handle == NULL || handle == cudaStreamLegacy || handle == cudaStreamPerThread)
        return &default_stream;
    return (Stream *)handle;
}

static uint64_t capture_of(Stream *stream) {
    return stream->capture ? stream->capture->id : 0;
}

static cudaError_t violate(Capture *capture, const char *what, cudaError_t error) {
    capture->valid = 0;
    note(VIOLATION, what, capture->id, 0);
    return fail(error);
}

/* Refuses a call that may synchronise, or allocate, if a capture is active whose mode forbids it here. */
static cudaError_t check_unsafe_call(const char *what) {
    if (mode_of_this_thread == cudaStreamCaptureModeRelaxed)
        return cudaSuccess;
    for (int i = 0; i < n_active; i++) {
        Capture *capture = active[i];
        if (capture->mode == cudaStreamCaptureModeRelaxed)
            continue;
        int local = capture->mode == cudaStreamCaptureModeThreadLocal ||
                    mode_of_this_thread == cudaStreamCaptureModeThreadLocal;
        if (local && capture->thread != syscall(SYS_gettid))
            continue;
        return violate(capture, what, cudaErrorStreamCaptureUnsupported);
    }
    return cudaSuccess;
}

/* The default stream waits for every other one, unless that was made with cudaStreamNonBlocking. */
static Capture *capture_that_the_default_stream_waits_for(void) {
    for (int i = 0; i < n_active; i++)
        if (!(active[i]->origin->flags & cudaStreamNonBlocking))
            return active[i];
    return NULL;
}

/* Puts work on a stream: a node of the graph if it is captured. */
static cudaError_t enqueue(Stream *stream, const char *what) {
    if (stream->capture) {
        if (!stream->capture->valid)
            return fail(cudaErrorStreamCaptureInvalidated);
        stream->capture->nodes++;
        return cudaSuccess;
    }
    Capture *waited_for = stream == &default_stream ? capture_that_the_default_stream_waits_for() : NULL;
    return waited_for ? violate(waited_for, what, cudaErrorStreamCaptureImplicit) : cudaSuccess;
}

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *made, unsigned flags, int priority) {
    cudaError_t error = check_unsafe_call("cudaStreamCreate");
    if (error)
        return error;
    Stream *stream = calloc(1, sizeof *stream);
    pthread_mutex_lock(&lock);
    streams = with_room(streams, n_streams, &stream_capacity, sizeof *streams);
    streams[n_streams++] = stream;
    stream->id = n_streams;
    pthread_mutex_unlock(&lock);
    stream->flags = flags;
    stream->priority = priority;
    *made = (cudaStream_t)stream;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamCreate(cudaStream_t *made) {
    return cudaStreamCreateWithPriority(made, 0, 0);
}

EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *made, unsigned flags) {
    return cudaStreamCreateWithPriority(made, flags, 0);
}

EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    return cudaSuccess; /* torch keeps its streams to the end */
}

EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = stream_of(stream)->priority;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long *id) {
    *id = stream_of(stream)->id;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetDevice(cudaStream_t stream, int *device) {
    *device = current_device;
    return cudaSuccess;
}

static cudaError_t ask_about_stream(cudaStream_t handle, const char *what) {
    Stream *stream = stream_of(handle);
    if (stream->capture)
        return violate(stream->capture, what, cudaErrorStreamCaptureUnsupported);
    return check_unsafe_call(what);
}

EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return ask_about_stream(stream, "cudaStreamQuery");
}

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    cudaError_t error = ask_about_stream(stream, "cudaStreamSynchronize");
    if (!error)
        note(SYNCHRONISATION, "cudaStreamSynchronize", 0, 0);
    return error;
}

EXPORT cudaError_t cudaDeviceSynchronize(void) {
    cudaError_t error = check_unsafe_call("cudaDeviceSynchronize");
    if (!error)
        note(SYNCHRONISATION, "cudaDeviceSynchronize", 0, 0);
    return error;
}

EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *data, unsigned flags) {
    call(stream, cudaSuccess, data);
    return cudaSuccess;
}

EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void *data) {
    Stream *stream = stream_of(handle);
    cudaError_t error = enqueue(stream, "cudaLaunchHostFunc");
    if (!error && !stream->capture)
        function(data);
    return error;
}

/* ---- Events ---- */

static int belongs_to_active_capture(Event *event) {
    for (int i = 0; i < n_active; i++)
        if (active[i] == event->capture && active[i]->id == event->capture_id)
            return 1;
    return 0;
}

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *made, unsigned flags) {
    *made = (cudaEvent_t)calloc(1, sizeof(Event));
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreate(cudaEvent_t *made) {
    return cudaEventCreateWithFlags(made, 0);
}

EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle, unsigned flags) {
    Event *event = (Event *)handle;
    Stream *stream = stream_of(stream_handle);
    if (stream->capture && !stream->capture->valid)
        return fail(cudaErrorStreamCaptureInvalidated);
    event->stream = stream;
    event->capture = stream->capture;
    event->capture_id = capture_of(stream);
    event->when = now();
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}

static cudaError_t ask_about_event(cudaEvent_t handle, const char *what) {
    Event *event = (Event *)handle;
    if (belongs_to_active_capture(event))
        return violate(event->capture, what, cudaErrorStreamCaptureUnsupported);
    return check_unsafe_call(what);
}

EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) {
    return ask_about_event(event, "cudaEventQuery");
}

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    cudaError_t error = ask_about_event(event, "cudaEventSynchronize");
    if (!error)
        note(SYNCHRONISATION, "cudaEventSynchronize", 0, 0);
    return error;
}

EXPORT cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    float elapsed = 1e3 * (((Event *)to)->when - ((Event *)from)->when);
    *milliseconds = elapsed > 0 ? elapsed : 1e-3f;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t event_handle, unsigned flags) {
    Stream *stream = stream_of(stream_handle);
    Event *event = (Event *)event_handle;
    if (!event->stream)
        return cudaSuccess;
    if (!belongs_to_active_capture(event)) {
        if (stream->capture)
            return violate(stream->capture, "a captured stream waits for work outside the capture",
                           cudaErrorStreamCaptureIsolation);
        return cudaSuccess;
    }
    Capture *capture = event->capture;
    if (!capture->valid)
        return fail(cudaErrorStreamCaptureInvalidated);
    if (stream == &default_stream)
        return violate(capture, "the default stream waits for a captured event", cudaErrorStreamCaptureImplicit);
    if (stream->capture && stream->capture != capture) {
        stream->capture->valid = 0;
        return violate(capture, "two captures merge", cudaErrorStreamCaptureMerge);
    }
    if (!stream->capture) {
        /* A stream that waits for a captured event becomes part of the capture, and must be joined again. */
        stream->capture = capture;
        stream->joined = 0;
    }
    if (stream == capture->origin)
        event->stream->joined = 1;
    return cudaSuccess;
}

/* ---- Captures and graphs ---- */

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = mode_of_this_thread;
    mode_of_this_thread = *mode;
    *mode = before;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
    Stream *stream = stream_of(handle);
    if (stream == &default_stream || stream->capture || n_active == sizeof active / sizeof *active)
        return fail(cudaErrorStreamCaptureUnsupported);
    Capture *capture = calloc(1, sizeof *capture);
    capture->mode = mode;
    capture->thread = syscall(SYS_gettid);
    capture->valid = 1;
    capture->origin = stream;
    pthread_mutex_lock(&lock);
    capture->id = ++n_captures;
    active[n_active++] = capture;
    stream->capture = capture;
    stream->joined = 1;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *made) {
    Capture *capture = stream_of(handle)->capture;
    if (!capture)
        return fail(cudaErrorIllegalState);
    int n_unjoined = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < n_streams; i++) {
        if (streams[i]->capture != capture)
            continue;
        n_unjoined += !streams[i]->joined;
        streams[i]->capture = NULL;
    }
    for (int i = 0; i < n_active; i++)
        if (active[i] == capture)
            active[i] = active[--n_active];
    pthread_mutex_unlock(&lock);
    *made = NULL;
    if (!capture->valid)
        return fail(cudaErrorStreamCaptureInvalidated);
    if (n_unjoined)
        return violate(capture, "a stream of the capture was not joined", cudaErrorStreamCaptureUnjoined);
    Graph *graph = calloc(1, sizeof *graph);
    graph->nodes = capture->nodes;
    *made = (cudaGraph_t)graph;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *status) {
    Stream *stream = stream_of(handle);
    if (stream == &default_stream && capture_that_the_default_stream_waits_for())
        return fail(cudaErrorStreamCaptureImplicit);
    if (!stream->capture)
        *status = cudaStreamCaptureStatusNone;
    else if (stream->capture->valid)
        *status = cudaStreamCaptureStatusActive;
    else
        *status = cudaStreamCaptureStatusInvalidated;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *graph,
                                            const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges,
                                            size_t *n_dependencies) {
    if (status)
        cudaStreamIsCapturing(stream, status);
    if (id)
        *id = capture_of(stream_of(stream));
    if (graph)
        *graph = NULL;
    if (dependencies)
        *dependencies = NULL;
    if (edges)
        *edges = NULL;
    if (n_dependencies)
        *n_dependencies = 0;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    *made = (cudaGraphExec_t)graph;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiate(made, graph, flags);
}

EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    cudaError_t error = enqueue(stream_of(stream), "cudaGraphLaunch");
    if (!error)
        note(GRAPH_LAUNCH, "graph", capture_of(stream_of(stream)), 0);
    return error;
}

EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = ((Graph *)graph)->nodes;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    return cudaSuccess; /* the executable graph is the same object */
}

EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphDebugDotPrint(cudaGraph_t graph, const char *path, unsigned flags) {
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t *dependencies,
                                                cudaGraphEdgeData *edges, size_t *count) {
    *count = 0;
    return cudaSuccess;
}

/* ---- Memory ---- */

typedef enum { PAGEABLE, PINNED, ON_DEVICE } Place;

typedef struct {
    uintptr_t begin, end;
    Place place;
    int device;
} Range;

static Range *ranges;
static size_t n_ranges, range_capacity;
static size_t allocated;

static void add_range(void *begin, size_t size, Place place) {
    pthread_mutex_lock(&lock);
    ranges = with_room(ranges, n_ranges, &range_capacity, sizeof *ranges);
    ranges[n_ranges++] = (Range){(uintptr_t)begin, (uintptr_t)begin + size, place, current_device};
    if (place == ON_DEVICE)
        allocated += size;
    pthread_mutex_unlock(&lock);
}

/* Forgets the range that begins there, and returns its size; 0: there is none. */
static size_t remove_range(void *begin) {
    size_t size = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < n_ranges; i++) {
        if (ranges[i].begin != (uintptr_t)begin)
            continue;
        size = ranges[i].end - ranges[i].begin;
        if (ranges[i].place == ON_DEVICE)
            allocated -= size;
        ranges[i] = ranges[--n_ranges];
        break;
    }
    pthread_mutex_unlock(&lock);
    return size;
}

static Range find_range(const void *address) {
    Range found = {0, 0, PAGEABLE, -2}; /* -2 is CUDA's number for no device */
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < n_ranges; i++)
        if ((uintptr_t)address >= ranges[i].begin && (uintptr_t)address < ranges[i].end)
            found = ranges[i];
    pthread_mutex_unlock(&lock);
    return found;
}

/* Address space without pages: a network at full size costs nothing where no arithmetic touches its tensors. */
static void *reserve(size_t size) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *begin = mmap(NULL, (size + PAGE - 1) & ~(PAGE - 1), PROT_READ | PROT_WRITE, flags, -1, 0);
    return begin == MAP_FAILED ? NULL : begin;
}

static void release(void *begin) {
    size_t size = remove_range(begin);
    if (size)
        munmap(begin, (size + PAGE - 1) & ~(PAGE - 1));
}

EXPORT cudaError_t cudaMalloc(void **made, size_t size) {
    cudaError_t error = check_unsafe_call("cudaMalloc");
    if (error)
        return error;
    size = size ? size : 1;
    *made = allocated + size > MEMORY_OF_A_DEVICE ? NULL : reserve(size);
    if (!*made)
        return fail(cudaErrorMemoryAllocation);
    add_range(*made, size, ON_DEVICE);
    note(ALLOCATION, "cudaMalloc", 0, size);
    return cudaSuccess;
}

EXPORT cudaError_t cudaFree(void *begin) {
    if (!begin)
        return cudaSuccess;
    cudaError_t error = check_unsafe_call("cudaFree");
    if (!error)
        release(begin);
    return error;
}

EXPORT cudaError_t cudaMallocAsync(void **made, size_t size, cudaStream_t stream) {
    return cudaMalloc(made, size);
}

EXPORT cudaError_t cudaFreeAsync(void *begin, cudaStream_t stream) {
    return cudaFree(begin);
}

EXPORT cudaError_t cudaHostAlloc(void **made, size_t size, unsigned flags) {
    cudaError_t error = check_unsafe_call("cudaHostAlloc");
    if (error)
        return error;
    size = size ? size : 1;
    *made = reserve(size);
    if (!*made)
        return fail(cudaErrorMemoryAllocation);
    add_range(*made, size, PINNED);
    note(PINNED_ALLOCATION, "cudaHostAlloc", 0, size);
    return cudaSuccess;
}

EXPORT cudaError_t cudaFreeHost(void *begin) {
    release(begin);
    return cudaSuccess;
}

EXPORT cudaError_t cudaHostRegister(void *begin, size_t size, unsigned flags) {
    add_range(begin, size, PINNED);
    return cudaSuccess;
}

EXPORT cudaError_t cudaHostUnregister(void *begin) {
    remove_range(begin);
    return cudaSuccess;
}

EXPORT cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned flags) {
    *device = host;
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = MEMORY_OF_A_DEVICE;
    *free_bytes = MEMORY_OF_A_DEVICE - allocated;
    return cudaSuccess;
}

EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address) {
    static const enum cudaMemoryType types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice};
    Range range = find_range(address);
    memset(found, 0, sizeof *found);
    found->type = types[range.place];
    found->device = range.device;
    found->devicePointer = range.place == PAGEABLE ? NULL : (void *)address;
    found->hostPointer = (void *)address;
    return cudaSuccess;
}

static Kind kind_of_copy(const void *to, const void *from) {
    if (find_range(to).place != ON_DEVICE)
        return COPY_TO_HOST;
    switch (find_range(from).place) {
    case ON_DEVICE:
        return COPY_ON_DEVICE;
    case PINNED:
        return COPY_FROM_PINNED;
    default:
        return COPY_FROM_PAGEABLE;
    }
}

EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind direction,
                                   cudaStream_t handle) {
    Stream *stream = stream_of(handle);
    cudaError_t error = enqueue(stream, "cudaMemcpyAsync");
    if (error)
        return error;
    Kind kind = kind_of_copy(to, from);
    note(kind, "copy", capture_of(stream), size);
    if (!stream->capture)
        memmove(to, from, size);
    else if (kind != COPY_ON_DEVICE)
        /* CUDA would record it, and each replay would read from or write to memory that may be gone. */
        note(VIOLATION, "a captured copy from or to the host", stream->capture->id, size);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind direction) {
    cudaError_t error = check_unsafe_call("cudaMemcpy");
    if (error)
        return error;
    note(SYNCHRONISATION, "cudaMemcpy", 0, 0);
    return cudaMemcpyAsync(to, from, size, direction, NULL);
}

EXPORT cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                                     size_t height, enum cudaMemcpyKind direction, cudaStream_t handle) {
    Stream *stream = stream_of(handle);
    cudaError_t error = enqueue(stream, "cudaMemcpy2DAsync");
    if (error)
        return error;
    note(kind_of_copy(to, from), "copy of rows", capture_of(stream), width * height);
    if (stream->capture)
        return cudaSuccess;
    for (size_t row = 0; row < height; row++)
        memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t size,
                                       cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, stream);
}

EXPORT cudaError_t cudaMemsetAsync(void *begin, int value, size_t size, cudaStream_t handle) {
    Stream *stream = stream_of(handle);
    cudaError_t error = enqueue(stream, "cudaMemsetAsync");
    if (error)
        return error;
    note(MEMSET, "memset", capture_of(stream), size);
    if (!stream->capture)
        memset(begin, value, size);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemset(void *begin, int value, size_t size) {
    return cudaMemsetAsync(begin, value, size, NULL);
}

EXPORT cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static char constants[1 << 20]; /* no kernel reads them */
    *address = constants;
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t size, size_t offset,
                                      enum cudaMemcpyKind direction) {
    return cudaSuccess;
}

EXPORT cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *address) {
    return fail(cudaErrorNotSupported);
}

/* ---- Kernels ---- */

/* nvcc's code announces each kernel when a library is loaded: the address by which the host knows it, and its name. */
typedef struct {
    const void *address;
    const char *name;
} Kernel;

static Kernel *kernels;
static size_t n_kernels, kernel_capacity;
static int kernels_are_sorted;

EXPORT void **__cudaRegisterFatBinary(void *binary) {
    static void *handle[4];
    return handle;
}

EXPORT void __cudaRegisterFatBinaryEnd(void **handle) {
}

EXPORT void __cudaUnregisterFatBinary(void **handle) {
}

EXPORT char __cudaInitModule(void **handle) {
    return 1;
}

EXPORT void __cudaRegisterVar(void **handle, char *variable, char *device_address, const char *name, int external,
                              size_t size, int constant, int global) {
}

EXPORT void __cudaRegisterFunction(void **handle, const char *address, char *device_function, const char *name,
                                   int thread_limit, uint3 *thread_id, uint3 *block_id, dim3 *block, dim3 *grid,
                                   int *warp_size) {
    pthread_mutex_lock(&lock);
    kernels = with_room(kernels, n_kernels, &kernel_capacity, sizeof *kernels);
    kernels[n_kernels++] = (Kernel){address, name};
    kernels_are_sorted = 0;
    pthread_mutex_unlock(&lock);
}

static int compare_addresses(const void *first, const void *second) {
    uintptr_t a = (uintptr_t)((const Kernel *)first)->address;
    uintptr_t b = (uintptr_t)((const Kernel *)second)->address;
    return a < b ? -1 : a > b;
}

static const char *name_of(const void *address) {
    pthread_mutex_lock(&lock);
    if (!kernels_are_sorted)
        qsort(kernels, n_kernels, sizeof *kernels, compare_addresses);
    kernels_are_sorted = 1;
    Kernel wanted = {address, NULL};
    Kernel *found = bsearch(&wanted, kernels, n_kernels, sizeof *kernels, compare_addresses);
    pthread_mutex_unlock(&lock);
    return found ? found->name : "a kernel without a name";
}

static cudaError_t launch(const char *name, cudaStream_t handle) {
    Stream *stream = stream_of(handle);
    cudaError_t error = enqueue(stream, name);
    if (!error)
        note(KERNEL, name, capture_of(stream), 0);
    return error;
}

/* Logs a kernel of a library that is not called here (cuDNN, cuBLAS, NCCL), and checks it like any other. */
EXPORT int fake_kernel(const char *name, void *stream) {
    return launch(strdup(name), (cudaStream_t)stream);
}

EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *address) {
    *kernel = (cudaKernel_t)address;
    return cudaSuccess;
}

EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                      cudaStream_t stream) {
    return launch(name_of(kernel), stream);
}

EXPORT cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                    cudaStream_t stream) {
    return launch(name_of(kernel), stream);
}

EXPORT cudaError_t cudaLaunchCooperativeKernel(const void *kernel, dim3 grid, dim3 block, void **arguments,
                                               size_t shared, cudaStream_t stream) {
    return launch(name_of(kernel), stream);
}

EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *configuration, const void *kernel, void **arguments) {
    return launch(name_of(kernel), configuration->stream);
}

/* kernel<<<grid, block, shared, stream>>>(...) pushes its configuration; the function behind `kernel` pops it. */
static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} configurations[8];
static __thread int n_configurations;

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    configurations[n_configurations].grid = grid;
    configurations[n_configurations].block = block;
    configurations[n_configurations].shared = shared;
    configurations[n_configurations].stream = stream;
    n_configurations++;
    return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    n_configurations--;
    *grid = configurations[n_configurations].grid;
    *block = configurations[n_configurations].block;
    *shared = configurations[n_configurations].shared;
    *(void **)stream = configurations[n_configurations].stream;
    return cudaSuccess;
}

EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    found->binaryVersion = 90;
    found->ptxVersion = 90;
    return cudaSuccess;
}

EXPORT cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute which, int value) {
    return cudaSuccess;
}

static int blocks_per_multiprocessor(int threads_per_block) {
    return threads_per_block ? 2048 / threads_per_block : 1;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int threads,
                                                                 size_t shared) {
    *blocks = blocks_per_multiprocessor(threads);
    return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads,
                                                                          size_t shared, unsigned flags) {
    *blocks = blocks_per_multiprocessor(threads);
    return cudaSuccess;
}

/* ---- The driver ---- */

static CUcontext the_context = (CUcontext)16; /* handles that are not NULL; nobody looks behind them */
static CUmodule the_module = (CUmodule)16;

static CUresult as_driver_error(cudaError_t error) {
    return (CUresult)error; /* the two lists of errors share their numbers */
}

EXPORT CUresult cuInit(unsigned flags) {
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDriverGetVersion(int *version) {
    *version = CUDA_VERSION_HERE;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetCount(int *count) {
    *count = n_devices();
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int number) {
    *device = number;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    snprintf(name, length, "Fake NVIDIA H100");
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
    *value = attribute((int)which);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active_now) {
    *flags = 0;
    *active_now = 1;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = the_context;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = the_context;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    *device = current_device;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSynchronize(void) {
    return as_driver_error(cudaDeviceSynchronize());
}

EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
    *value = 1 << 20;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *code) {
    cudaError_t error = check_unsafe_call("cuModuleLoadData");
    note(ALLOCATION, "cuModuleLoadData", 0, 0);
    *module = the_module;
    return as_driver_error(error);
}

EXPORT CUresult cuModuleLoadDataEx(CUmodule *module, const void *code, unsigned n_options, CUjit_option *options,
                                   void **values) {
    return cuModuleLoadData(module, code);
}

EXPORT CUresult cuModuleLoad(CUmodule *module, const char *path) {
    return cuModuleLoadData(module, path);
}

EXPORT CUresult cuModuleUnload(CUmodule module) {
    return CUDA_SUCCESS;
}

/* A function's handle is its name, which is all that a launch needs. */
EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)strdup(name);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
    switch (which) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
        *value = 32;
        break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        *value = 1024;
        break;
    default:
        *value = 0;
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
    return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache configuration) {
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = cudaGetErrorString((cudaError_t)error);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorName(CUresult error, const char **name) {
    *name = cudaGetErrorName((cudaError_t)error);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                               unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared, CUstream stream,
                               void **arguments, void **extra) {
    return as_driver_error(launch((const char *)function, (cudaStream_t)stream));
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *configuration, CUfunction function, void **arguments,
                                 void **extra) {
    return as_driver_error(launch((const char *)function, (cudaStream_t)configuration->hStream));
}

EXPORT CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                          unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                                          CUstream stream, void **arguments) {
    return as_driver_error(launch((const char *)function, (cudaStream_t)stream));
}

EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads,
                                                            size_t shared) {
    *blocks = blocks_per_multiprocessor(threads);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *configuration) {
    *clusters = 16;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr address) {
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        *(CUdeviceptr *)value = address;
    else
        *(int *)value = 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *which, void **values, CUdeviceptr address) {
    for (unsigned i = 0; i < count; i++)
        cuPointerGetAttribute(values[i], which[i], address);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemGetInfo(size_t *free_bytes, size_t *total) {
    return as_driver_error(cudaMemGetInfo(free_bytes, total));
}

EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                       const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                       const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                       CUtensorMapFloatOOBfill fill) {
    return CUDA_SUCCESS;
}

EXPORT CUresult cuLinkCreate(unsigned n_options, CUjit_option *options, void **values, CUlinkState *state) {
    return CUDA_ERROR_NOT_SUPPORTED;
}

EXPORT CUresult cuLinkAddData(CUlinkState state, CUjitInputType type, void *data, size_t size, const char *name,
                              unsigned n_options, CUjit_option *options, void **values) {
    return CUDA_ERROR_NOT_SUPPORTED;
}

EXPORT CUresult cuLinkComplete(CUlinkState state, void **cubin, size_t *size) {
    return CUDA_ERROR_NOT_SUPPORTED;
}

static CUresult succeed(void) {
    return CUDA_SUCCESS;
}

/* Torch and NCCL look driver functions up by name; one that is not here does nothing. */
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                                    unsigned long long flags,
                                                    enum cudaDriverEntryPointQueryResult *status) {
    *function = dlsym(RTLD_DEFAULT, symbol);
    if (!*function)
        *function = (void *)succeed;
    if (status)
        *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
