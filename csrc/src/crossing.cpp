#include "crossing.hpp"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "addresses.hpp"
#include "asyncdiff/errors.hpp"
#include "door.hpp"
#include "handshake.hpp"
#include "sha256.hpp"

namespace asyncdiff {

namespace {

// Seconds that one address may take, of several.
constexpr double kTry = 2;
// Seconds between two looks whether there is still somebody to wait for.
constexpr double kLook = 0.05;

struct Offer {
  std::string secret;
  int port;
  std::vector<std::string> addresses;
};

Offer read_offer(const std::string& bytes, int process) {
  const std::vector<std::string> parts = unpacked(bytes);
  if (parts.size() < 3 || parts[0].empty()) {
    throw Error("process " + std::to_string(process) + " does not say how to reach it");
  }
  return {parts[0], std::atoi(parts[1].c_str()), {parts.begin() + 2, parts.end()}};
}

}  // namespace

Crossing::Crossing(int process, std::vector<int> hosts)
    : process_(process), hosts_(std::move(hosts)) {
  const bool several = std::any_of(hosts_.begin(), hosts_.end(),
                                   [this](int host) { return host != hosts_.front(); });
  if (!several) return;
  addresses_ = own_addresses();
  listener_ = listen_at_own(addresses_, port_);
  secret_ = handshake::hello();  // is random
}

bool Crossing::other_host(int process) const {
  return hosts_[static_cast<std::size_t>(process)] != hosts_[static_cast<std::size_t>(process_)];
}

std::string Crossing::offer() const {
  if (!listener_.open()) return "";
  std::vector<std::string> parts = {secret_, std::to_string(port_)};
  parts.insert(parts.end(), addresses_.begin(), addresses_.end());
  return packed(parts);
}

std::string Crossing::key_of(const std::vector<std::string>& offers, int listener) {
  return hmac_sha256(offers.at(static_cast<std::size_t>(listener)),
                     "asyncdiff crossing" + packed(offers));
}

std::map<int, Wire> Crossing::connect(const std::vector<std::string>& offers, double seconds,
                                      const std::function<void()>& check) {
  std::map<int, Wire> out;
  if (!listener_.open()) return out;
  const Clock::time_point limit = after(seconds);
  const int count = static_cast<int>(hosts_.size());
  // In order: process 0 waits for nobody before it lets others in, the next ones for it alone.
  for (int p = 0; p < process_; ++p) {
    if (!other_host(p)) continue;
    const Offer offer = read_offer(offers.at(static_cast<std::size_t>(p)), p);
    const std::string key = key_of(offers, p);
    std::string tried;
    std::size_t next = 0;
    while (out.count(p) == 0) {
      const SocketAddress address{offer.addresses[next % offer.addresses.size()], offer.port, ""};
      if (next++ >= offer.addresses.size()) usleep(20000);
      check();
      std::string why = "it does not answer";
      try {
        knock(address, process_, count, key, p, std::min(limit, after(kTry)), out, why);
      } catch (const AuthenticationError&) {
        why = "another process listens there";
      }
      if (next <= offer.addresses.size()) {
        tried += (tried.empty() ? "" : "; ") + text_of(address) + ": " + why;
      }
      if (out.count(p) == 0 && Clock::now() >= limit) {
        throw CollectiveTimeout(
            p, {},
            "process " + std::to_string(process_) + " did not reach process " + std::to_string(p) +
                ", on another host, within " + seconds_text(seconds) + " (" + tried +
                "): let the hosts connect to each other at any port, and name the network "
                "interface that they share by ASYNCDIFF_INTERFACE");
      }
    }
  }
  std::set<int> above;
  for (int p = process_ + 1; p < count; ++p) {
    if (other_host(p)) above.insert(p);
  }
  Door door(std::move(listener_), above, count, key_of(offers, process_));
  while (!door.wait(std::min(limit, after(kLook)))) {
    check();
    if (Clock::now() < limit) continue;
    const int missing = door.missing();
    throw CollectiveTimeout(
        missing, {},
        "process " + std::to_string(missing) + ", on another host, did not connect to process " +
            std::to_string(process_) + " within " + seconds_text(seconds) +
            (door.strangers().empty()
                 ? ""
                 : " (of the connections that came, " + door.strangers() + ")") +
            ": let the hosts connect to each other at any port, and name the network interface "
            "that they share by ASYNCDIFF_INTERFACE");
  }
  out.merge(door.in());
  return out;
}

std::map<int, Wire> connect_hosts(const Processes& processes, double seconds) {
  const Party& everybody = processes.everybody();
  std::vector<int> hosts;
  for (int p = 0; p < processes.count(); ++p) hosts.push_back(processes.host_of(p));
  std::unique_ptr<Crossing> crossing;
  everybody.together("listen to other hosts",
                     [&] { crossing = std::make_unique<Crossing>(processes.process(), hosts); });
  const std::vector<std::string> offers = everybody.all_gather(crossing->offer());
  std::map<int, Wire> out;
  everybody.together("connect to other hosts",
                     [&] { out = crossing->connect(offers, seconds, [&] { processes.check(); }); });
  return out;
}

}  // namespace asyncdiff
