"""How noisy the gradient is, and which rows and bits keep it within its bound."""
