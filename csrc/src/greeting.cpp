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
constexpr std::uint32_t kVersion = 3;

struct Head {
  char magic[8];
  std::uint32_t version;
  std::uint32_t reserved;
  Identity identity;
};

// After the head, and alone in later rounds: what the process has to say, or what failed.
constexpr char kWell = '=';
constexpr char kFailed = '!';
constexpr char kMissed = '?';  // because of a process that did not come, whose number follows

// What went wrong in this process or, told by its answer, in another one.
void throw_any(const std::exception_ptr& mine, const std::vector<std::string>& answers) {
  if (mine) std::rethrow_exception(mine);
  for (std::size_t p = 0; p < answers.size(); ++p) {
    if (answers[p].compare(0, 1, std::string(1, kWell)) == 0) continue;
    const std::size_t end = answers[p].find('\n');
    if (answers[p].compare(0, 1, std::string(1, kMissed)) == 0 && end != std::string::npos) {
      throw CollectiveTimeout(std::atoi(answers[p].c_str() + 1), {}, answers[p].substr(end + 1));
    }
    const std::string text = answers[p].compare(0, 1, std::string(1, kFailed)) == 0
                                 ? answers[p].substr(1)
                                 : "it says nothing that this version knows";
    throw Error("process " + std::to_string(p) + " could not make a fabric: " + text);
  }
}

std::string answer(const std::function<std::string()>& work, std::exception_ptr& error) {
  try {
    return kWell + work();
  } catch (const CollectiveTimeout& e) {
    error = std::current_exception();
    return kMissed + std::to_string(e.process) + "\n" + e.what();
  } catch (const std::exception& e) {
    error = std::current_exception();
    return kFailed + std::string(e.what());
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
        out.memory =
            segment
                ? segment->buffer()
                : open_shared(handles[static_cast<std::size_t>(first - out.hosts.begin())], nbytes);
        out.connections = crossing->connect(offers, seconds);
        return std::string();
      },
      error);
  throw_any(error, rendezvous.all_gather(made));
  return out;
}

}  // namespace asyncdiff
