"""What is kept for one operation: residuals that stand for a tensor, and masks that map a gradient."""
