"""The protocol of VTAB-1k: learning rates chosen on validation images, then tests with several seeds."""
