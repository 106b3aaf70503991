// A stand-in for NVIDIA's driver library with one device, whose kernels are emulated: cuda.core runs on it as it is.
// What a call must give is given; every other call of the driver's answers "success" and nothing else.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

extern "C" int emulate(const char* name, unsigned grid_x, unsigned grid_y, unsigned block_size, unsigned shared,
                       void** parameters);

namespace {

// As the CUDA driver's interface lays it out.
struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

enum Result { success = 0, invalid_value = 1, invalid_image = 200, invalid_context = 201, unknown = 999 };

void* const context = reinterpret_cast<void*>(1);
void* const library = reinterpret_cast<void*>(2);
std::vector<std::string> names;
thread_local void* current;
void* last_stream;

int device_count(int* count) { return *count = 1, success; }
int device_get(int* device, int ordinal) { return *device = ordinal, ordinal == 0 ? success : invalid_value; }
int driver_version(int* version) { return *version = 13000, success; }
int context_get(void** out) { return *out = current, success; }
int context_set(void* wanted) { return current = wanted, success; }
int context_retain(void** out, int) { return *out = context, success; }
int error_text(int, const char** text) { return *text = "the stand-in refuses", success; }

int library_load(void** out, const void* code, void*, void*, unsigned, void*, void*, unsigned) {
  const bool refuses = std::getenv("STAND_IN_REFUSES") != nullptr;
  if (refuses || std::memcmp(code,
                             "\x7f"
                             "ELF",
                             4) != 0)
    return invalid_image;
  return *out = library, success;
}

int library_kernel(void** out, void* from, const char* name) {
  if (from != library) return invalid_value;
  names.push_back(name);
  return *out = reinterpret_cast<void*>(names.size()), success;
}

int launch(const LaunchConfig* config, void* kernel, void** parameters, void**) {
  if (current != context) return invalid_context;
  if (config->grid_z != 1 || config->block_y != 1 || config->block_z != 1) return invalid_value;
  last_stream = config->stream;
  const std::string& name = names[reinterpret_cast<std::uintptr_t>(kernel) - 1];
  const int failed = emulate(name.c_str(), config->grid_x, config->grid_y, config->block_x, config->shared, parameters);
  return failed ? unknown : success;
}

int nothing() { return success; }

const std::map<std::string, void*> functions = {
    {"cuDeviceGetCount", reinterpret_cast<void*>(device_count)},
    {"cuDeviceGet", reinterpret_cast<void*>(device_get)},
    {"cuDriverGetVersion", reinterpret_cast<void*>(driver_version)},
    {"cuCtxGetCurrent", reinterpret_cast<void*>(context_get)},
    {"cuCtxSetCurrent", reinterpret_cast<void*>(context_set)},
    {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(context_retain)},
    {"cuGetErrorName", reinterpret_cast<void*>(error_text)},
    {"cuGetErrorString", reinterpret_cast<void*>(error_text)},
    {"cuLibraryLoadData", reinterpret_cast<void*>(library_load)},
    {"cuLibraryGetKernel", reinterpret_cast<void*>(library_kernel)},
    {"cuLaunchKernelEx", reinterpret_cast<void*>(launch)},
};

}  // namespace

extern "C" {

int cuGetProcAddress_v2(const char* name, void** out, int, std::uint64_t, int* found) {
  const auto known = functions.find(name);
  *out = known == functions.end() ? reinterpret_cast<void*>(nothing) : known->second;
  if (found != nullptr) *found = 0;
  return success;
}

int cuGetProcAddress(const char* name, void** out, int version, std::uint64_t flags) {
  return cuGetProcAddress_v2(name, out, version, flags, nullptr);
}

// For the test: the stream of the latest launch.
void* stand_in_last_stream() { return last_stream; }
}
