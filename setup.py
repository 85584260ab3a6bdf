"""Compiles the training step (pipeline/training/kernel.cpp) for each instruction set; everything else: pyproject.toml.

Without a C++ compiler the package is installed all the same, and torch trains.
"""

import platform

from setuptools import Extension, setup

SETS = {"avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]}
SETS |= {"avx2": ["-mavx2", "-mfma"]}
if platform.machine().lower() in ("arm64", "aarch64"):
    SETS = {"neon": []}

setup(
    ext_modules=[
        Extension(
            f"probsurgery.pipeline.training._kernel_{name}",  # a plain shared library, which ctypes opens
            ["pipeline/training/kernel.cpp"],
            language="c++",
            # A multiplication and an addition become one instruction; no error number and no trap, so that roots and
            # choices are vectorised. Nothing else of -ffast-math: NaN and infinity stay what they are.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-ffp-contract=fast",
                "-fno-math-errno",
                "-fno-trapping-math",
                *flags,
            ],
            optional=True,
            py_limited_api=True,  # it uses nothing of Python's: one wheel serves all versions
        )
        for name, flags in SETS.items()
    ]
)
