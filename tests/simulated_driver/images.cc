#include "images.h"

#include <elf.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string_view>
#include <utility>

namespace weightlift::simulated {
namespace {

constexpr unsigned kCudaMachine = 190;  // EM_CUDA
constexpr int kBlackwell = 100;

struct Code {
  int architecture = 0;
  unsigned abi = 0;
};

// Version 7 of the ABI, of all toolkits before 12.8, has the architecture in the lowest byte of the
// flags, version 8 in the next. (Seen in what ptxas 12.9.86 and 13.0.88 make.)
Code describe(const Elf64_Ehdr& header) {
  const unsigned abi = header.e_ident[EI_ABIVERSION];
  const unsigned flags = header.e_flags;
  return {static_cast<int>((abi < 8 ? flags : flags >> 8) & 0xff), abi};
}

// Machine code runs within its major version, on the same or a newer compute capability ("Binary
// Compatibility", CUDA C++ Programming Guide). A 12.x driver knows version 8 of the ABI only for
// Blackwell, from 12.8 on. CUDA 13 uses it for all architectures, and sm_110 had another number
// before.
CUresult check_code(const Code& code, int driver, int capability) {
  if (code.abi > 8 || code.architecture == 0) return CUDA_ERROR_INVALID_IMAGE;
  if (driver < 13000 && code.abi == 8) {
    if (driver < 12080 || code.architecture < kBlackwell) return CUDA_ERROR_INVALID_IMAGE;
    if (code.architecture == 110) return CUDA_ERROR_INVALID_IMAGE;
  }
  const bool runs = code.architecture / 10 == capability / 10 && code.architecture <= capability;
  return runs ? CUDA_SUCCESS : CUDA_ERROR_NO_BINARY_FOR_GPU;
}

// PTX ISA, "Release Notes": the version that came with each CUDA.
int newest_ptx(int driver) {
  constexpr std::array<std::pair<int, int>, 11> kVersions = {{{13000, 90},
                                                              {12090, 88},
                                                              {12080, 87},
                                                              {12070, 86},
                                                              {12050, 85},
                                                              {12040, 84},
                                                              {12030, 83},
                                                              {12020, 82},
                                                              {12010, 81},
                                                              {12000, 80},
                                                              {0, 78}}};
  for (const auto& [cuda, ptx] : kVersions) {
    if (driver >= cuda) return ptx;
  }
  return 0;
}

CUresult check_ptx(std::string_view text, int driver, int capability) {
  const auto number = [text](const char* directive, const char* format, int& major, int& minor) {
    const std::size_t at = text.find(directive);
    return at != std::string_view::npos ? std::sscanf(text.data() + at, format, &major, &minor) : 0;
  };
  int major = 0;
  int minor = 0;
  int target = 0;
  if (number("\n.version", "\n.version %d.%d", major, minor) != 2) return CUDA_ERROR_INVALID_PTX;
  if (10 * major + minor > newest_ptx(driver)) return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
  if (number("\n.target", "\n.target sm_%d", target, minor) != 1) return CUDA_ERROR_INVALID_PTX;
  return target <= capability ? CUDA_SUCCESS : CUDA_ERROR_NO_BINARY_FOR_GPU;
}

}  // namespace

CUresult check_image(const void* image, int driver, int capability) {
  const auto* const start = static_cast<const char*>(image);
  constexpr std::string_view kSimulated = "simulated";
  if (std::strncmp(start, kSimulated.data(), kSimulated.size()) == 0) return CUDA_SUCCESS;
  if (std::memcmp(start, ELFMAG, SELFMAG) == 0) {
    Elf64_Ehdr header;
    std::memcpy(&header, image, sizeof header);
    if (header.e_machine != kCudaMachine) return CUDA_ERROR_INVALID_IMAGE;
    return check_code(describe(header), driver, capability);
  }
  if (std::strncmp(start, "//", 2) == 0) return check_ptx(start, driver, capability);
  return CUDA_ERROR_INVALID_IMAGE;
}

}  // namespace weightlift::simulated
