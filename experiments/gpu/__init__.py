"""`gpu-check`: correctness, speed and the first experiments on a GPU."""
