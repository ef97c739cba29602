// How two processes prove to each other that they know the key of a rendezvous. Messages have fixed
// sizes, so that nobody has to believe what a stranger says of one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace asyncdiff::handshake {

// Process 0 says hello, with what it has chosen at random.
constexpr std::size_t kHelloBytes = 16 + 32;
std::string hello();
// Whether these bytes are one.
bool is_hello(const std::string& bytes);

// Another process answers with what it has chosen, who it is, and a proof.
constexpr std::size_t kJoinBytes = 16 + 32 + 4 + 4 + 32;
std::string join(const std::string& key, const std::string& hello, std::uint32_t process,
                 std::uint32_t processes);

struct Joining {
  bool proven;
  std::uint32_t process;
  std::uint32_t processes;
};
Joining read_join(const std::string& key, const std::string& hello, const std::string& join);

// Process 0 says whether that process is welcome (no reason), and proves that it knows the key,
// too.
constexpr std::size_t kAnswerBytes = 1 + 255 + 32;
std::string answer(const std::string& key, const std::string& hello, const std::string& join,
                   const std::string& refusal);
// To who does not know the key: nothing to prove.
std::string other_key();

struct Answer {
  bool proven;
  std::string refusal;
};
Answer read_answer(const std::string& key, const std::string& hello, const std::string& join,
                   const std::string& bytes);

// The key of what is said between the two from then on.
std::string session_key(const std::string& key, const std::string& hello, const std::string& join);

}  // namespace asyncdiff::handshake
