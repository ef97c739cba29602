#include "nccl_shared.hpp"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/cuda_fabric.hpp"
#include "asyncdiff/errors.hpp"
#include "cuda_memory.hpp"
#include "device_guard.hpp"
#include "kernels.hpp"

namespace asyncdiff {

namespace {

// Making a communicator takes seconds: libraries of network cards are loaded, and every device of
// the machine is looked at.
constexpr double kMakingSeconds = 60;

// What networks left that were not closed, for the next one to free: that cannot be done at any
// time.
struct Left {
  std::set<int> devices;
  std::vector<Buffer> buffers;
};
std::mutex left_mutex;  // guards left_behind()
std::vector<Left>& left_behind() {
  static auto* all = new std::vector<Left>;
  return *all;
}

void synchronize(const std::set<int>& devices) {
  for (int device : devices) {
    const DeviceGuard guard(device);
    check_cuda(cudaDeviceSynchronize(), "waiting for a device");
  }
}

void free_left_behind() {
  std::vector<Left> all;
  {
    const std::lock_guard lock(left_mutex);
    all.swap(left_behind());
  }
  for (const Left& left : all) {
    try {
      synchronize(left.devices);
    } catch (const CudaError&) {  // who uses the device will see
    }
  }
}

std::set<int> own_devices(const Processes& processes, const std::vector<int>& devices) {
  std::set<int> out;
  for (std::size_t rank = 0; rank < devices.size(); ++rank) {
    if (processes.mine(static_cast<int>(rank))) out.insert(devices[rank]);
  }
  return out;
}

// Finds the devices and NCCL, and makes the pinned memory.
Buffer prepared(const Processes& processes, const std::vector<int>& devices) {
  Buffer out;
  const auto work = [&] {
    const std::set<int> own = own_devices(processes, devices);
    for (int device : own) {
      if (device >= 0 && device < cuda_device_count()) continue;
      throw DeviceError("CUDA device " + std::to_string(device) + " does not exist: there are " +
                        std::to_string(cuda_device_count()));
    }
    NcclLibrary::get();
    free_left_behind();
    for (int device : own) {
      const DeviceGuard guard(device);
      preload_kernels();
    }
    int device = 0;
    if (own.empty()) {
      check_cuda(cudaGetDevice(&device), "reading the current device");
    } else {
      device = *own.begin();
    }
    out = allocate_pinned(device, FlagPool::kBytes + FailureLog::nbytes(1));
  };
  processes.everybody().together("prepare NCCL", work);
  processes.everybody().agree("prepare NCCL", [] {
    return Party::Values{{"the version of NCCL", NcclLibrary::get().version()}};
  });
  return out;
}

// How many bundles a channel has sent, and to which process.
struct Sent {
  std::uint64_t count;
  std::uint32_t channel;
  std::int32_t to;
};

void add_to(std::string& bytes, const Sent& sent) {
  bytes.append(reinterpret_cast<const char*>(&sent), sizeof sent);
}

std::vector<Sent> sent_in(const std::string& bytes) {
  std::vector<Sent> out(bytes.size() / sizeof(Sent));
  if (!out.empty()) std::memcpy(out.data(), bytes.data(), out.size() * sizeof(Sent));
  return out;
}

Buffer for_failures(Buffer memory) {
  memory.data += FlagPool::kBytes;
  memory.nbytes = FailureLog::nbytes(1);
  return memory;
}

}  // namespace

void NcclEndMemory::reset(std::uint64_t count) const {
  clear(device, lines);
  const DeviceGuard guard(device.device);
  for (std::size_t at : device_counts) {
    check_cuda(cudaMemcpy(device.data + at, &count, sizeof count, cudaMemcpyHostToDevice),
               "setting a count");
  }
}

NcclShared::NcclShared(const Processes& processes, std::vector<int> devices,
                       double deadline_seconds, std::map<int, Wire> connections)
    : processes_(processes),
      devices_(std::move(devices)),
      deadline_(deadline_seconds),
      pinned_(prepared(processes_, devices_)),
      failures_(for_failures(pinned_), 0, 1, deadline_),
      courier_(std::move(connections), failures_, deadline_,
               {[this] {
                  // A thread without a context can launch nothing.
                  const std::set<int> own = own_devices(processes_, devices_);
                  if (!own.empty()) cudaSetDevice(*own.begin());
                  // So that whoever captures a graph in another thread is not disturbed.
                  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
                  cudaThreadExchangeStreamCaptureMode(&mode);
                },
                [this] { return processes_.over(); }, [this](int process) { return lost(process); },
                [this] { failed(); }}) {
  courier_.start();
}

NcclShared::~NcclShared() {
  if (processes_.forked()) {
    courier_.forget();
    new auto(std::move(links_));  // nothing of NCCL is to be called here
    return;
  }
  courier_.stop();
  if (closed_) return;
  failures_.end_waits();
  abort_links();
  try {
    Left left{own_devices(processes_, devices_), {pinned_}};
    for (const auto& one : ends_) left.buffers.push_back(one->device);
    const std::lock_guard lock(left_mutex);
    left_behind().push_back(std::move(left));
  } catch (...) {
  }
}

void NcclShared::check_open() const {
  if (closed_) throw Error("the fabric is closed");
}

void NcclShared::check() const {
  const auto why = [&](int straggler) {
    processes_.check();
    if (straggler < 0 || !processes_.left(straggler)) return;
    processes_.lost_because_left(straggler);
    processes_.check();
  };
  if (const auto error = courier_.error()) {
    try {
      std::rethrow_exception(error);
    } catch (const ExchangeTimeout& late) {
      why(late.incident.straggler);
      throw;
    } catch (...) {
      why(-1);
      throw;
    }
  }
  failures_.check(why);
}

void NcclShared::wait(const std::function<void(NcclCourier&)>& until) {
  try {
    until(courier_);
  } catch (const ExchangeTimeout&) {
    throw;
  } catch (const Error&) {
    check();  // of a failure that was told elsewhere
    throw;
  }
}

void NcclShared::abort(int rank, const std::string& reason) {
  if (!failures_.failed()) aborted_by_caller_ = true;
  failures_.abort(rank, reason);
  courier_.wake();
}

void NcclShared::on_failure(std::function<void(int, const std::string&)> tell) {
  const std::lock_guard lock(tell_mutex_);
  tell_ = std::move(tell);
}

std::exception_ptr NcclShared::lost(int process) const {
  std::vector<int> ranks;
  std::string text;
  for (int rank = 0; rank < static_cast<int>(processes_.owners().size()); ++rank) {
    if (processes_.owner(rank) != process) continue;
    ranks.push_back(rank);
    text += (text.empty() ? "" : ", ") + std::to_string(rank);
  }
  return std::make_exception_ptr(
      ProcessLost(process, ranks,
                  "process " + std::to_string(process) + " (rank " + text +
                      ") has ended, or the connection between its host and this one"));
}

void NcclShared::failed() {
  abort_links();
  if (aborted_by_caller_ || processes_.over()) return;
  const auto& owners = processes_.owners();
  const auto own = std::find(owners.begin(), owners.end(), processes_.process());
  const int mine = own == owners.end() ? -1 : static_cast<int>(own - owners.begin());
  std::string reason = "what crosses hosts has failed";
  try {
    check();
  } catch (const std::exception& error) {
    reason = error.what();
  }
  const std::lock_guard lock(tell_mutex_);
  if (tell_) tell_(mine, reason);
}

void NcclShared::abort_links() noexcept {
  const std::lock_guard lock(links_mutex_);
  for (const auto& [pair, one] : links_) one->abort();
}

NcclLimits NcclShared::limits(double seconds) const {
  return {seconds, [this] {
            processes_.check();
            if (failures_.failed()) throw Error("the exchange has failed or was aborted");
          }};
}

std::shared_ptr<NcclLink> NcclShared::link(int sender, int receiver, const Party& ends) {
  {
    const std::lock_guard lock(links_mutex_);
    const auto found = links_.find({sender, receiver});
    if (found != links_.end()) return found->second;
  }
  const bool sends = processes_.mine(sender);
  std::string told;
  ends.together("ask NCCL for an id", [&] {
    if (!sends) return;
    NcclUniqueId made{};
    NcclLibrary::get().check(NcclLibrary::get().get_unique_id(&made), "making an id");
    told.assign(made.bytes, sizeof made.bytes);
  });
  const auto all = ends.all_gather(told);
  NcclUniqueId id{};
  const std::string& bytes = all.at(static_cast<std::size_t>(processes_.owner(sender)));
  if (bytes.size() != sizeof id.bytes) throw NcclError("the sender's process sent no id of NCCL");
  std::memcpy(id.bytes, bytes.data(), sizeof id.bytes);
  std::shared_ptr<NcclCudaLink> out;
  ends.together("connect by NCCL", [&] {
    std::size_t first = 0;
    std::uint64_t* const word = take_words(1, first);
    const int place = sends ? NcclCommunicator::kSender : NcclCommunicator::kReceiver;
    out = std::make_shared<NcclCudaLink>(device(sends ? sender : receiver), id, place, word,
                                         limits(std::max(deadline_, kMakingSeconds)),
                                         limits(deadline_));
    store_word(word, 0);
    lines_.give_back(first, 1);
  });
  const std::lock_guard lock(links_mutex_);
  links_[{sender, receiver}] = out;
  return out;
}

std::uint64_t* NcclShared::take_words(std::size_t count, std::size_t& first) {
  first = lines_.take(count);
  return reinterpret_cast<std::uint64_t*>(pinned_.data + first);
}

void NcclShared::give_back(const NcclEndMemory& end) {
  courier_.remove(*end.end);
  failures_.remove_end(end.record);
  std::memset(pinned_.data + end.first, 0, end.words * FlagPool::kLine);
  lines_.give_back(end.first, end.words);
  ends_.erase(std::remove_if(ends_.begin(), ends_.end(),
                             [&](const auto& one) { return one.get() == &end; }),
              ends_.end());
}

void NcclShared::settle() {
  synchronize(own_devices(processes_, devices_));
  lent_.free_dropped();
}

template <class End, class Work>
void NcclShared::for_each_end(Work work) const {
  for (const auto& one : ends_) {
    if (auto* const end = dynamic_cast<End*>(one->end.get())) work(*end);
  }
}

void NcclShared::reset(std::uint64_t first) {
  check();
  // What was committed arrives first, so that nothing of it is under way between the couriers.
  std::string counts;
  processes_.everybody().together("empty its channels", [&] {
    settle();
    for_each_end<NcclOutgoing>([&](NcclOutgoing& end) {
      add_to(counts, {courier_.wait_until_sent(end), end.channel, end.process});
    });
  });
  const auto all = processes_.everybody().all_gather(counts);
  processes_.everybody().together("empty its channels", [&] {
    for_each_end<NcclIncoming>([&](const NcclIncoming& end) {
      for (const Sent& sent : sent_in(all[static_cast<std::size_t>(end.process)])) {
        if (sent.to != processes_.process() || sent.channel != end.channel) continue;
        courier_.wait_until_arrived(end, sent.count);
      }
    });
    settle();
    courier_.reset(first);
    for (const auto& one : ends_) one->reset(first);
  });
}

void NcclShared::close() {
  if (closed_ || processes_.forked()) return;  // a forked child has no courier to wait for
  std::exception_ptr failure;
  bool together = !failures_.failed() && !processes_.over();
  try {
    settle();
  } catch (const CudaError&) {  // who uses the device will see
  }
  try {
    if (together) {
      for_each_end<NcclOutgoing>([&](NcclOutgoing& end) { courier_.wait_until_sent(end); });
      processes_.everybody().barrier();
    }
  } catch (...) {
    failure = std::current_exception();
    together = false;
  }
  closed_ = true;
  courier_.stop();
  if (!together) abort_links();
  for (const auto& [pair, one] : links_) one->close(together);
  wait_for_nccl_calls(std::chrono::steady_clock::now() + std::chrono::seconds(2));
  ends_.clear();
  lent_.end();
  failures_.close();
  pinned_ = {};
  if (failure) std::rethrow_exception(failure);
}

}  // namespace asyncdiff
