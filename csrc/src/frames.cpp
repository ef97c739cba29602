#include "frames.hpp"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "sha256.hpp"

namespace asyncdiff {

namespace {

constexpr std::size_t kHead = 8 + 1;
constexpr std::uint64_t kMost = std::uint64_t{1} << 30;

std::string bytes_of(std::uint64_t value) {
  std::string out;
  for (int shift = 0; shift < 64; shift += 8) out += static_cast<char>(value >> shift);
  return out;
}

std::uint64_t number_in(const std::string& bytes, std::size_t at = 0) {
  std::uint64_t out = 0;
  for (std::size_t i = 0; i < 8; ++i) {
    out |= std::uint64_t{static_cast<unsigned char>(bytes[at + i])} << (8 * i);
  }
  return out;
}

}  // namespace

std::string packed(const std::vector<std::string>& texts) {
  std::string out;
  for (const std::string& text : texts) out += bytes_of(text.size()) + text;
  return out;
}

std::vector<std::string> unpacked(const std::string& bytes) {
  std::vector<std::string> out;
  for (std::size_t at = 0; at + 8 <= bytes.size();) {
    const std::uint64_t size = number_in(bytes, at);
    at += 8;
    if (size > bytes.size() - at) throw Error("process 0 sends what nobody can read");
    out.push_back(bytes.substr(at, static_cast<std::size_t>(size)));
    at += static_cast<std::size_t>(size);
  }
  return out;
}

void Wire::tell_end(char kind, int process, const std::string& reason) {
  put(kind, packed({std::to_string(process), reason}));
  write();
}

std::string Wire::proof(char role, std::uint64_t number, const std::string& framed) const {
  return hmac_sha256(key_, role + bytes_of(number) + framed);
}

void Wire::put(char kind, const std::string& payload) {
  const std::string framed = bytes_of(payload.size()) + kind + payload;
  out_.erase(0, done_);
  done_ = 0;
  out_ += framed + proof(role_, sent_++, framed);
}

Progress Wire::write() {
  while (!written()) {
    const Progress progress = write_some(socket_, out_, done_);
    if (progress != Progress::kSome) return progress;
  }
  return Progress::kSome;
}

Progress Wire::read() {
  while (!whole_) {
    std::size_t size = kHead;
    if (in_.size() >= kHead) {
      const std::uint64_t payload = number_in(in_);
      if (payload > kMost) throw Error("a message of " + std::to_string(payload) + " bytes");
      size = kHead + static_cast<std::size_t>(payload) + kDigestBytes;
    }
    if (in_.size() == size && size > kHead) {
      const std::string framed = in_.substr(0, size - kDigestBytes);
      if (!same_secret(in_.substr(framed.size()), proof(their_role_, received_++, framed))) {
        throw Error("a message that somebody else has changed");
      }
      whole_ = true;
      break;
    }
    const Progress progress = read_some(socket_, in_, size);
    if (progress != Progress::kSome) return progress;
  }
  return Progress::kSome;
}

Frame Wire::take() {
  Frame out{in_[8], in_.substr(kHead, in_.size() - kHead - kDigestBytes)};
  in_.clear();
  whole_ = false;
  return out;
}

}  // namespace asyncdiff
