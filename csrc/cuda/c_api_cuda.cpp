#include <cstddef>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "asyncdiff/cuda_fabric.hpp"
#include "asyncdiff/env.hpp"
#include "asyncdiff/socket_rendezvous.hpp"
#include "c_api.hpp"

using namespace asyncdiff;
using namespace asyncdiff::c_api;

namespace {

// Rank r is process r. Only the own device of a process counts.
asyncdiff_fabric* over(const std::shared_ptr<Rendezvous>& rendezvous, int device, double deadline) {
  const auto ranks = static_cast<std::size_t>(rendezvous->processes());
  std::vector<int> owners(ranks);
  std::iota(owners.begin(), owners.end(), 0);
  return new asyncdiff_fabric{make_cuda_fabric(std::vector<int>(ranks, device), std::move(owners),
                                               seconds(deadline), transport_from(env::transport()),
                                               rendezvous, env::link())};
}

}  // namespace

asyncdiff_code asyncdiff_cuda_fabric_make(const int* devices, int ranks, double deadline,
                                          asyncdiff_fabric** fabric) {
  return guarded([&] {
    asyncdiff_fabric*& place = given(fabric, "where the fabric goes");
    std::vector<int> all;
    if (ranks > 0) all.assign(&given(devices, "the list of devices"), devices + ranks);
    place = new asyncdiff_fabric{std::make_shared<CudaFabric>(
        std::move(all), seconds(deadline), transport_from(env::transport()), env::link())};
  });
}

asyncdiff_code asyncdiff_cuda_fabric_meet(const char* host, int port, int process, int processes,
                                          const void* key, size_t key_nbytes, int device,
                                          double timeout, double deadline,
                                          asyncdiff_fabric** fabric) {
  return guarded([&] {
    asyncdiff_fabric*& place = given(fabric, "where the fabric goes");
    place = over(meet(host, port, process, processes, key, key_nbytes, timeout), device, deadline);
  });
}

asyncdiff_code asyncdiff_cuda_fabric_from_environment(int device, double timeout, double deadline,
                                                      asyncdiff_fabric** fabric) {
  return guarded([&] {
    asyncdiff_fabric*& place = given(fabric, "where the fabric goes");
    place = over(SocketRendezvous::from_environment(timeout), device, deadline);
  });
}
