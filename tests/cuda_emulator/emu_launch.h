// emu_launch.h - a launch, and how its arguments are bound. Launches are run by emu_runtime.cpp.
#pragma once
#include <functional>
#include <utility>
#include "emu_core.h"

namespace emu {

struct Launch {
  dim3 grid, block;
  size_t dyn;
  std::function<void()> body;
};

// setting: bit 0 cp.async done at issue (else at wait); the rest the schedule's order. streams null: one block at a
// time. Otherwise streams[i] is launch i's stream: all blocks of the launch at the head of every stream run together
// (ranks with flags between them), and a stream's next launch follows when the last has ended.
void run_all(std::vector<Launch>& launches, int setting, const int* streams);

// kinds: one character an argument as the caller packed it: p pointer, i 4-byte and l 8-byte integer, f 4-byte float.
template <class T>
constexpr char kind_of() {
  if (std::is_pointer_v<T>) return 'p';
  if (std::is_floating_point_v<T>) return sizeof(T) == 4 ? 'f' : '?';
  return std::is_integral_v<T> ? (sizeof(T) == 4 ? 'i' : sizeof(T) == 8 ? 'l' : '?') : '?';
}
template <class... A, size_t... I>
inline void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_cv_t<std::remove_reference_t<A>>*>(args[I])...);
}
template <class... A>
inline std::function<void()> bind(void (*kernel)(A...), void** args, const char* kinds) {
  const char wanted[] = {kind_of<std::remove_cv_t<A>>()..., 0};
  if (std::strcmp(kinds, wanted))
    throw std::runtime_error(std::string("the kernel takes arguments ") + wanted + ", got " + kinds);
  return [=] { call(kernel, args, std::index_sequence_for<A...>{}); };
}

}  // namespace emu
