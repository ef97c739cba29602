#include "asyncdiff/shared_memory.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "asyncdiff/errors.hpp"
#include "identity.hpp"

namespace asyncdiff {

namespace {

// In /dev/shm: asyncdiff-<PID namespace in hex>-<pid>-<32 random hex digits>
constexpr char kPrefix[] = "asyncdiff-";

struct Handle {
  static constexpr char kMagic[8] = {'a', 's', 'y', 'n', 'c', 'd', 'i', 'f'};
  static constexpr std::uint32_t kVersion = 1;

  char magic[8];
  std::uint32_t version;
  std::uint32_t reserved;
  std::uint64_t nbytes;
  char name[72];
};
// Slash, prefix, 64-bit namespace, dash, 32-bit pid, dash, random digits; and the zero at the end.
static_assert(sizeof(Handle::name) >= 1 + (sizeof kPrefix - 1) + 16 + 1 + 10 + 1 + 32 + 1);

[[noreturn]] void fail(const std::string& what) { throw Error(what + ": " + std::strerror(errno)); }

// What the names of all processes of a namespace begin with.
std::string prefix_of(std::uint64_t pid_namespace) {
  char text[17];
  std::snprintf(text, sizeof text, "%" PRIx64, pid_namespace);
  return kPrefix + std::string(text) + "-";
}

std::string random_name() {
  unsigned char bytes[16];
  if (getrandom(bytes, sizeof bytes, 0) != sizeof bytes) fail("getting random bytes");
  std::string name = "/" + prefix_of(pid_namespace()) + std::to_string(getpid()) + "-";
  for (unsigned char byte : bytes) {
    char text[3];
    std::snprintf(text, sizeof text, "%02x", byte);
    name += text;
  }
  return name;
}

Buffer map(int descriptor, std::size_t nbytes) {
  const std::size_t size = std::max<std::size_t>(nbytes, 1);
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (memory == MAP_FAILED) fail("mapping shared memory of " + std::to_string(size) + " bytes");
  std::shared_ptr<void> owner(memory, [size](void* p) { munmap(p, size); });
  return {std::move(owner), static_cast<std::byte*>(memory), nbytes, Buffer::kHost};
}

// Whether a segment of ours could have this name.
bool is_ours(const std::string& name) {
  std::size_t at = 0;
  const auto skip = [&](const std::string& text) {
    const bool there = name.compare(at, text.size(), text) == 0;
    at += text.size();
    return there;
  };
  const auto digits = [&](const char* allowed, std::size_t least, std::size_t most) {
    const std::size_t end = std::min(name.find_first_not_of(allowed, at), name.size());
    const std::size_t count = end - at;
    at = end;
    return count >= least && count <= most;
  };
  constexpr char kHex[] = "0123456789abcdef";
  return skip(std::string("/") + kPrefix) && digits(kHex, 1, 16) && skip("-") &&
         digits("0123456789", 1, 10) && skip("-") && digits(kHex, 32, 32) && at == name.size();
}

}  // namespace

// A process of another namespace cannot be asked whether it lives.
void remove_leftovers() {
  const std::uint64_t here = pid_namespace();
  if (here == 0) return;
  const std::string prefix = prefix_of(here);
  DIR* folder = opendir("/dev/shm");
  if (folder == nullptr) return;
  while (const dirent* entry = readdir(folder)) {
    const std::string name = entry->d_name;
    if (name.compare(0, prefix.size(), prefix) != 0) continue;
    const long pid = std::strtol(name.c_str() + prefix.size(), nullptr, 10);
    // Another user's segments cannot be removed anyway.
    if (pid > 0 && !lives(static_cast<std::int32_t>(pid))) {
      shm_unlink(("/" + name).c_str());
    }
  }
  closedir(folder);
}

SharedSegment::SharedSegment(std::size_t nbytes) : name_(random_name()), forks_(forks()) {
  remove_leftovers();
  const int descriptor = shm_open(name_.c_str(), O_CREAT | O_EXCL | O_RDWR, 0600);
  if (descriptor < 0) fail("making the shared memory " + name_);
  try {
    const auto size = static_cast<off_t>(std::max<std::size_t>(nbytes, 1));
    // Allocated now: a write to memory that is not there would end the process with SIGBUS.
    const int code = posix_fallocate(descriptor, 0, size);
    if (code != 0) {
      errno = code;
      fail("taking " + std::to_string(size) + " bytes of shared memory (see df /dev/shm)");
    }
    buffer_ = map(descriptor, nbytes);
  } catch (...) {
    close(descriptor);
    unlink();
    throw;
  }
  close(descriptor);
}

SharedSegment::~SharedSegment() { unlink(); }

void SharedSegment::unlink() {
  if (!name_.empty() && forks() == forks_) shm_unlink(name_.c_str());
  name_.clear();
}

std::string SharedSegment::handle() const {
  Handle handle{};
  std::memcpy(handle.magic, Handle::kMagic, sizeof handle.magic);
  handle.version = Handle::kVersion;
  handle.nbytes = buffer_.nbytes;
  std::snprintf(handle.name, sizeof handle.name, "%s", name_.c_str());
  return std::string(reinterpret_cast<const char*>(&handle), sizeof handle);
}

Buffer open_shared(const std::string& bytes, std::size_t nbytes) {
  Handle handle;
  if (bytes.size() != sizeof handle) throw InvalidArgument("these bytes are no memory handle");
  std::memcpy(&handle, bytes.data(), sizeof handle);
  if (std::memcmp(handle.magic, Handle::kMagic, sizeof handle.magic) != 0) {
    throw InvalidArgument("these bytes are no memory handle");
  }
  if (handle.version != Handle::kVersion) {
    throw InvalidArgument("the memory handle has version " + std::to_string(handle.version) +
                          ", this is " + std::to_string(Handle::kVersion) +
                          ": all processes need the same asyncdiff");
  }
  if (handle.nbytes != nbytes) {
    throw InvalidArgument("the shared memory has " + std::to_string(handle.nbytes) +
                          " bytes where " + std::to_string(nbytes) +
                          " are expected: all processes must make the same channels in order");
  }
  handle.name[sizeof handle.name - 1] = '\0';
  const std::string name = handle.name;
  if (!is_ours(name)) throw InvalidArgument("the memory handle names what is none of asyncdiff's");
  const int descriptor = shm_open(name.c_str(), O_RDWR | O_NOFOLLOW, 0);
  if (descriptor < 0 && errno == ENOENT) {
    throw Error("the shared memory " + name +
                " of another process is not in this one's /dev/shm: the processes run in "
                "containers that have a /dev/shm each. Give them one (docker run --ipc=host, or "
                "--ipc=container:NAME), or say that they are different hosts (ASYNCDIFF_HOST); or "
                "the process that made it has ended");
  }
  if (descriptor < 0) fail("opening the shared memory " + name);
  struct stat status{};
  const bool known = fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
  const bool enough =
      known && static_cast<std::size_t>(status.st_size) >= std::max<std::size_t>(nbytes, 1);
  try {
    if (!known || status.st_uid != geteuid()) {
      throw InvalidArgument("the shared memory " + name + " is not this user's");
    }
    if (!enough) throw Error("the shared memory " + name + " is too small");
    Buffer out = map(descriptor, nbytes);
    close(descriptor);
    return out;
  } catch (...) {
    close(descriptor);
    throw;
  }
}

Buffer share(const Party& party, int creator, std::size_t nbytes) {
  std::unique_ptr<SharedSegment> segment;
  Buffer out;
  std::string handle;
  const bool mine = party.process() == creator;
  party.together("make shared memory", [&] {
    if (!mine) return;
    segment = std::make_unique<SharedSegment>(nbytes);
    handle = segment->handle();
    out = segment->buffer();
  });
  const auto handles = party.all_gather(handle);
  party.together("open shared memory", [&] {
    if (!mine) out = open_shared(handles.at(static_cast<std::size_t>(creator)), nbytes);
  });
  if (segment) segment->unlink();
  return out;
}

}  // namespace asyncdiff
