#include "greeting.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/shared_memory.hpp"
#include "crossing.hpp"

namespace asyncdiff {

namespace {

constexpr char kMagic[8] = {'a', 's', 'y', 'n', 'c', 'd', 'i', 'f'};
constexpr std::uint32_t kVersion = 4;

struct Head {
  char magic[8];
  std::uint32_t version;
  std::uint32_t reserved;
  Identity identity;
};

// After the head, and alone in later rounds: what the process has to say, or what failed.
constexpr char kWell = '=';
constexpr char kFailed = '!';
// Because of a process that did not come, or that has ended, whose number follows.
constexpr char kMissed = '?';
constexpr char kLost = '-';

bool is(char kind, const std::string& answer) { return !answer.empty() && answer[0] == kind; }

// Throws an error of the kind if the answer is of it.
template <class Kind>
void throw_of(char kind, const std::string& answer) {
  const std::size_t end = answer.find('\n');
  if (!is(kind, answer) || end == std::string::npos) return;
  throw Kind(std::atoi(answer.c_str() + 1), {}, answer.substr(end + 1));
}

// What went wrong in this process or, told by its answer, in another one. That one has ended is the
// reason of all else, and not all can know it by themselves.
void throw_any(const std::exception_ptr& mine, const std::vector<std::string>& answers) {
  for (const std::string& answer : answers) throw_of<ProcessLost>(kLost, answer);
  if (mine) std::rethrow_exception(mine);
  for (std::size_t p = 0; p < answers.size(); ++p) {
    if (is(kWell, answers[p])) continue;
    throw_of<CollectiveTimeout>(kMissed, answers[p]);
    const std::string text =
        is(kFailed, answers[p]) ? answers[p].substr(1) : "it says nothing that this version knows";
    throw Error("process " + std::to_string(p) + " could not make a fabric: " + text);
  }
}

std::string answer(const std::function<std::string()>& work, std::exception_ptr& error) {
  try {
    return kWell + work();
  } catch (const ProcessLost& e) {
    error = std::current_exception();
    return kLost + std::to_string(e.process) + "\n" + e.what();
  } catch (const CollectiveTimeout& e) {
    error = std::current_exception();
    return kMissed + std::to_string(e.process) + "\n" + e.what();
  } catch (const std::exception& e) {
    error = std::current_exception();
    return kFailed + std::string(e.what());
  }
}

// Work that fails where another process has ended fails because of that: survivors take the names
// of its memory away.
template <class Work>
void among(const std::vector<Identity>& identities, std::size_t me, const Work& work) {
  try {
    work();
  } catch (const Error&) {
    for (std::size_t p = 0; p < identities.size(); ++p) {
      if (!has_ended(identities[p], identities[me])) continue;
      throw ProcessLost(static_cast<int>(p), {},
                        "process " + std::to_string(p) +
                            " has ended while a fabric was made: it was killed, or crashed");
    }
    throw;
  }
}

// What a process offers: a handle of memory, and how to reach it.
std::vector<std::string> parts_of(const std::string& bytes, std::size_t process) {
  std::vector<std::string> out;
  try {
    out = unpacked(bytes.substr(1));
  } catch (const Error&) {
    out.clear();
  }
  if (out.size() != 2) {
    throw Error("process " + std::to_string(process) + " says nothing that this version knows");
  }
  return out;
}

}  // namespace

Identity identity_in(const std::string& bytes, int process) {
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
  head.identity.machine[sizeof head.identity.machine - 1] = '\0';
  head.identity.host[sizeof head.identity.host - 1] = '\0';
  return head.identity;
}

std::vector<int> hosts_of(const std::vector<Identity>& identities) {
  std::map<std::string, int> numbers;
  std::vector<int> out;
  for (const Identity& one : identities) {
    out.push_back(numbers.emplace(one.machine, static_cast<int>(numbers.size())).first->second);
  }
  return out;
}

Greeting greet(Rendezvous& rendezvous, std::size_t nbytes, double seconds) {
  const int own = rendezvous.process();
  const auto me = static_cast<std::size_t>(own);
  Head head{};
  std::memcpy(head.magic, kMagic, sizeof kMagic);
  head.version = kVersion;
  std::exception_ptr error;
  const std::string mine = answer(
      [&] {
        head.identity = own_identity();
        return std::string();
      },
      error);
  const auto greetings =
      rendezvous.all_gather(std::string(reinterpret_cast<const char*>(&head), sizeof head) + mine);
  Greeting out;
  std::unique_ptr<SharedSegment> segment;
  std::unique_ptr<Crossing> crossing;
  const std::string offered = answer(
      [&] {
        std::vector<std::string> answers;
        for (std::size_t p = 0; p < greetings.size(); ++p) {
          out.identities.push_back(identity_in(greetings[p], static_cast<int>(p)));
          answers.push_back(greetings[p].substr(sizeof head));
        }
        throw_any(error, answers);
        out.hosts = hosts_of(out.identities);
        crossing = std::make_unique<Crossing>(own, out.hosts);
        // The first process of a host makes the memory of all of its processes.
        const auto first = std::find(out.hosts.begin(), out.hosts.end(), out.hosts[me]);
        if (static_cast<std::size_t>(first - out.hosts.begin()) == me) {
          segment = std::make_unique<SharedSegment>(nbytes);
        }
        return packed({segment ? segment->handle() : "", crossing->offer()});
      },
      error);
  const auto all = rendezvous.all_gather(offered);
  const std::string made = answer(
      [&] {
        throw_any(error, all);
        std::vector<std::string> handles, offers;
        for (std::size_t p = 0; p < all.size(); ++p) {
          const std::vector<std::string> parts = parts_of(all[p], p);
          handles.push_back(parts[0]);
          offers.push_back(parts[1]);
        }
        const auto first = std::find(out.hosts.begin(), out.hosts.end(), out.hosts[me]);
        const auto maker = static_cast<std::size_t>(first - out.hosts.begin());
        among(out.identities, me, [&] {
          out.memory = segment ? segment->buffer() : open_shared(handles[maker], nbytes);
          out.connections = crossing->connect(offers, seconds);
        });
        return std::string();
      },
      error);
  throw_any(error, rendezvous.all_gather(made));
  return out;
}

}  // namespace asyncdiff
