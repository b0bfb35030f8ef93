"""Random numbers: every operation that draws is seen in one place, and drawn again for each copy."""
