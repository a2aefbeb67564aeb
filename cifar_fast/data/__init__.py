"""Images and labels as tensors: found, downloaded, checked, decoded once, or drawn."""
