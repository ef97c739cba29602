#include "asyncdiff/processes.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "assembly.hpp"
#include "asyncdiff/errors.hpp"

namespace asyncdiff {

namespace {

// What agree() sends begins with one of the first two; what Processes::all_gather() sends with the
// last, so that neither is taken for the other.
const std::string kDescribed = "=";
const std::string kFailed = "!";
const std::string kGathered = ">";

// What a step of a call may take, once all have come.
constexpr double kWorkSeconds = 60;

bool begins(const std::string& bytes, const std::string& with) {
  return bytes.compare(0, with.size(), with) == 0;
}

// Each text after its length: texts may hold anything.
std::string to_bytes(const Party::Values& values) {
  std::string out;
  for (const auto& [what, value] : values) {
    for (const std::string* text : {&what, &value}) {
      out += std::to_string(text->size()) + ":" + *text;
    }
  }
  return out;
}

// As many as can be read.
Party::Values from_bytes(const std::string& bytes) {
  std::vector<std::string> texts;
  for (std::size_t at = 0; at < bytes.size();) {
    const std::size_t colon = bytes.find(':', at);
    if (colon == std::string::npos) break;
    const std::size_t size = std::strtoul(bytes.c_str() + at, nullptr, 10);
    texts.push_back(bytes.substr(colon + 1, size));
    at = colon + 1 + texts.back().size();
  }
  Party::Values out;
  for (std::size_t i = 0; i + 1 < texts.size(); i += 2) out.emplace_back(texts[i], texts[i + 1]);
  return out;
}

// "; slots is 2 here, 3 in process 1"; empty where all are the same.
std::string difference(const Party::Values& mine, const Party::Values& theirs,
                       const std::string& where) {
  for (std::size_t i = 0; i < std::max(mine.size(), theirs.size()); ++i) {
    if (i < mine.size() && i < theirs.size() && mine[i] == theirs[i]) continue;
    const auto value_of = [](const Party::Values& values, const std::string& what) {
      for (const auto& [known, value] : values) {
        if (known == what) return value;
      }
      return std::string("missing");
    };
    const std::string& what = i < mine.size() ? mine[i].first : theirs[i].first;
    return "; " + what + " is " + value_of(mine, what) + " here, " + value_of(theirs, what) + " " +
           where;
  }
  return "";
}

std::vector<int> checked(std::vector<int> owners, const Rendezvous& rendezvous) {
  const int count = rendezvous.processes();
  if (rendezvous.process() < 0 || rendezvous.process() >= count) {
    throw InvalidArgument("the rendezvous calls this process " +
                          std::to_string(rendezvous.process()) + " of " + std::to_string(count));
  }
  for (int owner : owners) {
    if (owner < 0 || owner >= count) {
      throw InvalidArgument("owners names process " + std::to_string(owner) +
                            ", but the rendezvous has processes 0 to " + std::to_string(count - 1));
    }
  }
  return owners;
}

std::vector<int> from_zero(int count) {
  std::vector<int> out(static_cast<std::size_t>(count));
  std::iota(out.begin(), out.end(), 0);
  return out;
}

}  // namespace

bool Party::here() const {
  return std::find(members_.begin(), members_.end(), process_) != members_.end();
}

std::vector<std::string> Party::all_gather(const std::string& mine, const std::string& what,
                                           double seconds) const {
  if (!assembly_) return {mine};
  return assembly_->exchange(members_, mine, what, seconds);
}

double Party::work_seconds() const {
  return assembly_ ? std::max(assembly_->deadline(), kWorkSeconds) : 0;
}

std::vector<std::string> Party::all_gather(const std::string& mine) const {
  return all_gather(mine, "go on", work_seconds());
}

Party::Failure Party::failure_of(const std::function<void()>& work) const {
  const auto named = [](const std::string& text) { return text.empty() ? "unknown error" : text; };
  Failure out;
  try {
    work();
    return {};
  } catch (const std::exception& error) {
    out = {named(error.what()), std::current_exception()};
  } catch (...) {
    out = {named(""), std::current_exception()};
  }
  // Not left to the next call: what all have sent by then is taken, whoever has ended meanwhile.
  assembly_->check_ended(members_);
  return out;
}

void Party::throw_any(const std::string& what, const Failure& mine,
                      const std::vector<std::string>& all) const {
  if (mine.error) std::rethrow_exception(mine.error);
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (!all[i].empty()) {
      throw Error("process " + std::to_string(i) + " could not " + what + ": " + all[i]);
    }
  }
}

void Party::together(const std::string& what, const std::function<void()>& work) const {
  if (!several()) return work();
  const Failure mine = failure_of(work);
  throw_any(what, mine, all_gather(mine.text, what, work_seconds()));
}

void Party::agree(const std::string& what, const std::function<Values()>& describe) const {
  if (!several()) {
    describe();
    return;
  }
  Values mine;
  const Failure failure = failure_of([&] { mine = describe(); });
  const auto all = all_gather(failure.error ? kFailed + failure.text : kDescribed + to_bytes(mine),
                              what, assembly_->deadline());
  std::vector<std::string> failures;
  for (const std::string& bytes : all) {
    failures.push_back(begins(bytes, kFailed) ? bytes.substr(1) : "");
  }
  throw_any(what, failure, failures);
  std::string differences;
  for (int p : members_) {
    if (p == process_) continue;
    const std::string& bytes = all[static_cast<std::size_t>(p)];
    const std::string theirs = "in process " + std::to_string(p);
    differences += begins(bytes, kDescribed) ? difference(mine, from_bytes(bytes.substr(1)), theirs)
                                             : "; something else was called " + theirs;
  }
  if (differences.empty()) return;
  throw InvalidArgument("processes differ in a call that they have to make alike (" + what + "): " +
                        differences.substr(2) + ". This is process " + std::to_string(process_) +
                        ": any two processes make the calls that they share in the same order");
}

Processes::Processes(int ranks)
    : owners_(static_cast<std::size_t>(ranks), 0),
      everybody_(nullptr, {0}, 0),
      neighbours_(everybody_) {}

Processes::Processes(std::vector<int> owners, std::shared_ptr<Rendezvous> rendezvous,
                     double deadline)
    : process_(rendezvous->process()),
      count_(rendezvous->processes()),
      owners_(checked(std::move(owners), *rendezvous)),
      assembly_(std::make_shared<Assembly>(*rendezvous, owners_, deadline)),
      everybody_(assembly_, from_zero(count_), process_),
      neighbours_(everybody_) {
  neighbours_.members_.clear();
  for (int p = 0; p < count_; ++p) {
    hosts_ = std::max(hosts_, assembly_->host(p) + 1);
    if (assembly_->host(p) == assembly_->host(process_)) neighbours_.members_.push_back(p);
  }
}

int Processes::host_of(int process) const { return assembly_ ? assembly_->host(process) : 0; }

void Processes::check_mine(int rank) const {
  if (!mine(rank)) {
    throw InvalidArgument("rank " + std::to_string(rank) + " belongs to process " +
                          std::to_string(owner(rank)) + ", this is process " +
                          std::to_string(process()));
  }
  if (assembly_) assembly_->check_own();
}

Party Processes::party_of(const std::vector<int>& ranks) const {
  std::set<int> members;
  for (int rank : ranks) members.insert(owner(rank));
  return {assembly_, {members.begin(), members.end()}, process_};
}

std::vector<std::string> Processes::all_gather(const std::string& mine, double seconds) const {
  if (!assembly_) return {mine};
  auto all = assembly_->exchange(everybody_.members(), kGathered + mine, "gather", seconds);
  for (std::size_t p = 0; p < all.size(); ++p) {
    if (!begins(all[p], kGathered)) {
      throw InvalidArgument("process " + std::to_string(p) + " makes another call, process " +
                            std::to_string(process_) +
                            " gathers: any two processes make the calls that they share in the "
                            "same order");
    }
    all[p].erase(0, 1);
  }
  return all;
}

void Processes::heartbeat(const std::string& doing) const {
  if (assembly_) assembly_->heartbeat(doing);
}

void Processes::tell_other_hosts(const std::string& text) const {
  if (assembly_) assembly_->tell(text);
}

void Processes::on_told(std::function<void(const std::string&)> heard) const {
  if (assembly_) assembly_->on_told(std::move(heard));
}

void Processes::all_listen() const {
  if (hosts_ == 1) return;
  try {
    everybody_.barrier();
  } catch (...) {
    on_end({});
    on_told({});
    throw;
  }
}

void Processes::on_end(std::function<void()> wake) const {
  if (assembly_) assembly_->on_end(std::move(wake));
}

bool Processes::over() const { return assembly_ && assembly_->over(); }

void Processes::check() const {
  if (assembly_) assembly_->check();
}

bool Processes::left(int rank) const { return assembly_ && assembly_->left(owner(rank)); }

void Processes::lost_because_left(int rank) const { assembly_->lost_because_left(owner(rank)); }

void Processes::lost(int process, const std::string& why) const {
  if (assembly_) assembly_->lost(process, why);
}

void Processes::leave() const {
  if (assembly_) assembly_->leave();
}

bool Processes::forked() const { return assembly_ && !assembly_->own(); }

}  // namespace asyncdiff
