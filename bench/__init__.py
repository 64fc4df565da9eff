"""Workloads on kernel ext4, fuse2fs and fusewire side by side; ``python -m bench`` runs them (README.md)."""
