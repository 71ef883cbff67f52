"""Commands that have models answer."""
