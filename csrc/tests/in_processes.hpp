// Processes of a rendezvous, played by threads.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/rendezvous.hpp"

namespace asyncdiff {

class Meeting {
 public:
  explicit Meeting(int count) : texts_(static_cast<std::size_t>(count)) {}

  std::vector<std::string> gather(int process, const std::string& text) {
    std::unique_lock lock(mutex_);
    texts_[static_cast<std::size_t>(process)] = text;
    const int round = round_;
    if (++there_ == static_cast<int>(texts_.size())) {
      last_ = texts_;
      there_ = 0;
      ++round_;
      came_.notify_all();
    } else if (!came_.wait_for(lock, std::chrono::seconds(2), [&] { return round_ != round; })) {
      throw Error("somebody did not come");
    }
    return last_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable came_;
  std::vector<std::string> texts_, last_;
  int there_ = 0;
  int round_ = 0;
};

class Guest final : public Rendezvous {
 public:
  Guest(std::shared_ptr<Meeting> meeting, int process, int count)
      : meeting_(std::move(meeting)), process_(process), count_(count) {}
  int process() const override { return process_; }
  int processes() const override { return count_; }
  std::vector<std::string> all_gather(const std::string& mine) override {
    return meeting_->gather(process_, mine);
  }

 private:
  std::shared_ptr<Meeting> meeting_;
  int process_;
  int count_;
};

// What work(process, rendezvous) threw in each of them; empty where nothing.
inline std::vector<std::string> in_processes(
    int count, const std::function<void(int, std::shared_ptr<Rendezvous>)>& work) {
  const auto meeting = std::make_shared<Meeting>(count);
  std::vector<std::string> thrown(static_cast<std::size_t>(count));
  std::vector<std::thread> threads;
  for (int p = 0; p < count; ++p) {
    threads.emplace_back([&, p] {
      try {
        work(p, std::make_shared<Guest>(meeting, p, count));
      } catch (const std::exception& error) {
        thrown[static_cast<std::size_t>(p)] = error.what();
      } catch (int) {
        thrown[static_cast<std::size_t>(p)] = "an int";
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return thrown;
}

inline bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace asyncdiff
