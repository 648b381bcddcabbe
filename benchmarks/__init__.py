"""Numbers that the project claims, measured by whoever wants to see them."""
