"""The report of runs as one HTML file: reading them, drawing them, laying them out."""
