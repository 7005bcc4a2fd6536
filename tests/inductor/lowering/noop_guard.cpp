// A CPU build of torch has no guard for CUDA devices, without which slicing a fake CUDA tensor raises.
// This registers the one that does nothing, unless there is one.
#include <c10/core/impl/DeviceGuardImplInterface.h>

extern "C" int install_noop_cuda_guard() {
  if (c10::impl::hasDeviceGuardImpl(c10::DeviceType::CUDA)) return 0;
  static c10::impl::DeviceGuardImplRegistrar registrar(
      c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
  return 1;
}
