// Preloaded into the test processes (conftest.py): what waits in Mesa's software Vulkan driver sleeps between two looks.
//
// IREE's queue threads wait for any of several semaphores, and lavapipe waits for that by asking each one in turn until
// the clock says that it is too late: threads that spin as long as a device is open, to the end of a test process. With
// another process on the other core a call of a tiny kernel then takes 80 ms (two cores, Mesa 22.3).
//
// Here they sleep at the clock until lavapipe tells somebody of a change, as it does of each: the call takes 1.5 ms, and
// an open device that nobody calls no time. Where they have a lock they do not sleep: who makes the change waits for it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static const int patience = 200;                  // looks at the clock without anything in between
static const long together_ns = 5000;             // that far apart at most
static const struct timespec nap = {0, 5000000};  // what a change costs that nobody tells
static const uintptr_t size = 16 << 20;           // of lavapipe, at most
static _Atomic uintptr_t base;                    // where it is loaded, once it is known to wait
static atomic_uint changes;
static atomic_int sleepers;
static __thread int locks;  // of lavapipe that this thread has

static int in_lavapipe(void *caller) { return base && (uintptr_t)caller - base < size; }

static int waits_in_lavapipe(void *caller) {
  Dl_info found;
  if (in_lavapipe(caller)) return !locks;
  if (dladdr(caller, &found) && found.dli_fname && strstr(found.dli_fname, "libvulkan_lvp"))
    base = (uintptr_t)found.dli_fbase;
  return 0;  // whether it has a lock is counted from now on
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  static int (*ask)(clockid_t, struct timespec *);
  static __thread struct timespec last;
  static __thread int looks;
  static __thread unsigned seen;
  if (!ask) ask = NEXT(clock_gettime);
  int result = ask(clock, now);
  if (clock != CLOCK_MONOTONIC || result) return result;
  long apart = (now->tv_sec - last.tv_sec) * 1000000000L + now->tv_nsec - last.tv_nsec;
  looks = apart < together_ns ? looks + 1 : 0;
  last = *now;
  if (locks) return result;  // and what has changed since the last look without one is still to be seen
  if (looks > patience && waits_in_lavapipe(__builtin_return_address(0))) {
    atomic_fetch_add(&sleepers, 1);
    syscall(SYS_futex, &changes, FUTEX_WAIT_PRIVATE, seen, &nap);
    atomic_fetch_sub(&sleepers, 1);
    result = ask(clock, now);
    last = *now;
  }
  seen = changes;
  return result;
}

int pthread_cond_broadcast(pthread_cond_t *condition) {
  static int (*tell)(pthread_cond_t *);
  if (!tell) tell = (__typeof__(tell))dlvsym(RTLD_NEXT, "pthread_cond_broadcast", "GLIBC_2.3.2");
  if (!tell) tell = NEXT(pthread_cond_broadcast);  // x86-64 alone has an older one too
  int result = tell(condition);
  atomic_fetch_add(&changes, 1);
  if (sleepers) syscall(SYS_futex, &changes, FUTEX_WAKE_PRIVATE, INT_MAX);
  return result;
}

int pthread_mutex_lock(pthread_mutex_t *mutex) {
  static int (*lock)(pthread_mutex_t *);
  if (!lock) lock = NEXT(pthread_mutex_lock);
  int result = lock(mutex);
  if (in_lavapipe(__builtin_return_address(0))) locks++;
  return result;
}

int pthread_mutex_unlock(pthread_mutex_t *mutex) {
  static int (*unlock)(pthread_mutex_t *);
  if (!unlock) unlock = NEXT(pthread_mutex_unlock);
  if (in_lavapipe(__builtin_return_address(0)) && locks) locks--;
  return unlock(mutex);
}
