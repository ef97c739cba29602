// A program that catches what a shared library throws, by type: both mean the same type
// information. Some C++ libraries (libc++) compare its address.
#include <typeinfo>

#include "asyncdiff/errors.hpp"
#include "check.hpp"

const std::type_info* thrown_type();
void wait_in_vain();

int main() {
  bool caught = false;
  try {
    wait_in_vain();
  } catch (const asyncdiff::ExchangeTimeout& error) {
    caught = &typeid(error) == &typeid(asyncdiff::ExchangeTimeout);
  }
  CHECK(caught);
  CHECK(thrown_type() == &typeid(asyncdiff::ExchangeTimeout));
}
