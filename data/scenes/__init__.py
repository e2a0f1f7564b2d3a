"""Synthetic scenes and questions about them."""
