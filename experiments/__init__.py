"""What runs a cell: configuration, weights, data, the training engine, stages, tracking."""

import os

# where the package `kernels` is installed, transformers would fetch program code of the hub for some layers
os.environ.setdefault("USE_HUB_KERNELS", "NO")
