/* The control side of the simulated CUDA driver (libsimulated_cuda.so). Plain C: C++ tests find
 * these with dlsym, Python tests with ctypes. The driver side is CUDA's own: cuGetProcAddress_v2
 * and what it hands out. README.md says what is simulated and what counts as a violation. */
#ifndef WEIGHTLIFT_TESTS_SIMULATED_DRIVER_H_
#define WEIGHTLIFT_TESTS_SIMULATED_DRIVER_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { SIM_MAX_DEVICES = 16 };

/* When queued operations run. Every policy is legal: a correct client gets the same bytes. */
enum {
  SIM_EAGER = 0,  /* inside the call that submits them */
  SIM_LAZY = 1,   /* only when a synchronising call needs them: the latest legal moment */
  SIM_RANDOM = 2, /* at each driver call a random number of ready operations */
  SIM_SPLIT = 3,  /* as random, in 4 KiB pieces in any order, interleaved across streams */
  SIM_STALL = 4,  /* one stream moves only when a synchronising call needs it, others eagerly */
  SIM_PCT = 5,    /* random priorities of streams and host with a few random change points */
  SIM_POLICIES = 6
};

/* Time replaces the policy: operations run when their link has had the time to move them. */
enum { SIM_TIME_NONE = 0, SIM_TIME_REAL = 1, SIM_TIME_VIRTUAL = 2 };

/* How a hidden symbol is missing: real drivers return CUDA_ERROR_NOT_FOUND, cuda.h documents
 * CUDA_SUCCESS with a null pointer. */
enum { SIM_HIDE_NOT_FOUND = 0, SIM_HIDE_NULL = 1 };

/* What is alive. "External" is what the sim_* functions made in torch's place; everything else is
 * the client's own. */
typedef struct SimLedger {
  uint64_t streams;
  uint64_t events;
  uint64_t allocations;
  uint64_t allocated_bytes;
  uint64_t external_allocations;
  uint64_t external_bytes;
  uint64_t pinned_ranges;
  uint64_t pinned_bytes;
  uint64_t contexts; /* retains not yet released, over all devices */
  uint64_t pushed;   /* pushes not yet popped, over all threads */
  uint64_t modules;
  uint64_t pending;    /* operations submitted and not yet executed */
  uint64_t operations; /* submitted since the reset */
  uint64_t calls;      /* since the reset, those aside that "any function" leaves alone */
  uint64_t peak_pinned_bytes;
  uint64_t peak_device_bytes[SIM_MAX_DEVICES]; /* client and external together */
  uint64_t peak_client_bytes[SIM_MAX_DEVICES]; /* the client's own */
} SimLedger;

typedef struct SimLink {
  uint64_t bytes_to_device;
  uint64_t bytes_to_host;
  uint64_t bytes_of_pages; /* to the device from memory that is not pinned */
  double first_start;      /* seconds on sim_now's clock; 0 before the first copy */
  double last_finish;
} SimLink;

/* Forgets everything (handles of before are invalid from now on) and starts with `devices` devices
 * of 8 GiB, all faults, links and times off. 0..SIM_MAX_DEVICES devices. */
void sim_reset(int devices, uint64_t seed, int policy);
void sim_set_policy(uint64_t seed, int policy); /* what is queued stays queued */

/* Memory as torch's caching allocator would hand it out: 512-byte aligned, poisoned, 0 when the
 * device is full. Holds the device's primary context, as torch does. */
uint64_t sim_alloc(int device, uint64_t bytes);
/* Freed now: every operation on it must be known complete to the host. */
int sim_free(uint64_t address);
/* Freed in stream order, as torch's allocator does: every operation on it must be ordered before
 * this point of the stream. */
int sim_free_on(int device, uint64_t stream, uint64_t address);
void sim_hold_context(int device);      /* cuInit and a retain, as torch.cuda.init() would */
uint64_t sim_stream_create(int device); /* a stream of torch's: non-blocking, external */
int sim_stream_destroy(uint64_t stream);
void sim_synchronize(int device); /* torch.cuda.synchronize() */
/* The previous owner's kernel: a write of `bytes` bytes of 0xEE that is still queued on `stream`
 * (0: the device's default stream) when the memory is handed out. */
int sim_pending_write(int device, uint64_t stream, uint64_t address, uint64_t bytes);

/* Stream capture by the calling thread, as torch.cuda.graph does it; the modes are CUDA's. What is
 * queued on a capturing stream never runs. `sim_end_capture` says whether nothing broke it. */
enum { SIM_CAPTURE_GLOBAL = 0, SIM_CAPTURE_THREAD_LOCAL = 1, SIM_CAPTURE_RELAXED = 2 };
int sim_begin_capture(int device, uint64_t stream, int mode);
int sim_end_capture(int device, uint64_t stream);

/* By the host, now: violations where the host does not know what was queued to be complete. */
int sim_read_device(uint64_t address, void* target, uint64_t bytes);
int sim_write_device(uint64_t address, const void* source, uint64_t bytes);
/* In stream order, then waited for: what `tensor.cpu()` on that stream sees. */
int sim_read_on(int device, uint64_t stream, uint64_t address, void* target, uint64_t bytes);

void sim_set_memory(int device, uint64_t bytes); /* out of memory beyond it */
void sim_set_attribute(int device, int attribute, int value);
void sim_set_version(int version); /* 13000 is CUDA 13.0 */
void sim_hide_symbol(const char* name, int how);
/* The n-th call (1 is the next) of `name`, or of any function when null, returns `code`; a release
 * releases nevertheless, as CUDA's do when they report an earlier launch's error. "Any function"
 * leaves cuGetProcAddress, cuGetError* and cuCtxPushCurrent alone. `sticky`: the context (all of
 * them where the function needs none) is lost, and every later call on it returns `code` too. The
 * name "(operation)" is the n-th executed copy or kernel: it fails on the device, so its context is
 * lost whatever `sticky` says. */
void sim_fail_call(const char* name, uint64_t n, int code, int sticky);
uint64_t sim_faults_left(void); /* of sim_fail_call, those that have not struck */
void sim_exit(void);            /* the driver is gone, as in a process that exits */

void sim_set_time(int mode);
double sim_now(void);                                   /* seconds */
void sim_set_link(int device, double bytes_per_second); /* each direction; 0: unlimited */
void sim_set_host_memory(double bytes_per_second);      /* all links together; 0: unlimited */
void sim_link(int device, SimLink* link);
/* What the host spends: in each call that queues something (copies, kernels, events, waits of
 * streams), and from the moment that an operation has run until a thread that slept for it goes
 * on. A real driver takes microseconds for the first and up to 50 for the second. */
void sim_set_costs(double queueing_seconds, double waking_seconds);
/* Calls that wait for the device return no more, and those that ask are told "not yet", so that
 * what is queued meanwhile is queued with all copies in flight; what runs, the policy says. Until
 * it is let go of (0), or so many seconds of real time have passed, for a client that waits for
 * what is held would wait for ever. Says whether it was held until now. */
int sim_hold(double seconds);
/* What is a violation unless a test asks for it: streams that wait for the default stream, and
 * events that are waited for without CU_EVENT_BLOCKING_SYNC. */
void sim_allow(int blocking_streams, int spinning_events);
void sim_set_hashing(int on); /* of host bytes in flight; on unless turned off for timed runs */

void sim_ledger(SimLedger* ledger);
uint64_t sim_calls(const char* name);
void sim_drain(void); /* runs all that is queued; teaches the host nothing */
uint64_t sim_violations(void);
/* The text lives until the next reset; null beyond the last (the first 1,000 are kept). */
const char* sim_violation_text(uint64_t index);

/* An image that cuModuleLoadData takes; it holds weightlift_scatter. Fat binaries, ELF and PTX are
 * taken for it too, anything else is CUDA_ERROR_INVALID_IMAGE. */
const void* sim_image(void);

#ifdef __cplusplus
}
#endif

#endif /* WEIGHTLIFT_TESTS_SIMULATED_DRIVER_H_ */
