"""Kernels need Triton, which is there on Linux alone."""

import pytest

pytest.importorskip("triton")
