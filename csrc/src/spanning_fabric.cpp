#include "spanning_fabric.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "agreement.hpp"
#include "asyncdiff/errors.hpp"

namespace asyncdiff {

namespace {

constexpr unsigned kLookMicroseconds = 20000;

// Whom an error is about; -1 unknown.
int rank_of(const Error& error) {
  if (const auto* e = dynamic_cast<const ExchangeTimeout*>(&error)) return e->incident.rank;
  if (const auto* e = dynamic_cast<const SlotOrderError*>(&error)) return e->incident.rank;
  if (const auto* e = dynamic_cast<const Aborted*>(&error)) return e->rank;
  return -1;
}

}  // namespace

SpanningFabric::SpanningFabric(std::shared_ptr<Fabric> here, std::shared_ptr<Network> network,
                               Processes processes, bool watched)
    : Fabric(here->ranks(), here->deadline()),
      here_(std::move(here)),
      network_(std::move(network)),
      processes_(std::move(processes)),
      resets_(std::make_shared<ResetCount>(0)) {
  network_->on_failure([this](int rank, const std::string& reason) {
    failed_ = true;
    here_->abort(rank, reason);
  });
  if (watched) watch_ = new std::thread([this] { watch(); });
}

SpanningFabric::~SpanningFabric() {
  end_watch();
  if (!processes_.forked()) network_->on_failure({});
}

void SpanningFabric::end_watch() {
  if (watch_ == nullptr || processes_.forked()) return;  // a forked child has no such thread
  stop_ = true;
  watch_->join();
  delete watch_;
  watch_ = nullptr;
}

// What fails on this host, or in another process, ends all waits on the network; and here, so that
// other hosts are told.
void SpanningFabric::watch() {
  while (!stop_) {
    usleep(kLookMicroseconds);
    if (failed_) continue;
    try {
      here_->check();
    } catch (const Error& error) {
      if (failed_.exchange(true)) continue;
      network_->abort(rank_of(error), error.what());
      here_->abort(rank_of(error), error.what());
    }
  }
}

std::map<std::pair<int, int>, std::string> SpanningFabric::links() const {
  auto out = here_->links();
  for (int a = 0; a < ranks(); ++a) {
    for (int b = 0; b < ranks(); ++b) {
      if (processes_.host(a) != processes_.host(b)) out[{a, b}] = network_->name();
    }
  }
  return out;
}

std::map<std::pair<int, int>, std::string> SpanningFabric::link_reasons() const {
  auto out = here_->link_reasons();
  for (int a = 0; a < ranks(); ++a) {
    for (int b = 0; b < ranks(); ++b) {
      if (processes_.host(a) == processes_.host(b)) continue;
      out[{a, b}] =
          "ranks " + std::to_string(a) + " and " + std::to_string(b) + " are on different hosts";
    }
  }
  return out;
}

std::shared_ptr<Channel> SpanningFabric::channel(int sender, const std::vector<int>& receivers,
                                                 const Layout& layout, int slots,
                                                 const std::string& label, Mode mode) {
  check_endpoints(sender, receivers, slots);
  if (closed_) throw Error("the fabric is closed");
  std::vector<int> near, far;
  for (int rank : receivers) {
    (processes_.host(rank) == processes_.host(sender) ? near : far).push_back(rank);
  }
  if (far.empty()) return here_->channel(sender, receivers, layout, slots, label, mode);
  const std::string name = label.empty() ? channel_name(sender, receivers) : label;
  const Party ends = ends_of(sender, receivers);
  SpanningChannel::Parts parts;
  if (ends.here()) {
    agree_on_channel(ends, sender, receivers, layout, slots, name, mode);
    // In this order everywhere, so that any two processes make what they share in the same one:
    // the next parts also where one has failed, which those that have no end of it do not know.
    ends.together("make a channel between hosts", [&] {
      std::exception_ptr failure;
      const auto try_to = [&failure](const auto& make) {
        try {
          make();
        } catch (...) {
          if (!failure) failure = std::current_exception();
        }
      };
      if (!near.empty() && ends_of(sender, near).here()) {
        try_to([&] { parts.local = here_->channel(sender, near, layout, slots, name, mode); });
      }
      for (int rank : far) {
        const Party pair = ends_of(sender, {rank});
        if (!pair.here()) continue;
        try_to([&] {
          parts.remote.push_back(network_->channel(sender, rank, layout, slots, name, pair));
        });
      }
      if (failure) std::rethrow_exception(failure);
    });
  }
  return std::make_shared<SpanningChannel>(resets_, processes_, std::move(parts), kind() != "host",
                                           name, sender, receivers, layout, slots);
}

bool SpanningFabric::made(const Channel& channel) const {
  const auto* spanning = dynamic_cast<const SpanningChannel*>(&channel);
  return spanning != nullptr ? spanning->of(resets_) : here_->made(channel);
}

void SpanningFabric::put_batch(const std::vector<Put>& puts, Stream stream) {
  check_batch(puts);
  if (kind() == "host") {
    for (const Put& put : puts) put.channel->put(put.tensors, put.slot, stream);
    return;
  }
  std::vector<Put> near, far;
  for (const Put& put : puts) {
    const auto* spanning = dynamic_cast<const SpanningChannel*>(put.channel.get());
    if (spanning == nullptr) {
      near.push_back(put);
      continue;
    }
    spanning->check_sender(put.slot);
    const SpanningChannel::Parts& parts = spanning->parts();
    if (parts.local) near.push_back({parts.local, put.tensors, put.slot});
    for (const auto& part : parts.remote) far.push_back({part, put.tensors, put.slot});
  }
  here_->put_batch(near, stream);
  for (const Put& put : far) put.channel->put(put.tensors, put.slot, stream);
}

void SpanningFabric::abort(int rank, const std::string& reason) {
  here_->abort(rank, reason);
  network_->abort(rank, reason);
}

void SpanningFabric::check() {
  // Where one has failed, the other was aborted: what comes of that is not the reason.
  try {
    network_->check();
  } catch (const Aborted&) {
    here_->check();
    throw;
  }
  here_->check();
}

void SpanningFabric::reset(std::uint64_t first_bundle) {
  agree_on_reset(processes_, first_bundle, [&] {
    if (closed_) throw Error("the fabric is closed");
    if (!network_->recovers()) check();
  });
  network_->reset(first_bundle);
  here_->reset(first_bundle);  // in the end of which all have done both
  ++*resets_;
  failed_ = false;
}

void SpanningFabric::close() {
  if (closed_.exchange(true)) return;
  end_watch();
  std::exception_ptr failure;
  try {
    network_->close();
  } catch (...) {
    failure = std::current_exception();
  }
  here_->close();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace asyncdiff
