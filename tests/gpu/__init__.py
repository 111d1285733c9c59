"""Tests that need a GPU. What CUDA reads when it starts is set here, before any of them asks for it."""

import os

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # as many queues as ranks have streams
os.environ.setdefault(
    "CUDA_MODULE_LOADING", "EAGER"
)  # a kernel that is loaded late may wait for those that wait for it
