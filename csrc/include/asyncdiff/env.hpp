// Every environment variable that the library reads.
#pragma once

#include <optional>
#include <string>

#include "asyncdiff/export.hpp"
#include "asyncdiff/simulated_link.hpp"

namespace asyncdiff::env {

// ASYNCDIFF_DEADLINE: seconds that a wait may last where the caller does not say. Default 10.
ASYNCDIFF_EXPORT double deadline();

// ASYNCDIFF_TRANSPORT: auto, peer or staged, where the caller does not say. Default auto.
ASYNCDIFF_EXPORT std::string transport();

// ASYNCDIFF_LINK: the link that ranks are to have in the place of the real one, as
// simulated_link_from() takes it, where the caller does not say. None where it is not set.
ASYNCDIFF_EXPORT std::optional<SimulatedLink> link();

// ASYNCDIFF_CACHE: the folder that keeps what was measured on this machine; empty where nothing is
// to be kept ("off", or no home). Default $XDG_CACHE_HOME/asyncdiff, else ~/.cache/asyncdiff.
ASYNCDIFF_EXPORT std::string cache();

// ASYNCDIFF_NCCL: the file of NCCL's library, for GPUs of several hosts. Empty where it is not set:
// the one that the process has loaded, as torch does, or that the loader or Python finds.
ASYNCDIFF_EXPORT std::string nccl();

// ASYNCDIFF_HOST: the name of the host that this process counts as being on, 63 characters at most;
// processes of different names share no memory. Empty where it is not set: the machine tells.
ASYNCDIFF_EXPORT std::string host();

// ASYNCDIFF_INTERFACE: the network interface, or the address of one, by which processes of other
// hosts reach this one. Empty where it is not set: the one that reaches MASTER_ADDR, or all.
ASYNCDIFF_EXPORT std::string network_interface();

// MASTER_ADDR, the machine of process 0 as a launcher tells it; empty where none does.
ASYNCDIFF_EXPORT std::string first_machine();

// Where the processes of a launcher meet: RANK and WORLD_SIZE, MASTER_ADDR, ASYNCDIFF_PORT or else
// MASTER_PORT, and ASYNCDIFF_AUTHKEY, the secret that all of them know. Throws InvalidArgument
// where one is missing or means nothing, and where torchrun itself listens at MASTER_PORT.
struct World {
  int process;
  int processes;
  std::string address;
  int port;
  std::string key;
};
ASYNCDIFF_EXPORT World world();

}  // namespace asyncdiff::env
