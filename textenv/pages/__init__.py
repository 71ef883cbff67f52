"""What the package's pages and pictures have in common."""
