"""Build script for cffi: writes fusewire/_uapi.py, the parsed form of the declarations in uapi_text.py.

setup.py names it in `cffi_modules`. It runs where fusewire may not be importable, so it puts its own checkout first.
"""

import os
import sys

from cffi import FFI

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

sys.path.insert(0, _ROOT)
try:
    from fusewire.uapi_text import TEXT
finally:
    sys.path.remove(_ROOT)

ffi = FFI()
ffi.cdef(TEXT)
ffi.set_source("fusewire._uapi", None)  # None: a pure Python module, no compiler

if __name__ == "__main__":
    ffi.emit_python_code(os.path.join(_ROOT, "fusewire", "_uapi.py"))
