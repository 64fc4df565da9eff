"""What pyproject.toml cannot say: the modules that cffi makes at installation."""

import os
import runpy

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

UAPI = "fusewire/uapi_build.py"
"""Makes fusewire/_uapi.py: the FUSE declarations, parsed. Pure Python."""

ACCELERATOR = "fusewire/accel_build.py"
"""Makes fusewire/_accel: hot loops in C. Everything works without it, so a machine without compiler installs too."""


class BuildOptional(build_ext):
    """Builds the C extensions and goes on, with a warning, where one fails."""

    def finalize_options(self) -> None:
        """Mark every extension as one that may fail: cffi, which makes them from `cffi_modules`, cannot."""
        for extension in self.distribution.ext_modules or []:
            extension.optional = True
        super().finalize_options()


class BuildInPlaceToo(build_py):
    """In an editable installation the generated module belongs into the checkout, where cffi puts it
    only if there happens to be a C extension as well."""

    def run(self) -> None:
        """Copy the modules; for an editable installation write the generated one beside its source."""
        super().run()
        if getattr(self, "editable_mode", False):
            runpy.run_path(UAPI, run_name="__main__")


MODULES = [f"{script}:ffi" for script in (UAPI, ACCELERATOR) if os.path.exists(script)]

setup(cffi_modules=MODULES, cmdclass={"build_ext": BuildOptional, "build_py": BuildInPlaceToo})
