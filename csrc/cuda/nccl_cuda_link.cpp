#include "nccl_cuda_link.hpp"

#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "cuda_memory.hpp"
#include "device_guard.hpp"
#include "kernels.hpp"
#include "nccl_ends.hpp"

namespace asyncdiff {

NcclCudaLink::NcclCudaLink(int device, const NcclUniqueId& id, int place, std::uint64_t* word,
                           const NcclLimits& making, const NcclLimits& carrying)
    : device_(device) {
  const DeviceGuard guard(device_);
  preload_kernels();
  int lowest = 0, highest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "asking for priorities");
  // Few blocks that others wait for: before those that compute.
  check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, highest),
             "making a stream");
  try {
    const auto enter = [device] {
      cudaSetDevice(device);
      // So that whoever captures a graph in another thread is not disturbed.
      cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
      cudaThreadExchangeStreamCaptureMode(&mode);
    };
    communicator_ =
        std::make_unique<NcclCommunicator>(NcclLibrary::get(), id, place, enter, making);
    exchange_first(place, word, making);
  } catch (...) {
    cudaStreamDestroy(stream_);
    throw;
  }
  communicator_->set_limits(carrying);
}

void NcclCudaLink::exchange_first(int place, std::uint64_t* word, const NcclLimits& limits) {
  first_ = allocate_device(device_, sizeof(std::uint64_t));
  store_word(word, 0);
  try {
    if (place == NcclCommunicator::kSender) {
      send(first_.data, first_.nbytes, {nullptr, 0, word, 1});
    } else {
      receive(first_.data, first_.nbytes, {nullptr, 0, word, 1});
    }
    const auto limit =
        std::chrono::steady_clock::now() + std::chrono::duration<double>(limits.seconds);
    while (load_word(word) != 1) {
      if (limits.check) limits.check();
      communicator_->check();
      if (std::chrono::steady_clock::now() > limit) {
        throw NcclError("the first message between two ranks did not arrive within " +
                        std::to_string(static_cast<int>(limits.seconds)) +
                        " s; NCCL_DEBUG=INFO says what NCCL waits for, NCCL_SOCKET_IFNAME which "
                        "network interface it takes");
      }
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  } catch (...) {
    communicator_->abort();  // before the memory is freed
    throw;
  }
}

void NcclCudaLink::send(const std::byte* from, std::size_t nbytes, const Publication& then) {
  const DeviceGuard guard(device_);
  if (nbytes > 0) communicator_->send(from, nbytes, stream_);
  publish(then);
}

void NcclCudaLink::receive(std::byte* to, std::size_t nbytes, const Publication& then) {
  const DeviceGuard guard(device_);
  if (nbytes > 0) communicator_->receive(to, nbytes, stream_);
  publish(then);
}

void NcclCudaLink::publish(const Publication& then) { launch_publish(then, stream_); }

void NcclCudaLink::check() { communicator_->check(); }

void NcclCudaLink::abort() noexcept { communicator_->abort(); }

void NcclCudaLink::close(bool together) noexcept {
  quietly_on(device_, [&] {
    if (together) communicator_->close();
    communicator_->abort();
    if (stream_ != nullptr) cudaStreamDestroy(std::exchange(stream_, nullptr));
  });
}

}  // namespace asyncdiff
