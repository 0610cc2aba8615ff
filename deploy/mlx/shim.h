// Included before everything else when mlx-c is compiled, and when bindings are made from its headers.
// It takes the place of mlx/c/half.h, which names the 16-bit floats on ARM alone.
#ifndef EXO_MLX_SHIM_H
#define EXO_MLX_SHIM_H

#define MLX_HALF_H
#define HAS_FLOAT16
#define HAS_BFLOAT16

#ifdef __cplusplus

#include <version>
#include "mlx/types/half_types.h"
using mlx::core::bfloat16_t;
using mlx::core::float16_t;

#ifdef __cpp_lib_format
#include <format>
#else
// Compilers before gcc 13 lack std::format. mlx-c uses it for error messages with plain `{}` alone.
#include <sstream>
#include <string>
#include <string_view>
namespace std {
inline void exo_format_rest(ostringstream& out, string_view pattern) {
  out << pattern;
}
template <typename First, typename... Rest>
void exo_format_rest(
    ostringstream& out,
    string_view pattern,
    const First& first,
    const Rest&... rest) {
  auto hole = pattern.find("{}");
  if (hole == string_view::npos) {
    out << pattern;
    return;
  }
  out << pattern.substr(0, hole) << first;
  exo_format_rest(out, pattern.substr(hole + 2), rest...);
}
template <typename... Args>
string format(string_view pattern, const Args&... args) {
  ostringstream out;
  exo_format_rest(out, pattern, args...);
  return out.str();
}
} // namespace std
#endif // __cpp_lib_format

#else // C, as the bindings generator reads it; the Rust types are given there.

typedef unsigned short float16_t;
typedef unsigned short bfloat16_t;

#endif // __cplusplus
#endif // EXO_MLX_SHIM_H
