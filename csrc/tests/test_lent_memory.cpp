// What is dropped last where it was lent is freed later, and at once in the end.
#include <cstddef>
#include <memory>

#include "../src/lent_memory.hpp"
#include "check.hpp"

using asyncdiff::Buffer;
using asyncdiff::LentMemory;

namespace {

Buffer memory(bool& freed) {
  static std::byte place;
  freed = false;
  return {std::shared_ptr<void>(&place, [&freed](void*) { freed = true; }), &place, 1};
}

void the_last_view_frees_nothing() {
  LentMemory lent;
  bool freed = true;
  Buffer own = memory(freed);
  Buffer view = lent.lend(own), other = lent.lend(own);
  CHECK(view.data == own.data && view.nbytes == own.nbytes && view.device == own.device);
  own = {};
  other = {};
  lent.free_dropped();
  CHECK(!freed);  // there is a view
  view = {};
  CHECK(!freed);
  lent.free_dropped();
  CHECK(freed);
}

void who_owns_it_frees_it() {
  LentMemory lent;
  bool freed = true;
  Buffer own = memory(freed);
  for (int i = 0; i < 3; ++i) lent.lend(own) = {};
  CHECK(!freed);
  own = {};
  CHECK(freed);
}

void in_the_end_it_is_freed_at_once() {
  bool dropped = true, later = true, last = true;
  Buffer outlives;
  {
    LentMemory lent;
    Buffer first = lent.lend(memory(dropped));
    Buffer second = lent.lend(memory(later));
    outlives = lent.lend(memory(last));
    first = {};
    CHECK(!dropped);
    lent.end();
    CHECK(dropped && !later);
    second = {};
    CHECK(later);
  }
  outlives = {};
  CHECK(last);
}

}  // namespace

int main() {
  the_last_view_frees_nothing();
  who_owns_it_frees_it();
  in_the_end_it_is_freed_at_once();
}
