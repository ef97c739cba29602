#include "addresses.hpp"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/env.hpp"
#include "asyncdiff/errors.hpp"

namespace asyncdiff {

namespace {

constexpr int kBacklog = 512;

// Empty for what is no address that others could be told: of another family, or good on one link.
std::string text_of(const sockaddr* address) {
  char text[INET6_ADDRSTRLEN] = "";
  if (address == nullptr) return "";
  if (address->sa_family == AF_INET) {
    inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(address)->sin_addr, text, sizeof text);
  } else if (address->sa_family == AF_INET6) {
    const in6_addr& where = reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr;
    if (!IN6_IS_ADDR_LINKLOCAL(&where)) inet_ntop(AF_INET6, &where, text, sizeof text);
  }
  return text;
}

bool is_loopback(const std::string& address) {
  return address.compare(0, 4, "127.") == 0 || address == "::1";
}

struct Interface {
  std::string name, address;
};

std::vector<Interface> interfaces() {
  ifaddrs* found = nullptr;
  if (getifaddrs(&found) != 0) {
    throw Error(std::string("asking for network interfaces: ") + std::strerror(errno));
  }
  const std::unique_ptr<ifaddrs, void (*)(ifaddrs*)> owner(found, freeifaddrs);
  std::vector<Interface> out;
  for (const ifaddrs* one = found; one != nullptr; one = one->ifa_next) {
    const std::string address = text_of(one->ifa_addr);
    if (!address.empty() && (one->ifa_flags & IFF_UP) != 0) out.push_back({one->ifa_name, address});
  }
  return out;
}

std::vector<std::string> addresses_of(const std::string& wanted) {
  std::vector<std::string> out;
  std::string there;
  for (const Interface& one : interfaces()) {
    if (one.name == wanted || one.address == wanted) out.push_back(one.address);
    there += (there.empty() ? "" : ", ") + one.name + " (" + one.address + ")";
  }
  if (out.empty()) {
    throw InvalidArgument("ASYNCDIFF_INTERFACE='" + wanted + "' is no network interface, nor the " +
                          "address of one, of this machine, which has " + there);
  }
  return out;
}

// The own address of the way to another machine, to which nothing is sent; empty where none is
// known.
std::string address_towards(const std::string& machine) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* found = nullptr;
  if (machine.empty() || getaddrinfo(machine.c_str(), "9", &hints, &found) != 0) return "";
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owner(found, freeaddrinfo);
  for (const addrinfo* one = found; one != nullptr; one = one->ai_next) {
    const Socket probe(socket(one->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    sockaddr_storage own{};
    socklen_t size = sizeof own;
    if (!probe.open() || connect(probe.descriptor(), one->ai_addr, one->ai_addrlen) != 0) continue;
    if (getsockname(probe.descriptor(), reinterpret_cast<sockaddr*>(&own), &size) != 0) continue;
    const std::string text = text_of(reinterpret_cast<const sockaddr*>(&own));
    if (!text.empty() && !is_loopback(text)) return text;
  }
  return "";
}

bool listens(const Socket& socket, const sockaddr* address, socklen_t size, int& port) {
  if (!socket.open() || bind(socket.descriptor(), address, size) != 0 ||
      listen(socket.descriptor(), kBacklog) != 0) {
    return false;
  }
  sockaddr_storage own{};
  socklen_t own_size = sizeof own;
  getsockname(socket.descriptor(), reinterpret_cast<sockaddr*>(&own), &own_size);
  port = ntohs(own.ss_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6&>(own).sin6_port
                                         : reinterpret_cast<const sockaddr_in&>(own).sin_port);
  return true;
}

}  // namespace

std::vector<std::string> own_addresses() {
  const std::string wanted = env::network_interface();
  if (!wanted.empty()) return addresses_of(wanted);
  const std::string towards = address_towards(env::first_machine());
  if (!towards.empty()) return {towards};
  std::vector<std::string> out;
  for (const Interface& one : interfaces()) out.push_back(one.address);
  std::stable_partition(out.begin(), out.end(), [](const auto& a) { return !is_loopback(a); });
  return out;
}

Socket listen_at_own(const std::vector<std::string>& addresses, int& port) {
  const std::string only = addresses.size() == 1 ? addresses[0] : "";
  sockaddr_in6 six{};
  six.sin6_family = AF_INET6;
  sockaddr_in four{};
  four.sin_family = AF_INET;
  const bool is_six = only.empty() || inet_pton(AF_INET6, only.c_str(), &six.sin6_addr) == 1;
  if (!is_six) inet_pton(AF_INET, only.c_str(), &four.sin_addr);
  if (is_six) {
    Socket out(socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    const int off = 0;
    if (out.open()) setsockopt(out.descriptor(), IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (listens(out, reinterpret_cast<const sockaddr*>(&six), sizeof six, port)) return out;
  }
  if (!is_six || only.empty()) {
    Socket out(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (listens(out, reinterpret_cast<const sockaddr*>(&four), sizeof four, port)) return out;
  }
  throw Error("listening at " + (only.empty() ? "this machine's addresses" : only) + ": " +
              std::strerror(errno));
}

}  // namespace asyncdiff
