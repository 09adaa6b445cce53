// Scratch memory of an operator call: from an arena of the calling thread, kept between calls.
//
// Fresh memory costs a page fault for every 4 KiB and a TLB entry for every page touched; panels and
// streams are megabytes a call. The arena stays mapped, and asks for huge pages where there are any.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparse_kernels {

// Memory aligned to 64 bytes, valid until `scratch_release` has been called for every piece that this
// thread holds. Throws std::bad_alloc.
void* scratch_allocate(size_t bytes);
void scratch_release();

// Uninitialised array in the arena of the thread that constructs (and must destroy) it.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(scratch_allocate(static_cast<size_t>(count) * sizeof(T)))) {}
  ~Buffer() { scratch_release(); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

}  // namespace sparse_kernels
