# Headers from PyPI (build requirements in pyproject.toml), found through the interpreter of the
# build, so that a plain virtual environment is enough.

function(weightlift_python_path expression result)
  execute_process(COMMAND ${Python_EXECUTABLE} -c "${expression}" OUTPUT_VARIABLE output
                  ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(${result} "${output}" PARENT_SCOPE)
endfunction()

# nlohmann/json.hpp. The package is not imported, because an import needs its dependencies, which an
# offline machine may lack.
weightlift_python_path(
  "import importlib.util as u; print(u.find_spec('nlohmann_json').submodule_search_locations[0])"
  json_hint)
find_path(WEIGHTLIFT_JSON_INCLUDE nlohmann/json.hpp HINTS ${json_hint}/include)
if(NOT WEIGHTLIFT_JSON_INCLUDE)
  message(FATAL_ERROR "nlohmann/json.hpp not found: pip install nlohmann-json")
endif()
add_library(weightlift_json INTERFACE)
target_include_directories(weightlift_json SYSTEM INTERFACE ${WEIGHTLIFT_JSON_INCLUDE})

# cuda.h and cudaTypedefs.h, of which only prototypes are used.
weightlift_python_path(
  "import glob, nvidia; print(*(f for p in nvidia.__path__ for f in glob.glob(p + '/cu13/include')), sep=';')"
  cuda_hint)
find_path(WEIGHTLIFT_CUDA_INCLUDE cuda.h
          HINTS ${cuda_hint} /usr/local/cuda/include ENV CUDA_HOME PATH_SUFFIXES include)
if(NOT WEIGHTLIFT_CUDA_INCLUDE)
  message(FATAL_ERROR "cuda.h not found: pip install nvidia-cuda-runtime==13.0.96")
endif()
file(STRINGS ${WEIGHTLIFT_CUDA_INCLUDE}/cuda.h cuda_version REGEX "^#define CUDA_VERSION ")
string(REGEX REPLACE "[^0-9]" "" cuda_version "${cuda_version}")
if(cuda_version LESS 13000)
  message(FATAL_ERROR "${WEIGHTLIFT_CUDA_INCLUDE}/cuda.h is for CUDA ${cuda_version}; 13.0 or newer "
                      "is needed: pip install nvidia-cuda-runtime==13.0.96")
endif()
# Only these two are copied: the toolkit's folder has thousands of headers that must not be
# included.
file(COPY ${WEIGHTLIFT_CUDA_INCLUDE}/cuda.h ${WEIGHTLIFT_CUDA_INCLUDE}/cudaTypedefs.h
     DESTINATION ${CMAKE_BINARY_DIR}/cuda_header)
add_library(weightlift_cuda_header INTERFACE)
target_include_directories(weightlift_cuda_header SYSTEM INTERFACE ${CMAKE_BINARY_DIR}/cuda_header)

# The ptxas of CUDA 12.9, whose machine code drivers of the 12 series can load. Release wheels are
# built with it (`pip install nvidia-cuda-nvcc-cu12`).
weightlift_python_path(
  "import glob, nvidia; print(*(f for p in nvidia.__path__ for f in glob.glob(p + '/cuda_nvcc/bin/ptxas')))"
  ptxas_hint)
if(NOT WEIGHTLIFT_PTXAS)  # not cached: it may be installed after the first configuration
  set(WEIGHTLIFT_PTXAS "${ptxas_hint}")
endif()
