// A key-value store over TCP, as small as can be. It stands for what a stack has already: the
// TCPStore of torch, etcd, Redis. Only set(), and a get() that waits, are needed of any of them.
// Neither authenticated nor encrypted, as those are in a cluster: listen on a private network.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

class KeyValueStore {
 public:
  // Who serves listens at the port, until it is destroyed; everybody is a client. Throws where the
  // server does not answer in time.
  KeyValueStore(const std::string& address, int port, bool serves, double seconds)
      : seconds_(seconds) {
    if (serves) serve(port);
    const auto until = Clock::now() + std::chrono::duration<double>(seconds);
    const sockaddr_in where = named(address, port);
    while (true) {
      socket_ = socket(AF_INET, SOCK_STREAM, 0);
      if (connect(socket_, reinterpret_cast<const sockaddr*>(&where), sizeof where) == 0) break;
      close(socket_);
      if (Clock::now() > until) throw std::runtime_error("no store at " + address);
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
  }
  KeyValueStore(const KeyValueStore&) = delete;
  KeyValueStore& operator=(const KeyValueStore&) = delete;
  ~KeyValueStore() {
    close(socket_);
    if (listening_ < 0) return;
    shutdown(listening_, SHUT_RDWR);
    accepting_.join();
    for (int client : clients_) shutdown(client, SHUT_RDWR);
    for (std::thread& answering : answering_) answering.join();
    for (int client : clients_) close(client);
    close(listening_);
  }

  void set(const std::string& key, const std::string& value) {
    write_all(socket_, "s");
    write_text(socket_, key);
    write_text(socket_, value);
  }

  // Waits until somebody has set the key. Throws where nobody does in time.
  std::string get(const std::string& key) {
    write_all(socket_, "g");
    write_text(socket_, key);
    std::string found(1, 0);
    read_all(socket_, found);
    if (found == "-") throw std::runtime_error("nobody has set " + key + " in time");
    return read_text(socket_);
  }

 private:
  using Clock = std::chrono::steady_clock;

  static sockaddr_in named(const std::string& address, int port) {
    sockaddr_in out = {};
    out.sin_family = AF_INET;
    out.sin_port = htons(static_cast<std::uint16_t>(port));
    if (inet_pton(AF_INET, address.c_str(), &out.sin_addr) != 1) {
      throw std::runtime_error(address + " is no IPv4 address");
    }
    return out;
  }

  static void write_all(int to, const std::string& bytes) {
    for (std::size_t done = 0; done < bytes.size();) {
      const ssize_t n = send(to, bytes.data() + done, bytes.size() - done, MSG_NOSIGNAL);
      if (n <= 0) throw std::runtime_error("the store's connection is gone");
      done += static_cast<std::size_t>(n);
    }
  }
  static void read_all(int from, std::string& bytes) {
    for (std::size_t done = 0; done < bytes.size();) {
      const ssize_t n = recv(from, bytes.data() + done, bytes.size() - done, 0);
      if (n <= 0) throw std::runtime_error("the store's connection is gone");
      done += static_cast<std::size_t>(n);
    }
  }
  static void write_text(int to, const std::string& text) {
    const std::uint32_t size = htonl(static_cast<std::uint32_t>(text.size()));
    write_all(to, std::string(reinterpret_cast<const char*>(&size), sizeof size) + text);
  }
  static std::string read_text(int from) {
    std::string head(sizeof(std::uint32_t), 0);
    read_all(from, head);
    std::uint32_t size = 0;
    head.copy(reinterpret_cast<char*>(&size), sizeof size);
    std::string text(ntohl(size), 0);
    read_all(from, text);
    return text;
  }

  void serve(int port) {
    listening_ = socket(AF_INET, SOCK_STREAM, 0);
    const int yes = 1;
    setsockopt(listening_, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    const sockaddr_in where = named("0.0.0.0", port);
    if (bind(listening_, reinterpret_cast<const sockaddr*>(&where), sizeof where) != 0 ||
        listen(listening_, 64) != 0) {
      close(listening_);
      throw std::runtime_error("port " + std::to_string(port) + " is taken");
    }
    accepting_ = std::thread([this] {
      for (int client; (client = accept(listening_, nullptr, nullptr)) >= 0;) {
        clients_.push_back(client);
        answering_.emplace_back([this, client] { answer(client); });
      }
    });
  }

  void answer(int client) {
    try {
      std::string what(1, 0);
      while (true) {
        read_all(client, what);
        const std::string key = read_text(client);
        if (what == "s") {
          const std::string value = read_text(client);
          const std::lock_guard lock(mutex_);
          values_[key] = value;
          changed_.notify_all();
          continue;
        }
        std::unique_lock lock(mutex_);
        const bool found = changed_.wait_for(lock, std::chrono::duration<double>(seconds_),
                                             [&] { return values_.count(key) != 0; });
        const std::string value = found ? values_[key] : "";
        lock.unlock();
        write_all(client, found ? "+" : "-");
        if (found) write_text(client, value);
      }
    } catch (const std::runtime_error&) {  // the client has gone
    }
  }

  double seconds_;
  int socket_ = -1;
  int listening_ = -1;
  std::thread accepting_;
  std::vector<int> clients_;
  std::vector<std::thread> answering_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, std::string> values_;
};
