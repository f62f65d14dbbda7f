#include "factor_memory.h"

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace hra {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kLargePage = size_t{2} << 20;

size_t Up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

class FactorBlock {
 public:
  explicit FactorBlock(size_t bytes) : size_(Up(bytes, kLargePage)) {
    memory_ = ::operator new(size_, std::align_val_t{kLargePage}, std::nothrow);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (memory_ != nullptr) madvise(memory_, size_, MADV_HUGEPAGE);  // without it all works, only slower
#endif
  }
  FactorBlock(const FactorBlock&) = delete;
  FactorBlock& operator=(const FactorBlock&) = delete;
  ~FactorBlock() { ::operator delete(memory_, std::align_val_t{kLargePage}); }

  void* Take(size_t bytes) {
    if (memory_ == nullptr || bytes > size_ - used_) return nullptr;
    void* taken = static_cast<unsigned char*>(memory_) + used_;
    used_ += Up(bytes, kCacheLine);  // at most size_, which is a multiple
    return taken;
  }

 private:
  const size_t size_;
  size_t used_ = 0;
  void* memory_;
};

void* FactorMemory::Reserve(size_t bytes) {
  // The memory that the last node took from; never destroyed, since sessions may outlive the library's statics.
  static auto* lock = new std::mutex;
  static auto* last = new std::weak_ptr<FactorBlock>;
  const std::lock_guard<std::mutex> guard(*lock);
  block_ = last->lock();
  void* taken = block_ == nullptr ? nullptr : block_->Take(bytes);
  if (taken == nullptr) {
    block_ = std::make_shared<FactorBlock>(bytes);
    taken = block_->Take(bytes);
    *last = block_;
  }
  return taken;
}

}  // namespace hra
