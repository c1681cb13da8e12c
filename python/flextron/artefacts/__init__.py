"""What the directory of an elastic checkpoint holds: files in, files out, apart from what makes them."""
