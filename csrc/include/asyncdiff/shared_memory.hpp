// Host memory that several processes of one machine map.
#pragma once

#include <cstddef>
#include <string>

#include "asyncdiff/export.hpp"
#include "asyncdiff/memory.hpp"
#include "asyncdiff/processes.hpp"

namespace asyncdiff {

// A zeroed POSIX shared-memory segment with a random name that only this user can open. What is
// left of segments whose process has died is removed on the way, if it was of this PID namespace.
// In a forked child it is let alone.
class ASYNCDIFF_EXPORT SharedSegment {
 public:
  explicit SharedSegment(std::size_t nbytes);
  ~SharedSegment();
  SharedSegment(const SharedSegment&) = delete;
  SharedSegment& operator=(const SharedSegment&) = delete;

  const Buffer& buffer() const { return buffer_; }
  // What another process needs to open it: magic, version, size and name, as bytes.
  std::string handle() const;
  // Takes the name away: whoever has it open keeps it, nobody else can open it, and it ends with
  // the last process that maps it, however that process ends.
  void unlink();

 private:
  std::string name_;
  unsigned forks_;
  Buffer buffer_;
};

// Maps another process's segment. Throws InvalidArgument for bytes that are no handle of this
// version, not of this size, or of anything but such a segment; Error where it cannot be opened.
ASYNCDIFF_EXPORT Buffer open_shared(const std::string& handle, std::size_t nbytes);

// Takes away the names of segments whose process has ended before it could.
ASYNCDIFF_EXPORT void remove_leftovers();

// Makes one segment in process `creator` and maps it in all of the party; collective. Throws the
// same Error in every process if it fails in one.
ASYNCDIFF_EXPORT Buffer share(const Party& party, int creator, std::size_t nbytes);

}  // namespace asyncdiff
