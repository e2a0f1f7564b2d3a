"""Conditional batch normalisation for visual question answering (de Vries et al., NIPS 2017).

Legend of the shape letters in this package: B images (one question each), T words, V known words, E embedding,
D question embedding, C channels, H and W map size, G glimpses, A answers, S image side, L conditioned norms.
"""

__version__ = "0.1.0"
