#include "greeting.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/shared_memory.hpp"

namespace asyncdiff {

namespace {

constexpr char kMagic[8] = {'a', 's', 'y', 'n', 'c', 'd', 'i', 'f'};
constexpr std::uint32_t kVersion = 2;

struct Head {
  char magic[8];
  std::uint32_t version;
  std::uint32_t reserved;
  Identity identity;
};

// After the head, and alone in the second round: what the process has to say, or what failed.
constexpr char kSaid = '=';
constexpr char kFailed = '!';

// What went wrong in this process or, told by its answer, in another one.
void throw_any(const std::exception_ptr& mine, const std::vector<std::string>& answers) {
  if (mine) std::rethrow_exception(mine);
  for (std::size_t p = 0; p < answers.size(); ++p) {
    if (answers[p].compare(0, 1, std::string(1, kSaid)) == 0) continue;
    const std::string text = answers[p].compare(0, 1, std::string(1, kFailed)) == 0
                                 ? answers[p].substr(1)
                                 : "it says nothing that this version knows";
    throw Error("process " + std::to_string(p) + " could not make a fabric: " + text);
  }
}

std::string answer(const std::function<std::string()>& work, std::exception_ptr& error) {
  try {
    return kSaid + work();
  } catch (const std::exception& e) {
    error = std::current_exception();
    return kFailed + std::string(e.what());
  }
}

}  // namespace

Identity identity_in(const std::string& bytes, int process, const Identity& own) {
  const std::string who = "process " + std::to_string(process);
  Head head;
  if (bytes.size() < sizeof head || std::memcmp(bytes.data(), kMagic, sizeof kMagic) != 0) {
    throw InvalidArgument(who + " does not greet as a fabric does: all processes make the same " +
                          "fabrics, in the same order, with the same asyncdiff");
  }
  std::memcpy(&head, bytes.data(), sizeof head);
  if (head.version != kVersion) {
    throw InvalidArgument(who + " greets in version " + std::to_string(head.version) +
                          ", this process in version " + std::to_string(kVersion) +
                          ": all processes need the same asyncdiff");
  }
  head.identity.boot[sizeof head.identity.boot - 1] = '\0';
  head.identity.host[sizeof head.identity.host - 1] = '\0';
  const std::string boot = head.identity.boot;
  if (!boot.empty() && own.boot[0] != '\0' && boot != own.boot) {
    throw InvalidArgument(who + " runs on another host, '" + head.identity.host +
                          "'; this one is '" + own.host +
                          "': the processes of a fabric share the memory of one machine");
  }
  return head.identity;
}

Greeting greet(Rendezvous& rendezvous, std::size_t nbytes) {
  Head head{};
  std::memcpy(head.magic, kMagic, sizeof kMagic);
  head.version = kVersion;
  head.identity = own_identity();
  std::unique_ptr<SharedSegment> segment;
  std::exception_ptr error;
  const bool first = rendezvous.process() == 0;
  const std::string mine = answer(
      [&] {
        if (!first) return std::string();
        segment = std::make_unique<SharedSegment>(nbytes);
        return segment->handle();
      },
      error);
  const auto greetings =
      rendezvous.all_gather(std::string(reinterpret_cast<const char*>(&head), sizeof head) + mine);
  Greeting out;
  std::vector<std::string> answers;
  const std::string opened = answer(
      [&] {
        for (int p = 0; p < rendezvous.processes(); ++p) {
          const std::string& bytes = greetings.at(static_cast<std::size_t>(p));
          out.identities.push_back(identity_in(bytes, p, head.identity));
          answers.push_back(bytes.substr(sizeof head));
        }
        throw_any(error, answers);
        out.memory = first ? segment->buffer() : open_shared(answers[0].substr(1), nbytes);
        return std::string();
      },
      error);
  throw_any(error, rendezvous.all_gather(opened));
  return out;
}

}  // namespace asyncdiff
