#include "c_api.hpp"

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/env.hpp"
#include "asyncdiff/errors.hpp"
#include "asyncdiff/host_fabric.hpp"
#include "asyncdiff/socket_rendezvous.hpp"
#include "asyncdiff/version.hpp"

struct asyncdiff_channel {
  std::shared_ptr<asyncdiff::Channel> channel;
};

namespace asyncdiff::c_api {

namespace {

struct LastError {
  std::string text;
  int rank = -1;
};
thread_local LastError last;

int first_of(const std::vector<int>& ranks) { return ranks.empty() ? -1 : ranks.front(); }

// The number of an error, and the rank that it is about.
std::pair<asyncdiff_code, int> kind_of(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const ExchangeTimeout& e) {
    return {ASYNCDIFF_EXCHANGE_TIMEOUT,
            e.incident.straggler < 0 ? e.incident.peer : e.incident.straggler};
  } catch (const SlotOrderError& e) {
    return {ASYNCDIFF_SLOT_ORDER, e.incident.rank};
  } catch (const Aborted& e) {
    return {ASYNCDIFF_ABORTED, e.rank};
  } catch (const ProcessLost& e) {
    return {ASYNCDIFF_PROCESS_LOST, first_of(e.ranks)};
  } catch (const CollectiveTimeout& e) {
    return {ASYNCDIFF_COLLECTIVE_TIMEOUT, first_of(e.ranks)};
  } catch (const AuthenticationError&) {
    return {ASYNCDIFF_AUTHENTICATION, -1};
  } catch (const InvalidArgument&) {
    return {ASYNCDIFF_INVALID_ARGUMENT, -1};
  } catch (const DeviceError&) {
    return {ASYNCDIFF_DEVICE, -1};
  } catch (const CudaError&) {
    return {ASYNCDIFF_CUDA, -1};
  } catch (const NcclError&) {
    return {ASYNCDIFF_NCCL, -1};
  } catch (...) {
    return {ASYNCDIFF_ERROR, -1};
  }
}

std::vector<int> from_zero(int count) {
  std::vector<int> out(static_cast<std::size_t>(count));
  std::iota(out.begin(), out.end(), 0);
  return out;
}

asyncdiff_fabric* over(const std::shared_ptr<Rendezvous>& rendezvous, double deadline) {
  return new asyncdiff_fabric{make_host_fabric(from_zero(rendezvous->processes()),
                                               seconds(deadline), rendezvous, env::link())};
}

TensorSpec spec_of(const asyncdiff_tensor& tensor) {
  std::vector<std::int64_t> shape, strides;
  if (tensor.dimensions > 0) {
    shape.assign(&given(tensor.shape, "a tensor's shape"), tensor.shape + tensor.dimensions);
    if (tensor.strides != nullptr) {
      strides.assign(tensor.strides, tensor.strides + tensor.dimensions);
    }
  }
  return TensorSpec(&given(tensor.dtype, "a tensor's dtype"), std::move(shape), std::move(strides));
}

Stream as_stream(void* stream) { return reinterpret_cast<Stream>(stream); }

Channel& of(asyncdiff_channel* channel) { return *given(channel, "the channel").channel; }
Fabric& of(asyncdiff_fabric* fabric) { return *given(fabric, "the fabric").fabric; }

}  // namespace

asyncdiff_code guarded(const std::function<void()>& work) {
  std::exception_ptr thrown;
  try {
    work();
    return ASYNCDIFF_OK;
  } catch (const std::exception& error) {
    last.text = error.what();
    thrown = std::current_exception();
  } catch (...) {
    last.text = "unknown error";
    thrown = std::current_exception();
  }
  const auto [code, rank] = kind_of(thrown);
  last.rank = rank;
  return code;
}

void check_given(const void* pointer, const char* what) {
  if (pointer == nullptr) throw InvalidArgument(std::string(what) + " is a null pointer");
}

double seconds(double deadline) { return deadline == 0 ? env::deadline() : deadline; }

std::shared_ptr<Rendezvous> meet(const char* host, int port, int process, int processes,
                                 const void* key, std::size_t key_nbytes, double timeout) {
  const auto& bytes = given(static_cast<const char*>(key), "the key");
  return std::make_shared<SocketRendezvous>(SocketAddress{&given(host, "the host"), port, ""},
                                            process, processes, std::string(&bytes, key_nbytes),
                                            timeout);
}

}  // namespace asyncdiff::c_api

using namespace asyncdiff;
using namespace asyncdiff::c_api;

const char* asyncdiff_version(void) { return asyncdiff::version(); }
const char* asyncdiff_last_error(void) { return last.text.c_str(); }
int asyncdiff_last_error_rank(void) { return last.rank; }

asyncdiff_code asyncdiff_host_fabric_make(int ranks, double deadline, asyncdiff_fabric** fabric) {
  return guarded([&] {
    asyncdiff_fabric*& place = given(fabric, "where the fabric goes");
    place =
        new asyncdiff_fabric{std::make_shared<HostFabric>(ranks, seconds(deadline), env::link())};
  });
}

asyncdiff_code asyncdiff_host_fabric_meet(const char* host, int port, int process, int processes,
                                          const void* key, size_t key_nbytes, double timeout,
                                          double deadline, asyncdiff_fabric** fabric) {
  return guarded([&] {
    asyncdiff_fabric*& place = given(fabric, "where the fabric goes");
    place = over(meet(host, port, process, processes, key, key_nbytes, timeout), deadline);
  });
}

asyncdiff_code asyncdiff_host_fabric_from_environment(double timeout, double deadline,
                                                      asyncdiff_fabric** fabric) {
  return guarded([&] {
    asyncdiff_fabric*& place = given(fabric, "where the fabric goes");
    place = over(SocketRendezvous::from_environment(timeout), deadline);
  });
}

int asyncdiff_fabric_ranks(const asyncdiff_fabric* fabric) {
  return fabric == nullptr ? 0 : fabric->fabric->ranks();
}

asyncdiff_code asyncdiff_check(asyncdiff_fabric* fabric) {
  return guarded([&] { of(fabric).check(); });
}

asyncdiff_code asyncdiff_abort(asyncdiff_fabric* fabric, int rank, const char* reason) {
  return guarded([&] { of(fabric).abort(rank, reason == nullptr ? "" : reason); });
}

asyncdiff_code asyncdiff_reset(asyncdiff_fabric* fabric, uint64_t first_bundle) {
  return guarded([&] { of(fabric).reset(first_bundle); });
}

asyncdiff_code asyncdiff_fabric_free(asyncdiff_fabric* fabric) {
  const std::unique_ptr<asyncdiff_fabric> owner(fabric);
  return fabric == nullptr ? ASYNCDIFF_OK : guarded([&] { fabric->fabric->close(); });
}

asyncdiff_code asyncdiff_channel_make(asyncdiff_fabric* fabric, int sender, const int* receivers,
                                      size_t receiver_count, const asyncdiff_tensor* tensors,
                                      size_t tensor_count, int slots, const char* name,
                                      const char* mode, asyncdiff_channel** channel) {
  return guarded([&] {
    asyncdiff_channel*& place = given(channel, "where the channel goes");
    std::vector<int> to;
    if (receiver_count > 0) {
      to.assign(&given(receivers, "the list of receivers"), receivers + receiver_count);
    }
    std::vector<TensorSpec> specs;
    for (size_t i = 0; i < tensor_count; ++i) {
      specs.push_back(spec_of(*(&given(tensors, "the list of tensors") + i)));
    }
    place = new asyncdiff_channel{of(fabric).channel(sender, to, Layout(std::move(specs)), slots,
                                                     name == nullptr ? "" : name,
                                                     mode_from(mode == nullptr ? "auto" : mode))};
  });
}

asyncdiff_code asyncdiff_channel_free(asyncdiff_channel* channel) {
  const std::unique_ptr<asyncdiff_channel> owner(channel);
  return channel == nullptr ? ASYNCDIFF_OK : guarded([&] { channel->channel->close(); });
}

asyncdiff_code asyncdiff_put(asyncdiff_channel* channel, const void* const* tensors,
                             size_t tensor_count, int slot, void* stream) {
  return guarded([&] {
    std::vector<const void*> all;
    if (tensor_count > 0) {
      all.assign(&given(tensors, "the list of tensors"), tensors + tensor_count);
    }
    of(channel).put(all, slot, as_stream(stream));
  });
}

asyncdiff_code asyncdiff_wait_for(asyncdiff_channel* channel, int receiver, uint64_t count) {
  return guarded([&] { of(channel).wait_for(receiver, count); });
}

asyncdiff_code asyncdiff_wait_free(asyncdiff_channel* channel, uint64_t count) {
  return guarded([&] { of(channel).wait_free(count); });
}

asyncdiff_code asyncdiff_get(asyncdiff_channel* channel, int receiver, int slot, void* stream) {
  return guarded([&] { of(channel).get(receiver, slot, as_stream(stream)); });
}

asyncdiff_code asyncdiff_slot(asyncdiff_channel* channel, int receiver, int slot, size_t tensor,
                              void** data, size_t* nbytes) {
  return guarded([&] {
    Channel& from = of(channel);
    const Layout& layout = from.layout();
    if (tensor >= layout.specs.size()) {
      throw InvalidArgument("tensor " + std::to_string(tensor) + ": the bundle has " +
                            std::to_string(layout.specs.size()) + ", from 0");
    }
    given(data, "where the address goes") = from.slot(receiver, slot).data + layout.offsets[tensor];
    if (nbytes != nullptr) *nbytes = layout.specs[tensor].nbytes;
  });
}

asyncdiff_code asyncdiff_release(asyncdiff_channel* channel, int receiver, int slot, void* stream) {
  return guarded([&] { of(channel).release(receiver, slot, as_stream(stream)); });
}
