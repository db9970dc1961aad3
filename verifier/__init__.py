"""Whether anybody changed the log: recomputed from the events up, with no code of those who write it."""
