"""Settings: every key, its type and default, and the recipes that set them."""
