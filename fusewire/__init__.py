"""fusewire: ext4 served from user space over the raw FUSE protocol."""

__version__ = "0.1.0"
