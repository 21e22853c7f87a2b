// Preloaded into the test processes (conftest.py): what waits in Mesa's software Vulkan driver sleeps between two looks.
//
// IREE's queue threads wait for any of several semaphores, and lavapipe waits for that by asking each one in turn until
// the clock says that it is too late: three threads that spin as long as a device is open. With another process on the
// other core a call of a tiny kernel then takes 80 ms, and 3 ms when they sleep (two cores, Mesa 22.3).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>
#include <time.h>

static const int patience = 200;          // looks at the clock without anything in between
static const long together_ns = 5000;     // that far apart at most
static const struct timespec nap = {0, 20000};

static int asked_by_lavapipe(void *caller) {
  Dl_info found;
  return dladdr(caller, &found) && found.dli_fname && strstr(found.dli_fname, "libvulkan_lvp");
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  static int (*ask)(clockid_t, struct timespec *);
  static __thread struct timespec last;
  static __thread int looks;
  if (!ask) ask = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  int result = ask(clock, now);
  if (clock != CLOCK_MONOTONIC || result) return result;
  long apart = (now->tv_sec - last.tv_sec) * 1000000000L + now->tv_nsec - last.tv_nsec;
  looks = apart < together_ns ? looks + 1 : 0;
  if (looks > patience && asked_by_lavapipe(__builtin_return_address(0))) {
    nanosleep(&nap, NULL);
    result = ask(clock, now);
  }
  last = *now;
  return result;
}
