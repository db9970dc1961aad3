"""From a body to a committed event: parsing, the flush, and the writer that groups what arrives."""
