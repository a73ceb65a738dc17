"""The NEON kernels under an emulator against the scalar ones; wants a cross compiler and QEMU's user mode.

apt-get install g++-aarch64-linux-gnu qemu-user-static
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CORE = ROOT / "hf_hyper" / "csrc"
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no aarch64-linux-gnu-g++")
@pytest.mark.skipif(EMULATOR is None, reason="no qemu-aarch64-static")
def test_neon_agrees_with_scalar(tmp_path: Path) -> None:
    assert COMPILER is not None
    assert EMULATOR is not None
    sources = [path for path in sorted(CORE.glob("*.cpp")) if "avx" not in path.name]
    program = tmp_path / "compare_isas"
    flags = ["-std=c++17", "-O1", "-static", "-pthread", "-ffp-contract=off", "-DHYPER_ARM64=1", f"-I{CORE}"]
    comparison = Path(__file__).with_name("compare_isas.cpp")
    subprocess.run([COMPILER, *flags, "-o", program, comparison, *sources], check=True, timeout=1800)
    finished = subprocess.run([EMULATOR, program, "neon"], capture_output=True, text=True, timeout=1800, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout == "0 differences\n"
