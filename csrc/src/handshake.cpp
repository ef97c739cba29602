#include "handshake.hpp"

#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "asyncdiff/errors.hpp"
#include "sha256.hpp"

namespace asyncdiff::handshake {

namespace {

const std::string kMagic("asyncdiff-meet-1", 16);
constexpr std::size_t kReasonBytes = 255;

std::string random_bytes() {
  std::string out(32, '\0');
  if (getrandom(out.data(), out.size(), 0) != static_cast<ssize_t>(out.size())) {
    throw Error(std::string("getting random bytes: ") + std::strerror(errno));
  }
  return out;
}

std::string bytes_of(std::uint32_t value) {
  std::string out;
  for (int shift = 0; shift < 32; shift += 8) out += static_cast<char>(value >> shift);
  return out;
}

std::uint32_t number_at(const std::string& bytes, std::size_t at) {
  std::uint32_t out = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    out |= std::uint32_t{static_cast<unsigned char>(bytes[at + i])} << (8 * i);
  }
  return out;
}

// What a proof is of: who says it, and all that was said before.
std::string proof(const std::string& key, const char* what, const std::string& said) {
  return hmac_sha256(key, std::string("asyncdiff ") + what + '\0' + said);
}

}  // namespace

std::string hello() { return kMagic + random_bytes(); }

bool is_hello(const std::string& bytes) {
  return bytes.size() == kHelloBytes && bytes.compare(0, kMagic.size(), kMagic) == 0;
}

std::string join(const std::string& key, const std::string& hello_bytes, std::uint32_t process,
                 std::uint32_t processes) {
  const std::string said = kMagic + random_bytes() + bytes_of(process) + bytes_of(processes);
  return said + proof(key, "join", hello_bytes + said);
}

Joining read_join(const std::string& key, const std::string& hello_bytes,
                  const std::string& join_bytes) {
  if (join_bytes.size() != kJoinBytes) return {false, 0, 0};
  const std::string said = join_bytes.substr(0, kJoinBytes - kDigestBytes);
  const bool proven =
      said.compare(0, kMagic.size(), kMagic) == 0 &&
      same_secret(join_bytes.substr(said.size()), proof(key, "join", hello_bytes + said));
  return {proven, number_at(said, 48), number_at(said, 52)};
}

std::string answer(const std::string& key, const std::string& hello_bytes,
                   const std::string& join_bytes, const std::string& refusal) {
  std::string said(1, refusal.empty() ? 'w' : 'r');
  said += refusal.substr(0, kReasonBytes);
  said.resize(1 + kReasonBytes, '\0');
  return said + proof(key, "answer", hello_bytes + join_bytes + said);
}

std::string other_key() {
  std::string out = "k";
  out.resize(kAnswerBytes, '\0');
  return out;
}

Answer read_answer(const std::string& key, const std::string& hello_bytes,
                   const std::string& join_bytes, const std::string& bytes) {
  if (bytes.size() != kAnswerBytes) return {false, ""};
  const std::string said = bytes.substr(0, 1 + kReasonBytes);
  const bool proven =
      same_secret(bytes.substr(said.size()), proof(key, "answer", hello_bytes + join_bytes + said));
  const std::string reason = said.substr(1, said.find('\0') - 1);
  return {proven, said[0] == 'w' ? "" : reason.empty() ? "no reason was given" : reason};
}

std::string session_key(const std::string& key, const std::string& hello_bytes,
                        const std::string& join_bytes) {
  return proof(key, "session", hello_bytes + join_bytes);
}

}  // namespace asyncdiff::handshake
