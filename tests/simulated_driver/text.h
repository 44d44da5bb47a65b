// "{}" and "{:#x}" of std::format, which the oldest supported compiler lacks.
#pragma once

#include <ios>
#include <sstream>
#include <string>
#include <string_view>

namespace weightlift::simulated {

template <class... Values>
[[nodiscard]] std::string text(std::string_view pattern, const Values&... values) {
  std::ostringstream out;
  const auto put = [&](const auto& value) {
    const std::size_t open = pattern.find('{');
    const std::size_t close = pattern.find('}');
    const bool hex = close - open > 1;
    out << pattern.substr(0, open) << (hex ? std::hex : std::dec) << (hex ? "0x" : "") << value;
    pattern.remove_prefix(close + 1);
  };
  (put(values), ...);
  out << pattern;
  return out.str();
}

}  // namespace weightlift::simulated
