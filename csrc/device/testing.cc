#include <string>

#include "device/context.h"
#include "device/driver.h"
#include "device/pinned.h"
#include "device/process_driver.h"
#include "device/staging.h"

#ifdef WEIGHTLIFT_TESTING

namespace weightlift::device {

void use_driver_for_testing(const std::string& path) {
  wait_for_releases();
  StagingPool::instance().clear();
  forget_devices();
  replace_process_driver(path);
}

}  // namespace weightlift::device

#endif
