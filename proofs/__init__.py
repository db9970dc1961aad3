"""What proves the log to somebody outside: checkpoints, tiles, paths, and the cosignatures of witnesses."""
