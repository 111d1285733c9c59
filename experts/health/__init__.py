"""Whether the GPUs under a worker are well: read from NVML at the edge, judged by pure functions.

`nvml` reads, `reading` is what it reads, `verdict` judges two readings, `watch` does both now and then for one process,
`topology` says which GPUs are neighbours and plans by it, `wire` puts all of it into messages. NVML is the library of
NVIDIA's driver (docs.nvidia.com/deploy/nvml-api); its Python binding, nvidia-ml-py, is imported only where a GPU is
watched. Nothing here imports torch.
"""
