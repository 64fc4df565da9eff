"""ext4 as a library: parses and maps, does no I/O, knows nothing of FUSE."""
