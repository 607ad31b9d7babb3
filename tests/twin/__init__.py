"""The twin harness: any program, run plain and compressed from the same weights and draws, has the same outcome."""
