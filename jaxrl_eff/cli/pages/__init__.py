"""Pages that commands draw: HTML and SVG."""
