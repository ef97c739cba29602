#include "kernels.hpp"
#include "launch.hpp"
#include "simulated_link.cuh"

namespace asyncdiff {

void launch_depart(const SenderDevice& sender, const LinkDevice& link, std::uint64_t ns,
                   cudaStream_t stream) {
  launch<depart_kernel>(Launch::kOrdinary, {1, 1}, stream, "launching depart", sender, link, ns);
}

void launch_arrive(const SenderDevice& sender, const LinkDevice& link, int slot,
                   cudaStream_t stream) {
  launch<arrive_kernel>(Launch::kOrdinary, {1, 1}, stream, "launching arrive", sender, link, slot);
}

void preload_simulated_link() {
  preload<depart_kernel>();
  preload<arrive_kernel>();
}

}  // namespace asyncdiff
