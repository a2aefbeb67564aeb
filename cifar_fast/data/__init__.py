"""Images and labels as tensors: find a data set or download it, check it, decode it once, or draw a synthetic one."""
