"""What begins and ends compressed passes on an unmodified model, and sees every operation between."""
