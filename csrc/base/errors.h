// Errors of torch in torch's own words.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>
#include <string>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace mapsurgery {

// What torch said when it failed last in this thread; null where it keeps no words: before 2.13 it only writes them to
// the error stream.
inline const char* words_of_torch() {
#if !defined(_WIN32)
  using Words = const char* (*)();
  static const auto words = reinterpret_cast<Words>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  if (words != nullptr) return words();
#endif
  return nullptr;
}

// The error of a call of torch's C shim, whose headers tell no more than which call it was.
inline std::string in_words_of_torch(const std::string& text) {
  if (text.find(" API call failed at ") == std::string::npos) return text;
  if (const char* words = words_of_torch()) return words;
  return "mapsurgery: a call of torch failed; torch has written why to the error stream (" + text + ")";
}

template <auto kernel, class Type = decltype(kernel)>
struct InWordsOfTorch;

// The kernel of an operator, whose errors read as plain torch's do.
template <auto kernel, class Result, class... Arguments>
struct InWordsOfTorch<kernel, Result (*)(Arguments...)> {
  static Result call(Arguments... arguments) {
    try {
      return kernel(arguments...);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(in_words_of_torch(error.what()));
    }
  }
};

}  // namespace mapsurgery
