"""What Dibit borrows from torch and Python beyond their documentation; it knows nothing of compression."""
