// Every environment variable that the library reads.
#pragma once

#include <string>

namespace asyncdiff::env {

// ASYNCDIFF_DEADLINE: seconds that a wait may last where the caller does not say. Default 10.
double deadline();

// ASYNCDIFF_TRANSPORT: auto, peer or staged, where the caller does not say. Default auto.
std::string transport();

}  // namespace asyncdiff::env
