"""What a trained backbone is worth on other data."""
