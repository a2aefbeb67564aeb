"""What the notebooks show: figures, widgets, exercises, scales."""
