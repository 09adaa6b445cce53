// What the drivers ask of the machine: threads, forks, cache.
#include <pthread.h>
#include <unistd.h>

#include "driver.h"

namespace sparse_kernels {
namespace {

bool is_child = false;
// Registered when the module loads. A forked child in which torch was told to use one thread (what
// DataLoader workers do) would be safe either way; running serially there is the same.
const int registered = pthread_atfork(nullptr, nullptr, [] { is_child = true; });

}  // namespace

bool forked() { return is_child && registered == 0; }

int64_t second_level_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (size > 0) return size;
#endif
  return 1 << 20;
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace sparse_kernels
