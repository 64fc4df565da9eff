"""Request in, reply out: the only place that knows both the FUSE protocol and ext4."""
