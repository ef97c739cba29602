// A program's locale in which numbers look as in much of Europe: 1.234,5.
#pragma once

#include <clocale>
#include <locale>
#include <string>

class Commas final : public std::numpunct<char> {
  char do_decimal_point() const override { return ','; }
  char do_thousands_sep() const override { return '.'; }
  std::string do_grouping() const override { return "\3"; }
};

// For C++ streams everywhere; for C functions where the machine has such a locale.
inline void use_commas() {
  std::locale::global(std::locale(std::locale::classic(), new Commas));
  for (const char* name : {"de_DE.UTF-8", "de_DE", "fr_FR.UTF-8"}) {
    if (std::setlocale(LC_NUMERIC, name) != nullptr) return;
  }
}
