/* The library from C, and from what calls C: Rust, Go, Julia, ... What it does is said in the C++
 * headers; this is the part of it that exchanges bundles.
 *
 * Calls return ASYNCDIFF_OK, or what went wrong: asyncdiff_last_error() then has the message.
 * Nothing is thrown across. A fabric may be used by several threads, each end of a channel by one
 * at a time. Streams are cudaStream_t, and ignored on the host. */
#ifndef ASYNCDIFF_ASYNCDIFF_H
#define ASYNCDIFF_ASYNCDIFF_H

#include <stddef.h>
#include <stdint.h>

#define ASYNCDIFF_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef struct asyncdiff_fabric asyncdiff_fabric;
typedef struct asyncdiff_channel asyncdiff_channel;

/* The errors of errors.hpp, by number. */
typedef enum {
  ASYNCDIFF_OK = 0,
  ASYNCDIFF_ERROR = 1,            /* all others */
  ASYNCDIFF_INVALID_ARGUMENT = 2, /* a shape, a rank, a slot that cannot be meant */
  ASYNCDIFF_EXCHANGE_TIMEOUT = 3, /* a wait passed its deadline; the rank is who is waited for */
  ASYNCDIFF_SLOT_ORDER = 4,       /* a slot or a call out of turn; the rank is whose call it was */
  ASYNCDIFF_ABORTED = 5,          /* the rank has aborted the fabric */
  ASYNCDIFF_PROCESS_LOST = 6,     /* the rank's process has ended, or closed the fabric */
  ASYNCDIFF_COLLECTIVE_TIMEOUT = 7, /* the rank's process lives, and does not come */
  ASYNCDIFF_AUTHENTICATION = 8,     /* processes do not know the same key */
  ASYNCDIFF_DEVICE = 9,             /* a device that does not exist, or cannot do it */
  ASYNCDIFF_CUDA = 10,              /* a call of CUDA failed */
  ASYNCDIFF_NCCL = 11               /* NCCL is missing, or a call of it failed */
} asyncdiff_code;

/* The version that the linked library was built as, like "1.2.3". */
ASYNCDIFF_API const char* asyncdiff_version(void);
/* What went wrong in the last call of this thread that failed, and the rank that it was about (-1:
 * none, or unknown). The text is good until the next call of this thread fails. */
ASYNCDIFF_API const char* asyncdiff_last_error(void);
ASYNCDIFF_API int asyncdiff_last_error_rank(void);

/* --- fabrics. deadline: seconds that a wait may last, 0 for ASYNCDIFF_DEADLINE or else 10.
 * ASYNCDIFF_LINK simulates a link between any two ranks. */

/* Ranks are threads of this process. */
ASYNCDIFF_API asyncdiff_code asyncdiff_host_fabric_make(int ranks, double deadline,
                                                        asyncdiff_fabric** fabric);
/* Rank r is process r, one of `processes`, on one host or several. They meet at host and port,
 * where process 0 listens, within `timeout` seconds; all know the key. Collective. */
ASYNCDIFF_API asyncdiff_code asyncdiff_host_fabric_meet(const char* host, int port, int process,
                                                        int processes, const void* key,
                                                        size_t key_nbytes, double timeout,
                                                        double deadline, asyncdiff_fabric** fabric);
/* The same from what a launcher sets: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT (or
 * ASYNCDIFF_PORT), and ASYNCDIFF_AUTHKEY. */
ASYNCDIFF_API asyncdiff_code asyncdiff_host_fabric_from_environment(double timeout, double deadline,
                                                                    asyncdiff_fabric** fabric);

/* GPUs: in the library asyncdiff_cuda. devices[r] is the CUDA device of rank r. */
ASYNCDIFF_API asyncdiff_code asyncdiff_cuda_fabric_make(const int* devices, int ranks,
                                                        double deadline, asyncdiff_fabric** fabric);
/* The same in processes; `device` is this one's. */
ASYNCDIFF_API asyncdiff_code asyncdiff_cuda_fabric_meet(const char* host, int port, int process,
                                                        int processes, const void* key,
                                                        size_t key_nbytes, int device,
                                                        double timeout, double deadline,
                                                        asyncdiff_fabric** fabric);
ASYNCDIFF_API asyncdiff_code asyncdiff_cuda_fabric_from_environment(int device, double timeout,
                                                                    double deadline,
                                                                    asyncdiff_fabric** fabric);

ASYNCDIFF_API int asyncdiff_fabric_ranks(const asyncdiff_fabric* fabric);
/* What has gone wrong since the last reset, on GPUs too. */
ASYNCDIFF_API asyncdiff_code asyncdiff_check(asyncdiff_fabric* fabric);
/* Ends all waits, until the next reset. */
ASYNCDIFF_API asyncdiff_code asyncdiff_abort(asyncdiff_fabric* fabric, int rank,
                                             const char* reason);
/* Empties all channels. Nothing may be in flight. Collective among all processes. */
ASYNCDIFF_API asyncdiff_code asyncdiff_reset(asyncdiff_fabric* fabric, uint64_t first_bundle);
/* Ends the fabric, and gives the handle back, in any case. On GPUs collective. Null: nothing. */
ASYNCDIFF_API asyncdiff_code asyncdiff_fabric_free(asyncdiff_fabric* fabric);

/* --- channels */

/* One tensor of a bundle: its element type ("float16", "int64", ...), its shape, and its strides in
 * elements (null: row-major). */
typedef struct {
  const char* dtype;
  const int64_t* shape;
  const int64_t* strides;
  size_t dimensions;
} asyncdiff_tensor;

/* mode: "auto", "copy", "kernel" or "inline". Collective among the processes that run the ends. */
ASYNCDIFF_API asyncdiff_code asyncdiff_channel_make(asyncdiff_fabric* fabric, int sender,
                                                    const int* receivers, size_t receiver_count,
                                                    const asyncdiff_tensor* tensors,
                                                    size_t tensor_count, int slots,
                                                    const char* name, const char* mode,
                                                    asyncdiff_channel** channel);
/* Gives back what the channel has, and the handle, in any case. Collective as making it. Null:
 * nothing. */
ASYNCDIFF_API asyncdiff_code asyncdiff_channel_free(asyncdiff_channel* channel);

/* Sends a bundle: tensors[i] is where tensor i lies. The n-th bundle uses slot n % slots. */
ASYNCDIFF_API asyncdiff_code asyncdiff_put(asyncdiff_channel* channel, const void* const* tensors,
                                           size_t tensor_count, int slot, void* stream);
/* Waits for the next bundle. */
ASYNCDIFF_API asyncdiff_code asyncdiff_get(asyncdiff_channel* channel, int receiver, int slot,
                                           void* stream);
/* Between GPUs of several hosts: wait on the host until `count` bundles since the last reset have
   arrived at a receiver here, or until the slot of the `count`-th was released, for its sender
   here. A get, or a put, then waits for no other host on the device, where the driver would let
   nobody enqueue what ends that wait while it loads a kernel or frees memory. Elsewhere they return
   at once. */
ASYNCDIFF_API asyncdiff_code asyncdiff_wait_for(asyncdiff_channel* channel, int receiver,
                                                uint64_t count);
ASYNCDIFF_API asyncdiff_code asyncdiff_wait_free(asyncdiff_channel* channel, uint64_t count);
/* Where a tensor of the bundle in a slot lies, and how many bytes it has. */
ASYNCDIFF_API asyncdiff_code asyncdiff_slot(asyncdiff_channel* channel, int receiver, int slot,
                                            size_t tensor, void** data, size_t* nbytes);
/* The slot may be overwritten. */
ASYNCDIFF_API asyncdiff_code asyncdiff_release(asyncdiff_channel* channel, int receiver, int slot,
                                               void* stream);

#ifdef __cplusplus
}
#endif

#endif
