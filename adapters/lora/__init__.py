"""y += (x A^T) B per row, each row with its own adapter. See README.md for the equation and the layout."""
