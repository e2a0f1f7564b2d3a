"""What each task beside answering questions about whole images adds to the library."""
