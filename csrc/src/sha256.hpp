// SHA-256 (FIPS 180-4) and HMAC (RFC 2104), by which processes prove that they know a secret.
#pragma once

#include <cstddef>
#include <string>

namespace asyncdiff {

constexpr std::size_t kDigestBytes = 32;

std::string sha256(const std::string& text);
std::string hmac_sha256(const std::string& key, const std::string& text);
// Takes as long wherever they differ.
bool same_secret(const std::string& a, const std::string& b);

}  // namespace asyncdiff
