#include "scratch.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparse_kernels {
namespace {

constexpr size_t kPage = size_t{2} << 20;   // a huge page
constexpr size_t kKeep = size_t{64} << 20;  // bytes that a thread keeps between calls

struct Chunk {
  char* base;
  size_t size, used;
};

class Arena {
 public:
  ~Arena() { drop(); }

  void* allocate(size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (chunks_.empty() || chunks_.back().size - chunks_.back().used < bytes) add(bytes);
    Chunk& chunk = chunks_.back();
    void* piece = chunk.base + chunk.used;
    chunk.used += bytes;
    ++live_;
    return piece;
  }

  void release() {
    if (--live_ > 0) return;
    size_t total = 0;
    for (const Chunk& chunk : chunks_) total += chunk.size;
    // Several chunks mean that the call outgrew the arena: the next one gets it in one piece. It is taken
    // then: this runs in destructors, which must not throw.
    if (chunks_.size() > 1 || total > kKeep) {
      drop();
      wanted_ = total <= kKeep ? total : 0;
    }
    if (!chunks_.empty()) chunks_.back().used = 0;
  }

 private:
  void add(size_t bytes) {
    const size_t size = (std::max(bytes, wanted_) + kPage - 1) / kPage * kPage;
    void* base = std::aligned_alloc(kPage, size);
    if (base == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    madvise(base, size, MADV_HUGEPAGE);  // a wish: nothing depends on it
#endif
    chunks_.push_back({static_cast<char*>(base), size, 0});
    wanted_ = 0;
  }

  void drop() {
    for (const Chunk& chunk : chunks_) std::free(chunk.base);
    chunks_.clear();
  }

  std::vector<Chunk> chunks_;
  int64_t live_ = 0;
  size_t wanted_ = 0;  // bytes of the next chunk at least
};

thread_local Arena arena;

}  // namespace

void* scratch_allocate(size_t bytes) { return arena.allocate(bytes); }

void scratch_release() { arena.release(); }

}  // namespace sparse_kernels
