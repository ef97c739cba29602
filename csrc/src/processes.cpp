#include "asyncdiff/processes.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"

namespace asyncdiff {

namespace {

// What agree() sends begins with one of these.
const std::string kDescribed = "=";
const std::string kFailed = "!";

// Each text after its length: texts may hold anything.
std::string to_bytes(const Processes::Values& values) {
  std::string out;
  for (const auto& [what, value] : values) {
    for (const std::string* text : {&what, &value}) {
      out += std::to_string(text->size()) + ":" + *text;
    }
  }
  return out;
}

// As many as can be read.
Processes::Values from_bytes(const std::string& bytes) {
  std::vector<std::string> texts;
  for (std::size_t at = 0; at < bytes.size();) {
    const std::size_t colon = bytes.find(':', at);
    if (colon == std::string::npos) break;
    const std::size_t size = std::strtoul(bytes.c_str() + at, nullptr, 10);
    texts.push_back(bytes.substr(colon + 1, size));
    at = colon + 1 + texts.back().size();
  }
  Processes::Values out;
  for (std::size_t i = 0; i + 1 < texts.size(); i += 2) out.emplace_back(texts[i], texts[i + 1]);
  return out;
}

// "; slots is 2 here, 3 in process 1"; empty where all are the same.
std::string difference(const Processes::Values& mine, const Processes::Values& theirs,
                       const std::string& where) {
  for (std::size_t i = 0; i < std::max(mine.size(), theirs.size()); ++i) {
    if (i < mine.size() && i < theirs.size() && mine[i] == theirs[i]) continue;
    const auto value_of = [](const Processes::Values& values, const std::string& what) {
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

}  // namespace

Processes::Processes(int ranks) : owners_(static_cast<std::size_t>(ranks), 0) {}

Processes::Processes(std::vector<int> owners, std::shared_ptr<Rendezvous> rendezvous)
    : owners_(std::move(owners)), rendezvous_(std::move(rendezvous)) {
  if (process() < 0 || process() >= count()) {
    throw InvalidArgument("the rendezvous calls this process " + std::to_string(process()) +
                          " of " + std::to_string(count()));
  }
  for (int owner : owners_) {
    if (owner < 0 || owner >= count()) {
      throw InvalidArgument("owners names process " + std::to_string(owner) +
                            ", but the rendezvous has processes 0 to " +
                            std::to_string(count() - 1));
    }
  }
}

void Processes::check_mine(int rank) const {
  if (!mine(rank)) {
    throw InvalidArgument("rank " + std::to_string(rank) + " belongs to process " +
                          std::to_string(owner(rank)) + ", this is process " +
                          std::to_string(process()));
  }
}

std::vector<std::string> Processes::all_gather(const std::string& mine) const {
  if (!rendezvous_) return {mine};
  return rendezvous_->all_gather(mine);
}

Processes::Failure Processes::failure_of(const std::function<void()>& work) {
  const auto named = [](const std::string& text) { return text.empty() ? "unknown error" : text; };
  try {
    work();
    return {};
  } catch (const std::exception& error) {
    return {named(error.what()), std::current_exception()};
  } catch (...) {
    return {named(""), std::current_exception()};
  }
}

void Processes::throw_any(const std::string& what, const Failure& mine,
                          const std::vector<std::string>& all) const {
  if (mine.error) std::rethrow_exception(mine.error);
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (!all[i].empty()) {
      throw Error("process " + std::to_string(i) + " could not " + what + ": " + all[i]);
    }
  }
}

void Processes::together(const std::string& what, const std::function<void()>& work) const {
  if (!several()) return work();
  const Failure mine = failure_of(work);
  throw_any(what, mine, all_gather(mine.text));
}

void Processes::agree(const std::string& what, const std::function<Values()>& describe) const {
  if (!several()) {
    describe();
    return;
  }
  Values mine;
  const Failure failure = failure_of([&] { mine = describe(); });
  const auto all = all_gather(failure.error ? kFailed + failure.text : kDescribed + to_bytes(mine));
  std::vector<std::string> failures;
  for (const std::string& bytes : all) {
    failures.push_back(bytes.compare(0, 1, kFailed) == 0 ? bytes.substr(1) : "");
  }
  throw_any(what, failure, failures);
  std::string differences;
  for (int p = 0; p < count(); ++p) {
    if (p == process()) continue;
    const std::string& bytes = all[static_cast<std::size_t>(p)];
    const std::string theirs = "in process " + std::to_string(p);
    differences += bytes.compare(0, 1, kDescribed) == 0
                       ? difference(mine, from_bytes(bytes.substr(1)), theirs)
                       : "; something else was called " + theirs;
  }
  if (differences.empty()) return;
  throw InvalidArgument("processes differ in a call that all have to make alike (" + what + "): " +
                        differences.substr(2) + ". This is process " + std::to_string(process()) +
                        ": all processes make the same fabrics and channels, in the same order");
}

}  // namespace asyncdiff
