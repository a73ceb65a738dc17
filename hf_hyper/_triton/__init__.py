"""GPU kernels in Triton: typed launchers over tensors that lie on one device.

Triton comes with torch on CUDA and ROCm machines and is imported by the first launch, never before. Launchers allocate
by shape alone and never wait for the device, so they can be captured into a CUDA graph. Block sizes follow from shapes
by rules beside each kernel, not from timing at run time. With `TRITON_INTERPRET=1` all of them run on the CPU.
"""

from hf_hyper._triton.library import (
    copied_apart,
    explicit_byte_sums,
    multiprocessors,
    obstacle,
    on_device,
    say_if_absent,
)

__all__ = ["copied_apart", "explicit_byte_sums", "multiprocessors", "obstacle", "on_device", "say_if_absent"]
