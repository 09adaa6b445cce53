// Thread count and fork detection.
#include <pthread.h>

#include "driver.h"

namespace sparse_kernels {
namespace {

bool is_child = false;
// Registered when the module loads. A forked child in which torch was told to use one thread (what
// DataLoader workers do) would be safe either way; running serially there is the same.
const int registered = pthread_atfork(nullptr, nullptr, [] { is_child = true; });

}  // namespace

bool forked() { return is_child && registered == 0; }

int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace sparse_kernels
