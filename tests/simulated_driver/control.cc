// The sim_* functions; simulator.cc does the work.
#include <string>

#include "simulated_driver.h"
#include "simulator.h"

using weightlift::simulated::Device;
using weightlift::simulated::Fault;
using weightlift::simulated::Simulator;

namespace {

Simulator& sim() {
  return Simulator::instance();
}

constexpr char kImage[] = "simulated image: weightlift_scatter";

}  // namespace

extern "C" {

void sim_reset(int devices, uint64_t seed, int policy) {
  const auto lock = sim().lock();
  sim().reset(devices, seed, policy);
}

void sim_set_policy(uint64_t seed, int policy) {
  const auto lock = sim().lock();
  sim().set_policy(seed, policy);
}

uint64_t sim_alloc(int device, uint64_t bytes) {
  const auto lock = sim().lock();
  return sim().external_alloc(device, bytes);
}

int sim_free(uint64_t address) {
  const auto lock = sim().lock();
  return sim().external_free(address) ? 1 : 0;
}

int sim_free_on(int device, uint64_t stream, uint64_t address) {
  const auto lock = sim().lock();
  return sim().external_free_on(device, stream, address) ? 1 : 0;
}

void sim_hold_context(int device) {
  const auto lock = sim().lock();
  sim().hold_context(device);
}

uint64_t sim_stream_create(int device) {
  const auto lock = sim().lock();
  return sim().external_stream(device);
}

int sim_stream_destroy(uint64_t stream) {
  const auto lock = sim().lock();
  return sim().destroy_external_stream(stream) ? 1 : 0;
}

void sim_synchronize(int device) {
  auto lock = sim().lock();
  sim().synchronize_device(device, lock);
}

int sim_pending_write(int device, uint64_t stream, uint64_t address, uint64_t bytes) {
  const auto lock = sim().lock();
  return sim().pending_write(device, stream, address, bytes) ? 1 : 0;
}

int sim_read_device(uint64_t address, void* target, uint64_t bytes) {
  const auto lock = sim().lock();
  return sim().host_access(address, target, nullptr, bytes) ? 1 : 0;
}

int sim_write_device(uint64_t address, const void* source, uint64_t bytes) {
  const auto lock = sim().lock();
  return sim().host_access(address, nullptr, source, bytes) ? 1 : 0;
}

int sim_read_on(int device, uint64_t stream, uint64_t address, void* target, uint64_t bytes) {
  auto lock = sim().lock();
  return sim().read_on(device, stream, address, target, bytes, lock) ? 1 : 0;
}

void sim_set_memory(int device, uint64_t bytes) {
  const auto lock = sim().lock();
  if (Device* is = sim().device(device)) is->memory.resize(bytes);
}

void sim_set_attribute(int device, int attribute, int value) {
  const auto lock = sim().lock();
  if (Device* is = sim().device(device)) is->attributes[attribute] = value;
}

void sim_set_version(int version) {
  const auto lock = sim().lock();
  sim().set_version(version);
}

void sim_hide_symbol(const char* name, int how) {
  const auto lock = sim().lock();
  sim().hide_symbol(name, how);
}

void sim_fail_call(const char* name, uint64_t n, int code, int sticky) {
  const auto lock = sim().lock();
  if (n == 0) return;
  sim().add_fault(Fault{name != nullptr ? name : "", n, static_cast<CUresult>(code), sticky != 0});
}

uint64_t sim_faults_left(void) {
  const auto lock = sim().lock();
  return sim().faults_left();
}

void sim_exit(void) {
  const auto lock = sim().lock();
  sim().exit();
}

void sim_set_time(int mode) {
  const auto lock = sim().lock();
  sim().set_time(mode);
}

double sim_now(void) {
  const auto lock = sim().lock();
  return sim().now();
}

void sim_set_link(int device, double bytes_per_second) {
  const auto lock = sim().lock();
  if (Device* is = sim().device(device)) is->link = bytes_per_second;
}

void sim_set_host_memory(double bytes_per_second) {
  const auto lock = sim().lock();
  sim().set_host_memory(bytes_per_second);
}

void sim_set_costs(double queueing_seconds, double waking_seconds) {
  const auto lock = sim().lock();
  sim().set_costs(queueing_seconds, waking_seconds);
}

int sim_hold(double seconds) {
  const auto lock = sim().lock();
  return sim().hold(seconds) ? 1 : 0;
}

void sim_link(int device, SimLink* link) {
  const auto lock = sim().lock();
  *link = SimLink{};
  if (const Device* is = sim().device(device)) *link = is->traffic;
}

int sim_begin_capture(int device, std::uint64_t stream, int mode) {
  const auto lock = sim().lock();
  return sim().begin_capture(device, stream, mode) ? 1 : 0;
}

int sim_end_capture(int device, std::uint64_t stream) {
  const auto lock = sim().lock();
  return sim().end_capture(device, stream) ? 1 : 0;
}

void sim_allow(int blocking_streams, int spinning_events) {
  const auto lock = sim().lock();
  sim().allow(blocking_streams != 0, spinning_events != 0);
}

void sim_set_hashing(int on) {
  const auto lock = sim().lock();
  sim().set_hashing(on != 0);
}

void sim_ledger(SimLedger* ledger) {
  const auto lock = sim().lock();
  sim().ledger(*ledger);
}

uint64_t sim_calls(const char* name) {
  const auto lock = sim().lock();
  return sim().calls(name);
}

void sim_drain(void) {
  const auto lock = sim().lock();
  sim().drain();
}

uint64_t sim_violations(void) {
  const auto lock = sim().lock();
  return sim().violation_count();
}

const char* sim_violation_text(uint64_t index) {
  const auto lock = sim().lock();
  const auto& texts = sim().violations();
  return index < texts.size() ? texts[index].c_str() : nullptr;
}

const void* sim_image(void) {
  return kImage;
}

}  // extern "C"
