// The rendezvous of asyncdiff over any store that has set() and a get() that waits.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/rendezvous.hpp"

template <typename Store>
class StoreRendezvous final : public asyncdiff::Rendezvous {
 public:
  // `prefix`: of all keys. Another one for each fabric, and for each time that the processes are
  // started over a store that lives on: its old keys would be read again.
  StoreRendezvous(Store& store, std::string prefix, int process, int processes)
      : store_(store), prefix_(std::move(prefix)), process_(process), processes_(processes) {}

  int process() const override { return process_; }
  int processes() const override { return processes_; }

  std::vector<std::string> all_gather(const std::string& mine) override try {
    const std::string round = prefix_ + "/" + std::to_string(round_++) + "/";
    store_.set(round + std::to_string(process_), mine);
    std::vector<std::string> all;
    for (int p = 0; p < processes_; ++p) all.push_back(store_.get(round + std::to_string(p)));
    return all;
  } catch (const std::runtime_error& error) {
    throw asyncdiff::Error(std::string("meeting over the store: ") + error.what());
  }

 private:
  Store& store_;
  std::string prefix_;
  int process_;
  int processes_;
  int round_ = 0;
};
