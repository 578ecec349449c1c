"""What other trainers load from this library."""
