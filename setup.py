"""Compiles the training step for each instruction set; pyproject.toml has everything else.

Without a C++ compiler the package is installed all the same, and torch takes the steps.
"""

import platform

from setuptools import Extension, setup

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
IS_ARM = platform.machine().lower() in ("arm64", "aarch64")
FLAGS = {"neon": []} if IS_ARM else {"avx512": AVX512, "avx2": ["-mavx2", "-mfma"]}
# Products and sums are fused. Roots and choices set no error number and raise no trap, so that they are vectorised.
# Nothing else of -ffast-math: NaN and infinity stay what they are.
COMMON = ["-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]

setup(
    script_name="setup.py",  # so that it is no module of the package, whose root is this folder
    ext_modules=[
        Extension(
            f"probsurgery.pipeline.training._kernel_{name}",  # a plain shared library, opened by training/kernel.py
            ["pipeline/training/kernel.cpp"],
            language="c++",
            extra_compile_args=[*COMMON, *flags],
            optional=True,
            py_limited_api=True,  # it uses nothing of Python's
        )
        for name, flags in FLAGS.items()
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
