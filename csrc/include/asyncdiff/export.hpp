// What is visible outside the libraries; all else is hidden. Of classes that are thrown the
// typeinfo must be, or a program that catches them across a shared library sees std::exception.
#pragma once

#define ASYNCDIFF_EXPORT __attribute__((visibility("default")))
