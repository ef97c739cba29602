// DLPack's C structures, as far as they are read here: version 1, whose layout is fixed.
// Source: https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <cstdint>

namespace asyncdiff::bindings::dlpack {

constexpr std::uint32_t kMajorVersion = 1;

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };
enum TypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Tensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t ndim;
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null: row-major (before 1.2), or no dimensions
  std::uint64_t byte_offset;
};

// What a library's array type offers as type.__dlpack_c_exchange_api__, a capsule of this name.
constexpr const char* kCapsule = "dlpack_exchange_api";

struct ExchangeTable {
  std::uint32_t major;
  std::uint32_t minor;
  ExchangeTable* older;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  // Fills a view that is valid while the object is not touched; -1 with a Python exception set
  // where there is none. May be null.
  int (*view)(void* object, Tensor* out);
  void* current_stream;
};

}  // namespace asyncdiff::bindings::dlpack
