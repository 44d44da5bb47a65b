// Only for device/testing.cc: sets the library that driver() opens.
#pragma once

#include <string>

namespace weightlift::device {

// Drops the loaded driver. The next driver() opens `library`, or the default one for "".
void replace_process_driver(const std::string& library);

}  // namespace weightlift::device
