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
  Buffer buffer_;
};

// Maps another process's segment. Throws InvalidArgument for bytes that are no handle of this
// version or not of this size, Error where the segment cannot be opened.
Buffer open_shared(const std::string& handle, std::size_t nbytes);

// Makes one segment in process `creator` and maps it in all processes; collective. Throws the same
// Error in every process if it fails in one.
ASYNCDIFF_EXPORT Buffer share(const Processes& processes, int creator, std::size_t nbytes);

}  // namespace asyncdiff
