"""Foreign snapshot files, read into a `Snapshot` and written from one."""
