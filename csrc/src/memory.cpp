#include "asyncdiff/memory.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

namespace asyncdiff {

Buffer allocate_host(std::size_t nbytes) {
  constexpr std::align_val_t kPage{4096};
  const std::size_t size = std::max<std::size_t>(nbytes, 1);
  void* memory = ::operator new(size, kPage);
  std::memset(memory, 0, size);
  std::shared_ptr<void> owner(memory, [](void* p) { ::operator delete(p, kPage); });
  return {std::move(owner), static_cast<std::byte*>(memory), nbytes, Buffer::kHost};
}

}  // namespace asyncdiff
