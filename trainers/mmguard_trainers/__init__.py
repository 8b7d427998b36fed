"""Train the weights that mmguard's guards and examples load."""
