// For device/testing.cc alone: which library driver() opens.
#pragma once

#include <string>

namespace weightlift::device {

// Forgets the loaded driver; the next driver() opens `library` ("" for the system's).
void replace_process_driver(const std::string& library);

}  // namespace weightlift::device
