"""What the service does in the background: partitions, retention under legal holds, redaction, old keys."""
