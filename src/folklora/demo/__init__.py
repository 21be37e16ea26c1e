"""The embedded example: a small made-up world, a small model that has read about it, five tasks."""
