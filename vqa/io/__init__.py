"""Small tools: errors, files, images, locks, signals and worker processes, progress. Imports no torch."""
