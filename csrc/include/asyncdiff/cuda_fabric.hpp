// The fabric of several GPUs, or of several ranks on one GPU, in one process.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "asyncdiff/fabric.hpp"

namespace asyncdiff {

// How ranks on different devices reach each other. kAuto takes peer access where a write and a
// read-back in each direction prove it, and pinned host memory elsewhere.
enum class Transport { kAuto, kPeer, kStaged };

Transport transport_from(const std::string& name);

// The number of CUDA devices; 0 without a driver.
int cuda_device_count();

class CudaFabric final : public Fabric {
 public:
  // devices[r] is the CUDA device index of rank r; entries may repeat.
  // Throws DeviceError for a device that does not exist, and where peer access is demanded
  // (Transport::kPeer) and does not work.
  CudaFabric(std::vector<int> devices, double deadline_seconds, Transport transport);
  ~CudaFabric() override;

  const std::vector<int>& devices() const;

  std::string kind() const override { return "cuda"; }
  std::map<std::pair<int, int>, std::string> links() const override;
  std::map<std::pair<int, int>, std::string> link_reasons() const override;
  std::shared_ptr<Channel> channel(int sender, const std::vector<int>& receivers,
                                   const Layout& layout, int slots,
                                   const std::string& name) override;
  void abort(int rank, const std::string& reason) override;
  void check() override;
  void reset() override;
  void close() override;

  // What channels share with their fabric and outlive it with.
  struct Shared;

 private:
  std::shared_ptr<Shared> shared_;
};

}  // namespace asyncdiff
