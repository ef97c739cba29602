// A rendezvous over sockets, TCP or Unix, whose processes prove to each other that they know a
// secret.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "asyncdiff/export.hpp"
#include "asyncdiff/rendezvous.hpp"

namespace asyncdiff {

struct SocketAddress {
  std::string host;  // a name or a number
  int port = 0;
  std::string path;  // of a Unix socket, in place of both
};

// Process 0 listens, the others connect to it. Both sides prove in the handshake that they know the
// key (HMAC-SHA256 of what both have chosen at random), and every message after it carries such a
// proof, with its number: who does not know the key can neither join, nor say anything, nor hold
// anybody up. What is sent can be read by who sees the network: nothing is secret in it.
class ASYNCDIFF_EXPORT SocketRendezvous final : public Rendezvous {
 public:
  // Meets the others, at most for `timeout` seconds in all, whatever strangers do meanwhile; then
  // all_gather() waits as long (for process 0 a second longer: it says for whom it waited). Throws
  // CollectiveTimeout where a process does not come, AuthenticationError where process 0 has
  // another key, InvalidArgument (here and in process 0) for a process that does not exist, is
  // there already, or counts otherwise, and Error where the address cannot be had.
  SocketRendezvous(const SocketAddress& address, int process, int processes, std::string key,
                   double timeout);
  ~SocketRendezvous() override;

  // From RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and ASYNCDIFF_AUTHKEY (env.hpp). Throws
  // InvalidArgument where one of them is missing.
  static std::shared_ptr<SocketRendezvous> from_environment(double timeout);

  int process() const override;
  int processes() const override;
  // Throws ProcessLost, in all processes that are left, where one has ended or closed this, and
  // CollectiveTimeout where one says nothing; it then always does.
  std::vector<std::string> all_gather(const std::string& mine) override;
  void close();

 private:
  class Implementation;
  std::unique_ptr<Implementation> implementation_;
};

}  // namespace asyncdiff
