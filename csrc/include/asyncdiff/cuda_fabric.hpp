// The fabric of GPUs: of one process, or of several processes of one host. Ranks may share a GPU.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/channel_device.hpp"
#include "asyncdiff/export.hpp"
#include "asyncdiff/fabric.hpp"
#include "asyncdiff/put_costs.hpp"
#include "asyncdiff/rendezvous.hpp"
#include "asyncdiff/simulated_link.hpp"

namespace asyncdiff {

// How ranks on different devices reach each other. kAuto takes peer access where a write and a
// read-back in each direction prove it, and pinned host memory elsewhere.
enum class Transport { kAuto, kPeer, kStaged };

ASYNCDIFF_EXPORT Transport transport_from(const std::string& name);

// The number of CUDA devices; 0 without a driver.
ASYNCDIFF_EXPORT int cuda_device_count();

// What puts cost between two devices of this process. Measured at the first use on a machine, which
// takes a second or two and uses both devices, then kept in a file under env::cache(). Where it
// cannot be measured, costs as they are on NVLinked H200s.
ASYNCDIFF_EXPORT PutCosts put_costs(int from, int to, Transport transport);

class ASYNCDIFF_EXPORT CudaFabric final : public Fabric {
 public:
  // devices[r] is the CUDA device index of rank r; entries may repeat. All ranks are in this
  // process. Throws DeviceError for a device that does not exist, and where peer access is demanded
  // (Transport::kPeer) and does not work. With a link, the stream that sends a bundle waits until
  // it would have arrived by it, and tells the receivers then; no channel is inline. Those who
  // share a link have even shares of it while they send at the same time.
  CudaFabric(std::vector<int> devices, double deadline_seconds, Transport transport,
             std::optional<SimulatedLink> link = {});

  // Rank r runs in process owners[r], on that process's device devices[r]. What is collective then
  // is what HostFabric says, and close() of the fabric, too, among all processes. Device memory is
  // shared by CUDA IPC. What others may have mapped stays until the channel is closed, or the
  // fabric, also where channels are dropped without it; and for good, where the fabric is dropped
  // without it. Throws InvalidArgument where processes are on several hosts: make_cuda_fabric()
  // makes what spans them.
  CudaFabric(std::vector<int> devices, std::vector<int> owners, double deadline_seconds,
             Transport transport, std::shared_ptr<Rendezvous> rendezvous,
             std::optional<SimulatedLink> link = {});

  // The same for processes that have met, of which those on other hosts have no part in it: their
  // ranks are ends of no channel.
  CudaFabric(Processes processes, std::vector<int> devices, double deadline_seconds,
             Transport transport, std::optional<SimulatedLink> link = {});
  ~CudaFabric() override;

  const std::vector<int>& devices() const;

  std::string kind() const override { return "cuda"; }
  std::map<std::pair<int, int>, std::string> links() const override;
  std::map<std::pair<int, int>, std::string> link_reasons() const override;
  std::string simulated_link() const override;
  std::shared_ptr<Channel> channel(int sender, const std::vector<int>& receivers,
                                   const Layout& layout, int slots, const std::string& name,
                                   Mode mode = Mode::kAuto) override;
  // As many launches as needed where there are more than 8 channels or 320 tensors.
  void put_batch(const std::vector<Put>& puts, Stream stream) override;
  // A receiver's end of one of this fabric's channels, for a kernel of one's own that consumes
  // bundles itself (channel_receiver.hpp); good as long as the channel lives and the fabric is
  // open. Throws InvalidArgument for a channel of another fabric, and for a rank that does not
  // receive from it here.
  ReceiverDevice receiver_device(const Channel& channel, int receiver) const;
  void abort(int rank, const std::string& reason) override;
  void check() override;
  void reset(std::uint64_t first_bundle = 0) override;
  // With several processes: unmaps what others own, waits for all, frees. After a failure it waits
  // for nobody, and what others may still have mapped stays until this process ends.
  void close() override;

  // What channels share with their fabric and outlive it with.
  struct Shared;

 private:
  // Over a simulated link: all at once, the smallest first.
  void put_by_link(std::vector<Put> puts, Stream stream);
  bool made(const Channel& channel) const override;
  const Processes& processes() const override;

  std::shared_ptr<Shared> shared_;
};

// The same, whatever hosts the processes are on: a CudaFabric where it is one; else a fabric of
// which ranks of one host exchange as those of a CudaFabric, and the others by NCCL. Throws
// NcclError where that is needed and missing, InvalidArgument where a link is to be simulated
// between hosts.
ASYNCDIFF_EXPORT std::shared_ptr<Fabric> make_cuda_fabric(
    std::vector<int> devices, std::vector<int> owners, double deadline_seconds, Transport transport,
    std::shared_ptr<Rendezvous> rendezvous, std::optional<SimulatedLink> link = {});

}  // namespace asyncdiff
