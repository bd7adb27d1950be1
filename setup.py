"""The compiled accelerator; pyproject.toml has everything else."""

from setuptools import Extension, setup

# optional: without a C compiler handlefs works all the same, slower.
setup(ext_modules=[Extension("handlefs._native", ["handlefs/_native.c"], optional=True)])
