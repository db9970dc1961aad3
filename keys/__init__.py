"""API keys: what they look like, where they are kept, and what is remembered of them."""
