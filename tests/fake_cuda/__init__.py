"""A GPU that is not there. Whoever imports this package loads the guard for it, before PyTorch."""

import ctypes
import os
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = Path(find_spec("torch").submodule_search_locations[0]) / "lib"
GUARD = os.environ["FAKE_CUDA_GUARD"]  # guard.cpp, compiled
for library in (LIBRARIES / "libc10.so", LIBRARIES / "libtorch_cpu.so", GUARD):
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
